"""The neck's weights, fusion and both projectors, in a file of their own: what stage 1 makes and stage 2 takes."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..files import replace_file
from .errors import CheckpointError

__all__ = ["NECK_FILE", "is_neck", "load_neck", "neck_state", "save_neck"]

NECK_FILE = "neck.safetensors"
NECK_MODULES = ("model.fusion.", "model.image_projector.", "model.object_projector.")
_PEFT_PREFIX = "base_model.model."


def is_neck(name: str) -> bool:
    """Whether a parameter, by its name in the model or in a PEFT model around it, belongs to the neck."""
    return name.removeprefix(_PEFT_PREFIX).startswith(NECK_MODULES)


def neck_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The neck's part of a model's state, by the names it has in `MGLlavaForConditionalGeneration`."""
    return {name.removeprefix(_PEFT_PREFIX): value for name, value in state.items() if is_neck(name)}


def save_neck(state: Mapping[str, Tensor], path: Path) -> None:
    """Write the neck's part of a model's state, whole or not at all."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in neck_state(state).items()}
    with replace_file(path) as scratch:
        save_file(tensors, scratch, metadata={"format": "pt"})


def load_neck(model: nn.Module, path: str | Path) -> None:
    """Load a neck's weights into a model.

    Args:
        model: the model, or a PEFT model around it.
        path: what `save_neck` wrote, or the folder of it.

    Raises:
        CheckpointError: there is no such file, or it is damaged or another model's neck; names the difference.
    """
    path = Path(path)
    if path.is_dir():
        path = path / NECK_FILE
    try:
        loaded = load_file(path)
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no neck at {path}; stage 1 writes {NECK_FILE}") from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a safetensors file: {error}") from error
    parameters = neck_state(dict(model.named_parameters()))
    missing, surplus = parameters.keys() - loaded.keys(), loaded.keys() - parameters.keys()
    if missing or surplus:
        raise CheckpointError(
            f"{path} is another model's: missing {sorted(missing)}, not expected {sorted(surplus)}"
        )
    for name, parameter in parameters.items():
        # Under ZeRO-3 a parameter lies in pieces; its whole shape has a name of its own.
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        if tuple(loaded[name].shape) != shape:
            raise CheckpointError(
                f"{path}: {name} has the shape {tuple(loaded[name].shape)}, the model's {shape}"
            )
    with torch.no_grad(), _whole(list(parameters.values())):
        for name, parameter in parameters.items():
            if parameter.numel():  # all processes but the first see nothing of it under ZeRO-3
                parameter.copy_(loaded[name])


def _whole(parameters: list[nn.Parameter]):
    """A context in which the parameters are whole, also under ZeRO-3; what is written to them stays."""
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        return torch.no_grad()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=0)
