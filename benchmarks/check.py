"""Correctness before time: each provider against float64 on the same inputs."""

import torch
from torch import Tensor

from benchmarks.benchmark import Benchmark, Function, Problem, make_call, on_backend
from benchmarks.shapes import Sizes

# Of ‖actual − expected‖ / ‖expected‖, the largest over all results, without and with gradients: some times what the
# original compositions err by (float32 coordinates alone make torchvision's RoIAlign err by 1.1e-5).
TOLERANCES = {
    torch.float32: (5e-5, 3e-4),
    torch.float16: (5e-3, 5e-2),
    torch.bfloat16: (3e-2, 2e-1),
}
# The literal composition in float64 is the reference where it needs no more than this, in bytes.
LITERAL_LIMIT = {"cpu": 1 << 31, "cuda": 1 << 34}


class WrongResult(Exception):
    """A provider's results are not those of the reference."""

    def __init__(self, error: float, tolerance: float) -> None:
        super().__init__(f"wrong: relative error {error:.1e}, at most {tolerance:.0e} is right")
        self.error = error


def tolerance(benchmark: Benchmark, dtype: torch.dtype, mode: str) -> float:
    """What the relative error may be."""
    values, gradients = TOLERANCES[dtype]
    return (values if mode == "forward" else gradients) * benchmark.leniency


def expected(benchmark: Benchmark, sizes: Sizes, problem: Problem, mode: str) -> tuple[list[Tensor], str]:
    """The right results, in float64 if the benchmark allows, and where they are from.

    That is the literal composition (`reference`), or where it would take too much memory the fast algebra
    (`torch`), which the tests hold to it and to gradients by finite differences.
    """
    dtype, device = problem.grads[0].dtype, problem.grads[0].device
    extra_bytes = benchmark.providers[0].extra_bytes
    wide = torch.float64 if benchmark.in_float64 else dtype
    need = extra_bytes(sizes, wide, mode) if extra_bytes is not None else 0
    backend = "reference" if need <= LITERAL_LIMIT[device.type] else "torch"
    function = benchmark.reference or on_backend(backend, benchmark.function)
    name = "literal composition" if backend == "reference" else "fast algebra"
    # Backward alone is checked together with the values it belongs to.
    given = problem.in_float64() if benchmark.in_float64 else problem
    results = make_call(function, given, _checked_mode(mode))()
    return results, f"{name} in {str(wide).removeprefix('torch.')}"


def check(
    benchmark: Benchmark, function: Function, problem: Problem, mode: str, reference: list[Tensor]
) -> float:
    """A provider's relative error.

    Raises:
        WrongResult: it is above the tolerance, or no number.
    """
    actual = make_call(function, problem, _checked_mode(mode))()
    error = relative_error(actual, reference)
    allowed = tolerance(benchmark, problem.grads[0].dtype, mode)
    # Also false for NaN.
    if not error <= allowed:
        raise WrongResult(error, allowed)
    return error


def relative_error(actual: list[Tensor], reference: list[Tensor]) -> float:
    """The largest ‖actual − reference‖ / ‖reference‖; NaN if any result holds one. Of zeros: ‖actual‖."""
    errors = []
    for one, other in zip(actual, reference, strict=True):
        if one.shape != other.shape:
            return float("nan")
        wide, right = one.detach().double(), other.detach().double()
        errors.append((wide - right).norm().item() / (right.norm().item() or 1.0))
    return float("nan") if any(error != error for error in errors) else max(errors, default=0.0)


def _checked_mode(mode: str) -> str:
    return "forward" if mode == "forward" else "both"
