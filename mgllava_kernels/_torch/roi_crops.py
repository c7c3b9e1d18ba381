"""RoIAlign on the CPU: each box reads only the rows and columns its weights touch.

A box costs two small matrix products: first over the rows, then over the columns of a channels-last map, of which
it takes a view; of maps of another layout or dtype it copies the cells. Boxes come one after the other, so sums have
one fixed order.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

Crop = tuple[int, int, slice, slice]


def crops(image_index: Tensor, weights_y: Tensor, weights_x: Tensor) -> Iterator[Crop]:
    """Yield (box, image, rows, columns) for every box that touches its map.

    Args:
        image_index: (K,); weights_y: (K, bins, H); weights_x: (K, bins, W), on the CPU.
    """
    spans = [image_index.long()]
    for weights in (weights_y, weights_x):
        touched = weights.any(dim=1)
        order = touched.to(torch.uint8)  # argmax takes no booleans
        first, last = order.argmax(dim=1), order.shape[1] - order.flip(1).argmax(dim=1)
        spans += [first, torch.where(touched.any(dim=1), last, first)]
    for box, (image, top, bottom, left, right) in enumerate(torch.stack(spans, dim=1).tolist()):
        if bottom > top and right > left:
            yield box, image, slice(top, bottom), slice(left, right)


def align(maps: Tensor, image_index: Tensor, weights_y: Tensor, weights_x: Tensor) -> Tensor:
    """Bins of every box, (K, bins_y, bins_x, C), from maps (B, H, W, C): w_y · F · w_xᵀ, in the weights' dtype."""
    channels = maps.shape[-1]
    output = weights_y.new_zeros(len(image_index), weights_y.shape[1], weights_x.shape[1], channels)
    for box, image, rows, columns in crops(image_index, weights_y, weights_x):
        by_row = maps[image, rows, columns].to(output.dtype).flatten(1)
        partial = (weights_y[box, :, rows] @ by_row).unflatten(1, (-1, channels))
        torch.matmul(weights_x[box, :, columns], partial, out=output[box])
    return output


def align_backward(
    grad: Tensor, result: Tensor, image_index: Tensor, weights_y: Tensor, weights_x: Tensor
) -> None:
    """Add w_yᵀ · grad · w_x of every box to `result` (B, H, W, C); `grad` is (K, bins_y, bins_x, C)."""
    for box, image, rows, columns in crops(image_index, weights_y, weights_x):
        partial = weights_x[box, :, columns].T @ grad[box]
        result[image, rows, columns].flatten(1).addmm_(weights_y[box, :, rows].T, partial.flatten(1))
