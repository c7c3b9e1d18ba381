"""One case after the other: check, time, memory, rows."""

import datetime
import os
import platform
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

import torch

from benchmarks import memory, timing
from benchmarks.benchmark import Benchmark, Problem, Provider, forget_compilations, make_call, make_problem
from benchmarks.check import WrongResult, check, expected, tolerance
from benchmarks.roofline import Ceilings
from benchmarks.rows import Row
from benchmarks.shapes import Case
from mgllava_kernels.tune import conditions as gpu_conditions

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "triton", "torchvision", "transformers")
# What a commit must have changed to be another version of the code.
CODE = ("mgllava", "mgllava_kernels", "benchmarks", ":!benchmarks/results")
OURS = ("torch", "triton", "mgllava")


@dataclass(frozen=True)
class Job:
    """One case of a benchmark in a dtype and a mode: what is measured side by side."""

    benchmark: Benchmark
    case: Case
    dtype: str
    mode: str
    providers: tuple[Provider, ...]

    @property
    def name(self) -> str:
        return f"{self.benchmark.name}, {self.case.name}, {self.dtype}, {self.mode}"


@dataclass(frozen=True)
class Conditions:
    """What a row depends on beside the case."""

    device: torch.device
    kind: str
    device_name: str
    versions: dict[str, str]
    commit: str | None


def current_conditions(device: torch.device) -> Conditions:
    """Of this machine and this checkout."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    if device.type == "cuda":
        kind = name = torch.cuda.get_device_name(device)
        driver = gpu_conditions(device)["driver"]
        if driver is not None:
            versions["driver"] = driver
    else:
        kind, name = "cpu", f"{_cpu_name()}, {torch.get_num_threads()} threads"
    return Conditions(device, kind, name, versions, current_commit())


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def current_commit() -> str | None:
    """The last commit that changed the code, with `-dirty` if files differ from it.

    Without a git checkout it is what the environment variable GIT_COMMIT says, or None.
    """
    commit = _git("log", "-1", "--format=%h", "--", *CODE)
    if not commit:
        return os.environ.get("GIT_COMMIT") or None
    return commit + "-dirty" if _git("status", "--porcelain", "--", *CODE) else commit


def _git(*arguments: str) -> str | None:
    try:
        result = subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, text=True)
    except OSError:
        return None
    return result.stdout.strip() if result.returncode == 0 else None


class Runner:
    """Measures jobs on one device.

    Args:
        conditions: where and with what.
        ceilings: rates of the device.
        budget: seconds for the timing of one job; the slowest provider still gets its smallest number of rounds.
        by_name: providers that were asked for by name.
        with_memory: also measure peak memory (on a CPU each provider then runs in a process of its own).
        tell: gets a word on what is going on.
    """

    def __init__(
        self,
        conditions: Conditions,
        ceilings: Ceilings,
        budget: float,
        by_name: Sequence[str] = (),
        with_memory: bool = True,
        tell: Callable[[str], object] = lambda _: None,
    ) -> None:
        self.conditions = conditions
        self.ceilings = ceilings
        self.budget = budget
        self.by_name = tuple(by_name)
        self.with_memory = with_memory
        self.tell = tell

    def measure(self, job: Job) -> list[Row]:
        """The rows of one job: every provider, timed or with the reason why not."""
        device, dtype = self.conditions.device, getattr(torch, job.dtype)
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        rows = {provider.name: self._blank(job, provider, now) for provider in job.providers}
        free = memory.available(device)
        able = []
        for provider in job.providers:
            reason = provider.obstacle(device, job.dtype, job.mode, provider.name in self.by_name)
            reason = reason or memory.refusal(provider, job.case.sizes, dtype, job.mode, free)
            if reason is None:
                able.append(provider)
            else:
                rows[provider.name] = replace(rows[provider.name], reason=reason)
        if able:
            problem = make_problem(job.benchmark, job.case.sizes, dtype, device)
            right = self._check(job, problem, able, rows)
            measured = self._on_gpu(job, problem, right, rows) if device.type == "cuda" else None
            if measured is not None:
                return measured
            self._on_cpu(job, problem, right, rows)
        return list(rows.values())

    def _blank(self, job: Job, provider: Provider, run: str) -> Row:
        sizes, dtype, cost = job.case.sizes, getattr(torch, job.dtype), job.benchmark.cost
        return Row(
            op=job.benchmark.name,
            kind=self.conditions.kind,
            device=self.conditions.device_name,
            case=job.case.name,
            shape=sizes,
            dtype=job.dtype,
            mode=job.mode,
            provider=provider.name,
            launch="eager",
            versions=self.conditions.versions,
            commit=self.conditions.commit,
            run=run,
            origin=job.case.origin,
            tolerance=tolerance(job.benchmark, dtype, job.mode),
            floor_ms=None
            if cost is None
            else self.ceilings.floor_ms(cost(sizes, dtype, job.mode), job.dtype),
        )

    def _check(
        self, job: Job, problem: Problem, providers: Sequence[Provider], rows: dict[str, Row]
    ) -> list[Provider]:
        """The providers whose results are right; the rows of the others say what is wrong."""
        self.tell("reference")
        reference, name = expected(job.benchmark, job.case.sizes, problem, job.mode)
        right = []
        for provider in providers:
            self.tell(f"checking {provider.name}")
            row = replace(rows[provider.name], reference=name)
            try:
                row = replace(
                    row, error=check(job.benchmark, provider.function, problem, job.mode, reference)
                )
                right.append(provider)
            except WrongResult as wrong:
                row = replace(row, error=wrong.error, wrong=True, reason=str(wrong))
            except RuntimeError as error:
                row = replace(row, reason=_failure(error))
            rows[provider.name] = row
        return right

    def _on_cpu(
        self, job: Job, problem: Problem, providers: Sequence[Provider], rows: dict[str, Row]
    ) -> None:
        self.tell("timing")
        calls = {one.name: make_call(one.function, problem, job.mode) for one in providers}
        for name, seconds in (timing.in_rounds(calls, self.budget) if calls else {}).items():
            rows[name] = _timed(job, rows[name], seconds)
        del calls
        for provider in providers if self.with_memory else ():
            self.tell(f"memory of {provider.name}")
            extra = memory.apart(job.benchmark.name, provider.name, job.case.sizes, job.dtype, job.mode)
            rows[provider.name] = replace(rows[provider.name], extra_bytes=extra)
        forget_compilations()

    def _on_gpu(
        self, job: Job, problem: Problem, providers: Sequence[Provider], rows: dict[str, Row]
    ) -> list[Row]:
        """Two rows for each provider: launched by the host and inside a CUDA graph."""
        device, dtype = self.conditions.device, getattr(torch, job.dtype)
        sets = timing.number_of_sets(problem.nbytes, torch.cuda.get_device_properties(device).L2_cache_size)
        problems = [problem]
        problems += [
            make_problem(job.benchmark, job.case.sizes, dtype, device, seed) for seed in range(1, sets)
        ]
        results = [row for name, row in rows.items() if name not in {one.name for one in providers}]
        for provider in providers:
            row = rows[provider.name]

            def make_calls(provider: Provider = provider) -> list[timing.Call]:
                return [make_call(provider.function, one, job.mode) for one in problems]

            try:
                self.tell(f"memory of {provider.name}")
                calls = make_calls()
                row = replace(row, extra_bytes=memory.on_gpu(calls[0])) if self.with_memory else row
                self.tell(f"timing {provider.name}")
                results.append(_timed(job, row, timing.launched(calls, self.budget)))
                del calls
            except RuntimeError as error:
                results.append(replace(row, reason=_failure(error)))
                continue
            row = replace(row, launch="graph")
            try:
                self.tell(f"timing {provider.name} in a CUDA graph")
                results.append(_timed(job, row, timing.replayed(make_calls, self.budget)))
            except RuntimeError as error:
                results.append(replace(row, reason=_failure(error)))
        forget_compilations()
        torch.cuda.empty_cache()
        return results


def _failure(error: RuntimeError) -> str:
    """One line on why a provider failed."""
    lines = str(error).strip().splitlines() or [""]
    return f"failed: {type(error).__name__}: {lines[0]}"


def _timed(job: Job, row: Row, seconds: Sequence[float]) -> Row:
    milliseconds = timing.quantiles(seconds)
    share = None if row.floor_ms is None else row.floor_ms / milliseconds["median"]
    details = {}
    if job.benchmark.rate is not None:
        name, count = job.benchmark.rate
        details[name] = count(job.case.sizes) / (milliseconds["median"] / 1e3)
    return replace(row, milliseconds=milliseconds, samples=len(seconds), share=share, details=details)


def problems(rows: Sequence[Row]) -> list[str]:
    """A line for each row that makes a run fail: wrong results, and paths of this package that do not run."""
    failed = [
        row for row in rows if row.wrong or (row.provider in OURS and (row.reason or "").startswith("failed"))
    ]
    return [f"{row.op}, {row.case}, {row.dtype}, {row.mode}, {row.provider}: {row.reason}" for row in failed]


def is_measured(job: Job, conditions: Conditions, stored: Sequence[Row]) -> bool:
    """Whether every provider of a job has a row of this device, these versions and this commit."""
    found = {
        row.provider
        for row in stored
        if (row.op, row.case, row.shape, row.dtype, row.mode)
        == (job.benchmark.name, job.case.name, job.case.sizes, job.dtype, job.mode)
        and (row.device, row.versions, row.commit)
        == (conditions.device_name, conditions.versions, conditions.commit)
        and not row.wrong
    }
    return found >= {provider.name for provider in job.providers}


# Rough rates of two cores, to say beforehand how long a run takes: memory-bound and matmul-shaped work; what a
# scaled-down model computes.
CPU_BYTES, CPU_FLOPS, MODEL_FLOPS = 0.7e9, 1e11, 2e11
PROCESS_SECONDS, GPU_JOB_SECONDS, GPU_COMPILE_SECONDS = 5.0, 6.0, 60.0


def estimated_seconds(job: Job, conditions: Conditions, budget: float, with_memory: bool) -> float:
    """About how long a job takes."""
    dtype = getattr(torch, job.dtype)
    if conditions.device.type == "cuda":
        compiled = sum(provider.gpu_only is not None for provider in job.providers)
        return GPU_JOB_SECONDS + GPU_COMPILE_SECONDS * compiled
    sizes = job.case.sizes
    free = memory.available(conditions.device)
    cost = job.benchmark.cost
    flops = MODEL_FLOPS if cost is None else cost(sizes, dtype, job.mode).flops
    total = round_seconds = 0.0
    for provider in job.providers:
        if provider.needs_gpu or provider.gpu_only or memory.refusal(provider, sizes, dtype, job.mode, free):
            continue
        moved = provider.extra_bytes(sizes, dtype, job.mode) if provider.extra_bytes is not None else 0
        once = moved / CPU_BYTES + flops / CPU_FLOPS
        round_seconds += once
        total += once + (once + PROCESS_SECONDS if with_memory else 0)
    reference = round_seconds
    return total + reference + max(budget, timing.MIN_ROUNDS * round_seconds)
