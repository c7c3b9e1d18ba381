"""Detections of a few pictures at once, for a conversation about them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from .detector import Detector
from .detectors import DETECTORS
from .draw import explain_selection
from .tags import Tagger

__all__ = ["check_detector", "detect_objects", "draw_selections"]


def check_detector(name: str, has_tags: bool) -> None:
    """Raise ValueError for an unknown detector, and for one that lacks tags or has no use for them."""
    if name not in DETECTORS:
        raise ValueError(f"detector is {name!r}; expected one of {', '.join(DETECTORS)}")
    if DETECTORS[name].needs_tags and not has_tags:
        raise ValueError(
            f"{name} looks for the names it is given; add --tags, such as --tags coco or --tags 'cat, dog'"
        )
    if has_tags and not DETECTORS[name].needs_tags:
        raise ValueError(f"{name} has names of its own; leave --tags out or choose another detector")


def detect_objects(
    pictures: Sequence[Image.Image],
    detector: Detector,
    tagger: Tagger | None = None,
    question: str | None = None,
) -> list[dict[str, Any]]:
    """What the model's processor takes as detections of each picture.

    Args:
        pictures: upright RGB pictures, of any sizes.
        detector: finds the objects.
        tagger: where the detector wants names to look for.
        question: what is asked about the pictures, where the tagger reads it.

    Raises:
        ValueError: the tagger wants a question and there is none.
    """
    tags = None
    if tagger is not None:
        if tagger.needs_questions and question is None:
            raise ValueError(f"tags from {tagger.name} come out of the question; ask it with --prompt")
        questions = [question or ""] * len(pictures) if tagger.needs_questions else None
        tags = tagger(pictures, questions)
    return [found.as_dict() for found in detector(pictures, tags)]


def draw_selections(
    pictures: Sequence[Image.Image],
    detections: Sequence[dict[str, Any] | None],
    names: Sequence[str],
    folder: Path,
    **selection: Any,
) -> list[Path]:
    """Write what the model gets of each picture's detections, and what not and why, as `FOLDER/NAME.png`.

    Args:
        pictures, detections: in the same order; a picture without detections is written as it is.
        names: of the files, without suffix; the same name twice gets numbers.
        selection: as `explain_selection` takes it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    for picture, found, name in zip(pictures, detections, names, strict=True):
        path, number = folder / f"{name}.png", 2
        while path in written:
            path, number = folder / f"{name}-{number}.png", number + 1
        drawn = picture if found is None else explain_selection(picture, **found, **selection)
        drawn.save(path)
        written.append(path)
    return written
