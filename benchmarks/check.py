"""Correctness before time: each provider against a wider dtype on the same inputs.

A provider may err by twice what the baseline (the benchmark's first provider) errs by in the same dtype on the same
inputs, and by the dtype's own precision at least. Norms hide what is wrong in one place, so the worst row (token,
box, row of a weight) counts, too. The baseline itself is held to fixed tolerances.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.benchmark import Benchmark, Function, Problem, make_call, on_backend
from benchmarks.shapes import Sizes

# Of the baseline's ‖actual − expected‖ / ‖expected‖, without and with gradients: some times what it errs by (float32
# coordinates alone make torchvision's RoIAlign err by 1.1e-5).
BASELINE = {
    torch.float32: (5e-5, 3e-4),
    torch.float16: (5e-3, 5e-2),
    torch.bfloat16: (3e-2, 2e-1),
}
# What no provider is blamed for, whatever the baseline errs by: the rounding of a result; in float32, which the
# baseline may hit to the last digit, that of sums that cancel. The gradient of a gate is one of 590,000 products a
# picture, and all gradients behind it err by what it does: 2.3e-6 of 8 pictures on an EPYC, the literal composition's
# less than 1e-6, both by chance.
LEAST = {torch.float32: 5e-6, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
# How much more a provider may err than the baseline: as a whole, and in its worst row.
NORM_FACTOR, ROW_FACTOR = 2.0, 10.0
# The error of a few numbers is chance: results smaller than this are held to the baseline's worst result.
FEW = 1000


class WrongResult(Exception):
    """A provider's results are not those of the reference."""

    def __init__(self, text: str, error: float | None, tolerance: float | None) -> None:
        super().__init__(f"wrong: {text}")
        # JSON has no NaN.
        self.error = error if error is not None and math.isfinite(error) else None
        self.tolerance = tolerance


@dataclass(frozen=True)
class Errors:
    """Of each result: ‖actual − expected‖ / ‖expected‖, and the same of its worst row, relative to all rows."""

    norms: list[float]
    rows: list[float]


@dataclass(frozen=True)
class Standard:
    """What the results of a problem in a mode are held to.

    Args:
        expected: the results; in modes with gradients these follow the values.
        source: where `expected` is from.
        norms, rows: what each result may err by, as `Errors` has it.
        baseline, baseline_seconds: errors of the baseline, and how long its call took.
        dtype: that is measured.
        outputs: how many of the results are values.
        sums: of the problem, which no provider may change.
    """

    expected: list[Tensor]
    source: str
    norms: list[float]
    rows: list[float]
    baseline: Errors
    baseline_seconds: float
    dtype: torch.dtype
    outputs: int
    sums: list[float]

    def judge(self, results: Sequence[Tensor], leniency: float = 1.0) -> tuple[float, float]:
        """Error and tolerance of the result nearest to its limit; `results` may be the gradients alone.

        Raises:
            WrongResult: a result is beyond its limit, or no number, or there are more or fewer than expected.
        """
        first = len(self.expected) - len(results)
        if first not in (0, self.outputs if len(self.expected) > self.outputs else 0):
            raise WrongResult(f"{len(results)} results, expected {len(self.expected)}", None, None)
        return self._judge(errors_of(results, self.expected[first:]), first, leniency)

    def judge_baseline(self) -> tuple[float, float]:
        """The same for the baseline, which has fixed tolerances.

        Raises:
            WrongResult: a result is beyond them, or no number.
        """
        limit = BASELINE[self.dtype][len(self.expected) > self.outputs]
        return _worst(self.baseline.norms, [limit] * len(self.expected), "relative error")

    def _judge(self, errors: Errors, first: int, leniency: float) -> tuple[float, float]:
        limits = [limit * leniency for limit in self.norms[first:]]
        found = _worst(errors.norms, limits, "relative error")
        limits = [limit * leniency for limit in self.rows[first:]]
        _worst(errors.rows, limits, "relative error of one row")
        return found


def _worst(errors: list[float], limits: list[float], text: str) -> tuple[float, float]:
    """Of the result nearest to its limit."""
    for index, (error, limit) in enumerate(zip(errors, limits, strict=True)):
        # Also for NaN.
        if not error <= limit:
            raise WrongResult(
                f"{text} {error:.1e} of result {index}, at most {limit:.0e} is right", error, limit
            )
    return max(
        zip(errors, limits, strict=True),
        key=lambda pair: pair[0] / pair[1],
        default=(0.0, LEAST[torch.float32]),
    )


def standard(
    benchmark: Benchmark, sizes: Sizes, problem: Problem, mode: str, baseline: Function | None = None
) -> Standard:
    """The right results and what may be off, for `backward` together with the values it belongs to.

    Args:
        benchmark, sizes, problem, mode: what is measured.
        baseline: function of the first provider; None where it does not run: the reference in the measured dtype.
    """
    dtype, mode = problem.grads[0].dtype, checked_mode(mode)
    sums = problem.sums()
    wide = torch.float64 if benchmark.in_float64 or dtype == torch.float32 else torch.float32
    reference = benchmark.reference or on_backend("reference", benchmark.function)
    expected = [one.detach() for one in make_call(reference, problem.widened(wide), mode)()]
    begin = time.perf_counter()
    results = make_call(baseline or reference, problem, mode)()
    seconds = time.perf_counter() - begin
    errors = errors_of(results, expected)
    del results
    few = max(errors.norms, default=0.0), max(errors.rows, default=0.0)
    norms, rows = [], []
    for one, norm, row in zip(expected, errors.norms, errors.rows, strict=True):
        if one.numel() < FEW:
            norm, row = few
        norms.append(max(NORM_FACTOR * norm, LEAST[dtype]))
        rows.append(ROW_FACTOR * max(row, LEAST[dtype]))
    source = benchmark.source or f"literal composition in {str(wide).removeprefix('torch.')}"
    return Standard(expected, source, norms, rows, errors, seconds, dtype, len(problem.grads), sums)


def check(held_to: Standard, function: Function, problem: Problem, mode: str, leniency: float = 1.0) -> float:
    """A provider's relative error.

    Raises:
        WrongResult: it is above the tolerance, or no number.
    """
    return held_to.judge(make_call(function, problem, checked_mode(mode))(), leniency)[0]


def errors_of(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> Errors:
    """NaN for a result of another shape or that holds a NaN. Of zeros: ‖actual‖."""
    norms, rows = [], []
    for one, other in zip(actual, expected, strict=True):
        if one.shape != other.shape:
            norms.append(float("nan"))
            rows.append(float("nan"))
            continue
        right = _rows(other.detach()).double()
        off = _rows(one.detach()).double() - right
        size = right.norm().item() or 1.0
        norms.append(off.norm().item() / size)
        worst = off.norm(dim=1).max().item() if off.numel() else 0.0
        rows.append(worst / size * len(off) ** 0.5)
    return Errors(norms, rows)


def _rows(tensor: Tensor) -> Tensor:
    """Tokens, boxes, maps of one channel, rows of a weight."""
    if tensor.dim() == 4:
        tensor = tensor.flatten(1) if tensor.shape[2:] == (1, 1) else tensor.flatten(2)
    return tensor.reshape(-1, tensor.shape[-1] if tensor.dim() > 1 else 1)


def checked_mode(mode: str) -> str:
    """A mode's results with those that its own depend on."""
    return "forward" if mode == "forward" else "both"
