"""Crowded scenes: many things to look at, and no questions about them."""

from random import Random

from .digits import check_split, pictures_of
from .objects import CANVAS, COLOURS, DIGIT, SHAPES
from .scene import FRAMED_SHARE, Scene, Thing, draw_background, draw_size, extent_of

__all__ = ["CROWD_SIDES", "sample_crowd"]

CROWD_SIDES = (6, 9)  # things in a row, and rows
DIGIT_SHARE = 0.5
SPACE = 1.0  # pixels between a thing and the edge of its cell


def sample_crowd(split: str, index: int, rows: int) -> Scene:
    """Crowd number `index` of a split: one thing somewhere in each cell of a grid, of any size that fits.

    Half of the things are digits. For learning what things look like, a picture shows `rows`² at the price of ten.

    Args:
        split: `train`, `validation` or `test`.
        index: from 0 on.
        rows: and columns of the grid, one of `CROWD_SIDES`.

    Raises:
        ValueError: unknown split, negative index, or rows in which not all small things fit.
    """
    check_split(split)
    if index < 0:
        raise ValueError(f"index is {index}; expected 0 or more")
    if rows not in CROWD_SIDES:
        raise ValueError(f"rows are {rows}; expected one of {CROWD_SIDES}")
    rng = Random(f"crowd of {rows} rows {split} {index}")
    side = CANVAS / rows
    things = []
    for cell in range(rows**2):
        attributes = _attributes(rng, split)
        while True:
            sized = draw_size(rng, attributes)
            left, top, right, bottom = extent_of(sized)
            if max(right - left, bottom - top) <= side - 2 * SPACE:
                break
        row, column = divmod(cell, rows)
        x = rng.uniform(side * column + SPACE - left, side * (column + 1) - SPACE - right)
        y = rng.uniform(side * row + SPACE - top, side * (row + 1) - SPACE - bottom)
        things.append(Thing(**sized, centre=(x, y), box=(left + x, top + y, right + x, bottom + y)))
    rng.shuffle(things)
    return Scene(split, index, draw_background(rng), tuple(things))


def _attributes(rng: Random, split: str) -> dict:
    colour = rng.choice(list(COLOURS))
    if rng.random() >= DIGIT_SHARE:
        return {"kind": rng.choice(list(SHAPES)), "colour": colour}
    frame = rng.choice([other for other in COLOURS if other != colour])
    value = rng.randrange(10)
    return {
        "kind": DIGIT,
        "colour": colour,
        "digit": value,
        "picture": rng.choice(pictures_of(split, value)),
        "frame": frame if rng.random() < FRAMED_SHARE else None,
    }
