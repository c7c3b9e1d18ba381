"""The command line: `python -m benchmarks --help`."""

import contextlib
import itertools
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks import roofline, rows
from benchmarks.registry import BENCHMARKS, OPS
from benchmarks.rows import Row
from benchmarks.runner import (
    OURS,
    Conditions,
    DeviceLost,
    Job,
    Runner,
    beneath,
    current_conditions,
    estimated_seconds,
    is_measured,
    own_path,
    problems,
    without_lost,
)
from benchmarks.shapes import ALL_MODES

DEVICE_LOST = 3
# A machine whose load is above this share of its cores does something else, too.
BUSY = 0.25
DTYPES = ("bfloat16", "float16", "float32")
HELP = """Measure the ops and the neck against the original composition and other rivals.

Every provider's results are compared with float64 before it is timed; one that errs, does not fit into
memory or does not run here is listed with the reason, and wrong results make the command fail.

\b
python -m benchmarks --quick             two minutes on two cores: is it faster here?
python -m benchmarks --op neck           one benchmark in full, rows to benchmarks/results
python -m benchmarks                     everything for this device; goes on where it stopped
python -m benchmarks roofline            floors of every case on this device
python -m benchmarks roofline --device H200
                                         the same as a prediction, without the device
python -m pytest benchmarks/test_cpu.py  CPU-sized calls under pytest-benchmark

Without --results rows go to benchmarks/results, which git tracks: --results FOLDER keeps yours apart. Rows carry the
commit of the code: of the git checkout, without one what GIT_COMMIT=... says, else a hash of the files ("files-...").
Ends with 0; 1 if results are wrong, a path of this package does not run, or the options are bad; 3 if an error made
the GPU unusable for the process: the same command again goes on behind it.

MGLLAVA_ORIGINAL_REPOSITORY=FOLDER, a checkout of github.com/PhoenixZ810/MG-LLaVA that you fetched, adds its own
fusion module to conv_gate.
"""

app = typer.Typer(add_completion=False, pretty_exceptions_show_locals=False, rich_markup_mode=None)


def _chosen(kind: str, names: list[str] | None, known: tuple[str, ...]) -> list[str]:
    for name in names or []:
        if name not in known:
            raise ValueError(f"--{kind} must be one of {', '.join(known)}; got {name!r}")
    return list(dict.fromkeys(names or known))


def plan(
    device: torch.device,
    ops: list[str],
    case: str | None,
    dtypes: list[str] | None,
    modes: list[str],
    providers: list[str] | None,
    quick: bool,
) -> list[Job]:
    """The jobs of a run."""
    jobs = []
    for name in ops:
        benchmark = BENCHMARKS[name]
        wanted = benchmark.providers
        if providers is not None:
            # A ratio needs its neighbours of the same run.
            beside = (benchmark.providers[0].name, own_path(benchmark, device))
            named = [one for one in wanted if one.name in providers]
            wanted = tuple(one for one in wanted if named and one.name in (*providers, *beside))
        default = list(benchmark.dtypes) if device.type == "cuda" else ["float32"]
        for one in benchmark.cases:
            if (quick and not one.quick) or (one.gpu_only and device.type != "cuda"):
                continue
            exact = any(case == other.name for other in benchmark.cases)
            if case is not None and (case != one.name if exact else case not in one.name):
                continue
            for dtype in dtypes or default:
                jobs += [Job(benchmark, one, dtype, mode, wanted) for mode in modes if mode in one.modes]
    return [job for job in jobs if job.providers]


@app.callback(invoke_without_command=True, help=HELP)
def main(
    context: typer.Context,
    op: Annotated[list[str] | None, typer.Option(help=f"{', '.join(BENCHMARKS)}; default all.")] = None,
    case: Annotated[
        str | None,
        typer.Option(
            help="Only the case of this name, or those whose names contain it, such as '100 boxes'."
        ),
    ] = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option(help=f"{', '.join(DTYPES)}; default float32 on a CPU, bfloat16 on a GPU."),
    ] = None,
    mode: Annotated[list[str] | None, typer.Option(help=f"{', '.join(ALL_MODES)}; default all.")] = None,
    provider: Annotated[
        list[str] | None,
        typer.Option(
            help="Only these, such as 'original compiled', beside the baseline and this package's own path."
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto: a GPU if there is one.")] = "auto",
    budget: Annotated[
        float | None, typer.Option(min=0, help="Seconds of timing for each case; default 5, with --quick 1.")
    ] = None,
    quick: Annotated[
        bool, typer.Option(help="A few cases, forward, no memory; nothing is written without --results.")
    ] = False,
    fresh: Annotated[bool, typer.Option(help="Measure what is measured already, too.")] = False,
    results: Annotated[
        Path | None, typer.Option(help="Folder of the rows; default benchmarks/results.")
    ] = None,
) -> None:
    if context.invoked_subcommand is not None:
        return
    console, errors = _consoles()
    try:
        where = find_device(device)
        modes = _chosen("mode", mode or (["forward"] if quick else None), ALL_MODES)
        dtypes = _chosen("dtype", dtype, DTYPES) if dtype else None
        names = tuple(dict.fromkeys(one.name for each in BENCHMARKS.values() for one in each.providers))
        providers = _chosen("provider", provider, names) if provider else None
        jobs = plan(where, _chosen("op", op, tuple(BENCHMARKS)), case, dtypes, modes, providers, quick)
        if not jobs:
            raise ValueError("no case fits these options")
        folder = results or (None if quick else rows.RESULTS)
        with rows.locked(folder) if folder is not None else contextlib.nullcontext():
            wrong = run(jobs, where, provider or [], budget, quick, fresh, folder, console, errors)
    except DeviceLost as error:
        _print_error(errors, error)
        raise typer.Exit(DEVICE_LOST) from error
    except (ValueError, RuntimeError, OSError) as error:
        _print_error(errors, error)
        raise typer.Exit(1) from error
    for problem in wrong:
        errors.print("[bold red]wrong:[/]", end=" ")
        errors.print(problem, markup=False, highlight=False, soft_wrap=True)
    if wrong:
        raise typer.Exit(1)


def run(
    jobs: list[Job],
    device: torch.device,
    by_name: list[str],
    budget: float | None,
    quick: bool,
    fresh: bool,
    folder: Path | None,
    console: Console,
    errors: Console,
) -> list[str]:
    """Measure what is not measured yet, print and write rows after each job; the problems found."""
    # float32 means float32, for every provider.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    places = {device.type: current_conditions(device), "cpu": current_conditions(torch.device("cpu"))}
    where: Callable[[Job], Conditions] = lambda job: places["cpu" if job.benchmark.on_cpu else device.type]
    kept = [] if folder is None else rows.read_all(folder)
    stored = [] if fresh else kept
    wanted = [
        without_lost(job, where(job), stored)
        for job in jobs
        if not is_measured(job, where(job), stored, by_name, with_memory=not quick)
    ]
    seconds = budget if budget is not None else (1.0 if quick else 5.0)
    estimates = [estimated_seconds(job, where(job), seconds, not quick) for job in wanted]
    minutes = max(1, round(sum(estimates) / 60)) if wanted else 0
    _say(
        errors,
        f"{places[device.type].device_name}: {len(wanted)} measurements, about {minutes} min; "
        f"{len(jobs) - len(wanted)} are there already",
    )
    _tell_load(errors)
    found: list[str] = []
    answers: list[str] = []
    begin = time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as progress:
        task = progress.add_task("", total=len(wanted))
        tell = lambda job, what: progress.update(task, description=escape(f"{job.name}: {what}"))
        number = 0
        for _, group in itertools.groupby(wanted, lambda job: job.benchmark.name):
            own = list(group)
            written: dict[object, Row] = {}

            def write(row: Row, written: dict[object, Row] = written) -> None:
                written[row.key] = row
                if folder is not None:
                    rows.add([row], folder)

            conditions = where(own[0])
            before = _ceilings(own, conditions, lambda job: tell(job, "ceilings of the device"))
            runner = Runner(
                conditions,
                before,
                seconds,
                by_name,
                not quick,
                write=write,
            )
            for job in own:
                number += 1
                if not errors.is_terminal:
                    done = (time.monotonic() - begin) / 60
                    _say(errors, f"{number}/{len(wanted)}, {done:.0f} of {minutes} min: {job.name}")
                runner.tell = lambda what, job=job: tell(job, what)
                left_out = runner.name_left_out(job, kept)
                new = runner.measure(job) + left_out
                found += problems(new)
                answers += _answers(job, new)
                console.print(listing(job, new))
                progress.advance(task)
            if before is not None:
                after = _ceilings(own, conditions, lambda job: tell(job, "ceilings once more"))
                apart, ceilings = roofline.drift(before, after), roofline.best(before, after)
                if apart is not None:
                    _say(errors, f"warning: {own[0].benchmark.name}: the device's own rates changed: {apart}")
                if folder is not None:
                    rows.add([beneath(row, ceilings, apart) for row in written.values()], folder)
    if quick:
        for answer in answers:
            console.print(answer, highlight=False, soft_wrap=True, markup=False)
    return found


def _ceilings(
    jobs: list[Job], conditions: Conditions, tell: Callable[[Job], object]
) -> roofline.Ceilings | None:
    """Rates of the device for the jobs of one benchmark; None if it has no floor."""
    if jobs[0].benchmark.cost is None:
        return None
    tell(jobs[0])
    names = dict.fromkeys(job.dtype for job in jobs)
    return roofline.measure_ceilings(
        conditions.device, [getattr(torch, name) for name in names], conditions.device_name
    )


def _tell_load(errors: Console) -> None:
    """What else the machine does: it is in every time."""
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    busy = load > BUSY * cores
    _say(
        errors, f"load {load:.1f} on {cores} cores" + (": warning: something else is running" if busy else "")
    )


def _answers(job: Job, new: list[Row]) -> list[str]:
    """In words, how this package compares with the baseline."""
    first = job.benchmark.providers[0].name
    medians = {
        row.provider: row.milliseconds["median"] for row in new if row.milliseconds and row.launch == "eager"
    }
    return [
        f"{job.benchmark.name}, {job.case.name}: {name} {medians[first] / median:.1f} times as fast as {first}"
        for name, median in medians.items()
        if name in OURS and first in medians and name != first
    ]


def listing(job: Job, new: list[Row]) -> Table:
    """One job as a table."""
    table = Table(title=job.name, title_justify="left", title_style="bold")
    table.add_column("provider", no_wrap=True)
    first_name = job.benchmark.providers[0].name
    for column in ("median ms", "p20 to p80", f"x {first_name}", "of floor", "extra MB", "error"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("not timed because, or read with")
    baseline = {row.launch: row.milliseconds for row in new if row.provider == first_name}
    for row in new:
        name = row.provider + (" (graph)" if row.launch == "graph" else "")
        extra = "-" if row.extra_bytes is None else f"{row.extra_bytes / 1e6:,.1f}"
        error = "-" if row.error is None else f"{row.error:.0e}"
        reason = escape(row.reason or row.note or "")
        reason = f"[red]{reason}[/]" if row.wrong else reason
        if row.milliseconds is None:
            table.add_row(name, "-", "-", "-", "-", extra, error, reason)
            continue
        times, median = row.milliseconds, row.milliseconds["median"]
        first = baseline.get(row.launch)
        ratio = "-" if first is None else f"{first['median'] / median:.2f}"
        share = "-" if row.share is None else f"{row.share:.0%}"
        spread = f"{times['p20']:.3g} to {times['p80']:.3g}"
        table.add_row(name, f"{median:.3f}", spread, ratio, share, extra, error, reason)
    return table


@app.command(name="roofline")
def show_roofline(
    device: Annotated[
        str | None,
        typer.Option(
            help=f"{', '.join(roofline.VENDOR)}: a prediction from the vendor's figures. Default: measured here."
        ),
    ] = None,
    op: Annotated[list[str] | None, typer.Option(help=f"{', '.join(OPS)}; default all.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help=f"{', '.join(DTYPES)}; default float32 on a CPU, else bfloat16.")
    ] = None,
    mode: Annotated[str, typer.Option(help=", ".join(ALL_MODES))] = "forward",
) -> None:
    """Bytes, FLOPs and the least time of every case, on this device or predicted for a named one."""
    console, errors = _consoles()
    try:
        ops = _chosen("op", op, tuple(OPS))
        _chosen("mode", [mode], ALL_MODES)
        here = find_device("auto")
        name = dtype or ("float32" if device is None and here.type == "cpu" else "bfloat16")
        _chosen("dtype", [name], DTYPES)
        if device is None:
            conditions = current_conditions(here)
            ceilings = roofline.measure_ceilings(here, [getattr(torch, name)], conditions.device_name)
        elif device in roofline.VENDOR:
            ceilings = roofline.VENDOR[device]
        else:
            raise ValueError(f"--device must be one of {', '.join(roofline.VENDOR)}; got {device!r}")
    except (ValueError, RuntimeError) as error:
        _print_error(errors, error)
        raise typer.Exit(1) from error
    kind = "Floors" if device is None else "PREDICTED floors, not measured"
    title = (
        f"{kind}: {ceilings.device}, {name}, {mode}; {ceilings.bandwidth / 1e12:.3g} TB/s, "
        f"{ceilings.matmul[name] / 1e12:.3g} TFLOP/s ({ceilings.source})"
    )
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("op", no_wrap=True)
    table.add_column("case", no_wrap=True)
    for column in ("MB", "GFLOP", "floor µs", "bound by"):
        table.add_column(column, justify="right", no_wrap=True)
    for one in ops:
        for case in BENCHMARKS[one].cases:
            if mode not in case.modes:
                continue
            cost = BENCHMARKS[one].cost(case.sizes, getattr(torch, name), mode)
            by_bytes = cost.bytes / ceilings.bandwidth >= cost.flops / ceilings.matmul[name]
            table.add_row(
                *(one, case.name, f"{cost.bytes / 1e6:,.1f}", f"{cost.flops / 1e9:,.2f}"),
                *(f"{ceilings.floor_ms(cost, name) * 1e3:,.1f}", "bytes" if by_bytes else "FLOPs"),
            )
    console.print(table)


def find_device(name: str) -> torch.device:
    """`cpu`, `cuda`, or `auto`.

    Raises:
        ValueError: another name. RuntimeError: no GPU.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"--device must be auto, cpu or cuda; got {name!r}")
    has_gpu = torch.cuda.is_available()
    if name == "cuda" and not has_gpu:
        raise RuntimeError("--device cuda: torch finds no GPU")
    if name == "cpu" or not has_gpu:
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def _consoles() -> tuple[Console, Console]:
    console, errors = Console(), Console(stderr=True)
    if not console.is_terminal:
        console.width = 160  # in a file or a pipe nobody sees where a line should break
    return console, errors


def _say(errors: Console, text: str) -> None:
    errors.print(text, markup=False, highlight=False, soft_wrap=True)


def _print_error(errors: Console, error: Exception) -> None:
    errors.print("[bold red]error:[/]", end=" ")
    _say(errors, str(error))


if __name__ == "__main__":
    app()
