"""The literal composition of pooled RoIAlign piece by piece: the reference of any case fits into memory.

Nothing in it mixes channels, pictures or boxes, so the package's oracle (`mgllava_kernels.reference`) is called for a
few of them at a time; the backward pass computes each piece anew.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mgllava_kernels import reference
from mgllava_kernels._workloads import BINS

# 64 boxes of 192 channels and 56 x 56 bins are 308 MB in float64.
CHANNELS, BOXES = 192, 64


@dataclass(frozen=True)
class _Piece:
    """Some channels of one level of one picture, and where their vectors are in the result."""

    image: int
    level: int
    channels: slice
    rows: slice
    columns: slice


def pooled_roi_align(
    stages: Sequence[Tensor], boxes: Sequence[Tensor], spatial_scale: float
) -> tuple[Tensor]:
    """Stage maps (B, C_l, H_l, W_l), the finest first, and each picture's boxes (K_b, 4) to (ΣK, ΣC_l)."""
    return (_Pooled.apply(list(boxes), spatial_scale, *stages),)


class _Pooled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, boxes: list[Tensor], spatial_scale: float, *stages: Tensor) -> Tensor:
        ctx.save_for_backward(*stages)
        ctx.boxes, ctx.spatial_scale = boxes, spatial_scale
        output = stages[0].new_empty(sum(map(len, boxes)), sum(stage.shape[1] for stage in stages))

        def compute(piece: _Piece) -> None:
            maps = stages[piece.level][piece.image : piece.image + 1, piece.channels]
            own = output[piece.rows, piece.columns]
            for vectors, chunk in zip(own.split(BOXES), boxes[piece.image].split(BOXES), strict=True):
                with torch.no_grad():
                    vectors.copy_(_vectors(maps, stages[0], chunk, spatial_scale))

        _for_each(compute, list(_pieces(stages, boxes)), stages[0].device)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        stages, boxes = ctx.saved_tensors, ctx.boxes
        grads = [torch.zeros_like(stage) for stage in stages]

        def compute(piece: _Piece) -> None:
            maps = stages[piece.level][piece.image : piece.image + 1, piece.channels].detach()
            own = grad[piece.rows, piece.columns]
            for of_vectors, chunk in zip(own.split(BOXES), boxes[piece.image].split(BOXES), strict=True):
                with torch.enable_grad():
                    leaf = maps.detach().requires_grad_()
                    vectors = _vectors(leaf, stages[0], chunk, ctx.spatial_scale)
                (of_maps,) = torch.autograd.grad(vectors, leaf, of_vectors)
                grads[piece.level][piece.image : piece.image + 1, piece.channels] += of_maps

        _for_each(compute, list(_pieces(stages, boxes)), grad.device)
        return None, None, *grads


def _pieces(stages: Sequence[Tensor], boxes: Sequence[Tensor]) -> Iterator[_Piece]:
    row = 0
    for image, own in enumerate(boxes):
        column = 0
        for level, stage in enumerate(stages):
            for first in range(0, stage.shape[1] if len(own) else 0, CHANNELS):
                channels = slice(first, min(first + CHANNELS, stage.shape[1]))
                columns = slice(column + first, column + channels.stop)
                yield _Piece(image, level, channels, slice(row, row + len(own)), columns)
            column += stage.shape[1]
        row += len(own)


def _vectors(maps: Tensor, finest: Tensor, boxes: Tensor, spatial_scale: float) -> Tensor:
    """Maps (1, c, H, W) and boxes (k, 4) to (k, c); `finest` gives the size that the maps are brought to."""
    dtype = torch.promote_types(maps.dtype, torch.float32)
    rows = torch.cat([boxes.new_zeros(len(boxes), 1), boxes], dim=1).to(dtype)
    return reference.pooled_roi_align([finest[:1, :0], maps], rows, spatial_scale, BINS, BINS, -1, False)


def _for_each(compute: Callable[[_Piece], None], pieces: Sequence[_Piece], device: torch.device) -> None:
    """On a CPU on as many threads as torch has: torchvision's RoIAlign takes one."""
    if device.type != "cpu":
        for piece in pieces:
            compute(piece)
        return
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(compute, pieces))
