"""Real handwritten digits: 1797 pictures of 8x8 pixels (UCI optical recognition, in scikit-learn), in three splits."""

from functools import cache
from random import Random

import numpy as np

__all__ = ["SPLITS", "check_split", "digit_picture", "ink_bounds", "pictures_of"]

# Share of each digit's pictures. A scene of a split shows pictures of that split alone.
SPLITS = {"train": 0.75, "validation": 0.10, "test": 0.15}

INK = 4  # of 16: what is fainter is no ink when the bounds are taken


def check_split(split: str) -> None:
    """Raise ValueError unless `split` is one of `SPLITS`."""
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; expected one of {', '.join(SPLITS)}")


def digit_picture(picture: int) -> np.ndarray:
    """Picture number `picture` of `load_digits`: (8, 8) float32, 0 for paper to 1 for full ink."""
    return _load()[0][picture]


@cache
def ink_bounds(picture: int) -> tuple[int, int, int, int]:
    """The smallest `x1, y1, x2, y2` in pixels of the 8x8 picture that holds its ink."""
    rows, columns = np.nonzero(digit_picture(picture) >= INK / 16)
    return int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1


@cache
def pictures_of(split: str, value: int) -> tuple[int, ...]:
    """The numbers of the pictures of digit `value` that belong to `split`.

    Raises:
        ValueError: unknown split.
    """
    check_split(split)
    numbers = np.flatnonzero(_load()[1] == value).tolist()
    Random(f"pictures of {value}").shuffle(numbers)
    start = 0
    for name, share in SPLITS.items():
        stop = len(numbers) if name == list(SPLITS)[-1] else start + round(share * len(numbers))
        if name == split:
            break
        start = stop
    return tuple(sorted(numbers[start:stop]))


@cache
def _load() -> tuple[np.ndarray, np.ndarray]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "the digits of the scenes come with scikit-learn, which is not installed; "
            "pip install 'mgllava[train]'"
        ) from error
    digits = load_digits()
    return (digits.images / 16).astype(np.float32), digits.target
