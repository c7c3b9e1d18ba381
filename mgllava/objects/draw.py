"""Boxes drawn on pictures: detections as they are, and what the model gets of them."""

import colorsys
import math
import zlib
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from PIL import Image, ImageDraw, ImageFont

from .boxes import check_detections, select_detections

__all__ = ["Mark", "colour_of", "draw_detections", "draw_marks", "explain_selection"]

Colour = tuple[int, int, int]
Rectangle = tuple[float, float, float, float]

DROPPED: Colour = (200, 200, 200)
LONGEST_TEXT = 40


class Mark(NamedTuple):
    """One box of a drawing.

    Attributes:
        box: x1, y1, x2, y2 in pixels of the picture; what lies outside of it shows at its border.
        text: what stands beside it; may be empty.
        colour: red, green and blue, 0..255.
        dashed: whether the outline is, with black between the dashes: it shows on any ground.
    """

    box: Sequence[float]
    text: str
    colour: Colour
    dashed: bool = False


def draw_detections(
    picture: Image.Image, boxes: Any, labels: Sequence[str] | None = None, scores: Any = None
) -> Image.Image:
    """A picture with detections, each with its label and score, in a colour that belongs to the label.

    Args:
        picture: upright, of any mode; stays as it is.
        boxes: (N, 4) numbers `x1, y1, x2, y2` in pixels of the picture.
        labels: N names.
        scores: N numbers.

    Returns:
        An RGB picture of the same size.

    Raises:
        ValueError: boxes, labels or scores of the wrong form.
    """
    rows, names, values = check_detections(boxes, labels, scores)
    texts = [_text(name, value) for name, value in zip(names, _scores(values, len(rows)), strict=True)]
    marks = [
        Mark(box, text, colour_of(name)) for box, text, name in zip(rows.tolist(), texts, names, strict=True)
    ]
    return draw_marks(picture, marks)


def explain_selection(
    picture: Image.Image,
    boxes: Any,
    labels: Sequence[str] | None = None,
    scores: Any = None,
    **selection: Any,
) -> Image.Image:
    """A picture with the boxes the model gets, numbered in the order of its object tokens, and with those it does not.

    The latter are grey and dashed, with the reason in front of their label: `overlap` with a better box of that label,
    the `limit` per label, or `outside` of the canvas.

    Args:
        picture, boxes, labels, scores: as `draw_detections` takes them.
        selection: `high_res_size`, `iou_threshold`, `max_objects`, `max_per_category`, `best_per_label` where they
            differ from the defaults of `select_detections`.

    Returns:
        An RGB picture of the same size.

    Raises:
        ValueError: boxes, labels or scores of the wrong form.
        RuntimeError: torchvision, which does the suppression, cannot be imported.
    """
    rows, names, values = check_detections(boxes, labels, scores)
    selected = select_detections(rows, names, values, image_size=(picture.height, picture.width), **selection)
    texts = [_text(name, value) for name, value in zip(names, _scores(values, len(rows)), strict=True)]
    corners = rows.tolist()
    marks = [
        Mark(corners[index], f"{reason} {texts[index]}", DROPPED, dashed=True)
        for index, reason in selected.dropped.items()
    ]
    marks += [
        Mark(corners[index], f"{number} {texts[index]}", colour_of(names[index]))
        for number, index in enumerate(selected.kept, start=1)
    ]
    return draw_marks(picture, marks)


def draw_marks(picture: Image.Image, marks: Iterable[Mark]) -> Image.Image:
    """An RGB copy of a picture with marks; later ones lie above earlier ones, and texts above all outlines."""
    marks = list(marks)
    drawn = picture.convert("RGB") if picture.mode != "RGB" else picture.copy()
    draw = ImageDraw.Draw(drawn)
    unit = math.sqrt(drawn.width * drawn.height)
    width, font = max(1, round(unit / 400)), _font(max(10, round(unit / 45)))
    for mark in marks:
        outline = _outline(mark.box, drawn.size, width)
        if mark.dashed:
            _draw_dashed(draw, outline, mark.colour, width)
        else:
            draw.rectangle(outline, outline=mark.colour, width=width)
    places: list[Rectangle] = []
    written = [mark for mark in marks if mark.text]
    for mark in reversed(written):  # the last ones choose first
        places.append(
            _place_text(draw, mark, _outline(mark.box, drawn.size, width), font, drawn.size, places)
        )
    for mark, place in zip(written, reversed(places), strict=True):
        draw.rectangle(place, fill=mark.colour)
        draw.text((place[0] + 1, place[1]), mark.text, fill=_readable_on(mark.colour), font=font, anchor="la")
    return drawn


def colour_of(label: str) -> Colour:
    """A bright colour, the same for the same label everywhere."""
    number = zlib.crc32(str(label).encode(errors="replace"))
    hue, lightness = number % 360 / 360, (0.45, 0.55, 0.65)[number // 360 % 3]
    red, green, blue = colorsys.hls_to_rgb(hue, lightness, 0.9)
    return round(red * 255), round(green * 255), round(blue * 255)


def _scores(values: Any, count: int) -> list[float | None]:
    return [None] * count if values is None else values.tolist()


def _text(label: str, score: float | None) -> str:
    name = " ".join(str(label).split())
    name = name if len(name) <= LONGEST_TEXT else f"{name[: LONGEST_TEXT - 1]}…"
    return name if score is None else f"{name} {score:.2f}".strip()


def _outline(box: Sequence[float], size: tuple[int, int], width: int) -> tuple[int, int, int, int]:
    """The pixels around a box, as far as they are in the picture."""
    right, bottom = size[0] - 1, size[1] - 1
    x1, y1 = math.floor(box[0]) - width, math.floor(box[1]) - width
    x2, y2 = math.ceil(box[2]) - 1 + width, math.ceil(box[3]) - 1 + width
    x1, y1 = min(max(x1, 0), right), min(max(y1, 0), bottom)
    return x1, y1, min(max(x2, x1), right), min(max(y2, y1), bottom)


def _draw_dashed(
    draw: ImageDraw.ImageDraw, outline: tuple[int, int, int, int], colour: Colour, width: int
) -> None:
    x1, y1, x2, y2 = outline
    dash = 4 * width
    draw.rectangle(outline, outline=(0, 0, 0), width=width)
    for start in range(x1, x2 + 1, 2 * dash):
        end = min(start + dash - 1, x2)
        draw.rectangle((start, y1, end, min(y1 + width - 1, y2)), fill=colour)
        draw.rectangle((start, max(y2 - width + 1, y1), end, y2), fill=colour)
    for start in range(y1, y2 + 1, 2 * dash):
        end = min(start + dash - 1, y2)
        draw.rectangle((x1, start, min(x1 + width - 1, x2), end), fill=colour)
        draw.rectangle((max(x2 - width + 1, x1), start, x2, end), fill=colour)


def _place_text(
    draw: ImageDraw.ImageDraw,
    mark: Mark,
    outline: tuple[int, int, int, int],
    font: Any,
    size: tuple[int, int],
    taken: Sequence[Rectangle],
) -> Rectangle:
    """Above the box, below it, or inside: the first place where no other text is."""
    _, _, text_width, text_height = draw.textbbox((0, 0), mark.text, font=font, anchor="la")
    wide, high = math.ceil(text_width) + 2, math.ceil(text_height) + 1
    x1, y1, x2, y2 = outline
    places = []
    for x, y in (
        (x1, y1 - high),
        (x1, y2 + 1),
        (x2 - wide, y1 - high),
        (x2 - wide, y2 + 1),
        (x1, y1),
        (x2 - wide, y2 - high),
    ):
        x, y = max(0, min(x, size[0] - wide)), max(0, min(y, size[1] - high))
        places.append((x, y, x + wide - 1, y + high - 1))
    free = (place for place in places if not any(_meet(place, other) for other in taken))
    return next(free, places[0])


def _meet(one: Rectangle, other: Rectangle) -> bool:
    return one[0] <= other[2] and other[0] <= one[2] and one[1] <= other[3] and other[1] <= one[3]


def _readable_on(colour: Colour) -> Colour:
    """Black or white, whichever has the higher contrast as WCAG 2.1 defines it: at least 4.5."""
    linear = [v / 12.92 if v <= 0.03928 else ((v + 0.055) / 1.055) ** 2.4 for v in (c / 255 for c in colour)]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return (0, 0, 0) if luminance > 0.179 else (255, 255, 255)


@lru_cache(maxsize=32)
def _font(size: int) -> Any:
    return ImageFont.load_default(size)
