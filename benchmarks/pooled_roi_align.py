"""Pooled RoIAlign over ConvNeXt's stages: one vector per box."""

from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks import original, roofline
from benchmarks.benchmark import Benchmark, Inputs, original_providers, package_providers
from benchmarks.shapes import POOLED_ROI_ALIGN, TINY, Sizes, stage_shapes
from mgllava_kernels import pooled_roi_align
from mgllava_kernels._workloads import BINS, random_boxes


def stages_and_boxes(sizes: Sizes, generator: torch.Generator) -> Inputs:
    """Random stage maps, boxes (K, 4) for each picture, and the scale from canvas to the finest map."""
    images, canvas = sizes["images"], sizes["canvas"]
    shapes = stage_shapes(sizes)
    rows = random_boxes(images, sizes["boxes"], canvas, canvas, torch.device("cpu"))
    return {
        "stages": [torch.randn(shape, generator=generator) for shape in shapes],
        "boxes": [rows[rows[:, 0] == index, 1:].contiguous() for index in range(images)],
        "spatial_scale": shapes[0][2] / canvas,
    }


def _output_shapes(sizes: Sizes) -> list[tuple[int, ...]]:
    return [(sizes["images"] * sizes["boxes"], sum(shape[1] for shape in stage_shapes(sizes)))]


def _package(stages: Sequence[Tensor], boxes: Sequence[Tensor], spatial_scale: float) -> tuple[Tensor]:
    return (pooled_roi_align(stages, boxes, spatial_scale=spatial_scale, output_size=BINS),)


BENCHMARK = Benchmark(
    name="pooled_roi_align",
    cases=POOLED_ROI_ALIGN,
    tiny=TINY,
    inputs=stages_and_boxes,
    output_shapes=_output_shapes,
    providers=(
        *original_providers(original.pooled_roi_align, original.extra_pooled_roi_align),
        *package_providers(_package),
    ),
    function=_package,
    cost=roofline.pooled_roi_align,
)
