"""The whole vision neck: fusion, objects and both projectors in one call.

`backward` and `both` are those of MG-LLaVA's training: the towers are frozen, so gradients go to the neck's weights
alone. Nearly all of the extra memory is then those gradients, the same for every provider.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks import literal, original, roofline, threaded
from benchmarks.benchmark import Benchmark, Inputs, code_of, original_providers, package_providers
from benchmarks.conv_gate import low_res_tokens, make_fusion
from benchmarks.pooled_roi_align import stages_and_boxes
from benchmarks.projectors import make_projector
from benchmarks.shapes import NECK, TINY, Sizes, model_width, stage_shapes, token_width, tokens_of
from mgllava_kernels import ConvGateFusion, Projector, use_backend, vision_neck
from mgllava_kernels._workloads import BINS


def _inputs(sizes: Sizes, generator: torch.Generator) -> Inputs:
    channels = sum(shape[1] for shape in stage_shapes(sizes))
    return {
        "low_res": low_res_tokens(sizes, generator),
        **stages_and_boxes(sizes, generator),
        "fusion": make_fusion(sizes, generator),
        "image_projector": make_projector(token_width(sizes), sizes, generator),
        "object_projector": make_projector(channels, sizes, generator),
    }


def _output_shapes(sizes: Sizes) -> list[tuple[int, ...]]:
    images, width = sizes["images"], model_width(sizes)
    return [(images, tokens_of(sizes), width), (images * sizes["boxes"], width)]


def _package(
    low_res: Tensor,
    stages: Sequence[Tensor],
    boxes: Sequence[Tensor],
    fusion: ConvGateFusion,
    image_projector: Projector,
    object_projector: Projector,
    spatial_scale: float,
) -> tuple[Tensor, Tensor]:
    return vision_neck(
        low_res,
        stages,
        boxes,
        fusion=fusion,
        image_projector=image_projector,
        object_projector=object_projector,
        spatial_scale=spatial_scale,
        output_size=BINS,
    )


def reference(
    low_res: Tensor,
    stages: Sequence[Tensor],
    boxes: Sequence[Tensor],
    fusion: ConvGateFusion,
    image_projector: Projector,
    object_projector: Projector,
    spatial_scale: float,
) -> tuple[Tensor, Tensor]:
    """The literal composition, RoIAlign piece by piece."""
    with use_backend("reference"):
        image_tokens = image_projector(fusion(low_res, stages[-1]))
        (vectors,) = literal.pooled_roi_align(stages, boxes, spatial_scale)
        return image_tokens, object_projector(vectors)


# Without boxes both sides do what is left of the composition: the original still upsamples and joins the stages,
# and its RoIAlign has nothing to do. (The model itself gives such a picture one all-zero box.)
BENCHMARK = Benchmark(
    name="neck",
    cases=NECK,
    tiny=TINY,
    inputs=_inputs,
    output_shapes=_output_shapes,
    providers=(
        *original_providers(
            original.neck,
            original.extra_neck,
            original.too_many_bins,
            original.ONE_THREAD,
            partial(original.neck, align=threaded.roi_align),
        ),
        *package_providers(_package),
    ),
    function=_package,
    code=code_of("neck", "conv_gate", "original_repository", "pooled_roi_align", "projectors"),
    reference=reference,
    cost=roofline.neck,
    frozen=("low_res", "stages"),
)
