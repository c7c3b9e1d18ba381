"""Textures by name: each makes a (CANVAS, CANVAS) float32 pattern from about -1 to 1."""

import math
from collections.abc import Callable

import numpy as np
from PIL import Image

from .objects import CANVAS

__all__ = ["TEXTURES"]


def _axes(rng: np.random.Generator, period: float) -> tuple[np.ndarray, np.ndarray]:
    """Phases, in full turns, along two perpendicular axes of random direction."""
    angle = rng.uniform(0, math.pi)
    line = np.arange(CANVAS, dtype=np.float32)
    x, y = line[None, :], line[:, None]
    cosine, sine = math.cos(angle) / period, math.sin(angle) / period
    return cosine * x + sine * y + rng.random(), cosine * y - sine * x + rng.random()


def _noise(rng: np.random.Generator, side: int) -> np.ndarray:
    """Smooth noise whose details are `CANVAS / side` pixels wide, from -1 to 1."""
    values = Image.fromarray(rng.uniform(-1, 1, (side, side)).astype(np.float32))
    return np.asarray(values.resize((CANVAS, CANVAS), Image.Resampling.BICUBIC))


def _wave(phase: np.ndarray) -> np.ndarray:
    """A triangle wave from -1 to 1, of period 1."""
    return np.abs(phase - np.floor(phase) - 0.5) * 4 - 1


def _grain(rng: np.random.Generator) -> np.ndarray:
    return _noise(rng, 128)


def _clouds(rng: np.random.Generator) -> np.ndarray:
    return 0.75 * _noise(rng, 6) + 0.4 * _noise(rng, 24)


def _stripes(rng: np.random.Generator) -> np.ndarray:
    return _wave(_axes(rng, rng.uniform(7, 26))[0])


def _checks(rng: np.random.Generator) -> np.ndarray:
    along, across = _axes(rng, rng.uniform(14, 44))
    return np.clip(6 * _wave(along) * _wave(across), -1, 1)


def _dots(rng: np.random.Generator) -> np.ndarray:
    along, across = _axes(rng, rng.uniform(12, 30))
    return np.clip(2.5 * (_wave(along) + _wave(across)) - 1.2, -1, 1)


def _bricks(rng: np.random.Generator) -> np.ndarray:
    height = rng.uniform(12, 26)
    rows = np.arange(CANVAS, dtype=np.float32)[:, None] / height + rng.random()
    columns = np.arange(CANVAS, dtype=np.float32)[None, :] / (2.2 * height) + 0.5 * (np.floor(rows) % 2)
    to_edge = np.minimum(1 - _wave(rows), 2.2 * (1 - _wave(columns))) * height / 4  # in pixels
    return np.clip(to_edge - 1, -1, 0.6)


def _waves(rng: np.random.Generator) -> np.ndarray:
    along, across = _axes(rng, rng.uniform(10, 26))
    return _wave(along + 0.6 * np.abs(_wave(across / 2.5)))


TEXTURES: dict[str, Callable[[np.random.Generator], np.ndarray]] = {
    "grain": _grain,
    "clouds": _clouds,
    "stripes": _stripes,
    "checks": _checks,
    "dots": _dots,
    "bricks": _bricks,
    "waves": _waves,
}
