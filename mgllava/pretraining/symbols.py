"""Scenes as symbols: what an ideal pair of towers would say of every cell and every box."""

from collections.abc import Iterable, Sequence

import numpy as np
from torch import Tensor

from ..scenes import CANVAS, PLACES, Scene, Thing
from ..scenes.objects import place_of
from .attributes import CLASSES, POSITION_BINS, classes_of, position_of

__all__ = ["SYMBOL_SIZE", "SYMBOL_WORDS", "symbols_of_boxes", "symbols_of_cells"]

# What has a word of its own: kinds, colours of things, digits, and the words that make up places.
_NAMES = [word for name, words in CLASSES.items() if name != "frame" for word in words]
SYMBOL_WORDS: tuple[str, ...] = (*_NAMES, *dict.fromkeys(word for place in PLACES for word in place.split()))
_FRAMES = len(SYMBOL_WORDS)
_X = _FRAMES + len(CLASSES["frame"])
SYMBOL_SIZE = _X + 2 * POSITION_BINS


def symbols_of_boxes(things: Sequence[Thing | None], boxes: Tensor) -> np.ndarray:
    """What each box shows and where it is, (K, `SYMBOL_SIZE`) float32: ones for its words and its frame's colour,
    then the shares of x and y.

    Args:
        things: as `things_of_boxes` returns them.
        boxes: (K, 4) in pixels of the scene's canvas.
    """
    centres = ((boxes[:, :2] + boxes[:, 2:]) / 2).tolist()
    return np.stack([_symbol([thing], x, y) for thing, (x, y) in zip(things, centres, strict=True)])


def symbols_of_cells(scene: Scene, grid: int) -> np.ndarray:
    """The same of each cell of a grid, (grid², `SYMBOL_SIZE`): all that has its centre in it, and where it is."""
    held: dict[tuple[int, int], list[Thing | None]] = {}
    for thing in scene.things:
        column, row = (min(int(value / CANVAS * grid), grid - 1) for value in thing.centre)
        held.setdefault((row, column), []).append(thing)
    side = CANVAS / grid
    return np.stack(
        [
            _symbol(held.get((row, column), [None]), (column + 0.5) * side, (row + 0.5) * side)
            for row in range(grid)
            for column in range(grid)
        ]
    )


def _symbol(things: Iterable[Thing | None], x: float, y: float) -> np.ndarray:
    symbol = np.zeros(SYMBOL_SIZE, dtype=np.float32)
    words = place_of(x, y).split()
    for thing in things:
        if thing is None:
            words.append("nothing")
            continue
        words += [thing.kind, thing.colour]
        if thing.digit is not None:
            words.append(str(thing.digit))
            symbol[_FRAMES + classes_of(thing)[-1]] = 1
    symbol[[SYMBOL_WORDS.index(word) for word in words]] = 1
    symbol[_X : _X + POSITION_BINS] = position_of(x, CANVAS)
    symbol[_X + POSITION_BINS :] = position_of(y, CANVAS)
    return symbol
