"""Pictures of scenes: textured background, anti-aliased shapes, handwritten digits scaled up smoothly."""

import math

import numpy as np
from PIL import Image, ImageDraw

from .digits import digit_picture, ink_bounds
from .objects import CANVAS, COLOURS
from .scene import Background, Scene, Thing, frame_width, outlines
from .textures import TEXTURES

__all__ = ["render"]

SUPERSAMPLING = 4
DIGIT_BORDER = 2  # empty pixels around the 8x8 picture, for the bicubic filter
# Coverage of the ink at which a stroke starts and is full: scaled-up strokes are soft, this sharpens them.
FAINTEST, FULL = 0.22, 0.68

Mask = tuple[np.ndarray, int, int]  # (height, width) coverage from 0 to 1, and its left and top edge


def render(scene: Scene) -> Image.Image:
    """The scene's picture: RGB, `CANVAS` pixels square."""
    pixels = _background(scene.background)
    for thing in scene.things:
        colour = np.array(COLOURS[thing.colour], np.float32) + np.array(thing.shade, np.float32)
        if thing.picture is not None:
            if thing.frame is not None:
                _paint(pixels, _frame(thing), np.array(COLOURS[thing.frame], np.float32))
            _paint(pixels, _digit(thing, thing.picture), colour)
        else:
            _paint(pixels, _polygons(outlines(thing), thing.box), colour)
    channels = np.clip(pixels + 0.5, 0, 255).astype(np.uint8)
    return Image.merge("RGB", [Image.fromarray(channel) for channel in channels])


def _paint(pixels: np.ndarray, mask: Mask, colour: np.ndarray) -> None:
    """Lay a colour over the part of `pixels` (3, height, width) that the mask covers."""
    coverage, left, top = mask
    height, width = coverage.shape
    region = pixels[:, top : top + height, left : left + width]
    region += coverage * (colour[:, None, None] - region)


def _polygons(rings: list[list[tuple[float, float]]], box: tuple[float, float, float, float]) -> Mask:
    left, top, width, height = _cover(box)
    image = Image.new("L", (width * SUPERSAMPLING, height * SUPERSAMPLING))
    draw = ImageDraw.Draw(image)
    for ring, fill in zip(rings, (255, 0), strict=False):
        # A pixel's centre is half a pixel in from its edge, where its coordinates count from.
        points = [((x - left) * SUPERSAMPLING - 0.5, (y - top) * SUPERSAMPLING - 0.5) for x, y in ring]
        draw.polygon(points, fill=fill)
    return np.asarray(image.reduce(SUPERSAMPLING), np.float32) / 255, left, top


def _frame(thing: Thing) -> Mask:
    left, top, right, bottom = thing.box
    border = frame_width(thing.height)
    rings = [
        [(x1, y1), (x2, y1), (x2, y2), (x1, y2)]
        for x1, y1, x2, y2 in (
            (left, top, right, bottom),
            (left + border, top + border, right - border, bottom - border),
        )
    ]
    return _polygons(rings, thing.box)


def _digit(thing: Thing, picture: int) -> Mask:
    """The digit's ink, tilted and scaled so that its bounds have the thing's width and height."""
    reach = math.hypot(thing.width, thing.height) / 2 + 1
    x, y = thing.centre
    left, top, width, height = _cover((x - reach, y - reach, x + reach, y + reach))
    first_column, first_row, last_column, last_row = ink_bounds(picture)
    scale_x = (last_column - first_column) / thing.width
    scale_y = (last_row - first_row) / thing.height
    cosine, sine = math.cos(thing.angle), math.sin(thing.angle)
    # From a pixel of the patch back to the digit's picture: turn, scale, shift to the middle of the ink.
    a, b = cosine * scale_x, sine * scale_x
    d, e = -sine * scale_y, cosine * scale_y
    c = (first_column + last_column) / 2 + DIGIT_BORDER - a * (x - left) - b * (y - top)
    f = (first_row + last_row) / 2 + DIGIT_BORDER - d * (x - left) - e * (y - top)
    ink = np.pad(digit_picture(picture), DIGIT_BORDER)
    scaled = Image.fromarray(ink).transform(
        (width, height), Image.Transform.AFFINE, (a, b, c, d, e, f), Image.Resampling.BICUBIC
    )
    return np.clip((np.asarray(scaled) - FAINTEST) / (FULL - FAINTEST), 0, 1), left, top


def _cover(box: tuple[float, float, float, float]) -> tuple[int, int, int, int]:
    """Left, top, width and height of the whole pixels that cover the part of the box on the canvas."""
    left, top = max(math.floor(box[0]), 0), max(math.floor(box[1]), 0)
    right, bottom = min(math.ceil(box[2]), CANVAS), min(math.ceil(box[3]), CANVAS)
    return left, top, right - left, bottom - top


def _background(background: Background) -> np.ndarray:
    rng = np.random.default_rng(background.seed)
    pattern = TEXTURES[background.texture](rng)
    grain = rng.integers(-64, 64, (CANVAS, CANVAS), dtype=np.int8).astype(np.float32) / 256
    tint = 1 + rng.uniform(-0.35, 0.35, 3).astype(np.float32)
    level = background.contrast * (pattern + grain)
    return np.array(background.colour, np.float32)[:, None, None] + level * tint[:, None, None]
