"""Rows made up for the tests of what is made of rows."""

import dataclasses

from benchmarks import acceptance
from benchmarks.rows import Row

GPU = "NVIDIA H100 80GB HBM3"
RUN = "2026-01-01T10:00:00+00:00"


def row(provider: str = "torch", median: float | None = 1.0, **values) -> Row:
    """A row of the neck on a CPU; without a median it was not timed."""
    times = None
    if median is not None:
        factors = {"min": 0.8, "p20": 0.9, "median": 1.0, "p80": 1.25, "max": 2.0}
        times = {name: median * factor for name, factor in factors.items()}
    fixed = {
        "op": "neck",
        "kind": "cpu",
        "device": "a CPU, 2 threads",
        "case": "1 picture, 10 boxes",
        "shape": {"images": 1, "boxes": 10, "canvas": 768},
        "dtype": "float32",
        "mode": "forward",
        "provider": provider,
        "launch": "eager",
        "versions": {"torch": "2.11"},
        "commit": "abc",
        "run": RUN,
        "origin": "a test",
        "milliseconds": times,
        "samples": 0 if times is None else 9,
        "error": 3e-7,
        "tolerance": 1e-5,
    }
    return Row(**(fixed | values))


def gpu_row(provider: str = "triton", median: float | None = 1.0, **values) -> Row:
    return row(provider, median, **({"kind": GPU, "device": GPU, "dtype": "bfloat16"} | values))


def a_line(**changes) -> acceptance.Line:
    line = next(line for line in acceptance.LINES if line.op == "conv_gate" and len(line.cases) == 2)
    return dataclasses.replace(line, **changes)


def conv_gate(
    case: str, original: float | None, ours: float | None = 1.0, launch: str = "graph", **values
) -> list[Row]:
    fixed = {"op": "conv_gate", "case": case, "launch": launch}
    reason = {"reason": "refused"} if original is None else {}
    rivals = [gpu_row("original max-autotune", original, **fixed, **reason)]
    return [*rivals, gpu_row("triton", ours, **fixed, **values)]
