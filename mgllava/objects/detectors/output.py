"""From what a model or an algorithm says to `Detections`."""

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from ..detector import Detections

__all__ = ["target_sizes", "to_detections"]


def target_sizes(pictures: Sequence[Image.Image]) -> list[tuple[int, int]]:
    """Height and width of each, as the `post_process_*` methods of transformers take them."""
    return [(picture.height, picture.width) for picture in pictures]


def to_detections(boxes: Tensor, labels: Sequence[str], scores: Tensor, size: tuple[int, int]) -> Detections:
    """Clip boxes to the picture, drop those that miss it (in the padding, say), sort by falling score.

    Args:
        boxes: (N, 4) x1, y1, x2, y2 in pixels.
        labels: N names.
        scores: (N,).
        size: width and height of the picture.
    """
    width, height = size
    order = torch.sort(scores, descending=True, stable=True).indices.tolist()
    rows, values = boxes.tolist(), scores.tolist()
    kept = [
        index
        for index in order
        if rows[index][0] < width and rows[index][1] < height and rows[index][2] > 0 and rows[index][3] > 0
    ]
    clipped = [
        (max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height)))
        for x1, y1, x2, y2 in (rows[index] for index in kept)
    ]
    return Detections(
        tuple(clipped), tuple(labels[index] for index in kept), tuple(values[index] for index in kept)
    )
