"""Opens weight files: safetensors or PyTorch's own, whole or sharded, always lazily."""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from .pickles import read_pickle
from .tensors import ConversionError, LazyTensor, listed

TRANSFORMERS_WEIGHTS = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)
OPEN_CLIP_WEIGHTS = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
)

_SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def find_weights(folder: Path, names: Sequence[str]) -> Path | None:
    """The first of `names` that lies in `folder`, or None."""
    return next((folder / name for name in names if (folder / name).is_file()), None)


def open_weights(path: Path) -> dict[str, LazyTensor]:
    """The tensors of a weight file or of the shards an index names.

    Args:
        path: a `.safetensors` file, an `.index.json` beside its shards, or a file of `torch.save`.

    Raises:
        ConversionError: if a shard is missing, a file is truncated or its content is not a state dict.
    """
    if path.name.endswith(".index.json"):
        return _open_sharded(path)
    if path.suffix == ".safetensors":
        return _open_safetensors(path)
    return unwrap_state_dict(read_pickle(path), path.name)


def unwrap_state_dict(content: object, file: str) -> dict[str, LazyTensor]:
    """The state dict inside a checkpoint.

    Descends through the keys under which training frameworks nest it (`state_dict`, `module`, `model`) and
    strips the `module.` that data-parallel wrappers put before every name.
    """
    while isinstance(content, dict):
        nested = [
            content[key] for key in ("state_dict", "module", "model") if isinstance(content.get(key), dict)
        ]
        if not nested:
            break
        content = nested[0]
    tensors = {}
    if isinstance(content, dict):
        tensors = {str(key): value for key, value in content.items() if isinstance(value, LazyTensor)}
    if not tensors:
        raise ConversionError(f"{file} holds no state dict: no named tensors were found in it")
    while all(key.startswith("module.") for key in tensors):
        tensors = {key.removeprefix("module."): value for key, value in tensors.items()}
    return tensors


def _open_safetensors(path: Path) -> dict[str, LazyTensor]:
    try:
        handle = safe_open(path, framework="pt")
        tensors = {}
        for name in handle.keys():  # noqa: SIM118 - the handle is no mapping
            view = handle.get_slice(name)
            dtype = _SAFETENSORS_DTYPES.get(view.get_dtype())
            if dtype is None:
                raise ConversionError(
                    f"{path.name}: {name} is stored as {view.get_dtype()}, which is not supported"
                )
            tensors[name] = LazyTensor(
                tuple(view.get_shape()), dtype, path.name, partial(handle.get_tensor, name)
            )
    except (SafetensorError, OSError) as error:
        raise ConversionError(
            f"{path.name} is truncated or is no safetensors file ({error}); copy it again"
        ) from error
    return tensors


def _open_sharded(index: Path) -> dict[str, LazyTensor]:
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        if not (isinstance(weight_map, dict) and all(isinstance(name, str) for name in weight_map.values())):
            raise TypeError("its weight_map does not give each tensor a file name")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConversionError(
            f"{index.name} in {index.parent.name} is no index of weight files: {error}"
        ) from error
    shards = sorted(set(weight_map.values()))
    absent = [name for name in shards if not (index.parent / name).is_file()]
    if absent:
        raise ConversionError(
            f"{index.parent.name} is incomplete: {index.name} names absent files:\n{listed(absent)}"
        )
    tensors: dict[str, LazyTensor] = {}
    for name in shards:
        tensors.update(open_weights(index.parent / name))
    lost = sorted(set(weight_map) - set(tensors))
    if lost:
        raise ConversionError(
            f"{index.parent.name} is incomplete: {index.name} names tensors that no file has:\n{listed(lost)}"
        )
    return tensors
