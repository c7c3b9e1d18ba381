"""One case after the other: check, time, memory, rows."""

import datetime
import functools
import hashlib
import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

import torch

from benchmarks import memory, timing
from benchmarks.benchmark import Benchmark, Problem, Provider, forget_compilations, make_call, make_problem
from benchmarks.check import Standard, WrongResult, checked_mode, standard
from benchmarks.comparison import OURS, PACKAGE
from benchmarks.gpu_settings import gpu_settings
from benchmarks.roofline import Ceilings, Cost
from benchmarks.rows import DRIFTED, Row
from benchmarks.shapes import Case
from mgllava_kernels.configs import tables
from mgllava_kernels.tune import conditions as gpu_conditions

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "triton", "torchvision", "transformers")
# Calls longer than this many seconds take gigabytes: their memory is that of a timed call, not of one more process.
WATCHED_SECONDS = 4.0
# What a row on a CPU notes until its memory, too, is measured.
NO_MEMORY = "peak memory is not measured yet"
# Of a provider that --provider left out, so that no table looks complete that is not.
NOT_ASKED_FOR = "not asked for in this run"
# How the reason of a row begins whose provider took the GPU's context with it: it is not tried again.
LOST = "failed, and no other call of the process after it could run: "


@dataclass(frozen=True)
class Job:
    """One case of a benchmark in a dtype and a mode: what is measured together."""

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
    """What a row depends on beside the case; `tables` and `settings` as rows have them."""

    device: torch.device
    kind: str
    device_name: str
    versions: dict[str, str]
    tables: str | None = None
    settings: str | None = None


class DeviceLost(Exception):
    """After an error such as an illegal memory access every call of this process to CUDA fails."""


class NotWritten(OSError):
    """A row cannot be kept: no fault of what was measured."""


def current_conditions(device: torch.device) -> Conditions:
    """Of this machine."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        driver = gpu_conditions(device)["driver"]
        if driver is not None:
            versions["driver"] = driver
        settings = gpu_settings(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        return Conditions(device, name, name, versions, hash_of_tables(name), settings)
    name = f"{_cpu_name()}, {torch.get_num_threads()} threads"
    return Conditions(device, "cpu", name, versions)


def hash_of_tables(device_name: str) -> str | None:
    """Of a device's tuned tables, the user's and this package's, in the order in which they count."""
    digest = hashlib.sha256()
    own = [
        path
        for path in tables.find()
        if path == tables.path_of(path.parents[1], path.parent.name, device_name)
    ]
    for path in own:
        digest.update(f"{path.parent.name}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:8] if own else None


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


@functools.cache
def current_commit(code: tuple[str, ...]) -> str:
    """The last commit that changed `code` (git's pathspecs), with `-dirty` if files differ from it.

    Without a git checkout it is what the environment variable GIT_COMMIT says, or `files-` and a hash of the files.
    """
    commit = _git("log", "-1", "--format=%h", "--", *code)
    if commit:
        return commit + "-dirty" if _git("status", "--porcelain", "--", *code) else commit
    return os.environ.get("GIT_COMMIT") or f"files-{_hash_of(code)}"


def _hash_of(code: Sequence[str]) -> str:
    """Of the Python and JSON files that pathspecs choose."""
    digest = hashlib.sha256()
    for name in sorted(one for one in code if not one.startswith(":!")):
        chosen = ROOT / name
        for path in sorted(chosen.rglob("*")) if chosen.is_dir() else [chosen]:
            if path.suffix in (".py", ".json") and path.is_file():
                digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def _git(*arguments: str) -> str | None:
    try:
        result = subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, text=True)
    except OSError:
        return None
    return result.stdout.strip() if result.returncode == 0 else None


@dataclass(frozen=True)
class Outcome:
    """What checking a provider brought: its error and tolerance, or why it is not timed; seconds of the call."""

    seconds: float
    error: float | None = None
    tolerance: float | None = None
    wrong: bool = False
    reason: str | None = None

    def into(self, row: Row) -> Row:
        return replace(row, error=self.error, tolerance=self.tolerance, wrong=self.wrong, reason=self.reason)


class Runner:
    """Measures jobs on one device.

    Args:
        conditions: where and with what.
        ceilings: rates of the device; None for benchmarks without a floor.
        budget: seconds for the timing of one job; the slowest provider still gets its smallest number of rounds.
        by_name: providers that were asked for by name.
        with_memory: also measure peak memory (on a CPU most providers then run in a process of their own).
        tell: gets a word on what is going on.
        write: gets each row as soon as it is complete.
    """

    def __init__(
        self,
        conditions: Conditions,
        ceilings: Ceilings | None,
        budget: float,
        by_name: Sequence[str] = (),
        with_memory: bool = True,
        tell: Callable[[str], object] = lambda _: None,
        write: Callable[[Row], object] = lambda _: None,
    ) -> None:
        self.conditions = conditions
        self.ceilings = ceilings
        self.budget = budget
        self.by_name = tuple(by_name)
        self.with_memory = with_memory
        self.tell = tell
        self.write = write
        # Of the last problem: what it is held to and who passed. Modes with gradients are checked alike.
        self._key: object = None
        self._standard: Standard | None = None
        self._outcomes: dict[str, Outcome] = {}

    def measure(self, job: Job) -> list[Row]:
        """The rows of one job, all with one `run`: every provider, timed or with the reason why not.

        Raises:
            DeviceLost: a provider made the GPU unusable for this process; its row says so.
        """
        device, dtype = self.conditions.device, getattr(torch, job.dtype)
        now = _now()
        blank = {provider.name: self._blank(job, provider, now) for provider in job.providers}
        free = memory.available(device)
        rows: list[Row] = []
        able = []
        for provider in job.providers:
            reason = reason_now(job, provider, self.conditions, self.by_name, free)
            if reason is None:
                able.append(provider)
            else:
                self._put(rows, replace(blank[provider.name], reason=reason))
        # What compiles for a minute comes last: a run that is stopped has the others.
        able.sort(key=lambda provider: provider.compiled)
        try:
            if able:
                self.tell("inputs and reference")
                problem = make_problem(job.benchmark, job.case.sizes, dtype, device)
                held_to = self._standard_of(job, problem, able, blank, rows)
                measure = self._on_gpu if device.type == "cuda" else self._on_cpu
                measure(job, problem, held_to, able, blank, rows)
        except (DeviceLost, NotWritten):
            raise
        except Exception as error:
            # Of the inputs or the reference: nobody can be measured.
            lost = self._is_lost()
            for name in [one.name for one in able if one.name not in {row.provider for row in rows}]:
                reason = LOST + _line(error) if lost else _failure(error)
                self._put(rows, replace(blank[name], reason=reason))
            if lost:
                raise DeviceLost(f"{job.name}: {_line(error)}") from error
        finally:
            forget_compilations()
            if device.type == "cuda":
                _quietly(torch.cuda.empty_cache)
        order = [provider.name for provider in job.providers]
        return sorted(rows, key=lambda row: order.index(row.provider))

    def name_left_out(self, job: Job, stored: Sequence[Row]) -> list[Row]:
        """Rows of the providers that the job leaves out, where `stored` has none of this code."""
        known = {row.provider for row in _rows_of(job, self.conditions, stored)}
        asked = {provider.name for provider in job.providers}
        now = _now()
        rows: list[Row] = []
        for provider in job.benchmark.providers:
            if provider.name not in asked | known:
                self._put(rows, replace(self._blank(job, provider, now), reason=NOT_ASKED_FOR))
        return rows

    def _put(self, rows: list[Row], row: Row) -> None:
        rows.append(row)
        self._write(row)

    def _write(self, row: Row) -> None:
        try:
            self.write(row)
        except OSError as error:
            raise NotWritten(f"rows cannot be written: {error}") from error

    def _put_failure(self, rows: list[Row], row: Row, error: Exception) -> None:
        """The row of a provider that raised.

        Raises:
            DeviceLost: it took the GPU's context with it.
        """
        if not self._is_lost():
            self._put(rows, replace(row, reason=_failure(error)))
            return
        self._put(rows, replace(row, reason=LOST + _line(error)))
        name = f"{row.op}, {row.case}, {row.dtype}, {row.mode}, {row.provider}"
        raise DeviceLost(f"{name}: {_line(error)}") from error

    def _is_lost(self) -> bool:
        return self.conditions.device.type == "cuda" and not _quietly(torch.cuda.synchronize)

    def _blank(self, job: Job, provider: Provider, run: str) -> Row:
        sizes, dtype = job.case.sizes, getattr(torch, job.dtype)
        row = Row(
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
            commit=current_commit(job.benchmark.code),
            run=run,
            tables=self.conditions.tables,
            settings=self.conditions.settings,
            origin=job.case.origin,
            note=provider.cpu_note if self.conditions.kind == "cpu" else None,
        )
        if job.benchmark.cost is None or self.ceilings is None:
            return row
        cost = job.benchmark.cost(sizes, dtype, job.mode)
        return beneath(replace(row, bytes=cost.bytes, flops=cost.flops), self.ceilings)

    def _standard_of(
        self, job: Job, problem: Problem, able: Sequence[Provider], blank: dict[str, Row], rows: list[Row]
    ) -> Standard:
        mode = checked_mode(job.mode)
        key = (job.benchmark.name, job.case.name, job.dtype, mode)
        if self._standard is not None and self._key == key:
            return self._standard
        self._key = self._standard = None
        self._outcomes = {}
        first = job.benchmark.providers[0]
        arguments = (job.benchmark, job.case.sizes, problem, mode)
        made = None
        if first in able:
            try:
                made = standard(*arguments, first.function)
            except Exception as error:
                # Unless the GPU is gone, its own check says it once more.
                if self._is_lost():
                    self._put_failure(rows, blank[first.name], error)
        if made is None:
            made = standard(*arguments)
        elif not first.compiled:
            try:
                error, allowed = made.judge_baseline()
                self._outcomes[first.name] = Outcome(made.baseline_seconds, error, allowed)
            except WrongResult as wrong:
                self._outcomes[first.name] = _wrong(made.baseline_seconds, wrong)
        self._key, self._standard = key, made
        return made

    def _checked(self, job: Job, problem: Problem, held_to: Standard, provider: Provider) -> Outcome:
        """Whether a provider's results are right.

        Raises:
            Exception: it does not run.
        """
        if provider.name in self._outcomes:
            return self._outcomes[provider.name]
        self.tell(f"checking {provider.name}")
        begin = time.perf_counter()
        results = make_call(provider.function, problem, checked_mode(job.mode))()
        seconds = time.perf_counter() - begin
        try:
            error, allowed = held_to.judge(results, provider.leniency)
            if problem.sums() != held_to.sums:
                # Who comes next would get them, and the blame.
                problem.restore(
                    make_problem(job.benchmark, job.case.sizes, held_to.dtype, self.conditions.device)
                )
                raise WrongResult("it changes its inputs", None, None)
            outcome = Outcome(seconds, error, allowed)
        except WrongResult as wrong:
            outcome = _wrong(seconds, wrong)
        # Compiled code is forgotten at the end of a job: another mode compiles, and warms up, anew.
        if not provider.compiled:
            self._outcomes[provider.name] = outcome
        return outcome

    def _on_cpu(
        self,
        job: Job,
        problem: Problem,
        held_to: Standard,
        providers: Sequence[Provider],
        blank: dict[str, Row],
        rows: list[Row],
    ) -> None:
        right: dict[str, Row] = {}
        calls: dict[str, timing.Call] = {}
        for provider in providers:
            row = replace(blank[provider.name], reference=held_to.source)
            try:
                outcome = self._checked(job, problem, held_to, provider)
                row = outcome.into(row)
                if outcome.reason is None:
                    call = make_call(provider.function, problem, job.mode)
                    slow = self.with_memory and outcome.seconds > WATCHED_SECONDS
                    calls[provider.name] = memory.Watched(call) if slow else call
            except Exception as error:
                row = replace(row, reason=_failure(error))
            if row.reason is None:
                right[provider.name] = row
            else:
                self._put(rows, row)
        self.tell("timing")
        failures: dict[str, Exception] = {}

        def in_rounds() -> timing.Times:
            times, failed = timing.in_rounds(
                {name: call for name, call in calls.items() if name not in failures}, self.budget
            )
            failures.update(failed)
            return times

        times = timing.quietest(in_rounds, self.budget)
        for name, row in right.items():
            if name in failures or name not in times:
                self._put(rows, replace(row, reason=_failure(failures[name])))
            else:
                right[name] = _timed(job, row, times[name])
                # Its memory is still to come, which may end this process.
                self._write(_noted(right[name], NO_MEMORY))
        watched = {name: call for name, call in calls.items() if isinstance(call, memory.Watched)}
        calls.clear()
        for name, row in right.items():
            if row.milliseconds is None:
                continue
            if not self.with_memory:
                rows.append(row)
                continue  # written above
            if name in watched:
                row = replace(row, extra_bytes=watched[name].extra_bytes)
            else:
                self.tell(f"memory of {name}")
                try:
                    extra = memory.apart(job.benchmark.name, name, job.case.sizes, job.dtype, job.mode)
                    row = replace(row, extra_bytes=extra)
                except RuntimeError as error:
                    row = _noted(row, str(error))
            self._put(rows, row)

    def _on_gpu(
        self,
        job: Job,
        problem: Problem,
        held_to: Standard,
        providers: Sequence[Provider],
        blank: dict[str, Row],
        rows: list[Row],
    ) -> None:
        """Two rows for each provider: launched by the host and, if it can be held by one, inside a CUDA graph."""
        device, dtype = self.conditions.device, getattr(torch, job.dtype)
        sets = timing.number_of_sets(problem.nbytes, torch.cuda.get_device_properties(device).L2_cache_size)
        problems = [problem]
        problems += [
            make_problem(job.benchmark, job.case.sizes, dtype, device, seed) for seed in range(1, sets)
        ]
        for provider in providers:
            row = replace(blank[provider.name], reference=held_to.source)

            def make_calls(provider: Provider = provider) -> list[timing.Call]:
                return [make_call(provider.function, one, job.mode) for one in problems]

            def verify(results: Sequence[torch.Tensor], provider: Provider = provider) -> None:
                held_to.judge(results, provider.leniency)

            launches = ("eager", "graph") if job.benchmark.graph else ("eager",)
            for launch in launches:
                row = replace(row, launch=launch)
                try:
                    if launch == "eager":
                        row = self._checked(job, problem, held_to, provider).into(row)
                        if row.reason is not None:
                            self._put(rows, row)
                            break
                        self.tell(f"timing {provider.name}")
                        calls = make_calls()
                        if self.with_memory:
                            row = replace(row, extra_bytes=memory.on_gpu(calls[0]))
                        measure = functools.partial(timing.launched, calls, self.budget)
                    else:
                        self.tell(f"timing {provider.name} in a CUDA graph")
                        measure = functools.partial(timing.replayed, make_calls, self.budget, verify)
                    times = timing.quietest(lambda measure=measure: {"": measure()}, self.budget)
                    self._put(rows, _timed(job, row, times[""]))
                except NotWritten:
                    raise
                except WrongResult as wrong:
                    self._put(rows, _wrong(0.0, wrong).into(row))
                except Exception as error:
                    self._put_failure(rows, row, error)
                    if launch == "eager":
                        break
                finally:
                    calls = []


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def beneath(row: Row, ceilings: Ceilings, drift: str | None = None) -> Row:
    """A row with the floor that these ceilings give it, and a note if they are not to be relied on."""
    if row.bytes is None or row.flops is None:
        return row
    floor = ceilings.floor_ms(Cost(row.bytes, row.flops), row.dtype)
    rates = {"bandwidth": ceilings.bandwidth, "matmul_rate": ceilings.matmul[row.dtype]}
    share = _share(floor, row.milliseconds)
    row = replace(row, floor_ms=floor, share=share, **rates)
    return row if drift is None else _noted(row, f"{DRIFTED}: {drift}")


def _share(floor: float | None, milliseconds: Mapping[str, float] | None) -> float | None:
    return None if floor is None or milliseconds is None else floor / milliseconds["median"]


def _wrong(seconds: float, wrong: WrongResult) -> Outcome:
    return Outcome(seconds, wrong.error, wrong.tolerance, wrong=True, reason=str(wrong))


def _noted(row: Row, text: str) -> Row:
    return replace(row, note=text if row.note is None else f"{row.note}; {text}")


def _quietly(call: Callable[[], object]) -> bool:
    """Whether a call to CUDA succeeded."""
    try:
        call()
    except Exception:
        return False
    return True


def _failure(error: Exception) -> str:
    return f"failed: {_line(error)}"


def _line(error: Exception) -> str:
    """One line on what was raised."""
    try:
        lines = str(error).strip().splitlines() or [""]
    except Exception:
        return f"{type(error).__name__}, without a text"
    return f"{type(error).__name__}: {lines[0]}"


def _timed(job: Job, row: Row, seconds: Sequence[float]) -> Row:
    milliseconds = timing.quantiles(seconds)
    share = _share(row.floor_ms, milliseconds)
    details = {}
    if job.benchmark.rate is not None:
        name, count = job.benchmark.rate
        details[name] = count(job.case.sizes) / (milliseconds["median"] / 1e3)
    row = replace(row, milliseconds=milliseconds, samples=len(seconds), share=share, details=details)
    spread = timing.spread(seconds)
    return row if spread <= timing.NOISY else _noted(row, f"noisy: p80 / p20 is {spread:.1f}")


def problems(rows: Sequence[Row]) -> list[str]:
    """A line for each row that makes a run fail: wrong results, and paths of this package that do not run."""
    failed = [
        row for row in rows if row.wrong or (row.provider in OURS and (row.reason or "").startswith("failed"))
    ]
    return [f"{row.op}, {row.case}, {row.dtype}, {row.mode}, {row.provider}: {row.reason}" for row in failed]


def reason_now(
    job: Job, provider: Provider, conditions: Conditions, by_name: Sequence[str], free: int | None
) -> str | None:
    """Why a provider is not started, with `free` bytes of memory, or None."""
    reason = provider.obstacle(conditions.device, job.dtype, job.mode, provider.name in by_name)
    return reason or _refusal(provider, job, free)


def _refusal(provider: Provider, job: Job, free: int | None) -> str | None:
    """Why these sizes are too much for a provider, or None."""
    sizes = job.case.sizes
    reason = memory.refusal(provider, sizes, getattr(torch, job.dtype), job.mode, free)
    return reason or provider.impossible(sizes)


def is_measured(
    job: Job,
    conditions: Conditions,
    stored: Sequence[Row],
    by_name: Sequence[str] = (),
    with_memory: bool = True,
) -> bool:
    """Whether each provider has all times of this device, these versions and this code, or what kept it from running
    then still does; and whether this package's can be compared with the others', being of one run. What failed is
    tried again, save what took the device with it."""
    found: dict[str, list[Row]] = {}
    for row in _rows_of(job, conditions, stored):
        if with_memory and NO_MEMORY in (row.note or ""):
            continue
        found.setdefault(row.provider, []).append(row)
    free = memory.available(conditions.device)
    launches = {"eager", "graph"} if conditions.kind != "cpu" and job.benchmark.graph else {"eager"}
    settled = all(
        _is_settled(
            found.get(provider.name, []),
            reason_now(job, provider, conditions, by_name, free),
            launches,
            failures_count=provider.name in OURS,
        )
        for provider in job.providers
    )
    return settled and _are_of_one_run(job, conditions, found)


def _are_of_one_run(job: Job, conditions: Conditions, found: Mapping[str, Sequence[Row]]) -> bool:
    """Whether each provider was timed beside this package's, where that was timed."""
    own = found.get(own_path(job.benchmark, conditions.device), [])
    if any((row.reason or "").startswith(LOST) for row in own):
        return True  # it is not timed again
    runs = {row.run for row in own if row.milliseconds is not None}
    return not runs or all(
        row.run in runs
        for provider in job.providers
        for row in found.get(provider.name, [])
        if row.milliseconds is not None
    )


def own_path(benchmark: Benchmark, device: torch.device) -> str | None:
    """The provider that `auto` is on a device, with which all others are compared."""
    names = {provider.name for provider in benchmark.providers}
    on_cpu = device.type == "cpu" or benchmark.on_cpu
    return next((name for name in PACKAGE["cpu" if on_cpu else "gpu"] if name in names), None)


def without_lost(job: Job, conditions: Conditions, stored: Sequence[Row]) -> Job:
    """A job without the providers that took the device with them when it was measured before."""
    rows = _rows_of(job, conditions, stored)
    lost = {row.provider for row in rows if (row.reason or "").startswith(LOST)}
    return replace(job, providers=tuple(one for one in job.providers if one.name not in lost))


def _rows_of(job: Job, conditions: Conditions, stored: Sequence[Row]) -> list[Row]:
    """Those of a job that were measured here, with this code and these tuned tables."""
    case = (job.benchmark.name, job.case.name, job.case.sizes, job.dtype, job.mode)
    commit = current_commit(job.benchmark.code)
    here = (conditions.device_name, conditions.versions, commit, conditions.tables)
    return [
        row
        for row in stored
        if (row.op, row.case, row.shape, row.dtype, row.mode) == case
        and (row.device, row.versions, row.commit, row.tables) == here
    ]


def _is_settled(rows: Sequence[Row], reason: str | None, launches: set[str], failures_count: bool) -> bool:
    """Whether the rows of a provider, whom `reason` keeps from running now, are all there is to know."""
    reasons = [row.reason for row in rows if row.reason is not None]
    if any(one.startswith(LOST) for one in reasons):
        return True
    if any(row.wrong for row in rows) or (
        failures_count and any(one.startswith("failed") for one in reasons)
    ):
        return False
    # How much memory is free changes, and does not matter while it is too little.
    kept = reason is not None and any(_standing(one) == _standing(reason) for one in reasons)
    timed = any(row.milliseconds is not None for row in rows)
    return kept or (timed and launches <= {row.launch for row in rows})


def _standing(reason: str) -> str:
    return reason.partition(";")[0]


# Rough rates of two cores, to say beforehand how long a run takes: memory-bound and matmul-shaped work; what a
# scaled-down model computes; the reference in float64.
CPU_BYTES, CPU_FLOPS, MODEL_FLOPS, REFERENCE_BYTES = 0.7e9, 1e11, 2e11, 0.5e9
PROCESS_SECONDS = 5.0
# On a GPU, not yet measured: inputs and reference of a job, and each provider's check, launches and graph.
GPU_JOB_SECONDS, GPU_PROVIDER_SECONDS = 1.5, 1.0
# Bytes of weights a second: a model is made, filled, copied in float32, and run.
GPU_MODEL_BYTES = 0.5e9


def estimated_seconds(job: Job, conditions: Conditions, budget: float, with_memory: bool) -> float:
    """About how long a job takes."""
    dtype = getattr(torch, job.dtype)
    if conditions.device.type == "cuda":
        each = sum(GPU_PROVIDER_SECONDS + provider.compile_seconds for provider in job.providers)
        parameters = job.benchmark.parameters
        weights = 0 if parameters is None else parameters(job.case.sizes) * dtype.itemsize
        return GPU_JOB_SECONDS + each + weights / GPU_MODEL_BYTES
    sizes = job.case.sizes
    free = memory.available(conditions.device)
    cost = job.benchmark.cost
    flops = MODEL_FLOPS if cost is None else cost(sizes, dtype, job.mode).flops
    rounds = total = 0.0
    moved = 0
    # `both` is compared together with `backward`.
    checks = job.mode != "both" or "backward" not in job.case.modes
    for provider in job.providers:
        if provider.needs_gpu or provider.gpu_only:
            continue
        own = provider.extra_bytes(sizes, dtype, job.mode) if provider.extra_bytes is not None else 0
        moved = max(moved, own)
        if _refusal(provider, job, free):
            continue
        once = own / CPU_BYTES + flops / CPU_FLOPS
        rounds += once * (timing.SLOW_ROUNDS if once > timing.SLOW_SECONDS else timing.MIN_ROUNDS)
        total += once if checks else 0
        total += once + PROCESS_SECONDS if with_memory and once < WATCHED_SECONDS else 0
    reference = moved / REFERENCE_BYTES + 3 * flops / CPU_FLOPS if checks else 0
    return total + reference + max(budget, rounds)
