"""A sheet of scenes with the boxes the model gets, numbered in the order of its object tokens."""

from PIL import Image

from ..objects.boxes import detections_to_boxes
from ..objects.draw import Mark, draw_marks
from .detections import detect, things_of_boxes
from .objects import CANVAS
from .render import render
from .scene import Scene, sample_scene

__all__ = ["draw_boxes", "draw_sheet"]

SPACE = 8
ON_THING, ON_TEXTURE = (120, 255, 120), (170, 170, 170)


def draw_sheet(split: str, *, first: int = 0, columns: int = 4, rows: int = 3, scale: int = 2) -> Image.Image:
    """Scenes `first` and following, enlarged `scale` times without smoothing; boxes on texture are grey.

    Raises:
        ValueError: unknown split, or a number below its least.
    """
    if min(columns, rows, scale) < 1:
        raise ValueError(
            f"columns, rows and scale are {columns}, {rows} and {scale}; expected at least 1 of each"
        )
    step = CANVAS * scale + SPACE
    sheet = Image.new("RGB", (columns * step + SPACE, rows * step + SPACE), "white")
    for number in range(columns * rows):
        scene = sample_scene(split, first + number)
        corner = (SPACE + number % columns * step, SPACE + number // columns * step)
        sheet.paste(draw_boxes(scene, scale), corner)
    return sheet


def draw_boxes(scene: Scene, scale: int = 2) -> Image.Image:
    """The scene's picture, enlarged, with its boxes."""
    detections = detect(scene)
    boxes, _ = detections_to_boxes(**detections.as_dict(), image_size=(CANVAS, CANVAS), high_res_size=CANVAS)
    things = things_of_boxes(scene, detections)
    marks = [
        Mark([edge * scale for edge in box], str(number), ON_TEXTURE if thing is None else ON_THING)
        for number, (box, thing) in enumerate(zip(boxes.tolist(), things, strict=True), start=1)
    ]
    picture = render(scene).resize((CANVAS * scale, CANVAS * scale), Image.Resampling.NEAREST)
    return draw_marks(picture, marks)
