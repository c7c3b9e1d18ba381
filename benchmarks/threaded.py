"""torchvision's RoIAlign on all threads of a CPU, of which it takes one itself: the fairer rival there.

Boxes are shared out in the forward pass; in the backward pass, where boxes meet in the same cells, channels.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

# Of the original composition 8 boxes make 290 MB, beside the whole result a copy for each thread.
BOXES = 8

Part = TypeVar("Part")
_pool = functools.cache(ThreadPoolExecutor)


def roi_align(
    maps: Tensor,
    boxes: Tensor | Sequence[Tensor],
    side: int,
    spatial_scale: float = 1.0,
    ratio: int = -1,
    aligned: bool = False,
) -> Tensor:
    """The same as `torchvision.ops.roi_align`, bit for bit in the forward pass.

    Args:
        maps: (B, C, H, W) on a CPU.
        boxes: (K, 5), each with the index of its picture first, or (K_b, 4) for each picture, in pixels.
        side: bins of a box in each direction.
        spatial_scale: cells of the map a pixel.
        ratio: samples of a bin in each direction; -1: as many as it has cells.
        aligned: whether coordinates are shifted by half a cell.

    Returns:
        (K, C, side, side).
    """
    if not isinstance(boxes, Tensor):
        index = torch.arange(len(boxes)).repeat_interleave(torch.tensor([len(own) for own in boxes]))
        boxes = torch.cat([index.to(boxes[0].dtype).unsqueeze(1), torch.cat(list(boxes))], dim=1)
    return _OnThreads.apply(maps, boxes, side, spatial_scale, ratio, aligned)


class _OnThreads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, maps: Tensor, boxes: Tensor, side: int, *how: Any) -> Tensor:
        from torchvision.ops import roi_align as theirs

        ctx.save_for_backward(boxes)
        ctx.shape, ctx.side, ctx.how = maps.shape, side, how
        whole = maps.contiguous()  # once, not for each part
        output = maps.new_empty(len(boxes), maps.shape[1], side, side)

        def fill(part: tuple[Tensor, Tensor]) -> None:
            own, bins = part
            bins.copy_(theirs(whole, own, side, *how))

        _on_threads(fill, zip(boxes.split(BOXES), output.split(BOXES), strict=True))
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (boxes,) = ctx.saved_tensors
        images, _, height, width = ctx.shape
        spatial_scale, ratio, aligned = ctx.how
        of_maps = grad.new_empty(ctx.shape)
        threads = torch.get_num_threads()

        def fill(part: tuple[Tensor, Tensor]) -> None:
            own, cells = part
            size = (images, own.shape[1], height, width)
            backward = torch.ops.torchvision._roi_align_backward
            cells.copy_(backward(own, boxes, spatial_scale, ctx.side, ctx.side, *size, ratio, aligned))

        _on_threads(fill, zip(grad.tensor_split(threads, 1), of_maps.tensor_split(threads, 1), strict=True))
        return of_maps, None, None, None, None, None


def _on_threads(function: Callable[[Part], None], parts: Iterable[Part]) -> None:
    """`function` of each part, on as many threads as torch has; each has its own mode of gradients: none."""

    def call(part: Part) -> None:
        with torch.no_grad():
            function(part)

    list(_pool(torch.get_num_threads()).map(call, parts))
