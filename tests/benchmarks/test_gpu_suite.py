"""The suite of a GPU machine, with fake commands: order, limits, going on after a kill, and its verdict."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
import types
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


def leaving(path: Path, name: str, code: str = "", **options) -> Step:
    """Writes its name to a file, then does `code`."""
    return step(name, f"open({str(path)!r}, 'a').write({name!r} + ' ')\n{code}", **options)


def seconds(number: float) -> float:
    return number / 60


def suite(tmp_path: Path, *parts: Part, **options) -> Suite:
    return Suite(parts, tmp_path / "output", lambda line: None, **options)


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
    # What the end of the call took from a step is not charged to its part, the second time it is.
    for charged in (False, True):
        run = suite(tmp_path, *parts)
        before = run.progress["a"].seconds
        run.run(minutes=seconds(2))
        assert statuses(run) == [INCOMPLETE, INCOMPLETE]
        assert not run.progress["a"].closed
        assert list(run.progress["a"].outcomes) == ["a1"]
        assert (suite(tmp_path, *parts).progress["a"].seconds - before >= 1) == charged
    waits.unlink()

    later = suite(tmp_path, *parts)
    later.run(minutes=1)
    assert trace.read_text().split() == ["a1", "a2", "a2", "a2"]
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


def test_a_part_that_is_named_again_repeats_what_failed(tmp_path):
    arguments = tmp_path / "arguments"
    code = f"import sys; open({str(arguments)!r}, 'a').write(repr(sys.argv[1:]) + ' ')"
    parts = (Part("a", "", 1, (step("a", code, retry=("--retry",)),)),)
    suite(tmp_path, *parts).run(["a"])
    suite(tmp_path, *parts).run()
    suite(tmp_path, *parts).run(["a"])
    assert arguments.read_text().split() == ["[]", "['--retry']"]


def test_a_part_out_of_time_runs_when_it_is_named(tmp_path):
    waits = tmp_path / "waits"
    waits.touch()
    sleep = f"import os, time\nwhile os.path.exists({str(waits)!r}): time.sleep(0.02)"
    parts = (Part("a", "", seconds(1), (step("sleeps", sleep),)),)
    run = suite(tmp_path, *parts)
    run.run()
    assert statuses(run) == [INCOMPLETE]
    waits.unlink()
    again = suite(tmp_path, *parts)
    again.run()
    assert statuses(again) == [INCOMPLETE]
    again.run(["a"])
    assert statuses(again) == [PASS]


def test_what_other_code_left_is_set_aside(tmp_path):
    trace, told = tmp_path / "trace", []
    parts = (Part("a", "", 1, (leaving(trace, "a"),)),)
    output = tmp_path / "output"

    def run(**options) -> Suite:
        of = Suite(parts, output, told.append, **options)
        of.run()
        return of

    run(code="one")
    (output / "results").mkdir()
    rows.add(conv_gate("1 picture", 2.0), output / "results")
    (output / gpu_suite.CACHE).mkdir()
    run(code="one")
    assert trace.read_text() == "a "
    assert rows.read_all(output / "results")

    run(code="two")
    assert trace.read_text() == "a a "
    assert not (output / "results").exists()
    assert rows.read_all(output / "earlier" / "1" / "results")
    assert (output / gpu_suite.CACHE).is_dir()
    assert f"what other code left is now in {output / 'earlier' / '1'}" in told
    run(code="two", fresh=True)
    assert trace.read_text() == "a a a "
    assert (output / "earlier" / "2" / "state.json").is_file()


def test_a_command_that_lost_the_gpu_is_started_again_a_few_times(tmp_path):
    trace = tmp_path / "trace"
    from benchmarks.__main__ import DEVICE_LOST

    assert gpu_suite.DEVICE_LOST == DEVICE_LOST
    lost = f"raise SystemExit({DEVICE_LOST})"
    once = f"import os\nif len(open({str(trace)!r}).read().split()) < 2: {lost}"
    run = suite(tmp_path, Part("a", "", 1, (leaving(trace, "once", once, goes_on=True),)))
    run.run()
    assert trace.read_text() == "once once "
    assert statuses(run) == [PASS]

    run = suite(tmp_path / "always", Part("a", "", 1, (leaving(trace, "always", lost, goes_on=True),)))
    (tmp_path / "always").mkdir()
    run.run()
    assert trace.read_text().count("always") == 1 + gpu_suite.RESTARTS
    assert statuses(run) != [PASS]


def test_the_fingerprint_is_that_of_what_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_suite, "ROOT", tmp_path)
    for name in ("mgllava", "mgllava_kernels/configs", "benchmarks/results", "tests/kernels"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "tests" / "conftest.py").touch()
    found = [gpu_suite.fingerprint()]
    shows = ("benchmarks/report.py", "benchmarks/results/ablation.json", "mgllava/notes.md")
    measures = ("benchmarks/timing.py", "mgllava_kernels/roi_align.py", "mgllava_kernels/configs/a.json")
    for name in (*shows, *measures):
        (tmp_path / name).write_text("new")
        found.append(gpu_suite.fingerprint())
    assert len(set(found[: 1 + len(shows)])) == 1
    assert len(set(found)) == 1 + len(measures)


def test_a_commit_is_that_of_git_or_what_one_says_it_is(tmp_path, monkeypatch):
    monkeypatch.delenv("GIT_COMMIT", raising=False)
    monkeypatch.setattr(gpu_suite, "ROOT", tmp_path)
    assert gpu_suite.commit() is None
    monkeypatch.setenv("GIT_COMMIT", "abc1234")
    assert gpu_suite.commit() == "abc1234"
    monkeypatch.setenv("PATH", "")
    assert gpu_suite.commit() == "abc1234"


def test_the_plan_is_printed_where_neither_pytest_nor_torch_is_installed():
    code = (
        "import runpy, sys\n"
        "for name in ('pytest', 'torch', 'triton', 'typer', 'rich'): sys.modules[name] = None\n"
        f"sys.argv = ['gpu_suite.py', '--dry-run']\n"
        f"runpy.run_path({str(ROOT / 'benchmarks' / 'gpu_suite.py')!r}, run_name='__main__')"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert result.returncode == 0, result.stderr
    assert "minutes at most" in result.stdout


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
    assert stored["parts"]["b"]["outcomes"] == {"b1": PASS, "b2": PASS}


def test_commands_do_not_see_settings_that_change_what_is_measured(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("MGLLAVA_KERNELS", "reference")
    monkeypatch.setenv("MGLLAVA_KERNELS_CONFIGS", "somewhere")
    code = "import os; assert not {'TRITON_INTERPRET', 'MGLLAVA_KERNELS'} & set(os.environ)"
    code += "; assert os.environ['MGLLAVA_KERNELS_CONFIGS'] == 'tuned'; import benchmarks"
    bare = "import os; assert 'MGLLAVA_KERNELS_CONFIGS' not in os.environ"
    steps = (step("sees", code, environment=(("MGLLAVA_KERNELS_CONFIGS", "tuned"),)), step("bare", bare))
    run = suite(tmp_path, Part("a", "", 1, steps))
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


def test_what_keeps_torch_from_the_gpu_is_told(monkeypatch, capsys):
    def probed(code: str) -> str:
        monkeypatch.setattr(gpu_suite, "FIND_GPU", code)
        assert gpu_suite.main([]) == gpu_suite.NO_GPU
        return capsys.readouterr().err

    told = probed("raise ImportError('libcudart.so.13: cannot open shared object file')")
    assert "status 1" in told
    assert "ImportError: libcudart.so.13: cannot open shared object file" in told
    told = probed("import sys; sys.stderr.write('the driver is too old'); print('null')")
    assert "torch finds no GPU here\nthe driver is too old" in told
    monkeypatch.setattr(gpu_suite, "FIND_SECONDS", 0.1)
    assert "did not say within 0.1 s" in probed("import time; time.sleep(60)")


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


# Seconds of a process before its first measurement: imports, a CUDA context, the device's ceilings.
START = 8


def jobs_of(one: Step) -> list:
    import torch

    from benchmarks import __main__ as command

    options = options_of(one.command)
    (case,) = options.get("--case", [None])
    wanted = options["--op"], case, options.get("--dtype"), options["--mode"], options["--provider"]
    jobs = command.plan(torch.device("cuda"), *wanted, False)
    assert jobs, one.shown
    return jobs


def measuring(tmp_path: Path) -> list[tuple[Part, list[Step]]]:
    found = [
        (part, [one for one in part.steps if one.command[1] == "benchmarks"])
        for part in gpu_suite.plan(tmp_path)
    ]
    return [(part, steps) for part, steps in found if steps]


def test_every_benchmark_of_the_plan_has_cases_and_covers_the_acceptance(tmp_path):
    from benchmarks.acceptance import LINES

    wanted = {
        (line.op, case, dtype, line.mode)
        for line in LINES
        for case in line.cases
        for dtype in line.dtypes
        # Before tuning, 14 x 14 bins stand for these.
        if "to 7x7" not in case
    }
    parts = {part.name: steps for part, steps in measuring(tmp_path)}
    assert list(parts) == ["verdict", "benchmarks", "rivals", "curves", "models"]
    tuned = parts["benchmarks"] + parts["rivals"]
    for steps, more in ((parts["verdict"], set()), (tuned, {"float32", "bfloat16"})):
        jobs = [job for one in steps for job in jobs_of(one)]
        measured = {(job.benchmark.name, job.case.name, job.dtype, job.mode) for job in jobs}
        small = {
            ("roi_align", f"{boxes} boxes to 7x7, ratio 2", dtype, mode)
            for boxes in ("512", "1,000")
            for dtype in more
            for mode in ("forward", "backward")
        }
        assert measured >= wanted | small, (wanted | small) - measured


def test_the_rival_that_the_acceptance_names_is_measured_with_the_others(tmp_path):
    """In one run with this package, or there would be no ratio."""
    steps = [
        one for part, steps in measuring(tmp_path) if part.name in ("benchmarks", "rivals") for one in steps
    ]
    compared = {
        (rival, job.benchmark.name, job.case.name)
        for rival in ("original compiled", "original max-autotune")
        for one in steps
        for job in jobs_of(one)
        if {rival, "original", "triton"} <= {provider.name for provider in job.providers}
        and job.mode == "forward"
    }
    products = {
        ("conv_gate", "1 picture"),
        ("conv_gate", "32 pictures"),
        *(("projectors", case) for case in ("1 picture", "8 pictures", "32 pictures")),
    }
    pooled = {("pooled_roi_align", case) for case in (gpu_suite.ALL_BOXES, "1 picture, 100 boxes")}
    assert compared == {
        *(("original max-autotune", *case) for case in products),
        *(("original compiled", *case) for case in products | pooled),
    }


def test_the_original_repository_is_asked_for_where_it_is_there(tmp_path, monkeypatch):
    def asked() -> set[tuple[str, str]]:
        return {
            (part.name, job.case.name)
            for part, steps in measuring(tmp_path)
            for one in steps
            for job in jobs_of(one)
            if any(provider.name == "original repository" for provider in job.providers)
        }

    monkeypatch.delenv("MGLLAVA_ORIGINAL_REPOSITORY", raising=False)
    assert asked() == set()
    monkeypatch.setenv("MGLLAVA_ORIGINAL_REPOSITORY", "/somewhere")
    parts = ("verdict", "benchmarks", "rivals")
    assert asked() == {(part, case) for part in parts for case in ("1 picture", "32 pictures")}


def test_what_the_commands_say_that_they_take_fits_the_limits(tmp_path):
    import torch

    from benchmarks.runner import estimated_seconds

    conditions = types.SimpleNamespace(device=torch.device("cuda"))
    for part, steps in measuring(tmp_path):
        total = 0.0
        for one in steps:
            budget = float(options_of(one.command)["--budget"][0])
            estimate = START + sum(estimated_seconds(job, conditions, budget, True) for job in jobs_of(one))
            assert estimate <= 60 * one.at_most, f"{one.name}: {estimate / 60:.2f} min"
            total += estimate
        assert total <= 60 * part.minutes, f"{part.name}: {total / 60:.2f} min"


def test_a_large_model_takes_longer_than_an_op(tmp_path):
    """As long as its weights say; the one whose rate people ask for comes right behind the towers."""
    import torch

    from benchmarks.runner import GPU_MODEL_BYTES, estimated_seconds

    conditions = types.SimpleNamespace(device=torch.device("cuda"))
    (steps,) = [steps for part, steps in measuring(tmp_path) if part.name == "models"]
    jobs = [job for one in steps for job in jobs_of(one)]
    seconds = {job.benchmark.name: estimated_seconds(job, conditions, 1.0, True) for job in jobs}
    assert list(seconds)[:2] == ["vision_flow", "generation"]
    assert seconds["generation"] > 13e9 / GPU_MODEL_BYTES > 2 * seconds["vision_flow"]


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
    errors = shards.run([str(some_tests)], folder, number=2, hangs_after=10)
    results = shards.read_results(folder)
    assert errors == []
    assert (len(results.passed), len(results.skipped), results.collected, results.missing) == (5, 1, 9, 0)
    reasons = {test.partition("::")[2]: reason for test, reason in results.failed.items()}
    assert reasons == {
        "test_fails": "AssertionError: one is not two",
        "test_crashes": "its process ended with status 7",
        "test_hangs": "hung: nothing for 10 s",
    }
    assert str(results) == "5 passed, 3 failed, 1 skipped"

    # What has a result is not run again.
    before = {path: path.stat().st_size for path in folder.glob("*.jsonl")}
    assert shards.run([str(some_tests)], folder, number=2, hangs_after=10) == []
    again = shards.read_results(folder)
    assert (again.passed, again.failed) == (results.passed, results.failed)
    started = [record["start"] for path in before for record in shards.read(path) if "start" in record]
    assert len(started) == len(set(started)) == 9


def test_a_failed_test_runs_again_when_asked_and_what_passed_does_not(tmp_path, some_tests):
    broken = tmp_path / "broken"
    broken.touch()
    (some_tests / "test_some.py").write_text(
        f"import os\ndef test_passes(): pass\ndef test_fails(): assert not os.path.exists({str(broken)!r})\n"
    )
    folder = tmp_path / "records"
    command = [sys.executable, "-m", "benchmarks.shards", "--folder", str(folder), "--shards", "1"]

    def run(*options: str) -> str:
        result = subprocess.run(
            [*command, *options, str(some_tests)], cwd=ROOT, capture_output=True, text=True
        )
        return result.stdout.splitlines()[-1]

    def starts() -> int:
        return sum("start" in one for one in shards.read(folder / "shard-0-of-1.jsonl"))

    assert run() == "1 passed, 1 failed"
    broken.unlink()
    assert run() == "1 passed, 1 failed"
    assert run("--retry") == "2 passed"
    assert starts() == 2
    assert run("--fresh") == "2 passed"
    assert starts() == 2


@pytest.mark.parametrize(("lost", "processes"), [(False, 1), (True, 2)])
def test_a_failure_ends_its_process_only_if_the_gpu_is_lost(tmp_path, some_tests, lost, processes):
    error = "raise RuntimeError('an illegal memory access was encountered')" if lost else "pass"
    (some_tests / "conftest.py").write_text(
        "import sys, types\n"
        f"def synchronize():\n    {error}\n"
        "cuda = types.SimpleNamespace(is_initialized=lambda: True, synchronize=synchronize)\n"
        "sys.modules['torch'] = types.SimpleNamespace(cuda=cuda)\n"
    )
    (some_tests / "test_some.py").write_text(
        "def test_fails(): assert 1 == 2, 'one is not two'\ndef test_passes(): pass\n"
    )
    assert shards.run([str(some_tests)], tmp_path / "records", number=1) == []
    results = shards.read_results(tmp_path / "records")
    assert (len(results.failed), len(results.passed)) == (1, 1)
    records = shards.read(tmp_path / "records" / "shard-0-of-1.jsonl")
    assert sum("share" in one for one in records) == processes


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
