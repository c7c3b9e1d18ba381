"""Argument checks of the public functions: each names the argument, its value and what was expected."""

import operator
from collections.abc import Sequence
from numbers import Integral, Real

import torch
from torch import Tensor

LARGEST_SCALE = torch.finfo(torch.float32).max
FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_tensor(name: str, value: object, shape: Sequence[int | str]) -> Tensor:
    """Check that `value` is a floating tensor of `shape`; a string stands for any size and names the axis."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.layout != torch.strided or value.is_nested:
        kind = "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
        raise ValueError(f"{name} must be a dense tensor, got a {kind} one")
    if value.dtype not in FLOAT_DTYPES:
        raise ValueError(f"{name} must be float16, bfloat16, float32 or float64, got {value.dtype}")
    fits = value.ndim == len(shape) and all(
        isinstance(want, str) or _equal(have, want) for have, want in zip(value.shape, shape, strict=True)
    )
    if not fits:
        expected = ", ".join(str(size) for size in shape)
        raise ValueError(f"{name} must have shape ({expected}), got {tuple(value.shape)}")
    return value


def _equal(have: int, want: int) -> bool:
    """Whether two sizes agree; under torch.compile sizes of unknown value (`mark_unbacked`) are taken to."""
    if torch.compiler.is_compiling():
        from torch.fx.experimental.symbolic_shapes import guard_or_true

        return guard_or_true(have == want)
    return have == want


def check_map(name: str, value: object, shape: Sequence[int | str]) -> Tensor:
    """Check that `value` is a floating map of `shape`, (B, C, H, W), with at least one row and column."""
    tensor = check_tensor(name, value, shape)
    if tensor.shape[2] < 1 or tensor.shape[3] < 1:
        raise ValueError(f"{name} must have at least one row and one column, got {tuple(tensor.shape)}")
    return tensor


def check_alike(name: str, tensor: Tensor, model_name: str, model: Tensor) -> None:
    """Check that `tensor` has the device and dtype of `model`."""
    if tensor.device != model.device:
        raise ValueError(f"{name} must be on the device of {model_name}, {model.device}, got {tensor.device}")
    if tensor.dtype != model.dtype:
        raise ValueError(f"{name} must have the dtype of {model_name}, {model.dtype}, got {tensor.dtype}")


def check_scale(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    scale = float(value)
    if not 0 < scale <= LARGEST_SCALE:
        raise ValueError(f"{name} must be finite and greater than 0, got {value}")
    return scale


def check_int(name: str, value: object) -> int:
    if isinstance(value, torch.SymInt):
        # A size under torch.export, which behaves as an int; its value is not to be asked for.
        return value  # type: ignore[return-value]
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    number = operator.index(value)
    if not -(2**31) <= number < 2**31:
        raise ValueError(f"{name} must fit in 32 bits, got {value}")
    return number


def check_width(name: str, value: object) -> int:
    number = check_int(name, value)
    if number < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return number


def check_size(name: str, value: object) -> tuple[int, int]:
    """An int or a pair of ints, each at least 1, as (height, width)."""
    pair = tuple(value) if isinstance(value, list | tuple) else (value, value)
    if len(pair) != 2:
        raise ValueError(f"{name} must be an int or a pair of ints, got {value}")
    height, width = (check_int(name, size) for size in pair)
    if height < 1 or width < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return height, width
