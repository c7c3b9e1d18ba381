"""The two projectors, image tokens and objects in one call, against separate layers and cuBLAS epilogues."""

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import original, roofline
from benchmarks.benchmark import Benchmark, Inputs, Provider, code_of, original_providers, package_providers
from benchmarks.conv_gate import fill
from benchmarks.shapes import PROJECTORS, TINY, Sizes, model_width, stage_shapes, token_width, tokens_of
from mgllava_kernels import Projector, project_groups


def make_projector(in_features: int, sizes: Sizes, generator: torch.Generator) -> Projector:
    """A projector to the language model's width, with random weights."""
    projector = Projector(in_features, model_width(sizes))
    fill(projector, generator)
    return projector


def _inputs(sizes: Sizes, generator: torch.Generator) -> Inputs:
    """Without boxes the image tokens alone."""
    images, channels = sizes["images"], sum(shape[1] for shape in stage_shapes(sizes))
    sets = [(images * tokens_of(sizes), token_width(sizes))]
    if sizes["boxes"]:
        sets.append((images * sizes["boxes"], channels))
    return {
        "xs": [torch.randn(tokens, width, generator=generator) for tokens, width in sets],
        "projectors": [make_projector(width, sizes, generator) for _, width in sets],
    }


def _output_shapes(sizes: Sizes) -> list[tuple[int, ...]]:
    counts = [sizes["images"] * tokens_of(sizes), sizes["images"] * sizes["boxes"]]
    return [(count, model_width(sizes)) for count in counts if count]


def _original(xs: list[Tensor], projectors: list[Projector]) -> list[Tensor]:
    return [original.projector(module, x) for module, x in zip(projectors, xs, strict=True)]


def _epilogues(xs: list[Tensor], projectors: list[Projector]) -> list[Tensor]:
    """Bias and GELU in the epilogue of one cuBLAS call; torch offers no gradient of it.

    That GELU is the tanh approximation, up to 5e-4 off the exact one: right in half precision only.
    """
    results = []
    for module, x in zip(projectors, xs, strict=True):
        first, second = module.linear_1, module.linear_2
        hidden = torch._addmm_activation(first.bias, x, first.weight.T, use_gelu=True)
        results.append(torch.addmm(second.bias, hidden, second.weight.T))
    return results


def _addmm(xs: list[Tensor], projectors: list[Projector]) -> list[Tensor]:
    """cuBLAS with the bias in its epilogue, the exact GELU as a kernel of its own."""
    results = []
    for module, x in zip(projectors, xs, strict=True):
        first, second = module.linear_1, module.linear_2
        hidden = F.gelu(torch.addmm(first.bias, x, first.weight.T))
        results.append(torch.addmm(second.bias, hidden, second.weight.T))
    return results


def _package(xs: list[Tensor], projectors: list[Projector]) -> list[Tensor]:
    return project_groups(projectors, xs)


CUBLAS_ON_GPUS = "cuBLAS runs on a GPU"

BENCHMARK = Benchmark(
    name="projectors",
    cases=PROJECTORS,
    tiny=TINY,
    inputs=_inputs,
    output_shapes=_output_shapes,
    providers=(
        *original_providers(_original, original.extra_projectors),
        Provider("cuBLAS bias", _addmm, gpu_only=CUBLAS_ON_GPUS),
        Provider(
            "cuBLAS bias and GELU",
            _epilogues,
            gpu_only=CUBLAS_ON_GPUS,
            modes=("forward",),
            dtypes=("bfloat16", "float16"),
        ),
        *package_providers(_package),
    ),
    function=_package,
    code=code_of("projectors", "conv_gate", "original_repository", "pooled_roi_align"),
    cost=roofline.projectors,
)
