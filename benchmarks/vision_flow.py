"""Pictures to tokens: both towers and the neck."""

import torch

from benchmarks import original
from benchmarks.benchmark import Benchmark, Inputs, code_of, original_providers, package_providers
from benchmarks.models import (
    MODEL_FILES,
    make_model,
    original_flow,
    package_flow,
    parameters,
    picture_inputs,
    reference_flow,
    threaded_flow,
)
from benchmarks.shapes import TINY_MODEL, VISION_FLOW, Sizes, model_width, tokens_of


def _inputs(sizes: Sizes, generator: torch.Generator) -> Inputs:
    return {"model": make_model(sizes, generator).model, **picture_inputs(sizes, generator)}


def _output_shapes(sizes: Sizes) -> list[tuple[int, ...]]:
    return [(tokens_of(sizes) + sizes["boxes"], model_width(sizes))] * sizes["images"]


BENCHMARK = Benchmark(
    name="vision_flow",
    cases=VISION_FLOW,
    tiny=TINY_MODEL,
    inputs=_inputs,
    output_shapes=_output_shapes,
    providers=(
        *original_providers(
            original_flow,
            original.extra_flow,
            original.too_many_bins,
            original.ONE_THREAD,
            threaded_flow,
        ),
        *package_providers(package_flow),
    ),
    function=package_flow,
    code=code_of(
        "vision_flow",
        *MODEL_FILES,
        model=True,
    ),
    reference=reference_flow,
    in_float64=False,
    parameters=parameters,
    rate=("pictures_per_second", lambda sizes: sizes["images"]),
)
