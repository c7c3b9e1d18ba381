"""Measure which launch parameters are best on the current GPU: `python -m mgllava_kernels.tune`.

Every legal candidate of every kernel is timed inside the ops that use it, at published sizes, and the best are
written as tables of `mgllava_kernels.configs`. A table gains an entry whenever one is finished; entries that
are there are not measured again, so an interrupted run goes on where it stopped (delete a file to measure
anew). Compiling takes most of the time: `python -m mgllava_kernels.aot --target native --candidates` does it
beforehand, on all CPUs.
"""

import datetime
import functools
import math
import os
import shlex
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import triton
import typer
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from mgllava_kernels import configs
from mgllava_kernels._triton import launch
from mgllava_kernels._triton.launch import Target
from mgllava_kernels._workloads import OPS, Op, requests_of, select, select_dtypes
from mgllava_kernels.configs import Config, Request, tables

# What a candidate must be faster by: less is within the noise, and the heuristic is the safer choice.
MARGIN = 0.01
# How many candidates are measured once more, beside the heuristic: the best of many is lucky, too.
FINALISTS = 3
# What Triton raises, as a bare RuntimeError, when one of its passes gives up.
COMPILER_FAILED = "PassManager::run failed"
# Sets of arguments for one call: as many as exceed the L2 cache twice, at most these.
MAX_SETS = 64
# Of ‖candidate − heuristic‖ / ‖heuristic‖, in units in the last place of the dtype: candidates sum in other
# orders. Sums of ten thousand float32 terms differ by more units than the rounding of results does.
TOLERANCES = {torch.bfloat16: 1.0, torch.float16: 1.0, torch.float32: 64.0}

# Microseconds of one call, given the same call on several sets of arguments.
Measure = Callable[[Sequence[Callable[[], object]]], float]


@dataclass(frozen=True)
class Group:
    """Calls that ask for one entry: they differ in what tables do not tell apart, such as the batch."""

    request: Request
    calls: list[tuple[Op, str]]


@dataclass(frozen=True)
class Call:
    """One call on several sets of arguments, and what the heuristic's config makes of the first."""

    name: str
    runs: Sequence[Callable[[], Any]]
    expected: list[Tensor]


@dataclass(frozen=True)
class Skipped:
    """A candidate that was not timed, and why; `wrong` if it computed something else than the heuristic's."""

    kernel: str
    config: Config
    reason: str
    wrong: bool


class WrongResult(Exception):
    """A candidate's output is not that of the heuristic's config."""


def microseconds(calls: Sequence[Callable[[], object]]) -> float:
    """Median time of one call on the current GPU, from replays of a CUDA graph that makes all `calls` in turn.

    A graph leaves out what the host needs to launch; calls on sets of arguments that together exceed the L2
    cache read them from memory.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    once = _replay_milliseconds(graph, 1)
    # A sample of a millisecond is long beside the resolution of events, half a microsecond.
    replays = max(1, math.ceil(1.0 / max(once, 1e-3)))
    samples = [_replay_milliseconds(graph, replays) for _ in range(21)]
    return statistics.median(samples) * 1000 / (replays * len(calls))


def _replay_milliseconds(graph: torch.cuda.CUDAGraph, replays: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(replays):
        graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def conditions(device: torch.device) -> dict[str, str | None]:
    """What a measurement depends on beside the device."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "driver": _driver_version() if device.type == "cuda" else None,
        "command": shlex.join(["python", "-m", "mgllava_kernels.tune", *sys.argv[1:]]),
    }


def _driver_version() -> str | None:
    if torch.version.hip is not None:
        version = Path("/sys/module/amdgpu/version")
        return version.read_text().strip() if version.is_file() else None
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    lines = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    return lines[0].strip() if lines else None


class Tuner:
    """One run on one device; `skipped` collects what was left out.

    Args:
        device: where to measure.
        output: folder of the tables; entries that are there are kept.
        measure: times a call; tests pass a clock of their own.
        conditions: stored in the tables with the entries of this run.
        console: gets a line for each entry and for each candidate that is left out.
    """

    def __init__(
        self,
        device: torch.device,
        output: Path,
        measure: Measure,
        conditions: Mapping[str, str | None],
        console: Console,
    ) -> None:
        self.device = device
        self.output = output
        self.measure = measure
        self.conditions = dict(conditions)
        self.console = console
        self.target = launch.target_of(device)
        self.skipped: list[Skipped] = []

    def run(self, ops: Sequence[Op], dtypes: Sequence[torch.dtype]) -> None:
        """Write the entries that are missing for `ops` in `dtypes`."""
        with Progress(console=self.console, transient=True) as progress:
            for op in ops:
                for dtype in dtypes:
                    for group in groups_of(op, self.target, dtype):
                        if not self._finished(group.request):
                            self._finish(group, progress)

    def _finish(self, group: Group, progress: Progress) -> None:
        request = group.request
        candidates = request.candidates()
        name = f"{request.space.kernel}, {tables.dtype_name(request.dtype)}, count {request.count}"
        task = progress.add_task(name, total=1 + len(candidates))
        with self._tuned_so_far():
            config = request.heuristic()
            with _forcing(request, config):
                calls = [self._prepare(op, request.dtype, layout) for op, layout in group.calls]
            heuristic = self._times(request, config, calls)
            progress.advance(task)
            times = {}
            for candidate in candidates:
                measured = self._try(request, candidate, calls)
                if measured is not None:
                    times[candidate] = measured
                progress.advance(task)
            best = sorted(times, key=lambda candidate: _relative(times[candidate], heuristic))[:FINALISTS]
            finalists = [candidate for candidate in best if _wins(times[candidate], heuristic)]
            if finalists:
                heuristic = self._times(request, config, calls)
                times = {candidate: self._times(request, candidate, calls) for candidate in finalists}
                winner = min(finalists, key=lambda candidate: _relative(times[candidate], heuristic))
                config = winner if _wins(times[winner], heuristic) else config
        progress.remove_task(task)
        measured = times.get(config, heuristic)
        names = [call.name for call in calls]
        self._add(
            request, config, dict(zip(names, measured, strict=True)), dict(zip(names, heuristic, strict=True))
        )
        gain = 1 / _relative(measured, heuristic)
        self.console.print(
            f"{name}: {config} ({gain:.2f} times the heuristic's speed)", markup=False, soft_wrap=True
        )

    def _prepare(self, op: Op, dtype: torch.dtype, layout: str) -> Call:
        (workload,) = op.workloads
        arguments = [workload.arguments(dtype, layout, self.device)]
        expected = _tensors(op.call(arguments[0]))
        if self.device.type == "cuda":
            size = sum(tensor.nbytes for tensor in _tensors(arguments[0]) + expected)
            cache = torch.cuda.get_device_properties(self.device).L2_cache_size
            sets = min(MAX_SETS, math.ceil(2 * cache / max(size, 1)))
            arguments += [workload.arguments(dtype, layout, self.device) for _ in range(sets)]
        runs = [functools.partial(op.call, values) for values in arguments]
        return Call(f"{op.name}, {workload.name}, {layout}", runs, expected)

    def _times(self, request: Request, config: Config, calls: Sequence[Call]) -> list[float]:
        with _forcing(request, config):
            return [self.measure(call.runs) for call in calls]

    def _try(self, request: Request, config: Config, calls: Sequence[Call]) -> list[float] | None:
        """Times of a candidate, or None if it cannot run or errs."""
        try:
            with _forcing(request, config):
                for call in calls:
                    _check(_tensors(call.runs[0]()), call)
            return self._times(request, config, calls)
        except (OutOfResources, PTXASError, CompilationError, torch.OutOfMemoryError, WrongResult) as error:
            reason, wrong = f"{error}", isinstance(error, WrongResult)
        except RuntimeError as error:
            if COMPILER_FAILED not in str(error):
                raise
            reason, wrong = f"{error}", False
        self.skipped.append(Skipped(request.space.kernel, config, reason, wrong))
        # At once: an interrupted run would take it along.
        self.console.print("[bold red]wrong:[/]" if wrong else "[yellow]skipped:[/]", end=" ")
        line = f"{request.space.kernel}, {config}: {reason}"
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)
        return None

    @contextmanager
    def _tuned_so_far(self) -> Iterator[None]:
        """The other kernels of an op run with the entries they have by now."""
        with ExitStack() as stack:
            for path in self.output.glob(f"*/{tables.path_of(self.output, '', self.target.name).name}"):
                table = tables.read(path)
                for entry in table.entries:
                    stack.enter_context(
                        configs.force(
                            table.kernel,
                            entry.config,
                            dtype=entry.dtype,
                            sizes=dict(entry.sizes),
                            count=entry.count,
                        )
                    )
            yield

    def _table(self, request: Request) -> tuple[Path, tables.Table]:
        path = tables.path_of(self.output, request.space.kernel, self.target.name)
        if path.is_file():
            return path, tables.read(path)
        target = {name: getattr(self.target, name) for name in tables.TARGET_FIELDS}
        return path, tables.Table(request.space.kernel, self.target.name, target)

    def _finished(self, request: Request) -> bool:
        _, table = self._table(request)
        return any((entry.key, entry.count) == (request.key, request.count) for entry in table.entries)

    def _add(
        self,
        request: Request,
        config: Config,
        measured: Mapping[str, float],
        heuristic: Mapping[str, float],
    ) -> None:
        path, table = self._table(request)
        if self.conditions not in table.runs:
            table.runs.append(self.conditions)
        dtype, sizes = request.key
        times = [{name: round(time, 2) for name, time in values.items()} for values in (measured, heuristic)]
        run = table.runs.index(self.conditions)
        table.entries.append(tables.Entry(dtype, sizes, request.count, config, times[0], times[1], run))
        tables.write(path, table)


def groups_of(op: Op, target: Target, dtype: torch.dtype) -> list[Group]:
    """The entries that `op` asks for in `dtype`, each with all calls that do."""
    groups: dict[Any, Group] = {}
    for layout in op.layouts:
        for one, requests in requests_of(op, target, dtype, layout):
            for request in requests:
                asked = (request.space.kernel, request.key, request.count)
                groups.setdefault(asked, Group(request, [])).calls.append((one, layout))
    return list(groups.values())


def _forcing(request: Request, config: Config) -> AbstractContextManager[None]:
    return configs.force(
        request.space.kernel,
        config,
        dtype=request.dtype,
        sizes=dict(request.sizes),
        count=request.count,
    )


def _tensors(values: Any) -> list[Tensor]:
    """The tensors in the arguments or the result of an op."""
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, list | tuple):
        return [tensor for value in values for tensor in _tensors(value)]
    return []


def _check(output: Sequence[Tensor], call: Call) -> None:
    for actual, expected in zip(output, call.expected, strict=True):
        allowed = TOLERANCES[expected.dtype] * torch.finfo(expected.dtype).eps
        scale = expected.float().norm().item()
        error = (actual.float() - expected.float()).norm().item()
        # Also false for NaN.
        if not error <= allowed * scale:
            raise WrongResult(f"{call.name}: differs by {error / max(scale, 1e-30):.1e} relatively")


def _relative(times: Sequence[float], heuristic: Sequence[float]) -> float:
    """Geometric mean of the times as fractions of the heuristic's."""
    return statistics.geometric_mean(a / b for a, b in zip(times, heuristic, strict=True))


def _wins(times: Sequence[float], heuristic: Sequence[float]) -> bool:
    return _relative(times, heuristic) < 1 - MARGIN


app = typer.Typer(add_completion=False, pretty_exceptions_show_locals=False)


@app.command()
def main(
    op: Annotated[
        list[str] | None, typer.Option(help=f"{', '.join(op.name for op in OPS)}; default all.")
    ] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="bfloat16, float16, float32; default all.")] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help=f"Folder of the tables; default the one that {tables.ENVIRONMENT_VARIABLE} names, else the package's."
        ),
    ] = None,
) -> None:
    """Tune the kernels on the current GPU and write tables; goes on where an earlier run stopped."""
    console = Console(stderr=True)
    folder = output or tables.folders()[0]
    try:
        ops, dtypes = select(op or [], OPS), select_dtypes(dtype or [])
        if not torch.cuda.is_available():
            raise RuntimeError("tuning needs a GPU, and torch finds none")
        if triton.knobs.runtime.interpret:
            raise RuntimeError("tuning measures compiled kernels: unset TRITON_INTERPRET")
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(f"cannot write to {folder}: name another folder with --output")
        device = torch.device("cuda", torch.cuda.current_device())
        tuner = Tuner(device, folder, microseconds, conditions(device), console)
        tuner.run(ops, dtypes)
    except (ValueError, RuntimeError, OSError) as error:
        console.print("[bold red]error:[/]", end=" ")
        console.print(str(error), markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error
    if folder.resolve() not in [found.resolve() for found in tables.folders()]:
        console.print(f"to use these tables set {tables.ENVIRONMENT_VARIABLE}={folder}", soft_wrap=True)
    if any(skipped.wrong for skipped in tuner.skipped):
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
