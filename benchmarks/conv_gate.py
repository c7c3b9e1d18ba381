"""Conv-Gate fusion of ViT tokens and the coarsest ConvNeXt stage."""

import torch
from torch import Tensor

from benchmarks import original, original_repository, roofline
from benchmarks.benchmark import Benchmark, Inputs, Provider, code_of, original_providers, package_providers
from benchmarks.pooled_roi_align import stage_map
from benchmarks.shapes import CONV_GATE, TINY, Sizes, stage_shapes, token_width, tokens_of
from mgllava_kernels import ConvGateFusion


def make_fusion(sizes: Sizes, generator: torch.Generator) -> ConvGateFusion:
    """The module with random weights; its own initialisation would pass tokens through unchanged."""
    fusion = ConvGateFusion(token_width(sizes), stage_shapes(sizes)[-1][1])
    fill(fusion, generator)
    return fusion


@torch.no_grad()
def fill(module: torch.nn.Module, generator: torch.Generator) -> None:
    """Normal parameters that keep the size of activations."""
    for parameter in module.parameters():
        parameter.normal_(generator=generator).div_(parameter[0].numel() ** 0.5)


def low_res_tokens(sizes: Sizes, generator: torch.Generator) -> Tensor:
    """Random ViT tokens (B, N, D) as the model passes them: a view without the class token."""
    return torch.randn(sizes["images"], 1 + tokens_of(sizes), token_width(sizes), generator=generator)[:, 1:]


def _inputs(sizes: Sizes, generator: torch.Generator) -> Inputs:
    return {
        "low_res": low_res_tokens(sizes, generator),
        "high_res": stage_map(stage_shapes(sizes)[-1], sizes, generator),
        "fusion": make_fusion(sizes, generator),
    }


def _output_shapes(sizes: Sizes) -> list[tuple[int, ...]]:
    return [(sizes["images"], tokens_of(sizes), token_width(sizes))]


def _package(low_res: Tensor, high_res: Tensor, fusion: ConvGateFusion) -> tuple[Tensor]:
    return (fusion(low_res, high_res),)


BENCHMARK = Benchmark(
    name="conv_gate",
    cases=CONV_GATE,
    tiny=TINY,
    inputs=_inputs,
    output_shapes=_output_shapes,
    providers=(
        *original_providers(original.conv_gate, original.extra_conv_gate),
        Provider(
            "original repository", original_repository.conv_gate, on_request=original_repository.obstacle
        ),
        *package_providers(_package),
    ),
    function=_package,
    code=code_of("conv_gate", "original_repository", "pooled_roi_align"),
    cost=roofline.conv_gate,
)
