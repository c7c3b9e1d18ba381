"""The boxes of each case, the same for every run and every seed, and which cells of the maps they touch."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.shapes import Sizes, stage_shapes
from mgllava_kernels._torch.roi_align import axis_samples, axis_weights, upsampled_weights
from mgllava_kernels._workloads import BINS, LEVEL_PICTURE, level_boxes, random_boxes

CPU = torch.device("cpu")


def picture_boxes(sizes: Sizes) -> Tensor:
    """Rows (images · boxes, 5) in pixels of the canvas, on torch's default device."""
    return _drawn(random_boxes, sizes["images"], sizes["boxes"], sizes["canvas"], sizes["canvas"])


def region_boxes(sizes: Sizes) -> Tensor:
    """Rows (boxes, 5) in pixels of a picture of the pyramid, on torch's default device."""
    draw = random_boxes if sizes["large"] else level_boxes
    return _drawn(draw, sizes["images"], sizes["boxes"] // sizes["images"], *LEVEL_PICTURE)


def _drawn(draw: Callable[..., Tensor], *arguments: int) -> Tensor:
    # The generator is one of the CPU, so what it is given must be there, too.
    with CPU:
        rows = draw(*arguments, CPU)
    return rows.to(torch.get_default_device())


def pooled_cells(sizes: Sizes) -> tuple[tuple[int, int], ...]:
    """Of each stage, over all pictures: cells that any box of the picture has a weight on, and those of each box."""
    return _pooled_cells(tuple(sorted(sizes.items())))


@functools.cache
def _pooled_cells(items: tuple[tuple[str, int], ...]) -> tuple[tuple[int, int], ...]:
    sizes = dict(items)
    shapes = stage_shapes(sizes)
    with CPU:
        index, x1, y1, x2, y2 = picture_boxes(sizes).unbind(1)
        scale, (height, width) = shapes[0][3] / sizes["canvas"], shapes[0][2:]
        rows = axis_weights(axis_samples(y1, y2, scale, BINS, -1, False, per_bin=False), height)
        columns = axis_weights(axis_samples(x1, x2, scale, BINS, -1, False, per_bin=False), width)
        return tuple(
            _counted(index, upsampled_weights(rows, shape[2]) != 0, upsampled_weights(columns, shape[3]) != 0)
            for shape in shapes
        )


def region_cells(sizes: Sizes) -> int:
    """Cells of the map that any box of their picture samples, over all pictures."""
    return _region_cells(tuple(sorted(sizes.items())))


@functools.cache
def _region_cells(items: tuple[tuple[str, int], ...]) -> int:
    sizes = dict(items)
    scale, aligned = sizes["width"] / LEVEL_PICTURE[0], bool(sizes["aligned"])
    with CPU:
        index, x1, y1, x2, y2 = region_boxes(sizes).unbind(1)
        rows, columns = (
            axis_weights(
                axis_samples(low, high, scale, sizes["side"], sizes["ratio"], aligned, per_bin=True), size
            )
            for low, high, size in ((y1, y2, sizes["height"]), (x1, x2, sizes["width"]))
        )
        return _counted(index, (rows != 0).any(1), (columns != 0).any(1))[0]


def _counted(index: Tensor, rows: Tensor, columns: Tensor) -> tuple[int, int]:
    """Cells of all boxes together and of each alone, from the rows (K, H) and columns (K, W) that boxes touch."""
    together = 0
    for image in index.unique():
        own = index == image
        together += int((rows[own].float().T @ columns[own].float()).count_nonzero())
    return together, int((rows.sum(1) * columns.sum(1)).sum())
