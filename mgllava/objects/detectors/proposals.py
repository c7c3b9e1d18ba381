"""Class-agnostic proposals without weights: regions whose colour stands out from the rest of the picture.

Every pixel has a distance from the picture's prevailing colour. Cut at rising levels, the distances fall apart into
connected regions; those that differ from what surrounds them become boxes. This suits things on a plain or
textured ground. A photograph full of things has no prevailing colour: there a detector with weights finds more.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..detector import Detections
from .output import to_detections

__all__ = ["ProposalDetector"]

LABEL = "object"
# The model takes 100 boxes of a picture; of more than that it keeps 20 of each label, and here there is one.
MAX_PROPOSALS = 100
WORKING_SIDE = 512  # larger pictures are shrunk to it
SMALLEST_AREA, LARGEST_SHARE = 16, 0.5  # of a region: pixels, and share of the picture
LEVEL_STEP = 15.0  # in CIE Lab, where a distance of about 2 can just be told
CONTRAST_SCALE = 10.0  # on an even ground the contrast that scores 0.5
# Their width: a share of a region's longer side, but enough pixels to see the next dot of a texture.
SURROUNDINGS, LEAST_SURROUNDINGS = 0.25, 6
SAME_REGION_IOU = 0.5


@dataclass(frozen=True)
class Regions:
    """R connected regions, each at one level of the distances.

    Attributes:
        boxes: (R, 4) int, x1, y1, x2, y2 in pixels.
        colours: (R, 3) mean Lab colours.
        pixels: (R,) index of one pixel of each in the flattened picture.
        numbers: (R,) of each in its level's map.
        levels: (R,) index of its level.
        maps: for each level the number of the region that each pixel belongs to, flattened.
    """

    boxes: np.ndarray
    colours: np.ndarray
    pixels: np.ndarray
    numbers: np.ndarray
    levels: np.ndarray
    maps: list[np.ndarray]


class ProposalDetector:
    """Finds regions that stand out; every label is "object".

    Scores rank by contrast with the surroundings. At most 100 boxes are given, so that the limit on a picture's
    boxes takes the weakest: the limit of 20 of a label, which would apply beyond, never does.

    Args:
        threshold: proposals scored at or below it are left out; 0.6 by default.

    Raises:
        ImportError: OpenCV is not installed.
    """

    name = "proposals"
    needs_tags = False
    default_threshold = 0.6

    def __init__(self, threshold: float | None = None) -> None:
        _import_cv2()
        self.threshold = self.default_threshold if threshold is None else threshold

    def __call__(
        self, pictures: Sequence[Image.Image], tags: Sequence[Sequence[str]] | None = None
    ) -> list[Detections]:
        """See `mgllava.objects.detector.Detector`; tags make no difference."""
        return [self._propose(picture) for picture in pictures]

    def _propose(self, picture: Image.Image) -> Detections:
        from torchvision.ops import nms

        lab = _working_lab(picture)
        regions = _regions(lab)
        colours, spreads = _surroundings(lab, regions.boxes)
        contrast = np.linalg.norm(regions.colours - colours, axis=1)
        scores = contrast / (contrast + spreads + CONTRAST_SCALE)

        (strong,) = np.nonzero(scores > self.threshold)
        candidates = torch.from_numpy(regions.boxes[strong]).double()
        best = nms(candidates, torch.from_numpy(scores[strong]), SAME_REGION_IOU).numpy()
        best = best[: 5 * MAX_PROPOSALS]  # enough to choose from once what frames hold has gone
        best = best[_free_of_frames(regions, strong[best])][:MAX_PROPOSALS]
        scale = torch.tensor([picture.width / lab.shape[1], picture.height / lab.shape[0]] * 2)
        boxes = candidates[best] * scale
        return to_detections(boxes, [LABEL] * len(best), torch.from_numpy(scores[strong[best]]), picture.size)


def _working_lab(picture: Image.Image) -> np.ndarray:
    """(height, width, 3) float32 Lab, the longer side at most `WORKING_SIDE`."""
    cv2 = _import_cv2()
    pixels = np.asarray(picture.convert("RGB"))
    scale = WORKING_SIDE / max(picture.size)
    if scale < 1:
        size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
    return cv2.cvtColor(pixels.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)


def _regions(lab: np.ndarray) -> Regions:
    """The regions whose colour is farther from the prevailing one than each level."""
    cv2 = _import_cv2()
    distances = np.linalg.norm(lab - np.median(lab.reshape(-1, 3), axis=0), axis=2)
    found: list[tuple[np.ndarray, ...]] = []
    maps = []
    for level, least in enumerate(np.arange(LEVEL_STEP, distances.max(), LEVEL_STEP)):
        count, numbers, stats, _ = cv2.connectedComponentsWithStats((distances >= least).astype(np.uint8))
        areas = stats[:, cv2.CC_STAT_AREA]
        chosen = (areas >= SMALLEST_AREA) & (areas <= LARGEST_SHARE * distances.size)
        chosen[0] = False  # all that lies below the level
        (kept,) = np.nonzero(chosen)
        flat = numbers.ravel()
        colours = [
            np.bincount(flat, channel.ravel(), count)[kept] / areas[kept]
            for channel in np.moveaxis(lab, 2, 0)
        ]
        pixels = np.zeros(count, np.intp)
        pixels[flat] = np.arange(flat.size)
        corners = stats[kept][:, [cv2.CC_STAT_LEFT, cv2.CC_STAT_TOP]]
        sides = stats[kept][:, [cv2.CC_STAT_WIDTH, cv2.CC_STAT_HEIGHT]]
        boxes = np.concatenate([corners, corners + sides], axis=1)
        found.append((boxes, np.stack(colours, axis=1), pixels[kept], kept, np.full(len(kept), level)))
        maps.append(flat)
    if not found:
        empty = np.zeros(0, np.intp)
        return Regions(np.zeros((0, 4), np.int32), np.zeros((0, 3)), empty, empty, empty, maps)
    return Regions(*(np.concatenate(parts) for parts in zip(*found, strict=True)), maps=maps)


def _surroundings(lab: np.ndarray, boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean colours (R, 3) of what lies around the boxes, and how far it spreads about them (R,)."""
    cv2 = _import_cv2()
    sides = (boxes[:, 2:] - boxes[:, :2]).max(axis=1, keepdims=True)
    margins = np.maximum(LEAST_SURROUNDINGS, (SURROUNDINGS * sides).astype(int))
    height, width = lab.shape[:2]
    wide = np.concatenate([boxes[:, :2] - margins, boxes[:, 2:] + margins], axis=1)
    wide = wide.clip(0, [width, height, width, height])
    values = lab.astype(np.float64)
    sums, squares = cv2.integral(values), cv2.integral(values**2)

    def around(table: np.ndarray) -> np.ndarray:
        inner, outer = (
            table[y2, x2] - table[y1, x2] - table[y2, x1] + table[y1, x1]
            for x1, y1, x2, y2 in (boxes.T, wide.T)
        )
        return outer - inner

    inner_area, outer_area = ((b[:, 2:] - b[:, :2]).prod(axis=1, keepdims=True) for b in (boxes, wide))
    count = np.maximum(outer_area - inner_area, 1)
    means = around(sums) / count
    variances = around(squares) / count - means**2
    return means, np.sqrt(variances.sum(axis=1).clip(0))


def _free_of_frames(regions: Regions, chosen: np.ndarray) -> np.ndarray:
    """Which of the chosen regions lie in no hole of another one: what a frame holds belongs to it."""
    boxes = regions.boxes[chosen]
    within = (boxes[:, None, :2] >= boxes[None, :, :2]).all(axis=2) & (
        boxes[:, None, 2:] <= boxes[None, :, 2:]
    ).all(axis=2)
    np.fill_diagonal(within, False)
    free = np.ones(len(chosen), bool)
    for inner, outer in zip(*np.nonzero(within), strict=True):
        frame = chosen[outer]
        # A region that grew out of the inner one at a lower level holds its pixels; a frame does not.
        number = regions.maps[regions.levels[frame]][regions.pixels[chosen[inner]]]
        free[inner] &= number == regions.numbers[frame]
    return free


def _import_cv2() -> Any:
    try:
        import cv2
    except ImportError as error:
        raise ImportError(
            f"detector 'proposals' needs OpenCV, which does not import here ({error}); "
            "pip install opencv-python-headless"
        ) from error
    return cv2
