"""Autocast for matmul-like ops: operands are cast as torch casts those of its own matmuls."""

import torch
from torch import Tensor

from mgllava_kernels._tracing import constant_when_traced


def autocast_enabled(device: torch.device) -> bool:
    """Whether an autocast region for `device` is active; False for a device that knows none, as meta."""
    return _knows_autocast(device.type) and torch.is_autocast_enabled(device.type)


def autocast_operands(device: torch.device, tensors: list[Tensor]) -> list[Tensor]:
    """Cast `tensors` to the dtype of the active autocast region, except float64, as torch does."""
    if not autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device.type)
    return [
        tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor
        for tensor in tensors
    ]


@constant_when_traced
def _knows_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)
