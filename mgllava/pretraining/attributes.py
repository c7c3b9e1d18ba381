"""What there is to know about a thing, as numbers: targets of the towers, symbols for the language model."""

from collections.abc import Sequence

import numpy as np

from ..scenes import CANVAS, COLOURS, KINDS, Scene, Thing

__all__ = [
    "CELL_SIZE",
    "CLASSES",
    "NONE",
    "POSITION_BINS",
    "REGION_SIZE",
    "cell_labels",
    "classes_of",
    "one_hot_places",
    "position_of",
]

NONE = -100  # a thing without this attribute; cross entropy leaves it out

CLASSES: dict[str, tuple[str, ...]] = {
    "kind": (*KINDS, "nothing"),
    "colour": tuple(COLOURS),
    "digit": tuple("0123456789"),
    "frame": (*COLOURS, "none"),
}
POSITION_BINS = 16  # for each of x and y: 16 pixels apart, values in between shared by the two nearest
CELL_SIZE = sum(map(len, CLASSES.values()))
REGION_SIZE = CELL_SIZE + 2 * POSITION_BINS


def classes_of(thing: Thing | None) -> list[int]:
    """The index of each attribute in `CLASSES`, `NONE` where it does not apply; texture is of kind `nothing`."""
    if thing is None:
        return [CLASSES["kind"].index("nothing"), NONE, NONE, NONE]
    has_digit = thing.digit is not None
    return [
        CLASSES["kind"].index(thing.kind),
        CLASSES["colour"].index(thing.colour),
        thing.digit if has_digit else NONE,
        CLASSES["frame"].index(thing.frame or "none") if has_digit else NONE,
    ]


def position_of(centre: float, side: float) -> np.ndarray:
    """A coordinate as shares of `POSITION_BINS` bins, (bins,) float32, at most two of them not zero."""
    place = min(max(centre / side * POSITION_BINS - 0.5, 0.0), POSITION_BINS - 1.0)
    return np.maximum(0.0, 1.0 - np.abs(np.arange(POSITION_BINS) - place)).astype(np.float32)


def cell_labels(scene: Scene, grid: int) -> np.ndarray:
    """What has its centre in each cell, (grid², `CELL_SIZE`) of zeros and ones, row by row; else `nothing`."""
    labels = np.zeros((grid, grid, CELL_SIZE), dtype=np.float32)
    for thing in scene.things:
        column, row = (min(int(value / CANVAS * grid), grid - 1) for value in thing.centre)
        labels[row, column, one_hot_places(classes_of(thing))] = 1
    empty = ~labels.any(axis=-1)
    labels[empty, CLASSES["kind"].index("nothing")] = 1
    return labels.reshape(grid * grid, CELL_SIZE)


def one_hot_places(classes: Sequence[int]) -> list[int]:
    """Where a thing's attributes stand in a vector of all classes."""
    starts = np.cumsum([0, *map(len, CLASSES.values())])
    return [int(start) + value for start, value in zip(starts, classes, strict=False) if value != NONE]
