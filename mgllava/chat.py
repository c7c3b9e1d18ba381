"""A conversation about pictures: load a folder, keep the history, stream the answers."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForImageTextToText, AutoProcessor, TextStreamer
from transformers.generation.streamers import BaseStreamer

from mgllava_kernels import active_backend

from .configuration_mgllava import MGLlavaConfig
from .modeling_mgllava import PICTURE_INPUTS, MGLlavaForConditionalGeneration
from .processing_mgllava import MGLlavaProcessor

# What `save_pretrained` of model and processor writes beside the weights.
DESCRIPTIONS = (
    "processor_config.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
)
DTYPES = ("auto", "float32", "bfloat16", "float16")


def load_model(
    path: str, dtype: str = "auto", device: str = "auto"
) -> tuple[MGLlavaForConditionalGeneration, MGLlavaProcessor]:
    """Load a converted model for inference.

    Args:
        path: a folder that `mgllava convert` wrote, or a hub id.
        dtype: `auto` (as stored), `float32`, `bfloat16` or `float16`.
        device: `auto` (accelerate's device map where there is a GPU, else the CPU) or a torch device.

    Raises:
        ValueError: if dtype or device is unknown, or the folder holds no MG-LLaVA model.
    """
    check_dtype(dtype)
    check_model_folder(path)
    if device == "auto":
        device_map = "auto" if torch.cuda.is_available() else "cpu"
    else:
        device_map = str(check_device(device))
    check_backend(device_map)
    processor = AutoProcessor.from_pretrained(path)
    model = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype, device_map=device_map)
    return model.eval(), processor


def check_dtype(dtype: str) -> None:
    """Raise ValueError if `load_model` knows no such dtype."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}")


def check_model_folder(path: str) -> None:
    """Raise ValueError if `path` is a folder (or looks like one) without a complete MG-LLaVA model in it."""
    folder = Path(path)
    if not folder.exists():
        if folder.is_absolute() or path.startswith(".") or path.count("/") > 1:
            raise ValueError(f"no model folder at {path}")
        return  # a hub id
    if not folder.is_dir():
        raise ValueError(f"{path} is a file; expected a folder that `mgllava convert` wrote")
    config = folder / "config.json"
    if not config.is_file():
        raise ValueError(
            f"{path} has no config.json, so it is no converted model; `mgllava convert` makes one from the "
            "published files"
        )
    try:
        model_type = json.loads(config.read_text()).get("model_type")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{config} is not a JSON object: {error}") from error
    if model_type != MGLlavaConfig.model_type:
        raise ValueError(f"{path} holds a {model_type!r} model; expected {MGLlavaConfig.model_type!r}")
    if missing := [name for name in DESCRIPTIONS if not (folder / name).is_file()]:
        raise ValueError(f"{path} is incomplete; missing {', '.join(missing)}")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = json.loads(index.read_text()).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ValueError(f"{index} is damaged: it has no weight_map")
        shards = sorted(set(weight_map.values()))
    else:
        shards = ["model.safetensors"]
    if missing := [name for name in shards if not (folder / name).is_file()]:
        raise ValueError(f"{path} is incomplete; missing {', '.join(missing)}")
    for name in shards:
        try:
            with safe_open(folder / name, framework="pt"):
                pass
        except SafetensorError as error:
            raise ValueError(f"{folder / name} is damaged or cut short: {error}") from error


def check_backend(device: str) -> None:
    """Raise ValueError if the kernels' path that the environment asks for does not exist or cannot run there."""
    try:
        active_backend(torch.empty(0, device="cuda" if device == "auto" else device))
    except RuntimeError as error:
        raise ValueError(str(error)) from error


def default_device() -> str:
    """Where one GPU suffices: on it if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_device(device: str) -> torch.device:
    """The named torch device; ValueError if there is none such here."""
    try:
        found = torch.device(device)
        torch.ones(1, device=found).item()
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from error
    return found


class ChatSession:
    """A conversation with one model, about pictures that lead the first turn.

    The pictures are encoded once; later turns reuse their features.

    Args:
        model, processor: as `load_model` returns them.
        images: the pictures, as paths, URLs or PIL images; may be empty.
        detections: for each picture its detections (`{"boxes", "labels", "scores"}`, pixels of the upright
            picture) or None. None for all: every picture gets the one empty box.
        generation: settings for `generate` (`max_new_tokens`, `do_sample`, `temperature`, ...).
    """

    def __init__(
        self,
        model: MGLlavaForConditionalGeneration,
        processor: MGLlavaProcessor,
        images: Sequence[str | Image.Image] = (),
        detections: Sequence[dict[str, Any] | None] | None = None,
        **generation: Any,
    ):
        self.model = model
        self.processor = processor
        self.images = list(images)
        self.detections = list(detections) if detections is not None else [None] * len(self.images)
        if len(self.detections) != len(self.images):
            raise ValueError(
                f"{len(self.images)} pictures came with {len(self.detections)} detections; expected one each"
            )
        self.generation = generation
        self.history: list[dict[str, Any]] = []
        self._encoded: dict[str, Any] | None = None
        self._placeholders = (processor.image_token, processor.object_token)

    def reset(self) -> None:
        """Forget the conversation; the pictures stay."""
        self.history = []

    def ask(self, question: str, streamer: BaseStreamer | None = None) -> str:
        """The model's answer to one more turn.

        Args:
            question: the user's text.
            streamer: receives the answer's tokens as they come, for example `stdout_streamer(processor)`.

        Raises:
            ValueError: if the conversation and its answer would not fit the model's context, or the question holds
                a placeholder. The conversation stays as it was.
        """
        for token in self._placeholders:
            if token in question:
                raise ValueError(f"{token} cannot be part of a question: it stands for what the model sees")
        content: list[dict[str, Any]] = []
        if not self.history:
            for image, found in zip(self.images, self.detections, strict=True):
                content.append({"type": "image", "image": image, **(found or {})})
        content.append({"type": "text", "text": question})
        turns = [*self.history, {"role": "user", "content": content}]
        inputs = self.processor.apply_chat_template(
            turns, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        ).to(self.model.device)
        self._check_length(inputs["input_ids"].shape[1])

        pictures = {name: inputs.pop(name) for name in PICTURE_INPUTS if name in inputs}
        if pictures and self._encoded is None:
            with torch.inference_mode():
                self._encoded = {"image": self.model.get_image_features(**pictures)}
        if self._encoded is not None:
            inputs["mm_encoder_outputs"] = self._encoded
        output = self.model.generate(**inputs, **self.generation, streamer=streamer)
        answer = self.processor.tokenizer.decode(
            output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        ).strip()
        remembered = answer
        for token in self._placeholders:  # spelt out by the model, they would be taken for pictures next turn
            remembered = remembered.replace(token, token.replace("<", "< "))
        self.history = [*turns, {"role": "assistant", "content": [{"type": "text", "text": remembered}]}]
        return answer

    def _check_length(self, prompt_tokens: int) -> None:
        limit = getattr(self.model.config.text_config, "max_position_embeddings", None)
        wanted = prompt_tokens + self.generation.get("max_new_tokens", 0)
        if limit is not None and wanted > limit:
            raise ValueError(
                f"the conversation has {prompt_tokens} tokens and the answer may take "
                f"{wanted - prompt_tokens}; the model's context holds {limit}. Start anew with RESET, or lower "
                "--max-new-tokens"
            )


def stdout_streamer(processor: MGLlavaProcessor) -> TextStreamer:
    """Prints an answer on standard output while it is generated."""
    return TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
