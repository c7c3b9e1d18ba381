"""The whole verdict of a GPU machine in one command: tests, tuned tables, benchmarks, tables and plots.

    python benchmarks/gpu_suite.py --dry-run         the plan with its times
    python benchmarks/gpu_suite.py                   everything, in under 25 minutes
    python benchmarks/gpu_suite.py --minutes 9       what is not finished yet, for nine minutes; again to go on
    python benchmarks/gpu_suite.py --part tests      one part: what failed in it once more
    GIT_COMMIT=$(git rev-parse --short HEAD) python benchmarks/gpu_suite.py
                                                     where the copy of the checkout has no .git

Runs from a checkout, without installing anything and without network. Parts run in the order of what they tell;
each has a time limit, goes on where it stopped and cannot stop the next. Everything lands in one folder (--output):
rows, tuned tables, logs, tables and plots, and summary.md; what other code left there is set aside in its folder
`earlier`. Ends with 0 if every part passed and every line of the acceptance is met, 1 if not, 2 without a GPU.
"""

import argparse
import contextlib
import hashlib
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
# The status of `python -m benchmarks` when the GPU answers its process no more, and how often it is started again.
DEVICE_LOST, RESTARTS = 3, 3
# What torch.compile made.
CACHE = "inductor"
# Another version of these files is another result. Those that only arrange and show results are left out.
CODE = ("mgllava", "mgllava_kernels", "benchmarks", "tests/kernels", "tests/conftest.py")
SHOWS = ("ablation.py", "acceptance.py", "comparison.py", "gpu_suite.py", "plots.py", "report.py")


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
        retry: options that make it repeat what failed.
        goes_on: with the status DEVICE_LOST it is started again and goes on behind what ended it.
    """

    name: str
    command: tuple[str, ...]
    needs: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()
    at_most: float = math.inf
    enough: bool = False
    retry: tuple[str, ...] = ()
    goes_on: bool = False

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
    """What a part has done.

    Args:
        retry: its steps begin with what failed.
        seconds: spent, without what a step lost that the end of a call cut off.
        outcomes: of each finished step.
        cut: steps that the end of a call cut off once. The second time their seconds count, or a part of long steps
            and short calls would never end.
        notes: why steps did not pass.
        closed: finished or out of time.
    """

    retry: bool = False
    seconds: float = 0.0
    outcomes: dict[str, str] = field(default_factory=dict)
    cut: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    closed: bool = False

    def status(self, part: Part) -> str:
        """PASS, FAIL or INCOMPLETE."""
        if FAIL in self.outcomes.values():
            return FAIL
        complete = all(self.outcomes.get(step.name) == PASS for step in part.steps)
        return PASS if complete else INCOMPLETE


EAGER = ("original", "torchvision", "cuBLAS bias", "cuBLAS bias and GELU", "torch", "triton")
POOLED = (*EAGER, "original compiled")
FORWARD, BOTH = "--mode forward --budget 1", "--mode both --budget 1"
# What a curve shows.
PLOTTED = ("original", "torch", "triton")
ALL_BOXES = "8 pictures, 100 boxes each"


def _with_repository() -> tuple[str, ...]:
    """Also the original's own module, where whoever runs this has fetched it."""
    return (*EAGER, "original repository") if os.environ.get("MGLLAVA_ORIGINAL_REPOSITORY") else EAGER


def _measure(
    name: str,
    folder: Path,
    arguments: str,
    providers: Sequence[str],
    at_most: float,
    tuned: Path | None = None,
    needs: tuple[str, ...] = (),
) -> Step:
    """Rows of some cases; rivals that cannot run are rows with the reason."""
    named = (word for provider in providers for word in ("--provider", provider))
    command = (
        "-m",
        "benchmarks",
        "--device",
        "cuda",
        *shlex.split(arguments),
        *named,
        "--results",
        str(folder),
    )
    tables = () if tuned is None else (("MGLLAVA_KERNELS_CONFIGS", str(tuned)),)
    return Step(name, command, ("typer", "rich", *needs), tables, at_most, goes_on=True)


# Those whose kernels run on the GPU.
KERNEL_TESTS = (
    *("pooled_roi_align_triton", "conv_gate_triton", "projector_triton", "roi_align_triton"),
    *("neck", "tune"),
)


def plan(output: Path) -> tuple[Part, ...]:
    """The parts, the most telling first."""
    results, heuristics, tuned = output / "results", output / "results_before_tuning", output / "tuned"
    return (
        _tests(output),
        _verdict(heuristics),
        _tuning(tuned),
        _benchmarks(results, tuned),
        _rivals(results, tuned),
        _curves(results, tuned),
        _models(results, tuned),
        _more_tests(output),
        _report(results, heuristics),
    )


COMMAND_LINE = ("triton", "typer", "rich")
AOT = ("-m", "mgllava_kernels.aot", "--target", "native")


def _tests(output: Path) -> Part:
    warm_up = {"at_most": 0.5, "enough": True}
    return Part(
        "tests",
        "kernels in every dtype against golden values, naive loops and torchvision",
        4,
        (
            # On all cores, lest every process of the tests compiles the same kernels.
            Step("compile-bfloat16", (*AOT, "--dtype", "bfloat16"), COMMAND_LINE, **warm_up),
            Step(
                "compile-others", (*AOT, "--dtype", "float32", "--dtype", "float16"), COMMAND_LINE, **warm_up
            ),
            _pytest("tests", output, [_file_of(name) for name in KERNEL_TESTS]),
        ),
        lambda output: str(shards.read_results(output / "tests")),
    )


def _more_tests(output: Path) -> Part:
    left_out = [*map(_file_of, KERNEL_TESTS), "tests/kernels/test_aot.py"]
    paths = ["tests/kernels", "tests/benchmarks", *[f"--ignore={path}" for path in left_out]]
    return Part(
        "more tests",
        "the other tests of the kernels and of the benchmarks",
        0.75,
        (_pytest("more-tests", output, paths),),
        lambda output: str(shards.read_results(output / "more-tests")),
    )


def _file_of(kernel_test: str) -> str:
    return f"tests/kernels/test_{kernel_test}.py"


def _pytest(name: str, output: Path, paths: Sequence[str]) -> Step:
    command = ("-m", "benchmarks.shards", "--folder", str(output / name), *paths)
    return Step(name, command, ("pytest", "hypothesis", "triton"), retry=("--retry",))


def _verdict(folder: Path) -> Part:
    both = "--mode forward --mode both --budget 1"
    return Part(
        "verdict",
        "main cases with the launch parameters of a bare checkout: its own tables, else the heuristics'",
        2.65,
        tuple(
            _measure(f"verdict-{name}", folder, text, _with_repository(), at_most)
            for name, text, at_most in (
                ("8x100", f"--op pooled_roi_align --op neck --case '{ALL_BOXES}' {both}", 0.75),
                ("batch-1", f"--op conv_gate --op projectors --case '1 picture' {both}", 0.75),
                ("batch-32", f"--op conv_gate --op projectors --case '32 pictures' {both}", 0.75),
                (
                    "1x100",
                    "--op pooled_roi_align --case '1 picture, 100 boxes' --mode forward --budget 1",
                    0.4,
                ),
                (
                    "regions-14",
                    "--op roi_align --case '14x14, ratio 2' --mode forward --mode backward --budget 1",
                    1.0,
                ),
                ("batch-8", "--op projectors --case '8 pictures' --mode forward --budget 1", 0.4),
            )
        ),
        lambda _: _rows_of(folder),
    )


def _tuning(tuned: Path) -> Part:
    # First the products: whether they go to cuBLAS is for the tables to say.
    forward = ("grouped_mlp_projector", "conv_gate_fusion", "pooled_roi_align", "roi_align")
    regions = ("roi_align", "roi_align_backward")
    backward = (
        *("pooled_roi_align_backward", "roi_align_backward"),
        *("grouped_mlp_projector_backward", "conv_gate_fusion_backward"),
    )

    def options(ops: Sequence[str], dtype: str) -> tuple[str, ...]:
        return (*(word for op in ops for word in ("--op", op)), "--dtype", dtype)

    def tune(name: str, ops: Sequence[str], dtype: str) -> Step:
        command = ("-m", "mgllava_kernels.tune", "--output", str(tuned), *options(ops, dtype))
        return Step(f"tune-{name}", command, COMMAND_LINE, at_most=0.75)

    candidates = (*AOT, "--candidates", *options(forward, "bfloat16"))
    return Part(
        "tune",
        "launch parameters for this GPU",
        3,
        (
            Step("tune-compile", candidates, COMMAND_LINE, at_most=1, enough=True),
            # One command an op: an error of CUDA ends a command.
            *(tune(op, [op], "bfloat16") for op in forward),
            tune("regions", regions, "float32"),
            *(tune(op, [op], "bfloat16") for op in backward),
        ),
        lambda _: _entries_of(tuned),
    )


def _benchmarks(results: Path, tuned: Path) -> Part:
    regions = "--op roi_align --case '{}' --mode forward --mode backward --budget 1"
    return Part(
        "benchmarks",
        "main cases with the tuned launch parameters",
        3.7,
        tuple(
            _measure(name, results, text, providers, at_most, tuned)
            for name, text, providers, at_most in (
                ("tuned-8x100", f"--op pooled_roi_align --case '{ALL_BOXES}' {FORWARD}", POOLED, 0.75),
                ("tuned-neck", f"--op neck --case '{ALL_BOXES}' {FORWARD} --mode both", EAGER, 0.5),
                (
                    "tuned-1x100",
                    f"--op pooled_roi_align --case '1 picture, 100 boxes' {FORWARD}",
                    POOLED,
                    0.75,
                ),
                ("tuned-regions-7", regions.format("7x7, ratio 2"), EAGER, 1.25),
                ("tuned-regions-14", regions.format("14x14, ratio 2"), EAGER, 1),
                ("tuned-both", f"--op pooled_roi_align --case '{ALL_BOXES}' {BOTH}", EAGER, 0.4),
                ("tuned-both-1", f"--op conv_gate --case '1 picture' {BOTH}", _with_repository(), 0.4),
                ("tuned-both-32", f"--op conv_gate --case '32 pictures' {BOTH}", _with_repository(), 0.4),
            )
        ),
        lambda _: _rows_of(results),
    )


def _rivals(results: Path, tuned: Path) -> Part:
    """Where the acceptance asks for the best of what torch has: compiling takes nearly all of the time."""
    products = (*_with_repository(), "original compiled", "original max-autotune")
    return Part(
        "rivals",
        "products beside everything that cuBLAS and torch.compile make of them",
        6.1,
        tuple(
            _measure(name, results, f"{ops} --case '{case}' {FORWARD}", products, at_most, tuned)
            for name, ops, case, at_most in (
                ("rivals-1", "--op conv_gate --op projectors", "1 picture", 3),
                ("rivals-32", "--op conv_gate --op projectors", "32 pictures", 3),
                ("rivals-8", "--op projectors", "8 pictures", 1.5),
            )
        ),
        lambda _: _rows_of(results),
    )


def _curves(results: Path, tuned: Path) -> Part:
    """Of the neck alone: those of pooled RoIAlign look like them, and take as long."""

    def curves(what: str, case: str, at_most: float) -> Step:
        arguments = f"--op neck --case '{case}' --mode forward --budget 0.5"
        return _measure(f"curves-{what}", results, arguments, PLOTTED, at_most, tuned)

    return Part(
        "curves",
        "cost and memory of the neck against boxes, pictures and picture size",
        1.4,
        (curves("boxes-and-canvas", "1 picture", 1.25), curves("pictures", "10 boxes each", 0.6)),
        lambda _: _rows_of(results),
    )


def _models(results: Path, tuned: Path) -> Part:
    return Part(
        "models",
        "towers and neck, generation, first token, a training step, at published sizes",
        2.4,
        tuple(
            _measure(
                f"models-{op}",
                results,
                f"--op {op} --case '{case}' --mode {mode} --budget 1",
                PLOTTED,
                0.75,
                tuned,
                ("transformers", "timm"),
            )
            for op, case, mode in (
                ("vision_flow", ALL_BOXES, "forward"),
                ("generation", "1 picture, 100 boxes", "forward"),
                ("first_token", "1 picture, 100 boxes", "forward"),
                ("training_step", "2 pictures, 100 boxes each", "both"),
            )
        ),
        lambda _: _rows_of(results),
    )


def _report(*folders: Path) -> Part:
    def without_plots(_: Path) -> str:
        return "" if importlib.util.find_spec("matplotlib") else "no plots: matplotlib is not installed"

    steps = (
        Step(f"report-{folder.name}", ("-m", "benchmarks.report", "--results", str(folder)))
        for folder in folders
    )
    return Part("report", "tables and plots", 0.5, tuple(steps), without_plots)


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
        code: version of the code. What another version left in `output` is set aside.
        fresh: what the same version left, too.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        output: Path,
        tell: Callable[[str], object] = lambda line: print(line, flush=True),
        code: str = "",
        fresh: bool = False,
    ) -> None:
        self.parts, self.output, self.tell, self.code = tuple(parts), output, tell, code
        self.state = output / "state.json"
        stored = json.loads(self.state.read_text()) if self.state.is_file() else {}
        if stored and (fresh or stored["code"] != code):
            tell(f"{'what is there' if fresh else 'what other code left'} is now in {set_aside(output)}")
            stored = {}
        done = stored.get("parts", {})
        self.progress = {part.name: Progress(**done.get(part.name, {})) for part in self.parts}

    def run(self, names: Sequence[str] = (), minutes: float | None = None) -> None:
        """Run the parts of these names, or whichever are not closed, for at most `minutes` in all.

        A part that is named repeats what failed in it.
        """
        deadline = None if minutes is None else time.monotonic() + 60 * minutes
        (self.output / "logs").mkdir(parents=True, exist_ok=True)
        for part in self.parts:
            progress = self.progress[part.name]
            if names and part.name not in names:
                continue
            if deadline is not None and deadline - time.monotonic() < LEAST:
                break
            if names and progress.closed:
                progress = self.progress[part.name] = Progress(retry=True)
            if not progress.closed:
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
            spent = progress.seconds
            status = self._command(step, progress, limits[ended_by])
            if status is None and ended_by == "call":
                if step.name not in progress.cut:
                    progress.cut.append(step.name)
                    progress.seconds = spent
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
        begin = time.monotonic()
        # What was cut off has begun to repeat already.
        first = step.retry if progress.retry and step.name not in progress.cut else ()
        status = self._attempt(step, first, progress, limit)
        for _ in range(RESTARTS):
            left = limit - (time.monotonic() - begin)
            if not (step.goes_on and status == DEVICE_LOST) or left <= 0:
                break
            status = self._attempt(step, (), progress, left)
        return status

    def _attempt(self, step: Step, more: tuple[str, ...], progress: Progress, limit: float) -> int | None:
        shown = " ".join([step.shown, *more])
        self.tell(f"   {shown}")
        begin, spent_before = time.monotonic(), progress.seconds
        with (self.output / "logs" / f"{step.name}.log").open("ab") as log:
            log.write(f"$ {shown}\n".encode())
            log.flush()
            process = subprocess.Popen(
                [sys.executable, *step.command, *more],
                cwd=ROOT,
                env=_environment(self.output) | dict(step.environment),
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
        parts = {name: asdict(one) for name, one in self.progress.items()}
        partial.write_text(json.dumps({"code": self.code, "parts": parts}, indent=1) + "\n", encoding="utf-8")
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
        f"python -m benchmarks.report --merge {output}/results",
        f"cp -r {output}/tuned/* mgllava_kernels/configs/",
    ]


def set_aside(output: Path) -> Path:
    """Move all that is in a folder into one below its `earlier`, and return that; caches stay."""
    number = sum(1 for _ in (output / "earlier").glob("*")) + 1
    aside = output / "earlier" / str(number)
    aside.mkdir(parents=True)
    for path in output.iterdir():
        if path.name not in ("earlier", CACHE):
            path.rename(aside / path.name)
    return aside


def fingerprint() -> str:
    """A short hash of the files whose change makes another result."""
    digest = hashlib.sha256()
    for name in CODE:
        path = ROOT / name
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.suffix in (".py", ".json") and file.name not in SHOWS and "results" not in file.parts:
                digest.update(f"{file.relative_to(ROOT)}\n".encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def commit() -> str | None:
    """What git or GIT_COMMIT says of the checkout; None if neither does."""
    try:
        result = subprocess.run(
            ["git", "-C", ROOT, "rev-parse", "--short", "HEAD"], capture_output=True, text=True
        )
    except OSError:
        result = None
    found = result.stdout.strip() if result is not None and result.returncode == 0 else ""
    return found or os.environ.get("GIT_COMMIT") or None


def _environment(output: Path) -> dict[str, str]:
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in ("TRITON_INTERPRET", "MGLLAVA_KERNELS", "MGLLAVA_KERNELS_CONFIGS")
    }
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    kept |= {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    # What torch.compile found is still there when the next call goes on.
    return {"TORCHINDUCTOR_CACHE_DIR": str(output / CACHE)} | kept


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Stop a command with everything it started, and what of that outlives it."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)


FIND_SECONDS = 120  # of importing torch from a cold disk, too; a driver that hangs takes for ever
FIND_GPU = """
import json, platform, torch
found = {"device": torch.cuda.get_device_name()} if torch.cuda.is_available() else None
if found:
    from benchmarks.gpu_settings import gpu_settings
    found["settings"] = gpu_settings(f"GPU-{torch.cuda.get_device_properties().uuid}")
    found |= {"driver": None, "python": platform.python_version(), "torch": torch.__version__, "triton": None}
    try:
        import triton
        from mgllava_kernels.tune import conditions
        found["triton"] = triton.__version__
        found["driver"] = conditions(torch.device("cuda", torch.cuda.current_device()))["driver"]
    except ImportError:
        pass
print(json.dumps(found))
"""


def find_gpu() -> dict[str, str | None]:
    """Name and versions of the GPU that torch finds, asked in a process of its own so that no memory is held here.

    Raises:
        RuntimeError: there is none, or asking failed; with what the process had to say.
    """
    command = [sys.executable, "-c", FIND_GPU]
    try:
        result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=FIND_SECONDS)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"torch did not say within {FIND_SECONDS} s whether there is a GPU") from None
    said = result.stderr.strip()
    if result.returncode != 0 or not result.stdout:
        raise RuntimeError(f"asking torch for a GPU ended with status {result.returncode}:\n{said}")
    found = json.loads(result.stdout.splitlines()[-1])
    if found is None:
        raise RuntimeError("\n".join(filter(None, ["torch finds no GPU here", said])))
    return found


NO_COMMIT = "**No commit is known: set GIT_COMMIT and run again with --fresh.**"


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
        "--part",
        action="append",
        default=[],
        metavar="NAME",
        help="only this part: what failed in it once more, and what is not finished",
    )
    parser.add_argument("--fresh", action="store_true", help="set aside what is there and begin anew")
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
    try:
        gpu = find_gpu()
    except RuntimeError as error:
        print(f"this suite needs a GPU (--dry-run prints its plan): {error}", file=sys.stderr)
        return NO_GPU
    # What stops this program stops its commands too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    suite = Suite(parts, output, code=fingerprint(), fresh=options.fresh)
    for name in ("results", "results_before_tuning"):
        (output / name).mkdir(parents=True, exist_ok=True)
    conditions = ", ".join(f"{name} {value or 'unknown'}" for name, value in gpu.items())
    known = commit()
    conditions += f", commit {known}, files {suite.code}." if known else f", files {suite.code}. {NO_COMMIT}"
    try:
        suite.run(options.part, options.minutes)
    finally:
        text, well = suite.summary(conditions)
        print(text)
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
