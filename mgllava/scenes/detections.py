"""What an object detector would report on a scene: the truth with its usual faults."""

from dataclasses import dataclass
from random import Random
from typing import Any

from ..objects.boxes import select_detections
from .objects import CANVAS, KINDS
from .scene import Box, Scene, Thing

__all__ = ["Detections", "detect", "jittered", "things_of_boxes"]

MISSED_SHARE = 0.03
DUPLICATE_SHARE = 0.12
FALSE_POSITIVES = (0, 1, 2)
JITTER, DUPLICATE_JITTER = 0.04, 0.10  # standard deviation of an edge, as a share of the box's side
SCORES, DUPLICATE_SCORES, FALSE_SCORES = (0.45, 0.99), (0.30, 0.70), (0.30, 0.60)


@dataclass(frozen=True)
class Detections:
    """Raw detections of one picture, before any selection.

    Attributes:
        boxes: x1, y1, x2, y2 in pixels of the picture.
        labels: the kind the detector takes each for.
        scores: between 0 and 1.
        sources: for each box the index of its thing in the scene, `None` where there is only texture.
    """

    boxes: tuple[Box, ...]
    labels: tuple[str, ...]
    scores: tuple[float, ...]
    sources: tuple[int | None, ...]

    def as_dict(self) -> dict[str, Any]:
        """The form `MGLlavaProcessor` and `load_detections` take, without the sources."""
        return {
            "boxes": [list(box) for box in self.boxes],
            "labels": list(self.labels),
            "scores": list(self.scores),
        }


def detect(scene: Scene) -> Detections:
    """The detections of a scene; the same for the same scene.

    Every thing is missed with the same probability, whatever it is, so that the number of boxes says nothing
    about what they hold.
    """
    rng = Random(f"detections {scene.split} {scene.index}")
    found: list[tuple[Box, str, float, int | None]] = []
    for index, thing in enumerate(scene.things):
        missed, duplicated = rng.random() < MISSED_SHARE, rng.random() < DUPLICATE_SHARE
        box, score = jittered(rng, thing.box, JITTER), _score(rng, SCORES)
        duplicate, lower_score = jittered(rng, thing.box, DUPLICATE_JITTER), _score(rng, DUPLICATE_SCORES)
        if not missed:
            found.append((box, thing.kind, score, index))
            if duplicated:
                found.append((duplicate, thing.kind, lower_score, index))
    for _ in range(rng.choice(FALSE_POSITIVES)):
        found.append((_on_texture(rng, scene.things), rng.choice(KINDS), _score(rng, FALSE_SCORES), None))
    rng.shuffle(found)
    boxes, labels, scores, sources = zip(*found, strict=True) if found else ((), (), (), ())
    return Detections(boxes, labels, scores, sources)


def things_of_boxes(
    scene: Scene, detections: Detections, high_res_size: int = CANVAS, **selection: Any
) -> list[Thing | None]:
    """What each box the model gets shows, in the order of its object tokens.

    Args:
        scene: what was detected.
        detections: of that scene.
        high_res_size: side of the model's canvas.
        selection: `iou_threshold`, `max_objects`, `max_per_category` where the model's differ from the defaults of
            `select_detections`.

    Returns:
        One entry for each box: its thing, or `None` for texture and for the one empty box that stands for no
        detection.
    """
    selected = select_detections(
        **detections.as_dict(), image_size=(CANVAS, CANVAS), high_res_size=high_res_size, **selection
    )
    sources = [detections.sources[index] for index in selected.kept] or [None]
    return [None if source is None else scene.things[source] for source in sources]


def jittered(rng: Random, box: Box, deviation: float = JITTER) -> Box:
    """A box as a detector finds it: each edge off by a share of the side, clipped to the canvas."""
    width, height = box[2] - box[0], box[3] - box[1]
    left, right = (edge + rng.gauss(0, deviation * width) for edge in (box[0], box[2]))
    top, bottom = (edge + rng.gauss(0, deviation * height) for edge in (box[1], box[3]))
    return _on_canvas(left, top, right, bottom)


def _on_texture(rng: Random, things: tuple[Thing, ...]) -> Box:
    """A box that touches no thing."""
    while True:
        width, height = rng.uniform(10, 40), rng.uniform(10, 40)
        x, y = rng.uniform(0, CANVAS - width), rng.uniform(0, CANVAS - height)
        box = _on_canvas(x, y, x + width, y + height)
        if not any(
            box[0] < thing.box[2]
            and thing.box[0] < box[2]
            and box[1] < thing.box[3]
            and thing.box[1] < box[3]
            for thing in things
        ):
            return box


def _on_canvas(left: float, top: float, right: float, bottom: float) -> Box:
    """Clipped to the picture and rounded as an annotation file would hold it."""
    left, top, right, bottom = (round(min(max(edge, 0.0), CANVAS), 2) for edge in (left, top, right, bottom))
    return left, top, right, bottom


def _score(rng: Random, limits: tuple[float, float]) -> float:
    return round(rng.uniform(*limits), 4)
