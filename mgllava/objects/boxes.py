"""Box geometry: raw detections on a picture become boxes on the model's canvas (paper, section 3.2)."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Selection", "detections_to_boxes", "load_detections", "select_detections"]

BOX_FORM = "[x1, y1, x2, y2] with x1 <= x2 and y1 <= y2, in pixels of the picture"


class Selection(NamedTuple):
    """Which detections of a picture the model gets, and why it does not get the others.

    Attributes:
        boxes: (K, 4) float32 in pixels of the canvas, in the order of object tokens; K may be 0.
        labels: of these boxes.
        kept: for each of them the index of its detection.
        dropped: for the index of each other detection the reason: `"overlap"` with a better box of its label,
            the `"limit"` per label, or `"outside"` of the canvas.
    """

    boxes: Tensor
    labels: list[str]
    kept: list[int]
    dropped: dict[int, str]


def detections_to_boxes(
    boxes: Any,
    labels: Sequence[str] | None = None,
    scores: Any = None,
    *,
    image_size: tuple[int, int],
    high_res_size: int = 768,
    iou_threshold: float = 0.2,
    max_objects: int = 100,
    max_per_category: int = 20,
    best_per_label: bool = False,
) -> tuple[Tensor, list[str]]:
    """Select detections and move them onto the padded, resized high-resolution canvas.

    With `scores` the boxes are a detector's output. They are thinned out by non-maximum suppression within
    each label, which also sorts them by falling score; if more than `max_objects` remain, only the best
    `max_per_category` of each label stay, grouped by label in order of first appearance (the total may still
    exceed `max_objects`). Without `scores` they are regions somebody chose: all are kept, in the given order.

    Then the geometry, in both cases: scale with the picture (padded to a square, resized to
    `high_res_size`), round half to even, drop boxes wholly outside the canvas, clip the others to it. Boxes
    without area are legal.

    Args:
        boxes: (N, 4) numbers `x1, y1, x2, y2` in pixels of the upright picture; lists, an array or a tensor.
        labels: N names. `None` means one nameless label for all.
        scores: N finite numbers, or `None` for chosen regions.
        image_size: height and width of the upright picture in pixels.
        high_res_size: side of the canvas in pixels.
        iou_threshold: overlap above which the lower-scored box of a label is suppressed.
        max_objects: number of boxes above which the limit per label applies.
        max_per_category: how many boxes of one label stay then.
        best_per_label: keep only the best box of each label. Training does so when a sample's text nearly
            fills its token limit.

    Returns:
        Boxes (K, 4) float32 in pixels of the canvas, and their K labels. Where no box is left, one all-zero
        box and no label: the model always sees at least one object.

    Raises:
        ValueError: boxes, labels or scores of the wrong form; names the entry and what was expected.
        RuntimeError: torchvision, which does the suppression, cannot be imported.
    """
    selection = select_detections(
        boxes,
        labels,
        scores,
        image_size=image_size,
        high_res_size=high_res_size,
        iou_threshold=iou_threshold,
        max_objects=max_objects,
        max_per_category=max_per_category,
        best_per_label=best_per_label,
    )
    if not selection.kept:
        return torch.zeros(1, 4), []
    return selection.boxes, selection.labels


def select_detections(
    boxes: Any,
    labels: Sequence[str] | None = None,
    scores: Any = None,
    *,
    image_size: tuple[int, int],
    high_res_size: int = 768,
    iou_threshold: float = 0.2,
    max_objects: int = 100,
    max_per_category: int = 20,
    best_per_label: bool = False,
) -> Selection:
    """What `detections_to_boxes` does, with the same arguments and errors, and what became of each detection."""
    height, width = image_size
    if height < 1 or width < 1:
        raise ValueError(f"image_size must be a positive (height, width), got {tuple(image_size)}")
    boxes, labels, scores = check_detections(boxes, labels, scores)

    side = max(height, width)
    left, top = (side - width) // 2, (side - height) // 2
    boxes = (boxes + torch.tensor([left, top, left, top])).float()

    kept = list(range(len(boxes)))
    dropped: dict[int, str] = {}
    if scores is not None and len(boxes):
        kept = _suppress(boxes, labels, scores, iou_threshold)
        dropped |= dict.fromkeys(set(range(len(boxes))).difference(kept), "overlap")
        if best_per_label or len(kept) > max_objects:
            best = _best_of_each_label(kept, labels, 1 if best_per_label else max_per_category)
            dropped |= dict.fromkeys(set(kept).difference(best), "limit")
            kept = best

    boxes = torch.round(boxes[kept] * (high_res_size / side))
    inside = (boxes[:, 2:] >= 0).all(dim=1) & (boxes[:, :2] <= high_res_size).all(dim=1)
    dropped |= {index: "outside" for index, keep in zip(kept, inside.tolist(), strict=True) if not keep}
    kept = [index for index in kept if index not in dropped]
    return Selection(boxes[inside].clamp(0, high_res_size), [labels[index] for index in kept], kept, dropped)


def check_detections(
    boxes: Any, labels: Sequence[str] | None = None, scores: Any = None
) -> tuple[Tensor, list[str], Tensor | None]:
    """Check the form of one picture's detections.

    Returns:
        Boxes (N, 4) float64, N labels (empty names if there were none), scores (N,) float32 or `None`.

    Raises:
        ValueError: naming the first offending entry, its value and what was expected.
    """
    boxes = _as_boxes(boxes)
    finite = torch.isfinite(boxes.float()).all(dim=1)
    _require(finite, boxes, "finite numbers")
    _require((boxes[:, :2] <= boxes[:, 2:]).all(dim=1), boxes, BOX_FORM)

    labels = [""] * len(boxes) if labels is None else _as_list(labels, "labels")
    if len(labels) != len(boxes):
        raise ValueError(f"{len(boxes)} boxes but {len(labels)} labels; every box needs one label")
    for index, label in enumerate(labels):
        if not isinstance(label, (str, int)):
            raise ValueError(f"labels[{index}] is {label!r}, expected a name or a number")
    if scores is None:
        return boxes, labels, None
    values = _as_list(scores, "scores")
    try:
        scores = torch.tensor(values, dtype=torch.float32).reshape(-1)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(f"scores must be a list of numbers, one for each box: {error}") from error
    if len(scores) != len(boxes):
        raise ValueError(f"{len(boxes)} boxes but {len(scores)} scores; every box needs one score")
    for index in torch.nonzero(~torch.isfinite(scores))[:1, 0].tolist():
        raise ValueError(f"scores[{index}] is {values[index]}, expected a finite number")
    return boxes, labels, scores


def load_detections(
    path: str | Path, *, id: str | int | None = None, image: str | Path | None = None
) -> dict[str, Any]:
    """Read one picture's detections from a JSON file.

    The file holds one object `{"boxes": [[x1, y1, x2, y2], ...], "labels": [...], "scores": [...]}`, labels
    and scores being optional, or a list of such objects with an `"id"` each (text or number), as the
    published annotation files do.

    Args:
        path: the file.
        id: the entry wanted out of a list.
        image: the picture's path, whose stem serves as id where `id` is not given; `000042.jpg` finds `42`. Where no
            id is the stem, one that the path ends in counts, `train/1.jpg`. A list of one entry needs neither.

    Returns:
        A dictionary with `boxes` and, where the file has them, `labels` and `scores`; boxes in pixels.

    Raises:
        ValueError: the file is not JSON or not of this form, or holds no entry, or several, of that id.
        FileNotFoundError: there is no such file.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not a JSON file: {error}") from error
    if isinstance(content, list):
        content = _select_entry(content, path, id, image)
    if not isinstance(content, dict) or "boxes" not in content:
        found = f"keys {sorted(content)}" if isinstance(content, dict) else type(content).__name__
        raise ValueError(
            f'{path}: expected {{"boxes": [[x1, y1, x2, y2], ...], "labels": [...], "scores": [...]}} or a '
            f'list of such objects with an "id" each, got {found}'
        )
    detections = {key: content[key] for key in ("boxes", "labels", "scores") if content.get(key) is not None}
    try:
        check_detections(**detections)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return detections


def _select_entry(
    entries: list[Any], path: str | Path, id: str | int | None, image: str | Path | None
) -> Any:
    for index, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise ValueError(
                f"{path}: entry {index} is a {type(entry).__name__}, expected an object with boxes"
            )
    if id is None and len(entries) == 1:
        return entries[0]
    if id is None and image is None:
        raise ValueError(
            f"{path} holds {len(entries)} entries; say which one by its id or by the picture's name"
        )
    wanted = str(id) if id is not None else Path(image).stem
    matches = [entry for entry in entries if str(entry.get("id")) == wanted]
    if not matches and id is None and wanted.isdecimal():
        matches = [entry for entry in entries if _is_number(entry.get("id"), int(wanted))]
    if not matches and id is None:
        matches = _entries_at(os.path.abspath(image), entries)
    if len(matches) != 1:
        ids = ", ".join(repr(entry.get("id")) for entry in entries[:3])
        raise ValueError(
            f"{path} holds {len(matches)} entries of id {wanted!r} among {len(entries)}, expected one; its ids are "
            f"{ids}{', ...' if len(entries) > 3 else ''}"
        )
    return matches[0]


def _entries_at(place: str, entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those whose id is the longest end of a path, in whole names: pictures of equal stems have such ids."""
    ends = {
        str(entry["id"])
        for entry in entries
        if "id" in entry and place.endswith(f"/{entry['id']}".replace("//", "/"))
    }
    longest = max(ends, key=len, default=None)
    return [entry for entry in entries if longest is not None and str(entry.get("id")) == longest]


def _is_number(id: Any, number: int) -> bool:
    return str(id).isdecimal() and int(id) == number


def _as_list(values: Any, name: str) -> list[Any]:
    values = values.tolist() if hasattr(values, "tolist") else values
    if not isinstance(values, Iterable) or isinstance(values, str):
        raise ValueError(f"{name} is {values!r}, expected a list")
    return list(values)


def _as_boxes(boxes: Any) -> Tensor:
    rows = _as_list(boxes, "boxes")
    for index, row in enumerate(rows):
        row = row.tolist() if hasattr(row, "tolist") else row
        if not isinstance(row, (list, tuple)) or len(row) != 4:
            raise ValueError(f"boxes[{index}] is {row}, expected {BOX_FORM}")
        rows[index] = row
    try:
        return torch.tensor(rows, dtype=torch.float64).reshape(-1, 4)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(f"boxes must be rows of numbers, {BOX_FORM}: {error}") from error


def _require(valid: Tensor, boxes: Tensor, expected: str) -> None:
    for index in torch.nonzero(~valid)[:1, 0].tolist():
        raise ValueError(f"boxes[{index}] is {boxes[index].tolist()}, expected {expected}")


def _suppress(boxes: Tensor, labels: list[str], scores: Tensor, iou_threshold: float) -> list[int]:
    try:
        from torchvision.ops import batched_nms
    except (
        ImportError,
        RuntimeError,
    ) as error:  # a torchvision of another torch build fails with RuntimeError
        raise RuntimeError(
            "selecting detections needs torchvision, which does not import here; install the build made "
            f"for torch {torch.__version__} (or pass boxes without scores, which all stay): {error}"
        ) from error
    numbers = {label: number for number, label in enumerate(dict.fromkeys(labels))}
    classes = torch.tensor([numbers[label] for label in labels])
    # batched_nms keeps labels apart by shifts larger than any coordinate, which takes boxes from zero up.
    return batched_nms(boxes - boxes.min().clamp(max=0), scores, classes, iou_threshold).tolist()


def _best_of_each_label(kept: list[int], labels: list[str], count: int) -> list[int]:
    """The first `count` indices of each label out of `kept`, which is sorted by falling score."""
    groups: dict[str, list[int]] = {}
    for index in kept:
        groups.setdefault(labels[index], []).append(index)
    return [index for group in groups.values() for index in group[:count]]
