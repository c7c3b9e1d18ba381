"""What several kernel tests share: golden values, error measures, graph counting."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

GOLDEN = Path(__file__).parents[1] / "golden"
PATHS = ("torch", "reference")

# Triton kernels run on the GPU where there is one, else in Triton's interpreter on the CPU.
KERNEL_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KERNEL_DTYPES = (
    torch.float32,
    torch.float16,
    pytest.param(
        torch.bfloat16,
        marks=pytest.mark.skipif(
            KERNEL_DEVICE == "cpu", reason="needs a GPU: Triton's interpreter multiplies bfloat16 wrongly"
        ),
    ),
)

GOLDEN_TOLERANCE = 1e-4  # the reach that the golden files' README states for float32 paths

# The golden files name the fusion's layers as the original does.
LAYER_NAMES = {
    "slow_conv": "high_res_conv",
    "slow_proj": "high_res_proj",
    "fast_conv": "low_res_conv",
    "fast_proj": "low_res_proj",
    "gate.0": "gate_in",
    "gate.2": "gate_out",
}


def golden(name: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / f"{name}.safetensors")


def golden_fusion(values: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    """The golden parameters ("param") or their gradients ("grad") by the names of `ConvGateFusion`."""
    state = {}
    for key, value in values.items():
        prefix, _, name = key.partition(".")
        if prefix == kind and name:
            layer, _, leaf = name.rpartition(".")
            state[f"{LAYER_NAMES[layer]}.{leaf}"] = value
    return state


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖."""
    assert actual.shape == expected.shape
    scale = expected.double().norm().item()
    return (actual.double() - expected.double()).norm().item() / max(scale, 1e-30)


def as_accurate(actual: Tensor, composition: Tensor, exact: Tensor) -> bool:
    """The yardstick: at most twice the error of the literal composition in the same dtype, against fp64.

    An error of float32's own rounding counts as that, also where the composition's sums happen to be better.
    """
    assert actual.dtype == composition.dtype
    rounding = torch.finfo(torch.float32).eps
    return relative_error(actual, exact) <= 2 * max(relative_error(composition, exact), rounding)


def random_boxes(count: int, size: float, images: int = 1, seed: int = 0, dtype=torch.float32) -> Tensor:
    """Boxes (count, 5) inside a picture of `size`."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(count, 2, 2, generator=generator, dtype=torch.float64) * size
    index = torch.randint(0, images, (count, 1), generator=generator)
    return torch.cat([index, corners.amin(1), corners.amax(1)], dim=1).to(dtype)
