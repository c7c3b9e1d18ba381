"""CPU-sized calls under pytest-benchmark: `python -m pytest benchmarks/test_cpu.py`.

One picture of the published sizes in float32, forward: this package's `torch` path beside the baseline, one group
a case. Its options save and compare runs (`--benchmark-save`, `--benchmark-compare`). Results are checked first.
"""

import pytest
import torch

from benchmarks import check
from benchmarks.benchmark import make_call, make_problem
from benchmarks.registry import BENCHMARKS

CASES = [
    (name, case, provider)
    for name, benchmark in BENCHMARKS.items()
    for case in benchmark.cases
    if case.quick
    for provider in benchmark.providers
    if provider.obstacle(torch.device("cpu"), "float32", "forward", by_name=False) is None
]


@pytest.fixture(scope="module")
def prepared():
    """Problems and what their results are held to, by benchmark and case; the last one is kept."""
    kept: dict = {}

    def get(benchmark, case):
        key = (benchmark.name, case.name)
        if key not in kept:
            kept.clear()
            problem = make_problem(benchmark, case.sizes, torch.float32, torch.device("cpu"))
            kept[key] = problem, check.standard(benchmark, case.sizes, problem, "forward")
        return kept[key]

    return get


@pytest.mark.parametrize(
    ("name", "case", "provider"), CASES, ids=[f"{name}-{case.name}-{one.name}" for name, case, one in CASES]
)
def test_forward(benchmark, prepared, name, case, provider):
    benchmark.group = f"{name}, {case.name}"
    problem, held_to = prepared(BENCHMARKS[name], case)
    check.check(held_to, provider.function, problem, "forward", provider.leniency)
    benchmark.pedantic(make_call(provider.function, problem, "forward"), rounds=3, warmup_rounds=1)
