"""Pictures to pixel tensors: this package's image processor against the original's steps."""

import functools
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.benchmark import Benchmark, Inputs, Provider, code_of
from benchmarks.shapes import PREPROCESSING, TINY_PICTURES, Sizes

LOW_RES, HIGH_RES = 336, 768
TORCHVISION_LENIENCY = 1e4


def _inputs(sizes: Sizes, generator: torch.Generator) -> Inputs:
    """Pictures of noise, smooth like a photograph's."""
    from PIL import Image

    pictures = []
    for _ in range(sizes["pictures"]):
        coarse = torch.rand(1, 3, 24, 32, generator=generator)
        pixels = F.interpolate(coarse, size=(sizes["height"], sizes["width"]), mode="bicubic").clamp(0, 1)
        array = (pixels[0].permute(1, 2, 0) * 255).byte().numpy()
        pictures.append(Image.fromarray(np.ascontiguousarray(array)))
    return {"pictures": pictures}


def _steps(backend: str, pictures: Sequence) -> Sequence[Tensor]:
    """Square with the mean's colour, transformers' CLIP processor at 768 px, bilinear resize to 336 px."""
    from PIL import Image

    processor = _clip_processor(backend)
    colour = tuple(int(value * 255) for value in processor.image_mean)
    high_res = []
    for picture in pictures:
        side = max(picture.size)
        square = Image.new(picture.mode, (side, side), colour)
        square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
        high_res.append(processor(square, return_tensors="pt")["pixel_values"])
    joined = torch.cat(high_res)
    return F.interpolate(joined, size=(LOW_RES, LOW_RES), mode="bilinear", align_corners=False), joined


@functools.cache
def _clip_processor(backend: str) -> Any:
    """transformers' processor as the original has it, on PIL, or as newer releases prefer it, on torchvision."""
    from transformers import CLIPImageProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    make = {"PIL": CLIPImageProcessorPil, "torchvision": CLIPImageProcessor}[backend]
    return make(size={"shortest_edge": HIGH_RES}, crop_size={"height": HIGH_RES, "width": HIGH_RES})


@functools.cache
def _own_processor() -> Any:
    from mgllava import MGLlavaImageProcessor

    return MGLlavaImageProcessor()


def _package(pictures: Sequence) -> Sequence[Tensor]:
    output = _own_processor()(pictures)
    return output["pixel_values"], output["pixel_values_high_res"]


_original = partial(_steps, "PIL")


def _output_shapes(sizes: Sizes) -> list[tuple[int, ...]]:
    return [(sizes["pictures"], 3, side, side) for side in (LOW_RES, HIGH_RES)]


BENCHMARK = Benchmark(
    name="preprocessing",
    cases=PREPROCESSING,
    tiny=TINY_PICTURES,
    inputs=_inputs,
    output_shapes=_output_shapes,
    providers=(
        Provider("original", _original),
        # It resizes without PIL and rounds many of the 256 values to the next one.
        Provider("original, torchvision", partial(_steps, "torchvision"), leniency=TORCHVISION_LENIENCY),
        Provider("mgllava", _package),
    ),
    function=_package,
    code=code_of("preprocessing", model=True),
    reference=_original,
    source="the original's steps",
    dtypes=("float32",),
    on_cpu=True,
    graph=False,
    rate=("pictures_per_second", lambda sizes: sizes["pictures"]),
)
