"""What can be read at all: a support vector machine on crops of the canvas, and of the low-resolution view.

The crops are cut at the true bounds, so this is a ceiling for reading one thing, not a model's score.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from .objects import CANVAS, DIGIT, SIZES
from .render import render
from .scene import Thing, sample_scene

__all__ = ["Legibility", "measure_legibility"]

PATCH = 14  # side of a ViT's patch, and of the crops the classifier sees, whatever the thing's size
MOST_CROPS = 4000  # to fit one machine on


@dataclass(frozen=True)
class Legibility:
    """How well one class of things can be told apart.

    Attributes:
        what: `digit` or `shape`.
        size: a name of `SIZES`.
        count: things of the test split.
        low_res_pixels: their mean height in the low-resolution view.
        high_res: accuracy on crops of the canvas.
        low_res: accuracy on the same crops of the low-resolution view.
        low_res_patch: accuracy on the patch of the low-resolution view that holds the thing's centre, somewhere:
            what a ViT of patch 14 starts from.
    """

    what: str
    size: str
    count: int
    low_res_pixels: float
    high_res: float
    low_res: float
    low_res_patch: float


def measure_legibility(
    num_train: int = 3000, num_test: int = 1000, *, low_res_size: int = 112
) -> list[Legibility]:
    """Fit on things of the training split, read those of the test split: values of digits, kinds of shapes."""
    from sklearn.svm import SVC

    train, test = (
        list(_crops(*scenes, low_res_size)) for scenes in (("train", num_train), ("test", num_test))
    )
    rows = []
    for what in ("digit", "shape"):
        seen, unseen = (
            [crop for crop in crops if (crop.thing.kind == DIGIT) == (what == "digit")]
            for crops in (train, test)
        )
        seen = seen[:MOST_CROPS]
        right = {}
        for view in ("high_res", "low_res", "low_res_patch"):
            machine = SVC(C=10).fit([getattr(crop, view) for crop in seen], [crop.answer for crop in seen])
            right[view] = machine.predict([getattr(crop, view) for crop in unseen]) == [
                crop.answer for crop in unseen
            ]
        for size in SIZES:
            chosen = np.array([crop.thing.size == size for crop in unseen])
            heights = [crop.thing.height for crop in unseen if crop.thing.size == size]
            if not heights:
                continue
            pixels = float(np.mean(heights)) * low_res_size / CANVAS
            scores = {view: float(hits[chosen].mean()) for view, hits in right.items()}
            rows.append(Legibility(what, size, len(heights), pixels, **scores))
    return rows


@dataclass(frozen=True)
class _Crop:
    thing: Thing
    high_res: np.ndarray
    low_res: np.ndarray
    low_res_patch: np.ndarray

    @property
    def answer(self) -> str:
        return self.thing.kind if self.thing.digit is None else str(self.thing.digit)


def _crops(split: str, num_scenes: int, low_res_size: int) -> Iterable[_Crop]:
    for index in range(num_scenes):
        scene = sample_scene(split, index)
        picture = render(scene)
        # The model's low-resolution view: bilinear, without antialiasing.
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float()
        view = F.interpolate(pixels, size=(low_res_size, low_res_size), mode="bilinear")[0].round().byte()
        low_res = Image.fromarray(view.permute(1, 2, 0).numpy())
        for thing in scene.things:
            column, row = (int(value * low_res_size / CANVAS) // PATCH * PATCH for value in thing.centre)
            patch = (column, row, column + PATCH, row + PATCH)
            yield _Crop(thing, _crop(picture, thing), _crop(low_res, thing), _features(low_res.crop(patch)))


def _crop(picture: Image.Image, thing: Thing) -> np.ndarray:
    """Features of what lies within the thing's bounds and a little around them."""
    scale = picture.width / CANVAS
    reach = max(thing.width, thing.height) / 2 + 1.5
    left, top = (max(value - reach, 0) * scale for value in thing.centre)
    right, bottom = (min(value + reach, CANVAS) * scale for value in thing.centre)
    size = (PATCH, PATCH)
    return _features(picture.resize(size, Image.Resampling.BILINEAR, box=(left, top, right, bottom)))


def _features(crop: Image.Image) -> np.ndarray:
    """How far each pixel is from the colour of the border, from 0 to 1, flattened."""
    pixels = np.asarray(crop, np.float32)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    distance = np.linalg.norm(pixels - np.median(border, axis=0), axis=-1)
    return (distance / max(distance.max(), 1)).ravel()
