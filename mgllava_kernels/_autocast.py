"""Autocast for matmul-like ops: operands are cast as torch casts those of its own matmuls."""

import torch
from torch import Tensor


def autocast_operands(device: torch.device, tensors: list[Tensor]) -> list[Tensor]:
    """Cast `tensors` to the dtype of the active autocast region, except float64, as torch does."""
    if not torch.is_autocast_enabled(device.type):
        return tensors
    dtype = torch.get_autocast_dtype(device.type)
    return [
        tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor
        for tensor in tensors
    ]
