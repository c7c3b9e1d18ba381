"""The three published models MG-LLaVA is built on, as local folders or hub ids, and their configurations."""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import snapshot_download
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedConfig,
)

from ..configuration_mgllava import MGLlavaHighResConfig
from .tensors import ConversionError, LazyTensor, refused_as
from .weights import OPEN_CLIP_WEIGHTS, TRANSFORMERS_WEIGHTS, find_weights, open_weights

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_DESCRIPTION_FILES = ("*.json", "*.jinja", "*.model", "*.txt")
_WEIGHT_FILES = {  # a format is fetched only if the one before is not there
    TRANSFORMERS_WEIGHTS: (("model*.safetensors*",), ("pytorch_model*.bin*",)),
    OPEN_CLIP_WEIGHTS: (("open_clip*.safetensors",), ("open_clip*.bin",)),
}


@dataclass(frozen=True)
class Part:
    """A model the checkpoint builds on.

    Attributes:
        option: the option that named it (`--llm`), for messages.
        name: hub id or folder name, never a path of this machine.
        folder: where its files are.
        weights: the names its weight file or index may have, the preferred one first.
        hub_id: the hub id, if its files come from there.
    """

    option: str
    name: str
    folder: Path
    weights: tuple[str, ...]
    hub_id: str | None = None

    def read_json(self, file: str) -> dict:
        """Raises ConversionError if the file is missing or is no JSON object."""
        try:
            content = json.loads((self.folder / file).read_text())
        except FileNotFoundError as error:
            raise ConversionError(f"{self.option} {self.name}: the folder has no {file}") from error
        except (ValueError, RecursionError) as error:
            raise ConversionError(f"{self.option} {self.name}: {file} is no valid JSON: {error}") from error
        if not isinstance(content, dict):
            raise ConversionError(f"{self.option} {self.name}: {file} is no JSON object")
        return content

    def tensors(self, required: bool = True) -> dict[str, LazyTensor]:
        """Its tensors by their original names; fetched from the hub if they are not there yet.

        Args:
            required: whether missing weights are an error; if not, what lies in a local folder is read all
                the same, and nothing is fetched.
        """
        if self.hub_id and not required:
            return {}
        if self.hub_id:
            for patterns in _WEIGHT_FILES[self.weights]:
                _download(self.option, self.hub_id, patterns)
                if find_weights(self.folder, self.weights):
                    break
        path = find_weights(self.folder, self.weights)
        if path is not None:
            return open_weights(path)
        if required:
            raise ConversionError(
                f"{self.option} {self.name}: the folder has no weights; expected one of "
                f"{', '.join(self.weights)}"
            )
        return {}


def find_part(option: str, location: str | Path, weights: tuple[str, ...]) -> Part:
    """A local folder as it is; a hub id with its configuration and tokenizer files fetched.

    Raises:
        ConversionError: if it is neither, or the hub cannot be reached.
    """
    folder = Path(location).expanduser()
    if folder.is_dir():
        return Part(option, folder.resolve().name, folder, weights)
    hub_id = str(location)
    if not _HUB_ID.fullmatch(hub_id):
        raise ConversionError(f"{option} {location}: no such folder, and not a hub id (owner/name) either")
    return Part(option, hub_id, _download(option, hub_id, _DESCRIPTION_FILES), weights, hub_id)


def _download(option: str, hub_id: str, patterns: Sequence[str]) -> Path:
    try:
        # Subfolders hold other formats of the same weights.
        return Path(snapshot_download(hub_id, allow_patterns=list(patterns), ignore_patterns=["*/*"]))
    except Exception as error:  # the hub client's errors have no common class of their own
        raise ConversionError(
            f"{option} {hub_id}: no such folder here, and it cannot be fetched from the hub "
            f"({type(error).__name__}). Offline, pass a folder that holds the "
            "files; for a gated model, log in first"
        ) from error


def read_text_config(part: Part) -> PreTrainedConfig:
    """Configuration of the language model; any causal LM that transformers itself implements."""
    _check_not_quantised(part, part.read_json("config.json"))
    with refused_as(f"{part.option} {part.name}: config.json describes no model transformers knows"):
        config = AutoConfig.from_pretrained(part.folder, trust_remote_code=False)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or not hasattr(config, "vocab_size"):
        raise ConversionError(
            f"{part.option} {part.name}: config.json describes a {config.model_type!r}; expected a "
            "causal language model"
        )
    with (
        refused_as(f"{part.option} {part.name}: no model can be built from config.json"),
        torch.device("meta"),
    ):
        AutoModelForCausalLM.from_config(config)
    return config


def read_vision_config(part: Part) -> CLIPVisionConfig:
    """Configuration of the CLIP ViT, from that of the vision half or of the whole model."""
    content = part.read_json("config.json")
    model_type = content.get("model_type")
    if model_type not in ("clip", "clip_vision_model"):
        raise ConversionError(
            f"{part.option} {part.name}: config.json describes a {model_type!r}; expected a CLIP model or "
            "the vision half of one, for example openai/clip-vit-large-patch14-336"
        )
    _check_not_quantised(part, content)
    with refused_as(f"{part.option} {part.name}: no CLIP ViT can be built from config.json"):
        config = CLIPVisionConfig.from_pretrained(part.folder)
        with torch.device("meta"):
            CLIPVisionModel(config)
        if config.image_size < config.patch_size:
            raise ValueError(f"image_size {config.image_size} is below patch_size {config.patch_size}")
    return config


def _check_not_quantised(part: Part, config: dict) -> None:
    if config.get("quantization_config") is not None:
        raise ConversionError(
            f"{part.option} {part.name}: config.json has a quantization_config; pass the model with unquantised "
            "weights, and quantise what is converted when it is loaded"
        )


def read_high_res_config(part: Part, grid_size: int) -> MGLlavaHighResConfig:
    """Configuration of the ConvNeXt: timm's model of the name open_clip's configuration gives.

    Args:
        grid_size: side of the ViT's token grid; the canvas is sized to give the last stage the same.
    """
    content: Any = part.read_json("open_clip_config.json")
    for key in ("model_cfg", "vision_cfg", "timm_model_name"):
        content = content.get(key) if isinstance(content, dict) else None
    architecture = content
    if not isinstance(architecture, str) or not timm.is_model(architecture):
        raise ConversionError(
            f"{part.option} {part.name}: open_clip_config.json names the vision tower {architecture!r} "
            "(model_cfg.vision_cfg.timm_model_name); expected a ConvNeXt of timm, for example convnext_large"
        )
    with refused_as(f"{part.option} {part.name}: {architecture} of open_clip_config.json is no ConvNeXt"):
        with torch.device("meta"):
            model: Any = timm.create_model(architecture, pretrained=False)
        stages = model.feature_info
        stride = stages[-1]["reduction"]
        return MGLlavaHighResConfig(
            architecture=architecture,
            stage_widths=[stage["num_chs"] for stage in stages],
            stride=stride,
            image_size=stride * grid_size,
        )


def read_image_statistics(part: Part) -> dict[str, list[float]]:
    """`image_mean` and `image_std` of the CLIP ViT's preprocessing, as far as its folder has them."""
    if not (part.folder / "preprocessor_config.json").is_file():
        return {}
    stored = part.read_json("preprocessor_config.json")
    statistics = {name: stored[name] for name in ("image_mean", "image_std") if name in stored}
    for name, values in statistics.items():
        if not (
            isinstance(values, list)
            and len(values) == 3
            and all(type(value) in (int, float) and math.isfinite(value) for value in values)
            and (name == "image_mean" or min(values) > 0)
        ):
            raise ConversionError(
                f"{part.option} {part.name}: preprocessor_config.json has the {name} {values!r}; expected "
                f"three {'numbers' if name == 'image_mean' else 'positive numbers'}"
            )
    return statistics
