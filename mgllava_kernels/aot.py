"""Compile the package's kernels ahead of time, without a GPU: `python -m mgllava_kernels.aot`.

The ops' own host functions run on meta tensors, so exactly the variants that they launch are compiled, and the
results land in Triton's cache (TRITON_CACHE_DIR) under the keys of ordinary launches: after
`--target native` on a GPU machine no kernel of the published sizes waits for the compiler.
"""

import dataclasses
import importlib
import json
import multiprocessing
import os
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import triton
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table as Listing
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from mgllava_kernels import _machine_code, configs
from mgllava_kernels._triton import launch
from mgllava_kernels._triton.launch import Target
from mgllava_kernels._workloads import OPS, Op, requests_of, select, select_dtypes
from mgllava_kernels.configs import Config, tables

# Shared memory is what a program may ask for.
TARGETS = {
    "sm_80": Target("cuda", 80, "sm_80", 108, 166912, 32),
    "sm_89": Target("cuda", 89, "sm_89", 142, 101376, 32),
    "sm_90": Target("cuda", 90, "sm_90", 132, 232448, 32),
    "sm_100": Target("cuda", 100, "sm_100", 148, 232448, 32),
    "gfx942": Target("hip", "gfx942", "gfx942", 304, 65536, 64),
}
DEFAULT_TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")


@dataclass(frozen=True)
class Forced:
    """Arguments of `configs.force`."""

    kernel: str
    config: Config
    sizes: tuple[tuple[str, int], ...] | None = None
    count: int | None = None


@dataclass(frozen=True)
class Job:
    """Calls of one op to compile for; `op` may have only some of its workloads."""

    op: Op
    target: Target
    dtype: torch.dtype
    layout: str
    forced: Forced | None = None


@dataclass(frozen=True)
class Built:
    """One kernel compiled, or the error that came instead.

    `options` are its constexpr parameters and Triton's options; `hash` is its key in Triton's cache;
    `workload` names the first call that launched it.
    """

    op: str
    dtype: str
    layout: str
    target: str
    workload: str
    kernel: str
    options: dict[str, Any]
    limit: int
    seconds: float
    error: str | None = None
    hash: str | None = None
    shared_memory: int = 0
    usage: _machine_code.Usage | None = None
    instructions: _machine_code.Instructions | None = None

    @property
    def failure(self) -> str | None:
        """Why this kernel is not fit for its target, or None."""
        if self.error is not None:
            return self.error
        if self.shared_memory > self.limit:
            return f"needs {self.shared_memory} bytes of shared memory, {self.target} has {self.limit}"
        if self.usage is not None and self.usage.spills:
            return (
                f"spills: {self.usage.stack_bytes} bytes of stack; "
                f"{self.usage.spilled_registers} vector and {self.usage.scalar_spills} scalar registers "
                "counted as spilled"
            )
        return None

    def record(self) -> dict[str, Any]:
        """Everything as JSON takes it."""
        return {**dataclasses.asdict(self), "failure": self.failure}


def find_target(name: str) -> Target:
    """A target of TARGETS by its name, or `native`: the current GPU.

    Raises:
        ValueError: unknown name.
        RuntimeError: `native` without a GPU, or with one that Triton compiles for under another name.
    """
    if name != "native":
        if name not in TARGETS:
            raise ValueError(f"target must be native or one of {', '.join(TARGETS)}; got {name!r}")
        return TARGETS[name]
    if not torch.cuda.is_available():
        raise RuntimeError("the target native needs a GPU, and torch finds none")
    target = launch.target_of(torch.device("cuda"))
    if driver.active.get_current_target() != gpu_target(target):
        raise RuntimeError(
            f"Triton compiles for {driver.active.get_current_target()} here, not for {gpu_target(target)}"
        )
    return target


def gpu_target(target: Target) -> GPUTarget:
    return GPUTarget(target.backend, target.arch, target.warp_size)


class _Driver:
    """What Triton asks a driver when it compiles. The target itself is the device: kernels are kept by it."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> GPUTarget:
        return self._target

    def get_current_stream(self, device: GPUTarget) -> int:
        return 0


@contextmanager
def driver_for(target: Target) -> Iterator[None]:
    """Let Triton compile for `target` inside the block, on any machine; nothing can be launched there."""
    before = driver._active
    driver.set_active(_Driver(gpu_target(target)))
    try:
        yield
    finally:
        driver.set_active(before)


def compile_job(job: Job) -> list[Built]:
    """Compile what one job launches; every kernel once, errors among the results."""
    built: dict[str, Built] = {}
    workload = ""

    def add(kernel: str, options: dict[str, Any], seconds: float, key: str, **results: Any) -> None:
        dtype = tables.dtype_name(job.dtype)
        where = (job.op.name, dtype, job.layout, job.target.name, workload)
        built.setdefault(key, Built(*where, kernel, options, job.target.shared_memory, seconds, **results))

    def compile(kernel: Any, grid: tuple[int, ...], args: Sequence[Any], options: dict[str, Any]) -> None:
        name = kernel.fn.__name__
        shown = {key: value for key, value in options.items() if isinstance(value, bool | int | float | str)}
        started = time.perf_counter()
        try:
            compiled = kernel.warmup(*args, grid=grid, **options)
        # Any failure is a result, of which there may be several; a defect of this program would be one too.
        except Exception as error:
            message = f"{type(error).__name__}: {error}"
            add(name, shown, time.perf_counter() - started, f"{name} {shown} {message}", error=message)
            return
        seconds = time.perf_counter() - started
        if compiled.hash not in built:
            usage, instructions = _examine(compiled, job.target)
            results = {"hash": compiled.hash, "shared_memory": compiled.metadata.shared}
            add(name, shown, seconds, compiled.hash, usage=usage, instructions=instructions, **results)

    with ExitStack() as stack:
        stack.enter_context(driver_for(job.target))
        stack.enter_context(launch.compile_only(job.target, compile))
        stack.enter_context(configs.observe())  # nothing is launched: no advice to tune
        stack.enter_context(_forcing(job.forced))
        for call in job.op.workloads:
            workload = call.name
            try:
                job.op.call(call.arguments(job.dtype, job.layout, torch.device("meta")))
            except Exception:
                error = traceback.format_exc(limit=-3).rstrip()
                add("", {}, 0.0, f"{workload} {error}", error=error)
    return list(built.values())


def compile_jobs(jobs: Sequence[Job], processes: int, progress: Progress | None = None) -> list[Built]:
    """Compile in `processes` processes; results in the order of the jobs.

    A process that the compiler brings down costs its own job: the result says so.

    Raises:
        RuntimeError: TRITON_INTERPRET is set, under which kernels cannot be compiled.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError(
            "kernels cannot be compiled while TRITON_INTERPRET is set: unset it and start this program again"
        )
    task = progress.add_task("compiling", total=len(jobs)) if progress else None
    results: dict[int, list[Built]] = {}

    def run(indices: Sequence[int], workers: int) -> None:
        # Not forked: torch and LLVM have started threads.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(max_workers=workers, mp_context=context) as pool:
            futures: dict[Future[list[Built]], int] = {pool.submit(compile_job, jobs[i]): i for i in indices}
            try:
                for future in as_completed(futures):
                    results[futures[future]] = future.result()
                    if progress and task is not None:
                        progress.advance(task)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    if jobs:
        try:
            run(range(len(jobs)), min(processes, len(jobs)))
        except BrokenProcessPool:
            # Which job it was is not known: the rest run one by one.
            for index in [index for index in range(len(jobs)) if index not in results]:
                try:
                    run([index], 1)
                except BrokenProcessPool:
                    results[index] = [_crashed(jobs[index])]
    return [built for index in range(len(jobs)) for built in results[index]]


def plan(
    ops: Sequence[Op], targets: Sequence[Target], dtypes: Sequence[torch.dtype], candidates: bool = False
) -> list[Job]:
    """The jobs for all workloads of `ops`, then for the tuned tables of `targets`.

    A table belongs to a target of its device's name, and to a target of TARGETS of the same architecture; its
    configs are compiled for its own device. With `candidates` every legal candidate is compiled as well.
    """
    # Neighbours run at the same time: of different targets, they do not compile the same kernel twice.
    jobs = [
        Job(op, target, dtype, layout)
        for op in ops
        for dtype in dtypes
        for layout in op.layouts
        for target in targets
    ]
    for path in tables.find():
        table = tables.read(path)
        device = Target(name=table.device, **table.target)
        if any(_stands_for(target, device) for target in targets):
            for op in ops:
                for dtype in dtypes:
                    jobs += _tuned_jobs(op, device, dtype, table)
    if candidates:
        for job in [job for job in jobs if job.forced is None]:
            jobs += _candidate_jobs(job)
    return jobs


def _stands_for(target: Target, device: Target) -> bool:
    if target in TARGETS.values():
        return (target.backend, target.arch) == (device.backend, device.arch)
    return target.name == device.name


def _tuned_jobs(op: Op, device: Target, dtype: torch.dtype, table: tables.Table) -> Iterator[Job]:
    """Each config of `table` in the first workload of `op` that launches the table's kernel, if one does."""
    tuned = dict.fromkeys(entry.config for entry in table.entries if entry.dtype == dtype)
    for layout in op.layouts:
        for one, requests in requests_of(op, device, dtype, layout):
            if any(request.space.kernel == table.kernel for request in requests):
                for config in tuned:
                    yield Job(one, device, dtype, layout, Forced(table.kernel, config))
                break


def _candidate_jobs(job: Job) -> Iterator[Job]:
    """Every legal candidate of every request of `job`, a request of several workloads in the first of them."""
    done = set()
    for one, requests in requests_of(job.op, job.target, job.dtype, job.layout):
        for request in requests:
            asked = (request.space.kernel, request.sizes, request.count)
            if asked not in done:
                done.add(asked)
                for config in request.candidates():
                    forced = Forced(request.space.kernel, config, request.sizes, request.count)
                    yield dataclasses.replace(job, op=one, forced=forced)


def load_native(jobs: Sequence[Job], built: Sequence[Built], target: Target) -> Iterator[str]:
    """Load what was compiled onto the current GPU, as a first launch does; yields what went wrong.

    Some versions of Triton compile a launcher for each signature then, and keep it on disk as well.
    """
    known = {result.hash for result in built}
    problems: list[str] = []

    def load(kernel: Any, grid: tuple[int, ...], args: Sequence[Any], options: dict[str, Any]) -> None:
        compiled = kernel.warmup(*args, grid=grid, **options)
        if compiled.hash not in known:
            problems.append(f"{kernel.fn.__name__}: a launch looks for another key in Triton's cache")
        try:
            compiled._init_handles()
        except triton.runtime.errors.OutOfResources as error:
            problems.append(f"{kernel.fn.__name__}: {error}")

    with launch.compile_only(target, load), configs.observe():
        for job in jobs:
            if job.target == target and job.forced is None:
                for call in job.op.workloads:
                    job.op.call(call.arguments(job.dtype, job.layout, torch.device("meta")))
    yield from dict.fromkeys(problems)


@contextmanager
def _forcing(forced: Forced | None) -> Iterator[None]:
    if forced is None:
        yield
        return
    sizes = None if forced.sizes is None else dict(forced.sizes)
    with configs.force(forced.kernel, forced.config, sizes=sizes, count=forced.count):
        yield


def _examine(compiled: Any, target: Target) -> tuple[_machine_code.Usage, _machine_code.Instructions]:
    if target.backend == "cuda":
        usage = _machine_code.nvidia_usage(compiled.asm["cubin"], triton.knobs.nvidia.cuobjdump.path)
        return usage, _machine_code.ptx_instructions(compiled.asm["ptx"])
    assembly = compiled.asm["amdgcn"]
    return _machine_code.amd_usage(assembly), _machine_code.amd_instructions(assembly)


def _crashed(job: Job) -> Built:
    where = (job.op.name, tables.dtype_name(job.dtype), job.layout, job.target.name, job.op.workloads[0].name)
    options: dict[str, Any] = {} if job.forced is None else dict(job.forced.config.options)
    error = "the compiler brought its process down"
    return Built(*where, "", options, job.target.shared_memory, 0.0, error=error)


def listing(built: Sequence[Built]) -> Listing:
    """One row a kernel; where several calls launch the same one, the dtypes and layouts of all of them."""
    table = Listing(
        *("kernel", "op", "dtype", "layout", "target", "options"),
        *("registers", "shared", "spills", "matrix", "16-byte loads", "atomics", "seconds"),
    )
    for same in _by_kernel(built):
        first = same[0]
        usage, code = first.usage, first.instructions
        shared = (
            *(first.kernel or "-", _joined(result.op for result in same)),
            *(_joined(result.dtype for result in same), _joined(result.layout for result in same)),
            *(first.target, " ".join(f"{name}={value}" for name, value in first.options.items())),
        )
        if usage is None or code is None:
            table.add_row(*shared, "[red]failed[/]")
            continue
        wide = sum(number for width, number in code.loads.items() if width >= 16)
        table.add_row(
            *shared,
            *(str(usage.registers), str(first.shared_memory)),
            _spills(usage),
            " ".join(f"{kind} {number}" for kind, number in code.matrix.items()) or "-",
            f"{wide} of {sum(code.loads.values())}",
            *(str(code.atomics or "-"), f"{max(result.seconds for result in same):.1f}"),
        )
    return table


def failures(built: Sequence[Built]) -> list[str]:
    """A line for each kernel that failed, for whichever calls it did."""
    lines = []
    for same in _by_kernel(built):
        first = same[0]
        if first.failure is not None:
            calls = dict.fromkeys(f"{one.op} {one.dtype} {one.layout}" for one in same)
            options = " ".join(f"{name}={value}" for name, value in first.options.items())
            where = f"{first.kernel or 'the host function'} {options}".rstrip()
            lines.append(f"{where} on {first.target} ({', '.join(calls)}): {first.failure}")
    return lines


def _by_kernel(built: Sequence[Built]) -> list[list[Built]]:
    """Results of the same kernel, or the same error, side by side."""
    groups: dict[tuple[str, ...], list[Built]] = {}
    for result in built:
        which = (result.target, result.kernel, result.hash or f"{result.options} {result.error}")
        groups.setdefault(which, []).append(result)
    return list(groups.values())


def _spills(usage: _machine_code.Usage) -> str:
    spills = {"B": usage.stack_bytes, "vector": usage.spilled_registers, "scalar": usage.scalar_spills}
    return ", ".join(f"{number} {kind}" for kind, number in spills.items() if number) or "-"


def _joined(values: Iterator[str]) -> str:
    return ", ".join(dict.fromkeys(values))


app = typer.Typer(add_completion=False, pretty_exceptions_show_locals=False)


@app.command()
def main(
    target: Annotated[
        list[str] | None,
        typer.Option(
            help=f"{', '.join(TARGETS)} or native (the current GPU); default {', '.join(DEFAULT_TARGETS)}."
        ),
    ] = None,
    op: Annotated[
        list[str] | None, typer.Option(help=f"{', '.join(op.name for op in OPS)}; default all.")
    ] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="bfloat16, float16, float32; default all.")] = None,
    candidates: Annotated[
        bool, typer.Option(help="Also whatever the tuner would try: before tuning. Slow.")
    ] = False,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="File for everything known of each kernel.")
    ] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes; default one a CPU.")] = None,
) -> None:
    """Compile every kernel for every target and show what it uses; fails where one does not compile or spills."""
    console, errors = Console(), Console(stderr=True)
    if not console.is_terminal:
        console.width = 250  # in a file or a pipe nobody sees where a line should break
    try:
        if json_path is not None and not (json_path.parent.is_dir() and os.access(json_path.parent, os.W_OK)):
            raise ValueError(f"--json {json_path}: {json_path.parent} is no folder that can be written to")
        ops, dtypes = select(op or [], OPS), select_dtypes(dtype or [])
        targets = [find_target(name) for name in dict.fromkeys(target or DEFAULT_TARGETS)]
        planned = plan(ops, targets, dtypes, candidates)
        with Progress(console=errors, transient=True) as progress:
            built = compile_jobs(planned, jobs or len(os.sched_getaffinity(0)), progress)
        problems = failures(built)
        for one in targets:
            if one not in TARGETS.values():
                problems += load_native(planned, built, one)
        if json_path is not None:
            record = {"torch": torch.__version__, "triton": triton.__version__}
            record["kernels"] = [result.record() for result in built]
            partial = json_path.with_name(f".{json_path.name}.{os.getpid()}")
            partial.write_text(json.dumps(record, indent=1) + "\n")
            os.replace(partial, json_path)
    except (ValueError, RuntimeError, OSError) as error:
        errors.print("[bold red]error:[/]", end=" ")
        errors.print(str(error), markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error
    console.print(listing(built))
    for problem in problems:
        errors.print("[bold red]failed:[/]", end=" ")
        errors.print(problem, markup=False, highlight=False, soft_wrap=True)
    if problems:
        raise typer.Exit(1)


if __name__ == "__main__":
    # Processes that compile import what they unpickle from the module, not from this copy of it.
    importlib.import_module("mgllava_kernels.aot").app()
