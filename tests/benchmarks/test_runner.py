"""The runner on a GPU that a fake stands for: rows of each launch, and what happens when something fails."""

import ast
import dataclasses
import types
from pathlib import Path

import pytest
import torch
from test_timing import Clock, FakeCuda

from benchmarks import memory, roofline, rows, runner
from benchmarks.benchmark import Provider
from benchmarks.registry import BENCHMARKS
from benchmarks.runner import Conditions, DeviceLost, Job, Runner
from benchmarks.shapes import Case

OutOfResources = pytest.importorskip("triton.runtime.errors").OutOfResources

OP = BENCHMARKS["pooled_roi_align"]
ORIGINAL, TORCH = OP.providers[0], next(one for one in OP.providers if one.name == "torch")
CEILINGS = roofline.Ceilings("a GPU", 1e12, {"float32": 1e14}, "a test")
GPU = Conditions(torch.device("cuda"), "a GPU", "a GPU", {"torch": "2"})
CPU = Conditions(torch.device("cpu"), "cpu", "a CPU", {"torch": "2"})


# Of torch.cuda: what times are taken with. The rest of torch keeps its own.
PARTS = (
    *("Event", "CUDAGraph", "Stream", "stream", "graph", "current_stream", "synchronize"),
    *("empty_cache", "get_device_properties"),
)


class Tensors:
    """Problems of the fake GPU are on the CPU; its sets of inputs are two."""

    def __init__(self, monkeypatch) -> None:
        made = runner.make_problem
        self.seeds: list[int] = []

        def make_problem(benchmark, sizes, dtype, device, seed=0):
            self.seeds.append(seed)
            return made(benchmark, sizes, dtype, torch.device("cpu"), seed)

        monkeypatch.setattr(runner, "make_problem", make_problem)
        monkeypatch.setattr(runner.timing, "number_of_sets", lambda *_: 2)


@pytest.fixture
def cuda(monkeypatch):
    """`torch.cuda` with a clock, on which every call takes a millisecond."""
    fake = FakeCuda(Clock())
    fake.lost = False

    def synchronize() -> None:
        if fake.lost:
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    fake.synchronize = fake.empty_cache = synchronize
    fake.get_device_properties = lambda _: types.SimpleNamespace(L2_cache_size=1 << 20)
    for name in PARTS:
        monkeypatch.setattr(torch.cuda, name, getattr(fake, name))
    monkeypatch.setattr(memory, "available", lambda _: 80 << 30)
    monkeypatch.setattr(memory, "on_gpu", lambda call: call() and 1000)
    monkeypatch.setattr(runner, "current_commit", lambda code: "abc")
    fake.problems = Tensors(monkeypatch)

    make_call = runner.make_call

    def timed(*arguments):
        call = make_call(*arguments)

        def run():
            fake.clock.now += 0.001
            return call()

        return run

    monkeypatch.setattr(runner, "make_call", timed)
    return fake


def job_of(*providers: Provider, mode: str = "forward", **changes) -> Job:
    case = Case("tiny", OP.tiny, "a test")
    return Job(dataclasses.replace(OP, providers=providers, **changes), case, "float32", mode, providers)


def measured(job: Job, written: list | None = None) -> dict[tuple[str, str], rows.Row]:
    """Rows by provider and launch."""
    write = (written if written is not None else []).append
    found = Runner(GPU, CEILINGS, 0.05, write=write).measure(job)
    return {(row.provider, row.launch): row for row in found}


def raising(error: Exception, name: str = "triton", after: int = 0) -> Provider:
    """A provider whose calls are right, and from call number `after` on raise."""
    calls = iter(range(10**6))

    def call(**inputs):
        if next(calls) >= after:
            raise error
        return TORCH.function(**inputs)

    return Provider(name, call)


@pytest.mark.parametrize("mode", ["forward", "backward", "both"])
def test_every_provider_has_a_row_of_each_launch(cuda, mode):
    written: list[rows.Row] = []
    found = measured(job_of(ORIGINAL, TORCH, mode=mode), written)
    names = [(name, launch) for name in ("original", "torch") for launch in ("eager", "graph")]
    assert list(found) == names
    assert [(row.provider, row.launch) for row in written] == names
    assert len({row.run for row in written}) == 1
    cost = OP.cost(OP.tiny, torch.float32, mode)
    for row in found.values():
        assert row.milliseconds["median"] == pytest.approx(1.0)
        assert row.reason is None
        assert row.extra_bytes == 1000
        assert row.error <= row.tolerance
        assert (row.bytes, row.flops) == (cost.bytes, cost.flops)
        assert (row.bandwidth, row.matmul_rate) == (1e12, 1e14)
        assert row.floor_ms == pytest.approx(max(row.bytes / 1e12, row.flops / 1e14) * 1e3)
    assert cuda.problems.seeds == [0, 1]


@pytest.mark.parametrize(
    "error",
    [
        OutOfResources(300000, 232448, "shared memory"),
        ModuleNotFoundError("No module named 'torchvision'"),
        ValueError("a kernel's own"),
        AssertionError("from inductor"),
        torch.OutOfMemoryError("CUDA out of memory\nand a long story"),
    ],
)
@pytest.mark.parametrize("after", [0, 1])
def test_a_provider_that_raises_is_a_row_and_the_others_are_timed(cuda, error, after):
    """While it is checked, or after that."""
    found = measured(job_of(ORIGINAL, raising(error, after=after), TORCH))
    reason = found.pop(("triton", "eager")).reason
    assert reason.startswith(f"failed: {type(error).__name__}: ")
    assert "\n" not in reason
    assert len(found) == 4
    assert all(row.milliseconds for row in found.values())
    assert runner.problems([dataclasses.replace(found["torch", "eager"], reason=reason)])


def test_a_baseline_that_raises_leaves_the_literal_composition_to_compare_with(cuda):
    found = measured(job_of(raising(ImportError("mismatched"), "original"), TORCH))
    assert found["original", "eager"].reason == "failed: ImportError: mismatched"
    assert found["torch", "graph"].milliseconds
    assert found["torch", "graph"].error < 1e-6


@pytest.mark.parametrize("broken", ["reference", "inputs"])
def test_what_nobody_can_be_measured_without_is_the_reason_of_all(cuda, broken):
    def breaks(*arguments, **inputs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    found = measured(job_of(ORIGINAL, TORCH, **{broken: breaks}))
    assert {name: row.reason for name, row in found.items()} == {
        (name, "eager"): "failed: OutOfMemoryError: CUDA out of memory" for name in ("original", "torch")
    }


def test_a_call_that_no_graph_holds_keeps_its_launched_times(cuda, monkeypatch):
    def cannot(*_) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(cuda.graph, "__enter__", cannot)
    found = measured(job_of(ORIGINAL, TORCH))
    assert found["torch", "eager"].milliseconds
    assert found["torch", "graph"].reason.startswith("failed: RuntimeError: operation not permitted")


def test_what_waits_for_the_device_is_not_captured(cuda):
    found = measured(job_of(ORIGINAL, TORCH, graph=False))
    assert list(found) == [("original", "eager"), ("torch", "eager")]
    assert runner.problems(list(found.values())) == []


def test_wrong_results_are_not_timed(cuda):
    wrong = Provider("triton", lambda **inputs: [TORCH.function(**inputs)[0] * 1.001])
    found = measured(job_of(ORIGINAL, wrong, TORCH))
    assert found["triton", "eager"].wrong
    assert found["triton", "eager"].milliseconds is None
    assert ("triton", "graph") not in found
    assert found["torch", "graph"].milliseconds


def test_wrong_results_of_a_graph_are_not_timed(cuda, monkeypatch):
    """A graph that froze a decision of the host replays it, though the eager call is right."""
    capturing = []
    enter, leave = cuda.graph.__enter__, cuda.graph.__exit__
    monkeypatch.setattr(cuda.graph, "__enter__", lambda self: (capturing.append(1), enter(self)))
    monkeypatch.setattr(cuda.graph, "__exit__", lambda self, *error: (capturing.clear(), leave(self)))
    frozen = Provider("triton", lambda **inputs: [TORCH.function(**inputs)[0] * (0.99 if capturing else 1)])
    found = measured(job_of(ORIGINAL, frozen, TORCH))
    assert found["triton", "eager"].milliseconds
    assert found["triton", "graph"].wrong
    assert "relative error 1.0e-02" in found["triton", "graph"].reason
    assert found["triton", "graph"].milliseconds is None
    assert runner.problems(list(found.values()))


def test_after_a_lost_device_only_the_offender_is_blamed_and_a_new_process_goes_on(cuda):
    def breaks(**inputs):
        cuda.lost = True
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    written: list[rows.Row] = []
    job = job_of(ORIGINAL, Provider("triton", breaks), TORCH)
    with pytest.raises(
        DeviceLost, match="pooled_roi_align, tiny, float32, forward, triton: AcceleratorError"
    ):
        measured(job, written)
    assert [(row.provider, bool(row.milliseconds)) for row in written] == [
        ("original", True),
        ("original", True),
        ("triton", False),
    ]
    assert written[-1].reason.startswith(runner.LOST)
    assert runner.problems(written)
    # The suite starts the command again.
    cuda.lost = False
    assert not runner.is_measured(job, GPU, written)
    rest = runner.without_lost(job, GPU, written)
    assert [one.name for one in rest.providers] == ["original", "torch"]
    again = list(measured(rest).values())
    assert runner.is_measured(job, GPU, [written[-1], *again])
    # Its eager times of the first run are none that the others could be compared with.
    timed = dataclasses.replace(written[-1], reason=None, milliseconds=again[0].milliseconds)
    graph = dataclasses.replace(written[-1], launch="graph")
    assert runner.is_measured(job, GPU, [timed, graph, *again])


def test_compiled_rivals_come_last_and_the_rows_keep_their_order(cuda):
    order = []

    def named(one: Provider) -> Provider:
        def call(**inputs):
            order.append(one.name)
            return TORCH.function(**inputs)

        return dataclasses.replace(one, function=call)

    compiled = next(one for one in OP.providers if one.compiled)
    found = measured(job_of(ORIGINAL, named(compiled), named(TORCH)))
    assert list(dict.fromkeys(order)) == ["torch", compiled.name]
    assert list(dict.fromkeys(name for name, _ in found)) == ["original", compiled.name, "torch"]


def test_modes_with_gradients_share_reference_and_checks(monkeypatch):
    made = []
    standard = runner.standard
    monkeypatch.setattr(runner, "standard", lambda *given: made.append(given[3]) or standard(*given))
    monkeypatch.setattr(memory, "apart", lambda *_: 1000)
    alone = Runner(CPU, CEILINGS, 0.0)
    for mode in ("forward", "backward", "both"):
        found = alone.measure(job_of(ORIGINAL, TORCH, mode=mode))
        assert all(row.milliseconds and row.error <= row.tolerance for row in found)
    assert made == ["forward", "both"]


def test_a_process_killed_while_its_memory_is_measured_leaves_the_times(monkeypatch):
    def apart(benchmark, provider, *_):
        if provider == "original":
            raise RuntimeError("measuring the memory of original ended with status -9")
        return 1000

    monkeypatch.setattr(memory, "apart", apart)
    original, ours = Runner(CPU, CEILINGS, 0.0).measure(job_of(ORIGINAL, TORCH))
    assert original.milliseconds
    assert original.extra_bytes is None
    assert "ended with status -9" in original.note
    assert "one thread" in original.note
    assert ours.extra_bytes == 1000


def test_times_are_written_before_memory_is_measured_and_the_next_run_brings_it(monkeypatch, tmp_path):
    def killed(*_):
        raise KeyboardInterrupt

    job = job_of(ORIGINAL, TORCH)
    measuring = Runner(CPU, CEILINGS, 0.0, write=lambda row: rows.add([row], tmp_path))
    monkeypatch.setattr(memory, "apart", killed)
    with pytest.raises(KeyboardInterrupt):
        measuring.measure(job)
    kept = rows.read_all(tmp_path)
    assert [bool(row.milliseconds) for row in kept] == [True, True]
    assert runner.is_measured(job, CPU, kept, with_memory=False)
    assert not runner.is_measured(job, CPU, kept)
    monkeypatch.setattr(memory, "apart", lambda *_: 1000)
    measuring.measure(job)
    kept = rows.read_all(tmp_path)
    assert [row.extra_bytes for row in kept] == [1000, 1000]
    assert runner.is_measured(job, CPU, kept)


def test_a_run_without_memory_leaves_it_to_the_next(tmp_path):
    job = job_of(ORIGINAL, TORCH)
    quick = Runner(CPU, CEILINGS, 0.0, with_memory=False, write=lambda row: rows.add([row], tmp_path))
    assert not any(runner.NO_MEMORY in (row.note or "") for row in quick.measure(job))  # shown at once
    assert runner.is_measured(job, CPU, rows.read_all(tmp_path), with_memory=False)
    assert not runner.is_measured(job, CPU, rows.read_all(tmp_path))


def test_results_that_are_missing_are_wrong(monkeypatch):
    monkeypatch.setattr(memory, "apart", lambda *_: 1000)

    def no_gradients(**inputs):
        return [*TORCH.function(**inputs)] * 2

    for name, function in (("torch", lambda **inputs: []), ("torch", no_gradients)):
        _, row = Runner(CPU, CEILINGS, 0.0).measure(job_of(ORIGINAL, Provider(name, function)))
        assert row.wrong
        assert row.milliseconds is None
        assert "results, expected 1" in row.reason


def test_rows_of_wrong_results_are_json(monkeypatch, tmp_path):
    broken = Provider("torch", lambda **inputs: [TORCH.function(**inputs)[0][:, :-1]])
    _, row = Runner(CPU, CEILINGS, 0.0, with_memory=False).measure(job_of(ORIGINAL, broken))
    assert row.wrong
    assert row.error is None
    rows.add([row], tmp_path)
    assert "NaN" not in rows.path_of(OP.name, "cpu", tmp_path).read_text()


def test_who_writes_to_the_inputs_is_wrong_and_nobody_else():
    def spoils(**inputs):
        results = TORCH.function(**inputs)
        inputs["stages"][0].detach().mul_(1.5)
        return results

    for mode in ("forward", "backward"):
        job = job_of(ORIGINAL, Provider("triton", spoils), TORCH, mode=mode)
        found = Runner(CPU, CEILINGS, 0.0, with_memory=False).measure(job)
        assert [(row.provider, row.wrong, bool(row.milliseconds)) for row in found] == [
            ("original", False, True),
            ("triton", True, False),
            ("torch", False, True),
        ]
        assert found[1].reason == "wrong: it changes its inputs"


def test_a_full_disk_is_no_fault_of_a_provider(cuda):
    def full(_):
        raise OSError(28, "No space left on device")

    with pytest.raises(runner.NotWritten, match="rows cannot be written.*No space left"):
        Runner(GPU, CEILINGS, 0.0, write=full).measure(job_of(ORIGINAL, TORCH))
    with pytest.raises(runner.NotWritten):
        Runner(CPU, CEILINGS, 0.0, with_memory=False, write=full).measure(job_of(ORIGINAL, TORCH))


def test_a_job_cut_off_before_its_graphs_is_measured_again(cuda):
    triton = dataclasses.replace(TORCH, name="triton")
    job = job_of(ORIGINAL, triton)
    found = list(measured(job).values())
    assert runner.is_measured(job, GPU, found)
    assert not runner.is_measured(job, GPU, found[:-1])
    # No graph can hold it: there is nothing more to measure.
    without = job_of(ORIGINAL, triton, graph=False)
    assert runner.is_measured(without, GPU, [row for row in found if row.launch == "eager"])


def test_times_without_neighbours_are_measured_again():
    job = job_of(ORIGINAL, TORCH)
    found = Runner(CPU, CEILINGS, 0.0, with_memory=False).measure(job)
    assert runner.is_measured(job, CPU, found, with_memory=False)
    later = [dataclasses.replace(found[1], run="later")]
    assert not runner.is_measured(job, CPU, [found[0], *later], with_memory=False)
    assert runner.is_measured(job_of(ORIGINAL), CPU, found[:1], with_memory=False)


def test_memory_of_slow_calls_is_that_of_a_timed_one(monkeypatch):
    monkeypatch.setattr(memory, "apart", lambda *_: pytest.fail("a process of its own"))
    monkeypatch.setattr(runner.timing, "SLOW_SECONDS", 0.0)
    monkeypatch.setattr(runner.timing, "TURN_SECONDS", 0.0)
    monkeypatch.setattr(runner, "WATCHED_SECONDS", 0.0)
    for row in Runner(CPU, CEILINGS, 0.0).measure(job_of(ORIGINAL, TORCH)):
        assert row.samples == runner.timing.SLOW_ROUNDS
        assert row.extra_bytes is not None


def settled(provider: Provider, row: rows.Row | None, by_name=(), free: int | None = 1 << 40) -> bool:
    job = job_of(provider)
    stored = [] if row is None else [row]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "available", lambda _: free)
        patch.setattr(runner, "current_commit", lambda code: "abc")
        return runner.is_measured(job, CPU, stored, by_name)


def row_of(provider: Provider, **values) -> rows.Row:
    fixed = {
        "op": OP.name,
        "kind": "cpu",
        "device": "a CPU",
        "case": "tiny",
        "shape": OP.tiny,
        "dtype": "float32",
        "mode": "forward",
        "provider": provider.name,
        "launch": "eager",
        "versions": {"torch": "2"},
        "commit": "abc",
        "run": "now",
        "origin": "a test",
    }
    return rows.Row(**fixed | values)


def test_a_reason_counts_as_measured_only_while_it_stands():
    compiled = next(one for one in OP.providers if one.compiled)
    row = row_of(compiled, reason=compiled.gpu_only)
    assert settled(compiled, row)
    assert not settled(compiled, row, by_name=[compiled.name])
    asked: list[str] = []
    on_request = dataclasses.replace(TORCH, on_request=lambda: asked[0] if asked else None)
    assert not settled(on_request, row_of(on_request, reason="on request: name a checkout"))
    asked.append("on request: name a checkout")
    assert settled(on_request, row_of(on_request, reason="on request: name a checkout"))
    large = dataclasses.replace(ORIGINAL, extra_bytes=lambda *_: 37 << 30)
    refused = row_of(large, reason=memory.refusal(large, OP.tiny, torch.float32, "forward", 26 << 30))
    assert settled(large, refused, free=24 << 30)
    assert not settled(large, refused, free=80 << 30)


def test_tuned_tables_are_part_of_the_conditions(monkeypatch, tmp_path):
    """Of this device, whether they are the user's or the package's."""
    monkeypatch.setenv(runner.tables.ENVIRONMENT_VARIABLE, str(tmp_path))
    monkeypatch.setattr(runner.tables, "PACKAGE", tmp_path / "package")
    assert runner.hash_of_tables("NVIDIA H200") is None
    found = []
    for folder in (tmp_path / "package", tmp_path):
        path = runner.tables.path_of(folder, "roi_align", "NVIDIA H200")
        path.parent.mkdir(parents=True)
        path.write_text("{}")
        found.append(runner.hash_of_tables("NVIDIA H200"))
    path.write_text('{"entries": []}')
    found.append(runner.hash_of_tables("NVIDIA H200"))
    runner.tables.path_of(tmp_path, "roi_align", "NVIDIA H100").write_text("{}")
    assert runner.hash_of_tables("NVIDIA H200") == found[-1]
    assert len({*found, None}) == 4


def test_rows_of_other_tuned_tables_are_measured_anew(cuda):
    job = job_of(ORIGINAL, TORCH)
    tuned = dataclasses.replace(GPU, tables="0123abcd", settings="MIG Disabled")
    found = Runner(tuned, CEILINGS, 0.05).measure(job)
    assert {(row.tables, row.settings) for row in found} == {("0123abcd", "MIG Disabled")}
    assert runner.is_measured(job, tuned, found)
    assert not runner.is_measured(job, GPU, found)


def test_times_count_as_measured_and_failures_do_not():
    times = {"min": 1.0, "p20": 1.0, "median": 1.0, "p80": 1.0, "max": 1.0}
    assert not settled(TORCH, None)
    assert settled(TORCH, row_of(TORCH, milliseconds=times))
    assert not settled(TORCH, row_of(TORCH, milliseconds=times, commit="def"))
    assert not settled(TORCH, row_of(TORCH, reason="failed: OutOfMemoryError: no memory"))
    assert not settled(TORCH, row_of(TORCH, reason="wrong: relative error", wrong=True))
    assert settled(TORCH, row_of(TORCH, reason=runner.LOST + "AcceleratorError"))


def imported(name: str) -> set[str]:
    """Modules of `benchmarks` that a module imports, and what those import."""
    tree = ast.parse((Path(runner.__file__).parent / f"{name}.py").read_text(encoding="utf-8"))
    found = {name}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("benchmarks"):
            own = node.module.removeprefix("benchmarks").removeprefix(".")
            for one in [own] if own else [alias.name for alias in node.names]:
                found |= imported(one)
    return found


@pytest.mark.parametrize("name", BENCHMARKS)
def test_the_code_of_a_benchmark_is_all_that_it_imports(name):
    """But `shapes`: another size is another case."""
    own = {path.removeprefix("benchmarks/").removesuffix(".py") for path in BENCHMARKS[name].code}
    assert imported(name) - {"shapes"} <= own
    assert own & {"check", "memory", "timing"} == {"check", "memory", "timing"}
    assert not own & {"__main__", "report", "registry", "gpu_suite"}


def test_the_version_of_the_code_without_git(monkeypatch, tmp_path):
    for folder in ("mgllava", "mgllava_kernels", "benchmarks/results"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "code.py").write_text("1")
    monkeypatch.setattr(runner, "ROOT", tmp_path)
    monkeypatch.setattr(runner, "_git", lambda *_: None)
    monkeypatch.setenv("GIT_COMMIT", "abc1234")
    version = runner.current_commit.__wrapped__
    assert version(OP.code) == "abc1234"
    monkeypatch.delenv("GIT_COMMIT")
    ops, models = version(OP.code), version(BENCHMARKS["generation"].code)
    assert ops.startswith("files-")
    for name in ("results/code", "report", "__main__", "gpu_suite", "runner", "neck"):
        (tmp_path / f"benchmarks/{name}.py").write_text("2")
    assert version(OP.code) == ops
    for name in ("timing", "original", "pooled_roi_align"):
        (tmp_path / f"benchmarks/{name}.py").write_text("2")
        assert version(OP.code) != ops
        ops = version(OP.code)
    models = version(BENCHMARKS["generation"].code)
    # The model's code is no part of the ops'.
    (tmp_path / "mgllava/code.py").write_text("2")
    assert version(OP.code) == ops
    assert version(BENCHMARKS["generation"].code) != models
    (tmp_path / "mgllava_kernels/code.py").write_text("2")
    assert version(OP.code) != ops
