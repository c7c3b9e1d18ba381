"""Detections of a few pictures at once, for a conversation about them: out of files, or by a detector."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from .boxes import load_detections
from .detector import Detector
from .detectors import DETECTORS, load_detector
from .draw import explain_selection
from .drawings import drawing_name, save_drawing
from .tags import Tagger, load_tagger

__all__ = [
    "check_detector",
    "check_sources",
    "detect_missing",
    "detect_objects",
    "draw_selections",
    "gather_detections",
]


def check_sources(
    num_pictures: int,
    boxes: Sequence[Path] | None,
    detector: str | None,
    tags: str | None = None,
    checkpoint: str | None = None,
    question: str | None = None,
) -> None:
    """Raise ValueError for options of a command line that do not name one source of boxes.

    Args:
        num_pictures: how many pictures there are.
        boxes: files, one for each picture.
        detector, tags, checkpoint: names, as `load_detector` and `load_tagger` take them.
        question: what is asked about the pictures, for tags out of it.
    """
    if detector is None and (tags or checkpoint):
        raise ValueError("--tags and --detector-checkpoint are for a detector; add --detector NAME")
    if detector:
        check_detector(detector, tags is not None)
        if not num_pictures:
            raise ValueError(f"--detector {detector} has no picture to look at; add --image FILE")
        if tags == "question" and question is None:
            raise ValueError("--tags question looks for what is asked; ask it with --prompt")
    if detector and boxes:
        raise ValueError("--boxes and --detector are two sources of boxes; give one of them")
    if boxes and len(boxes) != num_pictures:
        raise ValueError(f"{num_pictures} pictures came with {len(boxes)} boxes files; expected one for each")


def gather_detections(
    pictures: Sequence[Image.Image],
    names: Sequence[str],
    boxes: Sequence[Path] | None = None,
    detector: str | None = None,
    tags: str | None = None,
    checkpoint: str | None = None,
    *,
    device: str = "cpu",
    question: str | None = None,
) -> list[dict[str, Any]] | None:
    """Detections of each picture from the source that `check_sources` let pass; None if there is none.

    Args:
        pictures: upright RGB pictures, of any sizes.
        names: of the pictures' files, by which a file that holds many finds theirs.
        boxes, detector, tags, checkpoint: as for `check_sources`.
        device: where the detector runs.
        question: what is asked about the pictures, for tags out of it.

    Raises:
        ValueError, OSError, ImportError: what `load_detections`, `load_detector` and `load_tagger` raise.
    """
    if boxes:
        return [load_detections(path, image=name) for path, name in zip(boxes, names, strict=True)]
    if detector is None or not pictures:
        return None
    tagger = load_tagger(tags, device=device) if tags else None
    found_by = load_detector(detector, checkpoint=checkpoint, device=device)
    found = detect_objects(pictures, found_by, tagger, question)
    del tagger, found_by
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # the language model is placed by what is free
    return found


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


def detect_missing(
    pictures: Sequence[Image.Image],
    detections: Sequence[Mapping[str, Any] | None],
    detector: Detector,
    tags: Sequence[str] | Sequence[Sequence[str]] | None = None,
) -> list[Mapping[str, Any]]:
    """The given detections, and where a picture has none those of the detector.

    Args:
        pictures: upright RGB pictures, of any sizes.
        detections: for each picture its own, or None.
        detector: finds the others in one batch.
        tags: names to look for: a list for all pictures, or one for each; None where the detector wants none.

    Raises:
        ValueError: no tags for a detector that looks for names, tags for another, not one list for each picture, or a
            detector's name instead of a detector.
    """
    if isinstance(detector, str):
        raise ValueError(
            f"detector is {detector!r}; expected a detector: mgllava.objects.load_detector({detector!r}) loads it"
        )
    if detector.needs_tags and tags is None:
        raise ValueError(
            f"detector {detector.name!r} looks for the names it is given; add tags=['cat', 'dog']"
        )
    if tags is not None and not detector.needs_tags:
        raise ValueError(f"detector {detector.name!r} has names of its own; leave tags out")
    if isinstance(tags, str) or (tags is not None and not len(tags)):
        raise ValueError(f"tags is {tags!r}; expected a list of names")
    if tags is not None and all(isinstance(tag, str) for tag in tags):
        tags = [list(tags)] * len(pictures)
    if tags is not None and len(tags) != len(pictures):
        raise ValueError(
            f"{len(tags)} lists of tags for {len(pictures)} pictures; give one for each, or one list"
        )
    missing = [index for index, found in enumerate(detections) if found is None]
    filled = list(detections)
    if missing:
        wanted = None if tags is None else [tags[index] for index in missing]
        for index, found in zip(
            missing, detector([pictures[index] for index in missing], wanted), strict=True
        ):
            filled[index] = found.as_dict()
    return filled


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
        path, number = folder / drawing_name(name, ".png"), 2
        while path in written:
            path, number = folder / drawing_name(f"{name}-{number}", ".png"), number + 1
        save_drawing(picture if found is None else explain_selection(picture, **found, **selection), path)
        written.append(path)
    return written
