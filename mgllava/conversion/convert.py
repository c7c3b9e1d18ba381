"""From a training checkpoint and the three models it builds on to one self-contained folder."""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..configuration_mgllava import MGLlavaConfig
from ..image_processing_mgllava import MGLlavaImageProcessor
from ..modeling_mgllava import MGLlavaForConditionalGeneration
from ..processing_mgllava import MGLlavaProcessor
from .card import model_card
from .checkpoint import Checkpoint, open_checkpoint
from .language import Language, check_template, read_language
from .mapping import (
    CHECKPOINT,
    CLIP,
    CONVNEXT,
    LLM,
    Assignment,
    WeightMapping,
    components_in,
    detect_fusion_variant,
    map_weights,
    source_names,
)
from .parts import (
    find_part,
    read_high_res_config,
    read_image_statistics,
    read_text_config,
    read_vision_config,
)
from .tensors import ConversionError, refused_as
from .weights import OPEN_CLIP_WEIGHTS, TRANSFORMERS_WEIGHTS
from .write import (
    MAX_SHARD_BYTES,
    check_disk_space,
    check_output,
    check_tied,
    complete_or_absent,
    remove_abandoned,
    resolve_output,
    write_weights,
)

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class ConversionPlan:
    """Everything that will be written, decided before anything is.

    Attributes:
        config: the model's configuration.
        mapping: which tensor becomes which parameter.
        dtype: the dtype floating-point weights are written in.
        language: tokenizer, chat template and generation settings.
        image_processor: the image processor.
        sources: what each part was converted from, by name.
        notes: what the user should know, such as a chat template chosen by default.
    """

    config: MGLlavaConfig
    mapping: WeightMapping
    dtype: torch.dtype
    language: Language
    image_processor: MGLlavaImageProcessor
    sources: dict[str, str]
    notes: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """The mapping as text, one line per tensor."""
        return self.mapping.lines()

    def __str__(self) -> str:
        return "\n".join(self.lines())


@dataclass(frozen=True)
class ConversionResult:
    """Outcome of `convert_checkpoint`.

    Attributes:
        plan: what was done, or would be.
        output: the folder written; None after a dry run.
    """

    plan: ConversionPlan
    output: Path | None

    @property
    def notes(self) -> list[str]:
        return self.plan.notes


def convert_checkpoint(
    checkpoint: str | Path,
    llm: str | Path,
    clip: str | Path,
    convnext: str | Path,
    output: str | Path | None,
    *,
    template: str | None = None,
    dtype: torch.dtype | str | None = None,
    dry_run: bool = False,
    progress: bool = True,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> ConversionResult:
    """Convert a training checkpoint to a folder that the Auto classes load.

    Weights stream from memory-mapped files to shards, so memory stays around one shard (`max_shard_bytes`).
    Nothing in any file is executed. The folder appears under its name only when it is complete.

    Args:
        checkpoint: an xtuner `.pth` file, a DeepSpeed folder of it, or safetensors.
        llm, clip, convnext: folder or hub id of the language model, the CLIP ViT (vision half or whole model)
            and the open_clip ConvNeXt.
        output: the folder to write; must not exist or be empty. May be None in a dry run.
        template: built-in chat template; by default the language model's own, `vicuna` where it has none.
        dtype: dtype of the written weights, as `torch.dtype` or its name; by default that of the language
            model's weights as stored, and for fp32 master weights of ZeRO the dtype the model was trained in.
        dry_run: plan and check everything, write nothing.
        progress: show a progress bar on stderr.
        max_shard_bytes: size at which a new weight file is begun.

    Raises:
        ConversionError: before anything is written, if a file is missing, damaged or of another model, if a
            tensor is missing, left over, wrongly shaped or no weight, if `output` is taken or the disk too
            small; and, with nothing left behind, while writing, if weights are not finite.
    """
    if output is not None:
        output = resolve_output(output)
        with refused_as(f"--output {output}"):  # a name too long, a folder that may not be looked into
            check_output(output)
    elif not dry_run:
        raise ConversionError("no output folder given")
    plan = plan_conversion(checkpoint, llm, clip, convnext, template=template, dtype=dtype)
    if dry_run or output is None:
        return ConversionResult(plan, None)
    plan.notes.extend(remove_abandoned(output))
    check_disk_space(output, plan.mapping.assignments, plan.dtype)
    check_tied(plan.mapping)
    with complete_or_absent(output) as folder:
        _write_descriptions(folder, plan, title=output.name)
        write_weights(
            folder, plan.mapping.assignments, plan.dtype, progress=progress, max_shard_bytes=max_shard_bytes
        )
        _write_config(folder, plan)
    return ConversionResult(plan, output)


def plan_conversion(
    checkpoint: str | Path,
    llm: str | Path,
    clip: str | Path,
    convnext: str | Path,
    *,
    template: str | None = None,
    dtype: torch.dtype | str | None = None,
) -> ConversionPlan:
    """Read every source's description and assign every tensor, without reading the tensors' values.

    Arguments and errors as in `convert_checkpoint`.
    """
    check_template(template)
    dtype = _as_dtype(dtype)
    opened = open_checkpoint(checkpoint)
    llm_part = find_part("--llm", llm, TRANSFORMERS_WEIGHTS)
    clip_part = find_part("--clip", clip, TRANSFORMERS_WEIGHTS)
    convnext_part = find_part("--convnext", convnext, OPEN_CLIP_WEIGHTS)

    vision_config = read_vision_config(clip_part)
    fusion_variant = detect_fusion_variant(opened.tensors, vision_config.hidden_size)
    text_config = read_text_config(llm_part)
    text_vocab_size = text_config.vocab_size
    with refused_as(f"--llm {llm_part.name}: the tokenizer or generation_config.json is damaged"):
        language = read_language(llm_part, text_vocab_size, template)
    text_config.vocab_size = language.vocab_size
    with refused_as(
        f"no MG-LLaVA model can be built of {clip_part.name}, {convnext_part.name} and {llm_part.name}"
    ):
        config = MGLlavaConfig(
            vision_config=vision_config,
            high_res_config=read_high_res_config(
                convnext_part, vision_config.image_size // vision_config.patch_size
            ),
            text_config=text_config,
            image_token_id=language.image_token_id,
            object_token_id=language.object_token_id,
            text_vocab_size=text_vocab_size,
            fusion_variant=fusion_variant,
        )
    names = source_names(text_config)
    trained = components_in(opened.tensors, names[CHECKPOINT])
    mapping = map_weights(
        config,
        {
            CHECKPOINT: opened.tensors,
            LLM: llm_part.tensors(required="model.language_model." not in trained),
            CLIP: clip_part.tensors(required="model.vision_tower." not in trained),
            CONVNEXT: convnext_part.tensors(required="model.high_res_tower." not in trained),
        },
        names,
    )
    return ConversionPlan(
        config=config,
        mapping=mapping,
        dtype=dtype or _stored_dtype(opened, mapping.assignments),
        language=language,
        image_processor=MGLlavaImageProcessor(
            high_res_size=config.high_res_config.image_size,
            low_res_size=config.vision_config.image_size,
            **read_image_statistics(clip_part),
        ),
        sources={
            "MG-LLaVA checkpoint": opened.name,
            "language model": llm_part.name,
            "CLIP ViT": clip_part.name,
            "CLIP ConvNeXt": convnext_part.name,
        },
        notes=language.notes,
    )


def _as_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    given = getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype
    if given is not None and given not in _DTYPES:
        names = ", ".join(str(known).removeprefix("torch.") for known in _DTYPES)
        raise ConversionError(f"weights cannot be written in the dtype {dtype}; expected one of {names}")
    return given


def _stored_dtype(checkpoint: Checkpoint, assignments: list[Assignment]) -> torch.dtype:
    """The dtype of the language model's embedding as stored; fp32 master weights count as what they train."""
    embedding = next(item for item in assignments if item.target.startswith("model.language_model."))
    stored = embedding.tensor.dtype
    if embedding.source == CHECKPOINT and checkpoint.trained_in is not None:
        stored = checkpoint.trained_in
    return stored if stored in _DTYPES else torch.float32


def _write_descriptions(folder: Path, plan: ConversionPlan, title: str) -> None:
    """Everything but the weights and the configuration."""
    language = plan.language
    processor = MGLlavaProcessor(
        image_processor=plan.image_processor,
        tokenizer=language.tokenizer,
        chat_template=language.chat_template,
        num_image_tokens=plan.config.num_image_tokens,
    )
    processor.save_pretrained(folder)
    language.generation.save_pretrained(folder)
    card = model_card(
        title,
        plan.sources,
        low_res_size=plan.config.vision_config.image_size,
        high_res_size=plan.config.high_res_config.image_size,
        fusion_variant=plan.config.fusion_variant,
        dtype=str(plan.dtype).removeprefix("torch."),
        parameters=sum(item.numel for item in plan.mapping.assignments),
    )
    (folder / "README.md").write_text(card)


def _write_config(folder: Path, plan: ConversionPlan) -> None:
    """Comes last, since nothing loads without it."""
    config = plan.config
    config.architectures = [MGLlavaForConditionalGeneration.__name__]
    for part in (config, config.text_config, config.vision_config, config.high_res_config):
        part.dtype = plan.dtype
        part._name_or_path = ""  # a path of the machine that converted
    config.save_pretrained(folder)
