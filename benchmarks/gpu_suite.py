"""The whole verdict of a GPU machine in one command: tests, tuned tables, benchmarks, tables and plots.

    python benchmarks/gpu_suite.py --dry-run         the plan with its times
    python benchmarks/gpu_suite.py                   everything, in under 25 minutes
    python benchmarks/gpu_suite.py --minutes 9       what is not finished yet, for nine minutes; again to go on
    python benchmarks/gpu_suite.py --part tune       one part

Runs from a checkout, without installing anything and without network. Parts run in the order of what they tell;
each has a time limit, goes on where it stopped and cannot stop the next. Everything lands in one folder
(--output): rows, tuned tables, logs, tables and plots, and summary.md. Ends with 0 if every part passed and every
line of the acceptance is met, 1 if not, 2 without a GPU.
"""

import argparse
import contextlib
import importlib.util
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __package__ in (None, ""):
    # Run as a file: the package is to be found, its modules not under their bare names.
    sys.path[0] = str(ROOT)

from benchmarks import acceptance, rows, shards  # noqa: E402

DEFAULT_OUTPUT = ROOT / "build" / "gpu_suite"
PASS, FAIL, INCOMPLETE = "PASS", "FAIL", "INCOMPLETE"
NO_GPU = 2
# Seconds between SIGTERM and SIGKILL, and between two looks at a command.
GRACE, LOOK = 10.0, 0.5
# A call of less than this many seconds tells nothing.
LEAST = 15.0


@dataclass(frozen=True)
class Step:
    """One command of a part.

    Args:
        name: of its log.
        command: what follows `python`.
        needs: packages it cannot do without.
        environment: added to this process'.
        at_most: minutes, so that one that hangs leaves time for the others.
        enough: it passes when they are over: what only makes the next steps faster.
    """

    name: str
    command: tuple[str, ...]
    needs: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()
    at_most: float = math.inf
    enough: bool = False

    @property
    def shown(self) -> str:
        """As one would type it."""
        settings = [f"{name}={shlex.quote(value)}" for name, value in self.environment]
        return " ".join([*settings, "python", shlex.join(self.command)])


@dataclass(frozen=True)
class Part:
    """Steps in the order of what they tell, which share `minutes`; `numbers` says what they brought so far."""

    name: str
    text: str
    minutes: float
    steps: tuple[Step, ...]
    numbers: Callable[[Path], str] = lambda output: ""


@dataclass
class Progress:
    """What a part has done: seconds spent, the outcome of each finished step, and why others are not."""

    seconds: float = 0.0
    outcomes: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    closed: bool = False

    def status(self, part: Part) -> str:
        """PASS, FAIL or INCOMPLETE."""
        if FAIL in self.outcomes.values():
            return FAIL
        complete = all(self.outcomes.get(step.name) == PASS for step in part.steps)
        return PASS if complete else INCOMPLETE


EAGER = ("original", "torchvision", "cuBLAS bias", "cuBLAS bias and GELU", "torch", "triton")


def _measure(
    name: str, folder: Path, arguments: str, *more: str, tuned: Path | None = None, at_most: float = 1.5
) -> Step:
    command = (
        "-m",
        "benchmarks",
        "--device",
        "cuda",
        *shlex.split(arguments),
        *more,
        "--results",
        str(folder),
    )
    return Step(name, command, ("typer", "rich"), _tables(tuned), at_most)


def _providers(*names: str) -> tuple[str, ...]:
    return tuple(word for name in names for word in ("--provider", name))


def _tables(tuned: Path | None) -> tuple[tuple[str, str], ...]:
    return () if tuned is None else (("MGLLAVA_KERNELS_CONFIGS", str(tuned)),)


def _main_cases(prefix: str, folder: Path, tuned: Path | None) -> tuple[Step, ...]:
    """What the acceptance asks for, without rivals that compile for a minute."""
    both = "--mode forward --mode both"
    wanted = (
        ("8x100", f"--op pooled_roi_align --op neck --case '8 pictures, 100 boxes each' {both}"),
        ("batch-1", f"--op conv_gate --op projectors --case '1 picture' {both}"),
        ("batch-32", f"--op conv_gate --op projectors --case '32 pictures' {both}"),
        ("1x100", f"--op pooled_roi_align --op neck --case '1 picture, 100 boxes' {both}"),
        ("regions-7", "--op roi_align --case '7x7, ratio 2' --mode forward --mode backward"),
        ("regions-14", "--op roi_align --case '14x14, ratio 2' --mode forward --mode backward"),
        ("batch-8", "--op projectors --op conv_gate --case '8 pictures' --mode forward"),
    )
    return tuple(
        _measure(f"{prefix}-{name}", folder, f"{text} --budget 3", *_providers(*EAGER), tuned=tuned)
        for name, text in wanted
    )


# Those whose kernels run on the GPU.
KERNEL_TESTS = (
    *("pooled_roi_align_triton", "conv_gate_triton", "projector_triton", "roi_align_triton"),
    *("neck", "tune"),
)


def plan(output: Path) -> tuple[Part, ...]:
    """The parts, the most telling first."""
    heuristics, results, tuned = output / "results_before_tuning", output / "results", output / "tuned"
    aot = ("-m", "mgllava_kernels.aot", "--target", "native")
    tune = ("-m", "mgllava_kernels.tune", "--output", str(tuned))
    command_line = ("triton", "typer", "rich")
    # First the products: whether they go to cuBLAS is for the tables to say.
    forward = ("grouped_mlp_projector", "conv_gate_fusion", "pooled_roi_align", "roi_align")
    backward = (
        *("pooled_roi_align_backward", "roi_align_backward"),
        *("grouped_mlp_projector_backward", "conv_gate_fusion_backward"),
    )

    def options(ops: Sequence[str], *dtypes: str) -> tuple[str, ...]:
        return tuple(word for op in ops for word in ("--op", op)) + tuple(
            word for dtype in dtypes for word in ("--dtype", dtype)
        )

    def tests(name: str, *paths: str) -> Step:
        command = ("-m", "benchmarks.shards", "--folder", str(output / name), *paths)
        return Step(name, command, ("pytest", "hypothesis", "triton"))

    def results_of(name: str) -> Callable[[Path], str]:
        return lambda output: str(shards.read_results(output / name))

    kernels = [f"tests/kernels/test_{name}.py" for name in KERNEL_TESTS]
    compiled = _providers("original", "original compiled", "original max-autotune", "triton", "torch")
    cublas = _providers("cuBLAS bias", "cuBLAS bias and GELU")
    return (
        Part(
            "compile",
            "kernels of the published sizes, on all CPU cores",
            1.25,
            (
                Step("compile-bfloat16", (*aot, "--dtype", "bfloat16"), command_line),
                Step("compile-others", (*aot, "--dtype", "float32", "--dtype", "float16"), command_line),
            ),
        ),
        Part(
            "tests",
            "kernels in every dtype against golden values, naive loops and torchvision",
            4.25,
            (tests("tests", *kernels),),
            results_of("tests"),
        ),
        Part(
            "verdict",
            "main cases with the heuristics' launch parameters",
            3.75,
            _main_cases("verdict", heuristics, None),
            lambda output: _rows_of(output / "results_before_tuning"),
        ),
        Part(
            "tune",
            "launch parameters for this GPU",
            5,
            (
                Step(
                    "tune-compile",
                    (*aot, "--candidates", *options(forward, "bfloat16")),
                    command_line,
                    at_most=1.5,
                    enough=True,
                ),
                # One command an op: an error of CUDA ends a command.
                *(
                    Step(f"tune-{op}", (*tune, *options([op], "bfloat16")), command_line, at_most=1.75)
                    for op in forward
                ),
                Step(
                    "tune-regions",
                    (*tune, *options(["roi_align", "roi_align_backward"], "float32")),
                    command_line,
                ),
                *(
                    Step(f"tune-{op}", (*tune, *options([op], "bfloat16")), command_line, at_most=1.75)
                    for op in backward
                ),
            ),
            lambda output: _entries_of(output / "tuned"),
        ),
        Part(
            "benchmarks",
            "main cases with the tuned launch parameters, then with rivals that torch.compile makes",
            5,
            (
                *_main_cases("tuned", results, tuned),
                *(
                    _measure(name, results, f"{text} --budget 3", *providers, tuned=tuned, at_most=2)
                    for name, text, providers in (
                        ("compiled-32", "--op conv_gate --case '32 pictures' --mode forward", compiled),
                        ("compiled-1", "--op conv_gate --case '1 picture' --mode forward", compiled),
                        (
                            "compiled-projectors",
                            "--op projectors --case '32 pictures' --mode forward",
                            (*compiled, *cublas),
                        ),
                        (
                            "compiled-neck",
                            "--op neck --case '8 pictures, 100 boxes each' --mode forward",
                            compiled,
                        ),
                    )
                ),
            ),
            lambda output: _rows_of(output / "results"),
        ),
        Part(
            "curves",
            "cost and memory against boxes, pictures and picture size",
            1.75,
            tuple(
                _measure(
                    *(f"curves-{op}", results, f"--op {op} --mode forward --budget 1"),
                    *_providers(*EAGER),
                    tuned=tuned,
                )
                for op in ("pooled_roi_align", "conv_gate", "neck", "projectors")
            ),
            lambda output: _rows_of(output / "results"),
        ),
        Part(
            "models",
            "towers and neck, first token, generation, a training step, at published sizes",
            2,
            tuple(
                _measure(
                    *(f"models-{op}", results, f"--op {op} {case} --mode {mode} --budget 3"),
                    *_providers(*EAGER),
                    tuned=tuned,
                )
                for op, case, mode in (
                    ("vision_flow", "--case '8 pictures, 100 boxes each'", "forward"),
                    ("first_token", "--case '1 picture, 100 boxes'", "forward"),
                    ("generation", "--case '1 picture, 100 boxes'", "forward"),
                    ("training_step", "--case '2 pictures, 100 boxes each'", "both"),
                )
            ),
            lambda output: _rows_of(output / "results"),
        ),
        Part(
            "more tests",
            "the other tests of the kernels and of the benchmarks",
            1,
            (
                tests(
                    "more-tests",
                    "tests/kernels",
                    "tests/benchmarks",
                    *[f"--ignore={path}" for path in kernels],
                    "--ignore=tests/kernels/test_aot.py",
                ),
            ),
            results_of("more-tests"),
        ),
        Part(
            "report",
            "tables and plots",
            0.5,
            tuple(
                Step(f"report-{folder.name}", ("-m", "benchmarks.report", "--results", str(folder)))
                for folder in (results, heuristics)
            ),
            lambda _: (
                "" if importlib.util.find_spec("matplotlib") else "no plots: matplotlib is not installed"
            ),
        ),
    )


def _rows_of(folder: Path) -> str:
    found = rows.read_all(folder)
    timed = sum(row.milliseconds is not None for row in found)
    wrong = sum(row.wrong for row in found)
    return f"{timed} times, {len(found) - timed} not timed" + (f", {wrong} WRONG" if wrong else "")


def _entries_of(folder: Path) -> str:
    tables = [json.loads(path.read_text()) for path in sorted(folder.glob("*/*.json"))]
    entries = [entry for table in tables for entry in table["entries"]]
    better = sum(entry["microseconds"] != entry["heuristic_microseconds"] for entry in entries)
    return f"{len(entries)} entries, {better} better than the heuristic" if entries else "no entries"


class Suite:
    """Runs parts and remembers in `output`/state.json what is done.

    Args:
        parts: the plan.
        output: folder of everything.
        tell: gets a line on what is going on.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        output: Path,
        tell: Callable[[str], object] = lambda line: print(line, flush=True),
    ) -> None:
        self.parts, self.output, self.tell = tuple(parts), output, tell
        self.state = output / "state.json"
        stored = json.loads(self.state.read_text()) if self.state.is_file() else {}
        self.progress = {part.name: Progress(**stored.get(part.name, {})) for part in self.parts}

    def run(self, names: Sequence[str] = (), minutes: float | None = None) -> None:
        """Run the parts of these names, or whichever are not closed, for at most `minutes` in all."""
        deadline = None if minutes is None else time.monotonic() + 60 * minutes
        (self.output / "logs").mkdir(parents=True, exist_ok=True)
        for part in self.parts:
            progress = self.progress[part.name]
            if part.name in names:
                # Asked for by name it runs again, as far as its commands find anything left to do.
                progress = self.progress[part.name] = Progress()
            elif names or progress.closed:
                continue
            if deadline is not None and deadline - time.monotonic() < LEAST:
                break
            self._run(part, progress, deadline)

    def _run(self, part: Part, progress: Progress, deadline: float | None) -> None:
        self.tell(f"== {part.name}: {part.text} (up to {part.minutes:g} min)")
        progress.notes.clear()
        for step in part.steps:
            if step.name in progress.outcomes:
                continue
            missing = [name for name in step.needs if importlib.util.find_spec(name) is None]
            if missing:
                progress.notes.append(f"{step.name}: {', '.join(missing)} is not installed")
                progress.outcomes[step.name] = INCOMPLETE
                continue
            left = 60 * part.minutes - progress.seconds
            until_deadline = math.inf if deadline is None else deadline - time.monotonic()
            limits = {"step": 60 * step.at_most, "part": left, "call": until_deadline}
            ended_by = min(limits, key=limits.__getitem__)
            if limits[ended_by] <= 0:
                break
            status = self._command(step, progress, limits[ended_by])
            if status is None and ended_by == "call":
                break
            if status == 0 or (status is None and ended_by == "step" and step.enough):
                progress.outcomes[step.name] = PASS
            elif status is None or status == shards.INCOMPLETE:
                progress.outcomes[step.name] = INCOMPLETE
                progress.notes.append(f"{step.name}: {'out of time' if status is None else 'not complete'}")
            else:
                progress.outcomes[step.name] = FAIL
                progress.notes.append(f"{step.name}: status {status}, see logs/{step.name}.log")
            self._save()
        left = 60 * part.minutes - progress.seconds
        progress.closed = left <= 0 or all(step.name in progress.outcomes for step in part.steps)
        self._save()
        self.tell(f"   {self._line(part)}")

    def _command(self, step: Step, progress: Progress, limit: float) -> int | None:
        """The exit status of a step, or None if it ran past `limit` seconds."""
        self.tell(f"   {step.shown}")
        begin, spent_before = time.monotonic(), progress.seconds
        with (self.output / "logs" / f"{step.name}.log").open("ab") as log:
            log.write(f"$ {step.shown}\n".encode())
            log.flush()
            process = subprocess.Popen(
                [sys.executable, *step.command],
                cwd=ROOT,
                env=_environment() | dict(step.environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                process_group=0,
            )
            try:
                while process.poll() is None:
                    elapsed = time.monotonic() - begin
                    progress.seconds = spent_before + elapsed
                    self._save()
                    if elapsed >= limit:
                        return None
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(min(LOOK, max(0.01, limit - elapsed)))
            finally:
                _end(process)
                progress.seconds = spent_before + time.monotonic() - begin
        return process.returncode

    def _save(self) -> None:
        partial = self.state.with_name(f".{self.state.name}.{os.getpid()}")
        partial.write_text(
            json.dumps({name: asdict(one) for name, one in self.progress.items()}, indent=1) + "\n"
        )
        os.replace(partial, self.state)

    def _line(self, part: Part) -> str:
        progress = self.progress[part.name]
        started = progress.seconds > 0 or progress.outcomes
        pieces = [
            f"{progress.seconds / 60:.1f} of {part.minutes:g} min",
            part.numbers(self.output) if started else "",
        ]
        pieces += progress.notes if started else ["not started"]
        return f"{progress.status(part)}  {part.name}: " + "; ".join(piece for piece in pieces if piece)

    def summary(self, conditions: str) -> tuple[str, bool]:
        """The verdict as Markdown, and whether everything is well; also written to summary.md."""
        before, after = (rows.read_all(self.output / name) for name in ("results_before_tuning", "results"))
        tuned, untuned = acceptance.judge(after), acceptance.judge(before)
        lines = ["# GPU suite", "", conditions, "", "## Parts", ""]
        lines += [f"- {self._line(part)}" for part in self.parts]
        lines += ["", "## Acceptance, bfloat16, published widths", ""]
        verdicts = [_tests_verdict(shards.read_results(self.output / "tests"))]
        lines.append(f"- {verdicts[0]}")
        for one, other in zip(tuned, untuned, strict=True):
            verdict = other if one.state == acceptance.NOT_MEASURED and other.state != one.state else one
            verdicts.append(verdict)
            lines.append(f"- {verdict}" + (" (before tuning)" if verdict is other else ""))
        failed = {
            f"{test}: {reason}"
            for name in ("tests", "more-tests")
            for test, reason in shards.read_results(self.output / name).failed.items()
        }
        lines += ["", "## Failed tests", "", *(f"- {line}" for line in sorted(failed))] if failed else []
        lines += ["", "## To keep", "", *(f"    {line}" for line in keep(self.output))]
        text = "\n".join(lines) + "\n"
        self.output.mkdir(parents=True, exist_ok=True)
        (self.output / "summary.md").write_text(text, encoding="utf-8")
        well = all(self.progress[part.name].status(part) == PASS for part in self.parts)
        return text, well and all(verdict.state == acceptance.MET for verdict in verdicts)


def _tests_verdict(results: shards.Results) -> acceptance.Verdict:
    """Of the tests of the kernels, among them two runs with identical bits and the capture in CUDA graphs."""
    text = "kernel tests in every dtype, identical bits of two runs, capture in CUDA graphs"
    state = acceptance.MISSED if results.failed else acceptance.MET
    if not results.failed and (results.missing or not results.passed):
        state = acceptance.NOT_MEASURED
    return acceptance.Verdict(text, "all pass", str(results), state)


def keep(output: Path) -> list[str]:
    """Commands that bring the results of a GPU into the checkout."""
    return [
        f"cp {output}/results/*.jsonl benchmarks/results/ && python -m benchmarks.report",
        f"cp -r {output}/tuned/* mgllava_kernels/configs/",
    ]


def _environment() -> dict[str, str]:
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in ("TRITON_INTERPRET", "MGLLAVA_KERNELS")
    }
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return kept | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Stop a command with everything it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
            return


def find_gpu() -> dict[str, str] | None:
    """Name and versions of the GPU that torch finds, asked in a process of its own so that no memory is held here."""
    code = (
        "import json, torch\n"
        "found = torch.cuda.is_available()\n"
        "print(json.dumps({'device': torch.cuda.get_device_name(), 'torch': torch.__version__} if found else None))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return json.loads(result.stdout.splitlines()[-1]) if result.returncode == 0 and result.stdout else None


def listing(parts: Sequence[Part]) -> Iterator[str]:
    """The plan in words."""
    for part in parts:
        yield f"{part.name}: {part.text} (up to {part.minutes:g} min)"
        yield from (f"    {step.shown}" for step in part.steps)
    yield f"{sum(part.minutes for part in parts):g} minutes at most"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python benchmarks/gpu_suite.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--output", type=Path, default=DEFAULT_OUTPUT, help="folder of everything; default %(default)s"
    )
    parser.add_argument(
        "--part", action="append", default=[], metavar="NAME", help="only this part, once more"
    )
    parser.add_argument("--minutes", type=float, help="stop after so many; the next call goes on")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and end")
    options = parser.parse_args(arguments)
    output = options.output.resolve()
    parts = plan(output)
    names = [part.name for part in parts]
    for name in options.part:
        if name not in names:
            parser.error(f"--part must be one of {', '.join(names)}; got {name!r}")
    if options.minutes is not None and not options.minutes > 0:
        parser.error(f"--minutes must be more than 0; got {options.minutes:g}")
    if options.dry_run:
        print("\n".join(listing(parts)))
        return 0
    gpu = find_gpu()
    if gpu is None:
        print("torch finds no GPU here: this suite needs one (--dry-run prints its plan)", file=sys.stderr)
        return NO_GPU
    # What stops this program stops its commands too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    for name in ("results", "results_before_tuning"):
        (output / name).mkdir(parents=True, exist_ok=True)
    suite = Suite(parts, output)
    conditions = ", ".join(f"{name} {value}" for name, value in gpu.items())
    try:
        suite.run(options.part, options.minutes)
    finally:
        text, well = suite.summary(conditions)
        print(text)
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
