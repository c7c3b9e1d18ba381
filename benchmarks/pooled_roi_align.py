"""Pooled RoIAlign over ConvNeXt's stages: one vector per box.

`backward` and `both` ask for the gradients of the maps, which MG-LLaVA's own training does not need (both towers are
frozen there) and another model's may.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks import literal, original, roofline, threaded
from benchmarks.benchmark import Benchmark, Inputs, code_of, original_providers, package_providers
from benchmarks.boxes import picture_boxes
from benchmarks.shapes import POOLED_ROI_ALIGN, TINY, Sizes, stage_shapes
from mgllava_kernels import pooled_roi_align
from mgllava_kernels._workloads import BINS


def stage_map(shape: tuple[int, ...], sizes: Sizes, generator: torch.Generator) -> Tensor:
    """A random map (B, C, H, W) as ConvNeXt's stages leave it, channels_last; with `nchw` contiguous."""
    maps = torch.randn(shape, generator=generator)
    return maps if sizes.get("nchw") else maps.contiguous(memory_format=torch.channels_last)


def stages_and_boxes(sizes: Sizes, generator: torch.Generator) -> Inputs:
    """Random stage maps, boxes (K, 4) for each picture, and the scale from canvas to the finest map."""
    images, canvas = sizes["images"], sizes["canvas"]
    shapes = stage_shapes(sizes)
    rows = picture_boxes(sizes)
    return {
        "stages": [stage_map(shape, sizes, generator) for shape in shapes],
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
        *original_providers(
            original.pooled_roi_align,
            original.extra_pooled_roi_align,
            original.too_many_bins,
            original.ONE_THREAD,
            partial(original.pooled_roi_align, align=threaded.roi_align),
        ),
        *package_providers(_package),
    ),
    function=_package,
    code=code_of("pooled_roi_align"),
    reference=literal.pooled_roi_align,
    cost=roofline.pooled_roi_align,
)
