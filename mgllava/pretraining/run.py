"""A run of stage 0, from its recipe to the parts it makes."""

import json
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_model
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import CLIPVisionConfig, LlamaConfig, PreTrainedTokenizerFast, set_seed
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from ..chat_templates import load_chat_template
from ..configuration_mgllava import MGLlavaHighResConfig
from ..conversion.tokenizer import add_placeholders
from ..files import replace_file
from ..image_processing_mgllava import MGLlavaImageProcessor
from ..modeling_mgllava import IGNORE_INDEX
from ..processing_mgllava import MGLlavaProcessor
from ..scenes import WORDS
from ..training.arguments import training_arguments
from ..training.encode import Encoder
from ..training.errors import UNWRITABLE, CheckpointError, RecipeError
from ..training.run import check_output, check_trackers, keep_recipe
from ..training.sampling import TrainingOrder
from ..training.trainer import MGLlavaTrainer
from .language import LanguagePretraining, SymbolCollator, SymbolicScenes
from .parts import write_high_res_tower, write_language_model, write_vision_tower
from .recipe import PretrainingRecipe
from .tokenizer import build_tokenizer
from .towers import RegionScenes, TowerPretraining, collate_regions, region_accuracy

__all__ = ["TEMPLATE", "pretrain"]

logger = logging.get_logger(__name__)

TEMPLATE = "vicuna"
REPORT_FILE = "report.json"
WEIGHTS = "model.safetensors"
VALIDATION_SCENES = 1000
TEXT_LIMIT = 1024


def pretrain(recipe: PretrainingRecipe) -> Path:
    """Run a recipe of stage 0, or go on where an interrupted run of it stopped.

    Args:
        recipe: what to run.

    Returns:
        The folder with the result: `vision_tower` and `high_res_tower`, or `language_model`; beside it
        `report.json`, how well they do on validation scenes.

    Raises:
        RecipeError: the recipe cannot be used.
        CheckpointError: a checkpoint cannot be read or written; what was written before is intact.
    """
    output = Path(recipe.output)
    check_output(recipe, output)
    check_trackers(recipe)
    set_seed(recipe.seed)
    task = _Towers(recipe) if recipe.part == "towers" else _LanguageModel(recipe)
    if recipe.start is not None:
        _begin_with(task.model, Path(recipe.start))
    arguments = training_arguments(recipe)
    samples = task.samples("train", recipe.max_steps * recipe.global_batch, recipe.first)
    if arguments.process_index == 0:
        keep_recipe(recipe, output)
    trainer = MGLlavaTrainer(
        model=task.model,
        args=arguments,
        train_dataset=samples,
        data_collator=task.collate,
        order=TrainingOrder([1] * len(samples), recipe.global_batch, grouped=False, seed=recipe.seed),
        keep_checkpoints=recipe.keep_checkpoints,
        saves_model=True,
        saves_neck=False,
        muon_learning_rate=recipe.muon_learning_rate,
    )
    last = get_last_checkpoint(output)
    if last is not None:
        logger.warning(f"going on from {last}")
    trainer.train(resume_from_checkpoint=last)
    if arguments.should_save:
        load_model(task.model, Path(get_last_checkpoint(output)) / WEIGHTS)
        try:
            task.write(output)
        except UNWRITABLE as error:
            raise CheckpointError(
                f"{output} cannot be written: {error}; the last checkpoint is intact, and the same command goes on"
            ) from error
        loader = DataLoader(
            task.samples("validation", VALIDATION_SCENES, 0),
            batch_size=recipe.per_device_batch,
            collate_fn=task.collate,
            num_workers=recipe.workers,
        )
        with replace_file(output / REPORT_FILE) as scratch:
            scratch.write_text(json.dumps(task.measure(loader), indent=2) + "\n")
    trainer.accelerator.wait_for_everyone()
    return output


class _Towers:
    def __init__(self, recipe: PretrainingRecipe) -> None:
        vision = _config(CLIPVisionConfig, recipe.vision, "vision")
        self.grid = vision.image_size // vision.patch_size
        if not timm.is_model(recipe.architecture):
            raise RecipeError(f"architecture is {recipe.architecture}; timm knows no such model")
        stages = timm.create_model(recipe.architecture, pretrained=False).feature_info
        stride = stages[-1]["reduction"]
        high_res = MGLlavaHighResConfig(
            architecture=recipe.architecture,
            stage_widths=[stage["num_chs"] for stage in stages],
            stride=stride,
            image_size=stride * self.grid,
            # timm's small ones have convolutions of one pixel, which are slower on a CPU and no matrices to Muon.
            model_kwargs={"conv_mlp": False},
        )
        self.image_processor = MGLlavaImageProcessor(high_res.image_size, vision.image_size)
        self.model = TowerPretraining(vision, high_res)
        self.collate = collate_regions

    def samples(self, split: str, count: int, first: int) -> Dataset:
        return RegionScenes(split, count, self.image_processor, self.grid, first)

    def write(self, output: Path) -> None:
        write_vision_tower(self.model.vision_tower, output / "vision_tower")
        write_high_res_tower(self.model.high_res_tower, output / "high_res_tower")

    def measure(self, loader: DataLoader) -> dict[str, Any]:
        """The share of regions whose kind, colour, digit and frame the towers tell."""
        right: dict[str, int] = {}
        known: dict[str, int] = {}
        for batch, logits in _predictions(self.model, loader):
            for name, (hits, total) in region_accuracy(logits, batch["classes"]).items():
                right[name] = right.get(name, 0) + hits
                known[name] = known.get(name, 0) + total
        return {"regions": {name: right[name] / known[name] for name in right}}


class _LanguageModel:
    def __init__(self, recipe: PretrainingRecipe) -> None:
        vision = _config(CLIPVisionConfig, recipe.vision, "vision")
        self.recipe = recipe
        self.tokenizer = build_tokenizer(WORDS)
        config = _config(
            LlamaConfig,
            {
                "vocab_size": len(self.tokenizer),
                "bos_token_id": self.tokenizer.bos_token_id,
                "eos_token_id": self.tokenizer.eos_token_id,
                "pad_token_id": self.tokenizer.pad_token_id,
                **recipe.text,
            },
            "text",
        )
        self.processor = _processor(build_tokenizer(WORDS), (vision.image_size // vision.patch_size) ** 2)
        self.encoder = Encoder(self.processor, TEXT_LIMIT)
        self.model = LanguagePretraining(
            config, self.tokenizer, self.processor.image_token_id, self.processor.object_token_id
        )
        self.collate = SymbolCollator(self.tokenizer.pad_token_id)

    def samples(self, split: str, count: int, first: int) -> Dataset:
        recipe = self.recipe
        if split != "train":
            return SymbolicScenes(split, count, self.encoder, turns=1, first=first, views=recipe.views)
        return SymbolicScenes(
            split,
            count,
            self.encoder,
            turns=recipe.turns,
            lists=recipe.lists,
            first=first,
            caption_share=recipe.caption_share,
            views=recipe.views,
        )

    def write(self, output: Path) -> None:
        write_language_model(self.model.language_model, self.tokenizer, output / "language_model")

    def measure(self, loader: DataLoader) -> dict[str, Any]:
        """The share of questions answered exactly, one to a scene, with the views of training."""
        right = total = 0
        for batch, logits in _predictions(self.model, loader):
            labels = batch["labels"][:, 1:]
            same = (logits[:, :-1].argmax(-1) == labels) | (labels == IGNORE_INDEX)
            right += int(same.all(dim=1).sum())
            total += len(labels)
        return {"answers": right / total}


def _begin_with(model: nn.Module, run: Path) -> None:
    last = get_last_checkpoint(run) if run.is_dir() else None
    if last is None or not (run / REPORT_FILE).is_file():
        raise RecipeError(f"start is {run}; expected the folder of a finished run of stage 0")
    try:
        load_model(model, Path(last) / WEIGHTS)
    except (RuntimeError, SafetensorError) as error:
        raise RecipeError(
            f"start is {run}, whose weights are of another part or of other sizes: {error}"
        ) from error


@torch.no_grad()
def _predictions(model: nn.Module, loader: DataLoader):
    model.eval()
    device = next(model.parameters()).device
    for batch in tqdm(loader, desc="validation scenes"):
        batch = {name: value.to(device) for name, value in batch.items()}
        yield batch, model(**batch)["logits"]


def _processor(tokenizer: PreTrainedTokenizerFast, num_image_tokens: int) -> MGLlavaProcessor:
    add_placeholders(tokenizer)
    template = load_chat_template(TEMPLATE).source
    return MGLlavaProcessor(MGLlavaImageProcessor(), tokenizer, template, num_image_tokens)


def _config(cls: type, values: dict[str, Any], key: str) -> Any:
    try:
        return cls(**values)
    except Exception as error:  # transformers' configurations validate with errors of several libraries
        raise RecipeError(f"{key} is {values}, which is no {cls.__name__}: {error}") from error
