"""The tuner: which config wins, what is left out, what is written, and going on after an interruption.

It runs whole on a small kernel; on a CPU in Triton's interpreter, with a clock that knows what each config
costs.
"""

import io
import json
import re
from dataclasses import dataclass, replace

import pytest
import torch
from kernel_cases import KERNEL_DEVICE
from rich.console import Console

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton.runtime.errors import OutOfResources
from typer.testing import CliRunner

from mgllava_kernels import configs, tune
from mgllava_kernels._triton.launch import launch, target_of
from mgllava_kernels._workloads import OPS, Op, Workload
from mgllava_kernels.configs import Config, Space, choose, tables

DEVICE = torch.device(KERNEL_DEVICE)


@triton.jit
def _double_kernel(x_ptr, out_ptr, size, FACTOR: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.load(x_ptr + i, mask=i < size) * FACTOR, mask=i < size)


def config(block: int, factor: int = 2) -> Config:
    return Config((("BLOCK", block), ("FACTOR", factor)), 4, 1)


HEURISTIC = config(16)
CANDIDATES = [config(16), config(32), config(64), config(48)]
launched: list[Config] = []


def space(candidates=CANDIDATES, kernel: str = "double") -> Space:
    return Space(kernel, lambda *_: HEURISTIC, lambda *_: candidates, lambda config, dtype: 0)


def double(x, of: Space):
    """Twice x; a BLOCK of 64 asks for more than there is, one of 128 is too much for the compiler."""
    target = target_of(x.device)
    chosen = choose(of, target, x.dtype, {"columns": x.shape[1]}, len(x))
    launched.append(chosen)
    block = dict(chosen.blocks)["BLOCK"]
    if x.device.type == "meta":
        return x
    if block == 64:
        raise OutOfResources(2**20, 2**10, "shared memory")
    if block == 128:
        raise RuntimeError("PassManager::run failed")
    if block == 256:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    out = torch.empty_like(x)
    args = (x, out, x.numel())
    launch(_double_kernel, triton.cdiv(x.numel(), block), x.device, args, **chosen.options)
    return out


@dataclass(frozen=True)
class Doubling(Op):
    """The op of these tests, called without an import."""

    space: Space | None = None

    def call(self, arguments):
        return double(*arguments, self.space)


def rows(count: int, seen: int = 8):
    def arguments(dtype, layout, device):
        return (torch.randn(count, seen, dtype=dtype, device=device),)

    return Workload(f"{count} rows", arguments)


def op(*workloads: Workload, **changes) -> Doubling:
    return Doubling("double", "", workloads or (rows(3),), ("contiguous",), **{"space": space(), **changes})


class Clock:
    """Says what a config costs, in microseconds by BLOCK, and counts how often it is asked."""

    def __init__(self, **costs: float) -> None:
        self.costs = {int(name.removeprefix("b")): cost for name, cost in costs.items()}
        self.measured: list[Config] = []

    def __call__(self, calls) -> float:
        calls[-1]()
        self.measured.append(launched[-1])
        return self.costs[dict(launched[-1].blocks)["BLOCK"]]


@pytest.fixture(autouse=True)
def _nothing_remembered(monkeypatch):
    monkeypatch.delenv(tables.ENVIRONMENT_VARIABLE, raising=False)
    configs.reload()
    yield
    configs.reload()


def tuner(folder, clock, **conditions) -> tune.Tuner:
    console = Console(file=io.StringIO(), width=200)
    return tune.Tuner(DEVICE, folder, clock, {"date": "today", **conditions}, console)


def written(folder, kernel: str = "double") -> tables.Table:
    return tables.read(tables.path_of(folder, kernel, target_of(DEVICE).name))


def test_the_fastest_config_is_written_and_then_chosen(tmp_path, monkeypatch):
    run = tuner(tmp_path, Clock(b16=3.0, b32=2.0))
    run.run([op()], [torch.float32])
    table = written(tmp_path)
    (entry,) = table.entries
    assert (entry.dtype, entry.sizes, entry.count) == (torch.float32, (("columns", 8),), 3)
    assert entry.config == config(32)
    assert entry.microseconds == {"double, 3 rows, contiguous": 2.0}
    assert entry.heuristic_microseconds == {"double, 3 rows, contiguous": 3.0}
    assert table.runs == [{"date": "today"}]
    assert table.target["warp_size"] == target_of(DEVICE).warp_size

    monkeypatch.setenv(tables.ENVIRONMENT_VARIABLE, str(tmp_path))
    configs.reload()
    launched.clear()
    x = torch.randn(4, 8, device=DEVICE)
    torch.testing.assert_close(double(x, space()), 2 * x)
    assert launched == [config(32)]


def test_ties_go_to_the_heuristic(tmp_path):
    tuner(tmp_path, Clock(b16=2.0, b32=1.99)).run([op()], [torch.float32])
    (entry,) = written(tmp_path).entries
    assert entry.config == HEURISTIC
    assert entry.microseconds == entry.heuristic_microseconds


def test_a_lucky_measurement_does_not_win(tmp_path):
    clock = Clock(b16=2.0, b32=1.0)

    def lucky_once(calls):
        time = clock(calls)
        if clock.measured.count(config(32)) > 1:
            clock.costs[32] = 4.0
            return 4.0
        return time

    tuner(tmp_path, lucky_once).run([op()], [torch.float32])
    assert clock.measured.count(config(32)) == 2
    assert written(tmp_path).entries[0].config == HEURISTIC


def test_what_runs_out_of_resources_is_skipped_with_the_reason(tmp_path):
    clock = Clock(b16=3.0, b32=2.0)
    run = tuner(tmp_path, clock)
    run.run([op()], [torch.float32])
    assert [(skipped.kernel, skipped.config, skipped.wrong) for skipped in run.skipped] == [
        ("double", config(64), False)
    ]
    assert "out of resource: shared memory, Required: 1048576" in run.skipped[0].reason
    assert config(64) not in clock.measured
    assert config(48) not in launched, "an illegal candidate is not even tried"


def test_what_the_compiler_gives_up_on_is_skipped_and_other_errors_are_not(tmp_path):
    run = tuner(tmp_path, Clock(b16=3.0))
    run.run([op(space=space([config(128)]))], [torch.float32])
    assert [(skipped.config, skipped.reason) for skipped in run.skipped] == [
        (config(128), "PassManager::run failed")
    ]
    with pytest.raises(RuntimeError, match="illegal memory access"):
        run.run([op(rows(9), space=space([config(256)]))], [torch.float32])


def test_a_candidate_with_other_results_is_not_timed(tmp_path):
    wrong = config(32, factor=3)
    clock = Clock(b16=3.0, b32=1.0)
    run = tuner(tmp_path, clock)
    run.run([op(space=space([wrong]))], [torch.float32])
    (skipped,) = run.skipped
    assert (skipped.config, skipped.wrong) == (wrong, True)
    assert "differs by 5.0e-01 relatively" in skipped.reason
    assert wrong not in clock.measured
    assert written(tmp_path).entries[0].config == HEURISTIC


def test_what_is_left_out_is_told_at_once(tmp_path):
    """A run that is stopped later would take it along."""
    run = tuner(tmp_path, Clock(b16=3.0))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        run.run([op(space=space([config(32, factor=3), config(64), config(256)]))], [torch.float32])
    told = run.console.file.getvalue()
    assert re.search(r"wrong: double, .*BLOCK=32 .*differs by 5.0e-01 relatively", told)
    assert re.search(r"skipped: double, .*BLOCK=64 .*out of resource", told)


def test_a_defect_of_the_heuristics_config_is_not_swallowed(tmp_path):
    broken = replace(space(), heuristic=lambda *_: config(64))
    with pytest.raises(OutOfResources):
        tuner(tmp_path, Clock()).run([op(space=broken)], [torch.float32])
    assert not list(tmp_path.iterdir())


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path):
    both = op(rows(3), rows(40))
    clock = Clock(b16=3.0, b32=2.0)

    def interrupted(calls):
        if len(calls[0]().flatten()) > 40 * 8 - 1:
            raise KeyboardInterrupt
        return clock(calls)

    with pytest.raises(KeyboardInterrupt):
        tuner(tmp_path, interrupted, run="first").run([both], [torch.float32])
    assert [entry.count for entry in written(tmp_path).entries] == [3]
    first = written(tmp_path).entries[0]

    clock.measured.clear()
    tuner(tmp_path, clock, run="second").run([both], [torch.float32])
    table = written(tmp_path)
    assert [(entry.count, entry.run) for entry in table.entries] == [(3, 0), (40, 1)]
    assert table.entries[0] == first
    assert [run["run"] for run in table.runs] == ["first", "second"]

    clock.measured.clear()
    tuner(tmp_path, clock, run="third").run([both], [torch.float32])
    assert not clock.measured
    assert written(tmp_path) == table


def test_calls_that_tables_do_not_tell_apart_are_weighed_together(tmp_path):
    """A config that is best for one of two calls and bad for the other loses."""
    workloads = replace(rows(3), name="small"), replace(rows(3), name="large")
    times = iter([2.0, 2.0, 1.0, 5.0])
    seen = []

    def clock(calls):
        calls[0]()
        seen.append(launched[-1])
        return next(times)

    tuner(tmp_path, clock).run([op(*workloads)], [torch.float32])
    assert seen == [HEURISTIC, HEURISTIC, config(32), config(32)]
    (entry,) = written(tmp_path).entries
    assert entry.config == HEURISTIC
    assert list(entry.microseconds) == ["double, small, contiguous", "double, large, contiguous"]


def test_a_kernel_is_tuned_with_what_the_ops_other_kernels_have_by_then(tmp_path):
    first, second = space(), space(kernel="double again")

    @dataclass(frozen=True)
    class Twice(Doubling):
        def call(self, arguments):
            return double(double(*arguments, first), second)

    pairs = set()

    def clock(calls):
        calls[0]()
        pairs.add(tuple(launched[-2:]))
        return Clock(b16=3.0, b32=2.0).costs[dict(launched[-1].blocks)["BLOCK"]] + (
            0 if launched[-2] == HEURISTIC else -1
        )

    chained = Twice("twice", "", (rows(3),), ("contiguous",))
    tuner(tmp_path, clock).run([chained], [torch.float32])
    assert pairs == {(HEURISTIC, HEURISTIC), (config(32), HEURISTIC), (config(32), config(32))}
    assert written(tmp_path).entries[0].config == config(32)
    assert written(tmp_path, "double again").entries[0].config == config(32)


def test_without_a_gpu_the_command_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = CliRunner().invoke(tune.app, ["--output", str(tmp_path / "tables")])
    assert result.exit_code == 1
    assert "tuning needs a GPU" in result.output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--op", "roi"], "op must be one of pooled_roi_align"),
        (["--dtype", "float64"], "dtype must be one of bfloat16, float16, float32; got 'float64'"),
    ],
)
def test_unknown_names_are_errors_that_list_the_known(arguments, message):
    result = CliRunner().invoke(tune.app, arguments)
    assert result.exit_code == 1
    assert message in result.output


@pytest.mark.parametrize("listed", OPS, ids=lambda listed: listed.name)
def test_every_op_asks_for_legal_configs_of_its_kernels(listed):
    """Discovery runs on meta tensors: no kernel is compiled or launched."""
    from mgllava_kernels.aot import TARGETS

    for target in TARGETS.values():
        for dtype in (torch.bfloat16, torch.float32):
            groups = tune.groups_of(listed, target, dtype)
            assert groups
            for group in groups:
                request = group.request
                assert configs.legal(request.heuristic(), request.space, target, dtype) is None
                assert request.candidates(), f"{request.space.kernel} has nothing to tune on {target.name}"


@pytest.mark.skipif(KERNEL_DEVICE == "cpu", reason="needs a GPU: measures a CUDA graph")
def test_the_clock_of_the_command_measures(tmp_path):
    x = torch.randn(1 << 24, device=DEVICE)
    one = tune.microseconds([lambda: x.add(1)])
    four = tune.microseconds([lambda: x.add(1).add(1).add(1).add(1)] * 3)
    assert 1 < one < four < 8 * one
    run = tune.Tuner(
        DEVICE, tmp_path, tune.microseconds, tune.conditions(DEVICE), Console(file=io.StringIO())
    )
    run.run([op()], [torch.float32])
    conditions = json.loads(json.dumps(written(tmp_path).runs[0]))
    assert conditions["torch"] == torch.__version__
