"""A training run from its recipe to its result."""

import dataclasses
import importlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import TrainingArguments, set_seed
from transformers.integrations import get_reporting_integration_callbacks, unset_hf_deepspeed_config
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from ..chat import check_model_folder
from ..files import replace_file
from ..modeling_mgllava import MGLlavaForConditionalGeneration, MGLlavaModel
from ..processing_mgllava import MGLlavaProcessor
from .arguments import training_arguments
from .assemble import assemble_model
from .collate import Collator
from .encode import Encoder
from .errors import UNWRITABLE, CheckpointError, DataError, RecipeError
from .features import FeatureStore, fingerprint_towers
from .neck import NECK_FILE, load_neck, save_neck
from .recipe import DataRecipe, Recipe, RunSettings, check_same_run, recipe_from_dict
from .records import LlavaRecords, PythonRecords, RecordSource
from .result import write_model
from .samples import TrainingSamples
from .sampling import TrainingOrder
from .stages import add_adapters, choose_learners, keep_learners_in_float32
from .trainer import MGLlavaTrainer

__all__ = ["build_trainer", "check_output", "check_trackers", "keep_recipe", "open_source", "train"]

logger = logging.get_logger(__name__)

RECIPE_FILE = "recipe.json"
PARTS_FILE = "parts.json"
RECORDS_FILE = "records.safetensors"
MODEL_FOLDER = "model"
TEXT_AND_IMAGE_TOKENS = 2048  # of the original; its text limit leaves the image tokens out


def train(recipe: Recipe) -> Path:
    """Run a recipe, or go on where an interrupted run of it stopped.

    Launched by `accelerate launch` or `torchrun`, every process calls it. The loss is the mean over the learned
    tokens of the global batch (the original: of each process's share of it), so neither order nor result depend on
    how many processes share it, up to rounding.

    Args:
        recipe: what to run.

    Returns:
        The result: `neck.safetensors` of a stage 1, else a folder that `from_pretrained` loads; adapters are merged
        into it, and lie in the last checkpoint as well.

    Raises:
        RecipeError, DataError: before any training, if recipe or data cannot be used; DataError also in training,
            if more pictures turn out to be damaged than the recipe allows.
        CheckpointError: a checkpoint cannot be read or written; what was written before is intact.
    """
    trainer = build_trainer(recipe)
    output = Path(recipe.output)
    last = get_last_checkpoint(output)
    if last is not None:
        logger.warning(f"going on from {last}")
    trainer.train(resume_from_checkpoint=last)
    return _write_result(trainer, recipe)


def build_trainer(recipe: Recipe) -> MGLlavaTrainer:
    """Everything that is ready before the first step: model, data and trainer, all of it checked.

    Raises:
        RecipeError, DataError, CheckpointError: as `train`.
    """
    output = Path(recipe.output)
    check_output(recipe, output)
    if recipe.neck is not None and not Path(recipe.neck).exists():
        raise RecipeError(f"neck is {recipe.neck}, which does not exist; stage 1 writes {NECK_FILE}")
    check_trackers(recipe)
    sources = [open_source(source) for source in recipe.data]
    arguments = training_arguments(
        recipe,
        gradient_checkpointing=recipe.gradient_checkpointing,
        num_train_epochs=recipe.epochs,
        include_num_input_tokens_seen="non_padding",
    )
    # One process of all nodes, which share the disk, as they do for checkpoints.
    with arguments.main_process_first(local=False, desc="putting the model together"), _unsharded(arguments):
        _assemble_if_missing(recipe)
    processor = MGLlavaProcessor.from_pretrained(recipe.model)
    text_limit = recipe.text_limit or TEXT_AND_IMAGE_TOKENS - processor.num_image_tokens
    with arguments.main_process_first(local=False, desc="checking the records"):
        samples = TrainingSamples(
            sources,
            Encoder(processor, text_limit, recipe.show, with_features=recipe.features is not None),
            max_bad_share=recipe.max_bad_share,
            workers=recipe.workers,
            cache=output / RECORDS_FILE,
            begun=output.is_dir() and get_last_checkpoint(output) is not None,
            progress=arguments.process_index == 0,
        )
    if arguments.process_index == 0:
        for line in samples.report.lines():
            logger.warning(line)
        keep_recipe(recipe, output)
    set_seed(recipe.seed)  # of adapters
    model = _load_model(recipe, bool(arguments.deepspeed_plugin))
    tokenizer = processor.tokenizer
    padding = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    trainer = MGLlavaTrainer(
        model=model,
        args=arguments,
        train_dataset=samples,
        data_collator=Collator(next(token for token in padding if token is not None)),
        order=TrainingOrder(
            samples.lengths, recipe.global_batch, grouped=recipe.stage == 2, seed=recipe.seed
        ),
        keep_checkpoints=recipe.keep_checkpoints,
        saves_model=recipe.stage == 2,
        saves_neck=recipe.stage == 1 or recipe.lora is not None,
        muon_learning_rate=recipe.muon_learning_rate,
    )
    _reduce_in_float32(trainer)
    if recipe.features is not None:
        _store_features(recipe.features, trainer, processor)
    return trainer


def open_source(source: DataRecipe) -> RecordSource:
    """The records a recipe names.

    Raises:
        RecipeError: `dataset` names nothing that can be imported or called with these arguments.
        DataError: as `LlavaRecords`.
    """
    if source.records is not None:
        return LlavaRecords(source.records, source.pictures, source.boxes)
    module, _, name = source.dataset.partition(":")
    try:
        build = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise RecipeError(f"data.dataset is {source.dataset}, which cannot be imported: {error}") from error
    try:
        dataset = build(**source.arguments)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"data.dataset {source.dataset} refuses {source.arguments}: {error}") from error
    if not len(dataset):
        raise DataError(f"data.dataset {source.dataset} with {source.arguments} is empty")
    return PythonRecords(dataset, f"{source.dataset} {sorted(source.arguments.items())}")


def check_output(recipe: RunSettings, output: Path) -> None:
    """Raise RecipeError unless a run can begin or go on in `output`."""
    if output.exists() and not output.is_dir():
        raise RecipeError(f"output is {output}, which is a file; expected a folder")
    if (before := output / RECIPE_FILE).is_file():
        check_same_run(recipe_from_dict(json.loads(before.read_text())), recipe, output)
    elif output.is_dir() and any(output.glob("checkpoint-*")):
        raise RecipeError(
            f"output is {output}, which holds checkpoints of something else; choose another folder"
        )


def keep_recipe(recipe: RunSettings, output: Path) -> None:
    """Write down what the run in `output` is, for `check_output`."""
    with replace_file(output / RECIPE_FILE) as scratch:
        scratch.write_text(json.dumps(recipe.to_dict(), indent=2) + "\n")


def check_trackers(recipe: RunSettings) -> None:
    """Raise RecipeError if an experiment tracker cannot be used."""
    for tracker in recipe.report_to:
        try:
            for callback in get_reporting_integration_callbacks([tracker]):
                callback()
        except (ImportError, RuntimeError, ValueError) as error:
            raise RecipeError(
                f"report_to is {recipe.report_to}; {tracker} cannot be used: {error}"
            ) from error


@contextmanager
def _unsharded(arguments: TrainingArguments) -> Iterator[None]:
    """Models are built whole, though ZeRO-3 is set up, which would share each weight with processes that wait."""
    plugin = arguments.deepspeed_plugin
    if plugin is None:
        yield
        return
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        plugin.set_deepspeed_weakref()


def _assemble_if_missing(recipe: Recipe) -> None:
    if recipe.parts is None:
        check_model_folder(recipe.model)
        return
    folder = Path(recipe.model)
    facts = {"parts": dataclasses.asdict(recipe.parts), "seed": recipe.seed}
    if not folder.exists():
        assemble_model(recipe.parts, folder, recipe.seed)
        with replace_file(folder / PARTS_FILE) as scratch:
            scratch.write_text(json.dumps(facts, indent=2) + "\n")
    elif (folder / PARTS_FILE).is_file() and (
        before := json.loads((folder / PARTS_FILE).read_text())
    ) != facts:
        raise RecipeError(
            f"model is {folder}, which was put together of {before}; the recipe says {facts}; choose another folder"
        )


def _load_model(recipe: Recipe, with_deepspeed: bool) -> torch.nn.Module:
    options: Mapping[str, Any] = {}
    if recipe.attn_implementation is not None:
        options = {"attn_implementation": {"text_config": recipe.attn_implementation}}
    dtype = getattr(torch, recipe.precision)
    model = MGLlavaForConditionalGeneration.from_pretrained(recipe.model, dtype=dtype, **options)
    if recipe.neck is not None:
        load_neck(model, recipe.neck)
    choose_learners(model, recipe.stage)
    if recipe.lora is not None:
        model = add_adapters(model, recipe.lora)
    if not with_deepspeed:  # which keeps float32 copies of its own
        keep_learners_in_float32(model)
    return model


def _store_features(folder: str, trainer: MGLlavaTrainer, processor: MGLlavaProcessor) -> None:
    """Let the towers run once, in the first process; from then on all read what they made."""
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        raise RecipeError(f"features is {folder}; sharded models cannot run their towers ahead of training")
    model = next(module for module in trainer.model.modules() if isinstance(module, MGLlavaModel))
    towers = fingerprint_towers(model, processor.image_processor)
    samples = trainer.train_dataset
    with trainer.args.main_process_first(local=False, desc="features of pictures"):
        store = FeatureStore(folder, towers)
        if trainer.args.process_index == 0:
            samples.store_features(store, model, progress=True)
    samples.read_features(store)


def _reduce_in_float32(trainer: MGLlavaTrainer) -> None:
    """Under FSDP2 accelerate would sum gradients, and round the loss, in bfloat16."""
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None) if trainer.is_fsdp_enabled else None
    policy = getattr(plugin, "mixed_precision_policy", None)
    if policy is not None and plugin.fsdp_version == 2:
        plugin.mixed_precision_policy = dataclasses.replace(
            policy, reduce_dtype=torch.float32, output_dtype=None
        )


def _write_result(trainer: MGLlavaTrainer, recipe: Recipe) -> Path:
    """Make the result of the last checkpoint, in one process."""
    output = Path(recipe.output)
    result = output / (NECK_FILE if recipe.stage == 1 else MODEL_FOLDER)
    if trainer.args.should_save:
        last = Path(get_last_checkpoint(output))
        try:
            if recipe.stage == 1:
                save_neck(load_file(last / NECK_FILE), result)
            else:
                with _unsharded(trainer.args):
                    write_model(recipe, last, result)
        except UNWRITABLE as error:
            raise CheckpointError(
                f"{result} cannot be written: {error}; {last} is intact, and the same command tries again"
            ) from error
    trainer.accelerator.wait_for_everyone()
    return result
