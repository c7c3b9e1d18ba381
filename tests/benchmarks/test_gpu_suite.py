"""The suite of a GPU machine, with fake commands: order, limits, going on after a kill, and its verdict."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from row_cases import a_line, conv_gate

from benchmarks import acceptance, gpu_suite, rows, shards
from benchmarks.gpu_suite import FAIL, INCOMPLETE, PASS, Part, Step, Suite

ROOT = Path(gpu_suite.__file__).parents[1]


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch):
    monkeypatch.setattr(gpu_suite, "LEAST", 0.0)
    monkeypatch.setattr(gpu_suite, "LOOK", 0.02)


def step(name: str, code: str = "", **options) -> Step:
    return Step(name, ("-c", code), **options)


def leaving(path: Path, name: str, code: str = "") -> Step:
    """Writes its name to a file, then does `code`."""
    return step(name, f"open({str(path)!r}, 'a').write({name!r} + ' ')\n{code}")


def seconds(number: float) -> float:
    return number / 60


def suite(tmp_path: Path, *parts: Part) -> Suite:
    return Suite(parts, tmp_path / "output", lambda line: None)


def statuses(of: Suite) -> list[str]:
    return [of.progress[part.name].status(part) for part in of.parts]


def test_a_failure_or_a_missing_package_does_not_stop_the_next_part(tmp_path):
    trace = tmp_path / "trace"
    parts = (
        Part("a", "", 1, (leaving(trace, "fails", "raise SystemExit(1)"), leaving(trace, "second"))),
        Part("b", "", 1, (step("absent", needs=("no_such_package",)), leaving(trace, "third"))),
        Part("c", "", 1, (leaving(trace, "incomplete", f"raise SystemExit({shards.INCOMPLETE})"),)),
        Part("d", "", 1, (leaving(trace, "last"),)),
    )
    run = suite(tmp_path, *parts)
    run.run()
    assert trace.read_text().split() == ["fails", "second", "third", "incomplete", "last"]
    assert statuses(run) == [FAIL, INCOMPLETE, INCOMPLETE, PASS]
    assert run.progress["b"].notes == ["absent: no_such_package is not installed"]
    assert "status 1, see logs/fails.log" in run.summary("a GPU")[0]


def test_a_part_out_of_time_is_stopped_with_all_it_started(tmp_path):
    heart = tmp_path / "heart"
    beat = f"import time\nfor _ in range(1000): open({str(heart)!r}, 'a').write('.'); time.sleep(0.02)"
    code = f"import subprocess, sys, time\nsubprocess.Popen([sys.executable, '-c', {beat!r}])\ntime.sleep(60)"
    slow = Part("slow", "", seconds(1.5), (step("sleeps", code), step("never")))
    run = suite(tmp_path, slow, Part("next", "", 1, (step("quick"),)))
    begin = time.monotonic()
    run.run()
    assert time.monotonic() - begin < 30
    assert statuses(run) == [INCOMPLETE, PASS]
    assert run.progress["slow"].closed
    assert run.progress["slow"].notes == ["sleeps: out of time"]
    beats = heart.stat().st_size
    assert beats
    time.sleep(0.3)
    assert heart.stat().st_size == beats

    again = suite(tmp_path, slow, Part("next", "", 1, (step("quick"),)))
    again.run()
    assert again.progress["slow"].seconds < 10


@pytest.mark.parametrize(("enough", "status"), [(True, PASS), (False, INCOMPLETE)])
def test_a_step_that_takes_too_long_leaves_time_for_the_next(tmp_path, enough, status):
    """It passes if all it does is to warm up."""
    long = step("sleeps", "import time; time.sleep(60)", at_most=seconds(0.2), enough=enough)
    run = suite(tmp_path, Part("a", "", 1, (long, leaving(tmp_path / "trace", "after"))))
    run.run()
    assert statuses(run) == [status]
    assert run.progress["a"].closed
    assert (tmp_path / "trace").read_text() == "after "


def test_a_call_of_so_many_minutes_ends_and_the_next_goes_on(tmp_path):
    trace, waits = tmp_path / "trace", tmp_path / "waits"
    waits.touch()
    sleep = f"import os, time\nwhile os.path.exists({str(waits)!r}): time.sleep(0.02)"
    parts = (
        Part("a", "", 1, (leaving(trace, "a1"), leaving(trace, "a2", sleep))),
        Part("b", "", 1, (step("b"),)),
    )
    run = suite(tmp_path, *parts)
    run.run(minutes=seconds(2))
    assert statuses(run) == [INCOMPLETE, INCOMPLETE]
    assert not run.progress["a"].closed
    assert list(run.progress["a"].outcomes) == ["a1"]
    waits.unlink()

    later = suite(tmp_path, *parts)
    assert later.progress["a"].seconds >= 1
    later.run(minutes=1)
    assert trace.read_text().split() == ["a1", "a2", "a2"]
    assert statuses(later) == [PASS, PASS]


def test_only_a_part_that_is_named_runs_and_runs_again(tmp_path):
    trace = tmp_path / "trace"
    parts = (Part("a", "", 1, (leaving(trace, "a"),)), Part("b", "", 1, (leaving(trace, "b"),)))
    for _ in range(2):
        run = suite(tmp_path, *parts)
        run.run(["b"])
    assert trace.read_text().split() == ["b", "b"]
    assert statuses(run) == [INCOMPLETE, PASS]
    assert "not started" in run.summary("a GPU")[0]


def test_the_summary_judges_tuned_rows_and_falls_back_to_those_before(tmp_path, monkeypatch):
    one, other = (
        a_line(text="tuned line", cases=("1 picture",)),
        a_line(text="other line", cases=("32 pictures",)),
    )
    monkeypatch.setattr(acceptance, "LINES", (one, other))
    run = suite(tmp_path, Part("a", "", 1, (step("a"),)))
    run.run()
    rows.add(
        [*conv_gate("1 picture", 0.5), *conv_gate("32 pictures", 1.5)], run.output / "results_before_tuning"
    )
    rows.add(conv_gate("1 picture", 2.0), run.output / "results")
    (run.output / "tests").mkdir()
    record = run.output / "tests" / "shard-0-of-1.jsonl"
    passed = '{"share": ["t::a"], "collected": 1}\n{"test": "t::a", "outcome": "passed"}\n'
    record.write_text(passed)
    text, well = run.summary("NVIDIA H100")
    assert "- MET: tuned line: 2 times in a CUDA graph (wanted: at least 1 times)\n" in text
    assert "- MET: other line: 1.5 times in a CUDA graph (wanted: at least 1 times) (before tuning)\n" in text
    assert "capture in CUDA graphs: 1 passed (wanted: all pass)" in text
    assert well
    assert (run.output / "summary.md").read_text() == text

    record.write_text(passed.replace('"passed"', '"failed", "reason": "one is not two"'))
    text, well = run.summary("NVIDIA H100")
    assert "- MISSED: kernel tests" in text
    assert "- t::a: one is not two" in text
    assert not well
    record.write_text(passed.splitlines()[0] + "\n")
    assert "- NOT MEASURED: kernel tests" in run.summary("NVIDIA H100")[0]


KILLED = """
import sys
sys.path.insert(0, {root!r})
from pathlib import Path
from benchmarks.gpu_suite import Part, Step, Suite
trace = {trace!r}
note = "open(" + repr(trace) + ", 'a').write({{!r}} + ' ')"
parts = (
    Part("a", "", 1, (Step("a1", ("-c", note.format("a1"))),)),
    Part("b", "", 1, (
        Step("b1", ("-c", note.format("b1"))),
        Step("b2", ("-c", note.format("b2") + "; import os, time\\nwhile os.path.exists({waits!r}): time.sleep(.02)")),
    )),
)
Suite(parts, Path({output!r}), print).run()
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_suite_goes_on_inside_the_part_it_was_in(tmp_path, number):
    trace, waits = tmp_path / "trace", tmp_path / "waits"
    waits.touch()
    places = {"root": str(ROOT), "trace": str(trace), "waits": str(waits), "output": str(tmp_path / "output")}
    code = KILLED.format(**places)
    first = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
    end = time.monotonic() + 60
    while not (trace.is_file() and "b2" in trace.read_text()):
        assert time.monotonic() < end
        time.sleep(0.05)
    first.send_signal(number)
    first.wait()
    waits.unlink()
    second = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert second.returncode == 0, second.stderr
    assert trace.read_text().split() == ["a1", "b1", "b2", "b2"]
    stored = json.loads((tmp_path / "output" / "state.json").read_text())
    assert stored["b"]["outcomes"] == {"b1": PASS, "b2": PASS}


def test_commands_do_not_see_settings_that_change_what_is_measured(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("MGLLAVA_KERNELS", "reference")
    code = "import os; assert not {'TRITON_INTERPRET', 'MGLLAVA_KERNELS'} & set(os.environ)"
    code += "; assert os.environ['MGLLAVA_KERNELS_CONFIGS'] == 'tuned'; import benchmarks"
    run = suite(
        tmp_path, Part("a", "", 1, (step("sees", code, environment=(("MGLLAVA_KERNELS_CONFIGS", "tuned"),)),))
    )
    run.run()
    assert statuses(run) == [PASS], (tmp_path / "output" / "logs" / "sees.log").read_text()


def test_without_a_gpu_it_says_so_and_ends_with_2():
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_suite.py")]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd="/")
    assert result.returncode == 2
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    assert "finds no GPU" in result.stderr


def test_the_plan_keeps_its_promises(tmp_path, capsys):
    parts = gpu_suite.plan(tmp_path)
    # Less half a minute for stopping what is out of time.
    assert sum(part.minutes for part in parts) <= 24.5
    assert all(part.minutes <= 9 for part in parts)
    names = [one.name for part in parts for one in part.steps]
    assert len(set(names)) == len(names)
    assert gpu_suite.main(["--dry-run", "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert all(f"{part.name}: {part.text} (up to {part.minutes:g} min)" in printed for part in parts)
    assert list(tmp_path.iterdir()) == []


def options_of(command: tuple[str, ...]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for option, value in itertools.pairwise(command):
        if option.startswith("--"):
            found.setdefault(option, []).append(value)
    return found


def test_every_benchmark_of_the_plan_has_cases_and_covers_the_acceptance(tmp_path, monkeypatch):
    import torch

    from benchmarks import __main__ as command
    from benchmarks.acceptance import LINES

    wanted = {
        (line.op, case, dtype, line.mode) for line in LINES for case in line.cases for dtype in line.dtypes
    }
    parts = {part.name: part for part in gpu_suite.plan(tmp_path)}
    for name in ("verdict", "benchmarks", "curves"):
        measured = set()
        for one in parts[name].steps:
            options = options_of(one.command)
            (case,) = options.get("--case", [None])
            jobs = command.plan(
                torch.device("cuda"),
                options["--op"],
                case,
                options.get("--dtype"),
                options["--mode"],
                options["--provider"],
                False,
            )
            assert jobs, one.shown
            measured |= {(job.benchmark.name, job.case.name, job.dtype, job.mode) for job in jobs}
        if name != "curves":
            assert measured >= wanted


def test_every_command_of_the_plan_knows_its_options(tmp_path):
    """With --help behind them the commands parse what stands before it, and end."""
    from typer.testing import CliRunner

    from benchmarks import __main__ as benchmarks
    from mgllava_kernels import aot, tune

    apps = {"benchmarks": benchmarks.app, "mgllava_kernels.aot": aot.app, "mgllava_kernels.tune": tune.app}
    checked = set()
    for part in gpu_suite.plan(tmp_path):
        for one in part.steps:
            module = one.command[1]
            checked.add(module)
            if module in apps:
                known = CliRunner().invoke(apps[module], ["--help"], env={"COLUMNS": "200"}).output
                assert all(word in known for word in one.command[2:] if word.startswith("--")), one.shown
    assert checked == {*apps, "benchmarks.shards", "benchmarks.report"}


@pytest.fixture
def some_tests(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # a second less for each process
    folder = tmp_path / "some_tests"
    folder.mkdir()
    (folder / "pytest.ini").write_text("[pytest]\n")
    (folder / "test_some.py").write_text(
        "import os, time, pytest\n"
        "@pytest.mark.parametrize('value', range(4))\n"
        "def test_passes(value): pass\n"
        "def test_fails(): assert 1 == 2, 'one is not two'\n"
        "def test_crashes(): os._exit(7)\n"
        "def test_hangs(): time.sleep(1000)\n"
        "def test_skips(): pytest.skip('no need')\n"
        "def test_last(): pass\n"
    )
    return folder


def test_shards_survive_failures_crashes_and_hangs(tmp_path, some_tests):
    folder = tmp_path / "records"
    errors = shards.run([str(some_tests)], folder, number=2, hangs_after=4)
    results = shards.read_results(folder)
    assert errors == []
    assert (len(results.passed), len(results.skipped), results.collected, results.missing) == (5, 1, 9, 0)
    reasons = {test.partition("::")[2]: reason for test, reason in results.failed.items()}
    assert reasons == {
        "test_fails": "AssertionError: one is not two",
        "test_crashes": "its process ended with status 7",
        "test_hangs": "hung: nothing for 4 s",
    }
    assert str(results) == "5 passed, 3 failed, 1 skipped"

    # What has a result is not run again.
    before = {path: path.stat().st_size for path in folder.glob("*.jsonl")}
    assert shards.run([str(some_tests)], folder, number=2, hangs_after=4) == []
    again = shards.read_results(folder)
    assert (again.passed, again.failed) == (results.passed, results.failed)
    started = [record["start"] for path in before for record in shards.read(path) if "start" in record]
    assert len(started) == len(set(started)) == 9


def test_shards_go_on_after_a_kill(tmp_path, some_tests):
    (some_tests / "test_some.py").write_text(
        "import os, pathlib, time\n"
        "def test_first(): pass\n"
        f"def test_waits():\n    while os.path.exists({str(tmp_path / 'waits')!r}): time.sleep(0.02)\n"
    )
    (tmp_path / "waits").touch()
    folder = tmp_path / "records"
    command = [
        sys.executable,
        "-m",
        "benchmarks.shards",
        "--folder",
        str(folder),
        "--shards",
        "1",
        str(some_tests),
    ]
    first = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    record = folder / "shard-0-of-1.jsonl"
    end = time.monotonic() + 60
    while sum("start" in one for one in shards.read(record)) < 2:
        assert time.monotonic() < end
        time.sleep(0.05)
    first.terminate()
    first.wait()
    (tmp_path / "waits").unlink()
    second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (second.returncode, second.stdout.splitlines()[-1]) == (0, "2 passed")
    starts = [one["start"].partition("::")[2] for one in shards.read(record) if "start" in one]
    assert starts == ["test_first", "test_waits", "test_waits"]


def test_shards_tell_a_module_that_cannot_be_imported(tmp_path, some_tests):
    (some_tests / "test_some.py").write_text("import no_such_module\n")
    (some_tests / "test_other.py").write_text("def test_other(): pass\n")
    assert shards.run([str(some_tests)], tmp_path / "records", number=1) == []
    results = shards.read_results(tmp_path / "records")
    assert [reason for reason in results.failed.values() if "no_such_module" in reason]
    assert len(results.passed) == 1


def test_shards_tell_that_pytest_did_not_start(tmp_path, some_tests):
    (error,) = shards.run([str(some_tests), "--no-such-option"], tmp_path / "records", number=1)
    assert "before any test" in error
