"""Which original tensor becomes which parameter: the rules, and the check that they leave nothing over.

Every key of every source either has a home or stands on the list of parts the model does not have; every
parameter has exactly one source. Anything else is an error that names all keys concerned.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from ..configuration_mgllava import FusionVariant, MGLlavaConfig
from ..modeling_mgllava import MGLlavaForConditionalGeneration
from .tensors import ConversionError, LazyTensor, listed, refused_as

CHECKPOINT, LLM, CLIP, CONVNEXT = "checkpoint", "llm", "clip", "convnext"

# What a training checkpoint calls what this project calls; the language model's names are added per model.
CHECKPOINT_NAMES = {
    "projector.model.0.": "model.image_projector.linear_1.",
    "projector.model.2.": "model.image_projector.linear_2.",
    "bbox_projector.model.0.": "model.object_projector.linear_1.",
    "bbox_projector.model.2.": "model.object_projector.linear_2.",
    "fuse_module.slow_conv.": "model.fusion.high_res_conv.",
    "fuse_module.slow_proj.": "model.fusion.high_res_proj.",
    "fuse_module.fast_conv.": "model.fusion.low_res_conv.",
    "fuse_module.fast_proj.": "model.fusion.low_res_proj.",
    "fuse_module.gate.0.": "model.fusion.gate_in.",
    "fuse_module.gate.2.": "model.fusion.gate_out.",
    # Present only where a tower was trained or its frozen weights were saved too.
    "visual_encoder.vision_model.": "model.vision_tower.",
    "visual_encoder.": "model.vision_tower.",
    "visual_encoder_aux.vision_stem.": "model.high_res_tower.stem.",
    "visual_encoder_aux.vision_stages.": "model.high_res_tower.stages.",
}
CLIP_NAMES = {"vision_model.": "model.vision_tower.", "": "model.vision_tower."}
CONVNEXT_NAMES = {
    "visual.trunk.stem.": "model.high_res_tower.stem.",
    "visual.trunk.stages.": "model.high_res_tower.stages.",
}

# Parts of the sources that the model does not have: pattern over the whole key, reason.
_ROTARY = (r".*\.rotary_emb\.inv_freq", "computed from the configuration")
_POSITION_IDS = (r"(.*\.)?embeddings\.position_ids", "computed from the configuration")
IGNORED = {
    CHECKPOINT: (_ROTARY, _POSITION_IDS),
    LLM: (_ROTARY,),
    CLIP: (
        _POSITION_IDS,
        (r"text_model\..*", "text tower"),
        (r"(visual|text)_projection\.weight", "contrastive head"),
        (r"logit_scale", "contrastive head"),
    ),
    CONVNEXT: (
        (r"text\..*", "text tower"),
        (r"(transformer|token_embedding|ln_final)\..*", "text tower"),
        (r"positional_embedding|text_projection(\..*)?|attn_mask", "text tower"),
        (r"logit_scale|logit_bias", "contrastive head"),
        (r"visual\.trunk\.(norm_pre|head)\..*", "classification head"),
        (r"visual\.head\..*", "contrastive head"),
    ),
}
_WEIGHT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_LORA = re.compile(r"(^|\.)(lora_|base_model\.model\.)")
_COMPONENTS = ("model.vision_tower.", "model.high_res_tower.", "model.language_model.", "lm_head.", "model.")
_LANGUAGE_MODEL = ("model.language_model.", "lm_head.")


@dataclass(frozen=True)
class Assignment:
    """One parameter and where its values come from.

    Attributes:
        target: its name in the model.
        shape: its shape there.
        source: `checkpoint`, `llm`, `clip` or `convnext`.
        key: the tensor's name in the source.
        tensor: the tensor; of the same shape, or with fewer rows where the vocabulary grows.
    """

    target: str
    shape: tuple[int, ...]
    source: str
    key: str
    tensor: LazyTensor

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def added_rows(self) -> int:
        return self.shape[0] - self.tensor.shape[0] if self.shape else 0


@dataclass
class WeightMapping:
    """The complete assignment.

    Attributes:
        assignments: one for each parameter and persistent buffer, in the model's order.
        unused: (source, key, reason) for each tensor without a home, all of them expected.
        tied: where the embedding serves as head: it, and the head stored beside it, which must be the same.
    """

    assignments: list[Assignment] = field(default_factory=list)
    unused: list[tuple[str, str, str]] = field(default_factory=list)
    tied: tuple[Assignment, Assignment] | None = None

    def lines(self) -> list[str]:
        """The mapping as text: one line a tensor, `source: key -> parameter (shape)`."""
        lines = []
        for item in self.assignments:
            note = f", {item.added_rows} rows added" if item.added_rows else ""
            lines.append(f"{item.source}: {item.key} -> {item.target} {tuple(item.shape)}{note}")
        lines += [f"{source}: {key} -> not used ({reason})" for source, key, reason in self.unused]
        return lines


def language_model_names(text_config: PreTrainedConfig) -> dict[str, str]:
    """Prefixes of a causal LM's own names (`model.`, `lm_head.`) and what they are here."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(text_config)
    head = model.get_output_embeddings()
    head_name = next((name for name, module in model.named_modules() if module is head), "lm_head")
    return {f"{model.base_model_prefix}.": "model.language_model.", f"{head_name}.": "lm_head."}


def detect_fusion_variant(tensors: Mapping[str, LazyTensor], low_res_width: int) -> FusionVariant:
    """The ablation variant a checkpoint was trained as, from its keys and the width of its image projector.

    Raises:
        ConversionError: if it is no MG-LLaVA checkpoint.
    """
    check_is_mgllava(tensors)
    width = (
        tensors["projector.model.0.weight"].shape[-1]
        if "projector.model.0.weight" in tensors
        else low_res_width
    )
    if not any(key.startswith("fuse_module.") for key in tensors):
        # Without a fusion the projector reads both towers' features as they are.
        return "gate_sum" if width == low_res_width else "concat_raw"
    if width != 2 * low_res_width:
        return "gate_sum"
    gated = any(key.startswith("fuse_module.gate.") for key in tensors)
    return "gate_concat" if gated else "concat_projected"


def check_is_mgllava(tensors: Iterable[str]) -> None:
    """Raises ConversionError for a checkpoint of another model, or with unmerged adapters."""
    keys = list(tensors)
    adapters = [key for key in keys if _LORA.search(key)]
    if adapters:
        raise ConversionError(
            "the checkpoint holds LoRA adapters, whose scale it does not record; merge them into the "
            f"language model first (peft's merge_and_unload) and save the state_dict:\n{listed(adapters)}"
        )
    if any(key.startswith(("projector.", "bbox_projector.")) for key in keys):
        return
    if any(key.startswith("model.image_projector.") for key in keys):
        raise ConversionError("the checkpoint is converted already; load its folder with from_pretrained")
    raise ConversionError(
        "this is not an MG-LLaVA checkpoint: expected keys such as projector.model.0.weight, "
        "bbox_projector.model.0.weight and fuse_module.slow_conv.weight, found none; it holds "
        f"{len(keys)} tensors, for example:\n{listed(keys[:5])}"
    )


def components_in(checkpoint: Iterable[str], names: Mapping[str, str]) -> set[str]:
    """The components (prefixes of the model's names) that a checkpoint's tensors belong to."""
    targets = (rename(key, names) for key in checkpoint if not _reason_to_ignore(CHECKPOINT, key))
    return {_component(target) for target in targets if target}


def rename(key: str, names: Mapping[str, str]) -> str | None:
    """The model's name for an original key, or None where no rule fits; the longest prefix wins."""
    prefix = max((prefix for prefix in names if key.startswith(prefix)), key=len, default=None)
    return None if prefix is None else names[prefix] + key[len(prefix) :]


def source_names(text_config: PreTrainedConfig) -> dict[str, dict[str, str]]:
    """The renaming rules of each source."""
    language_model = language_model_names(text_config)
    return {
        CHECKPOINT: CHECKPOINT_NAMES | {f"llm.{old}": new for old, new in language_model.items()},
        LLM: language_model,
        CLIP: CLIP_NAMES,
        CONVNEXT: CONVNEXT_NAMES,
    }


def map_weights(
    config: MGLlavaConfig,
    sources: Mapping[str, Mapping[str, LazyTensor]],
    names: Mapping[str, Mapping[str, str]] | None = None,
) -> WeightMapping:
    """Assign every tensor of the sources to the parameters of the model of `config`.

    A component (the language model, a tower) that the checkpoint holds is taken from it whole; the same
    component of the folder is then not used.

    Args:
        config: the model, its vocabulary already grown for the placeholders.
        sources: tensors by original name for each of `checkpoint`, `llm`, `clip` and `convnext`.
        names: the sources' renaming rules, `source_names(config.text_config)` by default.

    Raises:
        ConversionError: lists all missing, left-over, wrongly shaped and doubly given keys.
    """
    names = names or source_names(config.text_config)
    shapes, table_names, integers = _model_shapes(config)
    replaced = components_in(sources.get(CHECKPOINT, {}), names[CHECKPOINT])
    mapping = WeightMapping()
    found: dict[str, Assignment] = {}
    heads: dict[str, Assignment] = {}
    leftover, misshapen, doubled, mistyped = [], [], [], []
    for source, tensors in sources.items():
        for key, tensor in tensors.items():
            target = rename(key, names[source])
            reason = _reason_to_ignore(source, key)
            if target == "lm_head.weight" and config.tie_word_embeddings:
                reason = "tied to the input embedding"
                heads[source] = Assignment(target, tensor.shape, source, key, tensor)
            if reason is not None:
                mapping.unused.append((source, key, reason))
                continue
            if target not in shapes:
                leftover.append(f"{source}: {key} {tensor.shape}")
                continue
            assignment = Assignment(target, shapes[target], source, key, tensor)
            expected = _expected_shape(target, shapes, table_names, config)
            if tensor.shape != expected:
                misshapen.append(f"{source}: {key} is {tensor.shape}, expected {expected}")
                found.setdefault(target, assignment)  # wrong, but not missing too
            elif source != CHECKPOINT and _component(target) in replaced:
                mapping.unused.append((source, key, "replaced by the checkpoint"))
            elif target not in integers and tensor.dtype not in _WEIGHT_DTYPES:
                mistyped.append(f"{source}: {key} is {str(tensor.dtype).removeprefix('torch.')}")
                found.setdefault(target, assignment)
            elif target in found:
                doubled.append(f"{source}: {key} and {found[target].key} both give {target}")
            else:
                found[target] = assignment
    missing = [
        f"{_origin(target, replaced)}: {target} {shape}"
        for target, shape in shapes.items()
        if target not in found
    ]
    _raise_if_any(
        (missing, "missing: parameters no source gives values for"),
        (leftover, "left over: keys without a home in the model"),
        (misshapen, "of the wrong shape"),
        (doubled, "given twice"),
        (mistyped, "of a type that holds no weights; quantised ones are not converted"),
    )
    mapping.assignments = [found[target] for target in shapes]
    embedding = next(item for item in mapping.assignments if item.target in table_names)
    if embedding.source in heads:
        mapping.tied = (embedding, heads[embedding.source])
    return mapping


def _raise_if_any(*groups: tuple[list[str], str]) -> None:
    problems = [f"  {title} ({len(keys)}):\n{listed(keys)}" for keys, title in groups if keys]
    if problems:
        raise ConversionError("the weights do not fit the model\n" + "\n".join(problems))


def _model_shapes(config: MGLlavaConfig) -> tuple[dict[str, tuple[int, ...]], set[str], set[str]]:
    """Shapes of all parameters and persistent buffers, the names of the two vocabulary tables and of what holds
    integers."""
    with refused_as("no MG-LLaVA model can be built of these parts"), torch.device("meta"):
        model = MGLlavaForConditionalGeneration(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    embedding = model.get_input_embeddings().weight
    tables = {"lm_head.weight"} | {
        name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter is embedding
    }
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    integers = {name for name, tensor in model.state_dict().items() if not tensor.dtype.is_floating_point}
    return shapes, tables, integers


def _expected_shape(
    target: str, shapes: Mapping[str, tuple[int, ...]], tables: set[str], config: MGLlavaConfig
) -> tuple[int, ...]:
    """The shape in the source: the vocabulary's tables have only the language model's own rows there."""
    shape = shapes[target]
    return (config.text_vocab_size, *shape[1:]) if target in tables else shape


def _reason_to_ignore(source: str, key: str) -> str | None:
    return next((reason for pattern, reason in IGNORED[source] if re.fullmatch(pattern, key)), None)


def _component(target: str) -> str:
    component = next(prefix for prefix in _COMPONENTS if target.startswith(prefix))
    return "model.language_model." if component in _LANGUAGE_MODEL else component


def _origin(target: str, replaced: set[str]) -> str:
    """The source that should have had a missing parameter."""
    component = _component(target)
    sources = {"model.vision_tower.": CLIP, "model.high_res_tower.": CONVNEXT, "model.language_model.": LLM}
    return CHECKPOINT if component in replaced else sources.get(component, CHECKPOINT)
