"""Plain RoIAlign against torchvision's."""

from functools import partial

import torch
from torch import Tensor

from benchmarks import original, roofline, threaded
from benchmarks.benchmark import Benchmark, Inputs, Provider, all_threads, code_of, package_providers
from benchmarks.boxes import region_boxes
from benchmarks.shapes import ROI_ALIGN, TINY_REGIONS, Sizes
from mgllava_kernels import roi_align
from mgllava_kernels._workloads import LEVEL_PICTURE


def _inputs(sizes: Sizes, generator: torch.Generator) -> Inputs:
    shape = [sizes[name] for name in ("images", "channels", "height", "width")]
    return {
        "maps": torch.randn(shape, generator=generator),
        "boxes": region_boxes(sizes),
        "side": sizes["side"],
        "spatial_scale": sizes["width"] / LEVEL_PICTURE[0],
        "ratio": sizes["ratio"],
        "aligned": bool(sizes["aligned"]),
    }


def _output_shapes(sizes: Sizes) -> list[tuple[int, ...]]:
    return [(sizes["boxes"], sizes["channels"], sizes["side"], sizes["side"])]


def _torchvision(
    maps: Tensor,
    boxes: Tensor,
    side: int,
    spatial_scale: float,
    ratio: int,
    aligned: bool,
    align: original.Align = original.torchvision_roi_align,
) -> tuple[Tensor]:
    """In float32 throughout, as under autocast: no bfloat16 kernel, and boxes in float16 miss their pixels."""
    values = maps if maps.dtype == torch.float64 else maps.float()
    result = align(values, boxes.to(values.dtype), side, spatial_scale, ratio, aligned)
    return (result.to(maps.dtype),)


def _package(
    maps: Tensor, boxes: Tensor, side: int, spatial_scale: float, ratio: int, aligned: bool
) -> tuple[Tensor]:
    return (roi_align(maps, boxes, side, spatial_scale, ratio, aligned),)


BENCHMARK = Benchmark(
    name="roi_align",
    cases=ROI_ALIGN,
    tiny=TINY_REGIONS,
    inputs=_inputs,
    output_shapes=_output_shapes,
    providers=(
        Provider("torchvision", _torchvision, cpu_note=original.ONE_THREAD),
        all_threads("torchvision", partial(_torchvision, align=threaded.roi_align)),
        *package_providers(_package),
    ),
    function=_package,
    code=code_of("roi_align"),
    cost=roofline.roi_align,
    dtypes=("bfloat16", "float32"),
)
