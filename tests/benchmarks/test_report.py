"""The report's numbers: ratios within one run only, losses in words, reasons, predictions; the acceptance of a GPU."""

import dataclasses
import importlib.util
import itertools
import subprocess
import sys
from pathlib import Path

import pytest
from row_cases import GPU, a_line, conv_gate, gpu_row, row

from benchmarks import acceptance, comparison, report, rows, runner
from benchmarks.acceptance import MET, MISSED, NOT_MEASURED
from benchmarks.comparison import compare, places
from benchmarks.registry import BENCHMARKS, OPS
from benchmarks.rows import Row

ROOT = Path(report.__file__).parents[1]
LATER = "2026-01-02T10:00:00+00:00"
CALM = {"min": 9.0, "p20": 9.5, "median": 10.0, "p80": 10.5, "max": 11.0}


def calm(provider: str, median: float, make=row, **values) -> Row:
    """A row whose times spread little."""
    return make(provider, milliseconds={name: median / 10 * one for name, one in CALM.items()}, **values)


with_plots = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib: draws plots"
)


def cells(text: str, start: str) -> list[str]:
    """The cells of the first table line that starts so."""
    (line, *_) = [line for line in text.splitlines() if line.startswith(f"| {start}")]
    return [cell.strip() for cell in line.strip("|").split(" | ")]


def column(text: str, start: str, name: str) -> str:
    """A cell by the name of its column."""
    header = next(line for line in text.splitlines() if line.startswith("| case |"))
    names = [cell.strip() for cell in header.strip("|").split(" | ")]
    return cells(text, start)[names.index(name)]


def test_providers_of_this_package_are_those_of_the_runner():
    assert set(comparison.OURS) == set(runner.OURS)
    named = {one.name for benchmark in BENCHMARKS.values() for one in benchmark.providers}
    assert named >= {"original", "torchvision", *comparison.OURS}
    for benchmark in BENCHMARKS.values():
        if any(one.name not in comparison.OURS for one in benchmark.providers):
            assert benchmark.providers[0].name in comparison.BASELINES


def test_a_cpu_shows_ratios_and_no_times():
    text = report.markdown(
        [row("original", 345.678, extra_bytes=4_000_000_000), row("torch", 31.0, extra_bytes=44_200_000)]
    )
    assert column(text, "1 picture, 10 boxes", "× original") == "11.2"
    assert column(text, "1 picture, 10 boxes", "p20 to p80") == "8.03 to 15.5, *noisy*"
    assert column(text, "1 picture, 10 boxes", "extra MB") == "44.2"
    assert column(text, "1 picture, 10 boxes", "original's") == "4,000.0"
    assert "345" not in text
    assert "31.0" not in text
    assert "not to be compared between machines" in text


def test_conditions_stand_beside_the_table():
    text = report.markdown([row("original"), row(run=LATER, commit="def-dirty")])
    assert "a CPU, 2 threads; commit abc, def-dirty; 2026-01-01 10:00 to 2026-01-02 10:00 UTC." in text
    assert "torch 2.11." in text
    assert "Sizes: a test." in text


def test_the_device_s_own_rates_stand_beside_the_table():
    slow, fast = {"bandwidth": 11.94e9, "matmul_rate": 321e9}, {"bandwidth": 12.4e9, "matmul_rate": 321e9}
    text = report.markdown([row("original", **slow), row(**slow), row(case="another case", **fast)])
    assert "UTC; memory 11.9 to 12.4 GB/s; float32 matmul 321 GFLOP/s." in text
    text = report.markdown(
        [
            gpu_row(bandwidth=3.1e12, matmul_rate=8e14, tables="0123abcd", settings="MIG Disabled"),
            gpu_row("original"),
        ]
    )
    assert "UTC; tuned tables: 0123abcd; MIG Disabled; memory 3.1 TB/s; bfloat16 matmul 800 TFLOP/s." in text


def test_what_numbers_should_be_read_with_stands_below_the_table():
    noted = {"note": "on one thread; noisy: p80 / p20 is 1.4", "reference": "literal composition in float64"}
    text = report.markdown([row("original", **noted), row(), row(op="generation", case="a model")])
    assert text.count("`original`: on one thread.") == 1
    assert "Compared with: literal composition in float64." in text
    assert "its rate counts the first token" in text
    assert report.NO_BOXES not in text
    assert report.NO_BOXES in report.markdown([row(case="1 picture, 0 boxes")])


def test_rates_that_changed_are_told_once_and_in_full_beside_the_table():
    note = f"{rows.DRIFTED}: bandwidth 30.0, then 20.0 G/s"
    measured = [
        row(name, 1.0, mode=mode, note=note) for mode in ("forward", "both") for name in ("original", "torch")
    ]
    told = f"{note[0].upper()}{note[1:]}."
    assert report.markdown(measured).count(told) == 1
    summary = report.readme(measured)
    assert told not in summary
    assert summary.count(rows.DRIFTED) == 1
    assert f"- `neck`: {rows.DRIFTED}, by as much as the tables say" in summary


def test_a_loss_is_said_as_plainly_as_a_win():
    text = report.markdown(
        [calm("original", 8.0, extra_bytes=10**8), calm("torch", 10.0, extra_bytes=8 * 10**8)]
    )
    assert column(text, "1 picture, 10 boxes", "× original") == "**0.80, slower**"
    assert column(text, "1 picture, 10 boxes", "extra MB") == "**800.0, 8.0 times as much**"
    listed = text.partition("Where it is slower or takes more memory:")[2].splitlines()[2:4]
    assert listed == [
        "- `neck`, 1 picture, 10 boxes, float32, forward: **0.80 times as fast** as `original`",
        "- `neck`, 1 picture, 10 boxes, float32, forward: **8.0 times the memory** of `original`",
    ]
    won = report.markdown(
        [row("original", 10.0, extra_bytes=8 * 10**8), row("torch", 8.0, extra_bytes=8 * 10**8)]
    )
    assert "**" not in won.partition("\n## ")[2].partition("\n## ")[0]


def test_ratios_are_named_after_what_they_are_against():
    text = report.markdown([row("torchvision", 8.0, op="roi_align"), row("torch", 2.0, op="roi_align")])
    assert column(text, "1 picture, 10 boxes", "× torchvision") == "4.00"
    assert "× original |" not in text


def test_the_better_torchvision_is_what_plain_roi_align_is_compared_with():
    measured = [
        row("torchvision", 8.0, op="roi_align"),
        row("torchvision, all threads", 5.0, op="roi_align"),
        row("torch", 2.0, op="roi_align"),
    ]
    text = report.markdown(measured)
    assert column(text, "1 picture, 10 boxes", "× torchvision") == "2.50 (torchvision, all threads)"
    assert "2.50 (torchvision, all threads)" in cells(report.readme(measured), "`roi_align`")[3]
    slow_pool = [measured[0], dataclasses.replace(measured[1], milliseconds=CALM), measured[2]]
    assert column(report.markdown(slow_pool), "1 picture", "× torchvision") == "4.00 (torchvision)"
    # The original composition stays what the others are compared with; its threaded form is a rival by name.
    original = [row("original", 8.0), row("original, all threads", 5.0), row("torch", 2.0)]
    text = report.markdown(original)
    assert column(text, "1 picture, 10 boxes", "× original") == "4.00"
    assert column(text, "1 picture, 10 boxes", "× best rival") == "2.50 (original, all threads)"


def test_times_that_spread_are_marked_with_their_number():
    calm = [row("original", samples=7, milliseconds=CALM), row("torch", samples=7, milliseconds=CALM)]
    text = report.markdown(calm)
    assert "noisy" not in column(text, "1 picture, 10 boxes", "p20 to p80")
    assert column(text, "1 picture, 10 boxes", "n") == "7"
    disturbed = row("original", milliseconds=CALM | {"p80": 13.0})
    assert "*noisy*" in column(report.markdown([disturbed, calm[1]]), "1 picture, 10 boxes", "p20 to p80")


def test_a_ratio_is_of_one_run():
    """The original's newer time, measured on its own, gives no ratio with the older time of this package."""
    old = [row("original", 10.0), row("torch", 2.0)]
    alone = row("original", 100.0, run=LATER, commit="def")
    (one,) = compare([*old, alone])
    assert one.speed_up(one.baseline) == 5.0
    again = [row("original", 30.0, run=LATER, commit="ghi"), row("torch", 10.0, run=LATER, commit="ghi")]
    for order in itertools.permutations([*old, *again]):
        (one,) = compare(order)
        assert one.speed_up(one.baseline) == 3.0
    (one,) = compare([row("original", 10.0), row("torch", 2.0, run=LATER)])
    assert one.speed_up(one.best_rival) is None


def test_the_newest_row_of_a_case_is_kept_as_the_text_says(tmp_path):
    rows.add([row("original", 9.0), row(commit="abc")], tmp_path)
    rows.add([row(commit="def", run=LATER)], tmp_path)
    assert [one.commit for one in rows.read_all(tmp_path) if one.provider == "torch"] == ["def"]
    assert "holds the newest row of each case with its commit" in report.markdown(rows.read_all(tmp_path))


def test_places_are_kept_apart():
    here, there = row("original", 10.0), row("torch", 1.0, device="another CPU")
    newer = row("torch", 1.0, versions={"torch": "2.15"})
    found = places([here, there, newer, gpu_row()])
    assert [len(own) for own in found.values()] == [1, 1, 1, 1]
    assert next(iter(found)).kind == GPU
    text = report.markdown([here, there, newer])
    assert text.count("### neck") == 3
    assert "10.0" not in text


def test_a_gpu_shows_times_and_the_best_rival():
    measured = [
        gpu_row("original", 30.0),
        gpu_row("original compiled", 8.0),
        gpu_row("original max-autotune", 6.0),
        calm("torch", 1.0, gpu_row),
        calm("triton", 2.0, gpu_row, share=0.625),
    ]
    text = report.markdown(measured)
    start = "1 picture, 10 boxes"
    assert column(text, start, "ms") == "2.0000"
    assert column(text, start, "× original") == "15.0"
    assert column(text, start, "best rival, ms") == "6.0000 (original max-autotune)"
    assert column(text, start, "× best rival") == "3.00"
    assert column(text, start, "torch path, ms") == "1.0000"
    assert column(text, start, "× torch path") == "**0.50, slower**"
    assert "**0.50 times as fast** as this package's torch path" in text
    assert column(text, start, "of floor") == "62%"
    assert "not yet measured" not in text


def test_launches_and_graphs_have_rows_of_their_own():
    measured = [
        gpu_row(provider, median, launch=launch)
        for launch, medians in (("eager", (6.0, 3.0)), ("graph", (5.0, 1.0)))
        for provider, median in zip(("original", "triton"), medians, strict=True)
    ]
    text = report.markdown(measured)
    assert [line.split(" | ")[3:9:5] for line in text.splitlines() if line.startswith("| 1 picture")] == [
        ["eager", "2.00"],
        ["graph", "5.00"],
    ]


def test_wrong_and_refused_providers_are_listed_with_their_reason():
    measured = [
        row("original", None, reason="would take about 36 GB beside its inputs; 20 GB are free"),
        row("original compiled", None, reason="failed: RuntimeError: a | b"),
        row(
            "torch",
            None,
            wrong=True,
            error=0.1,
            reason="wrong: relative error 1.0e-01, at most 1e-05 is right",
        ),
        row("another rival", 3.0),
    ]
    text = report.markdown(measured)
    listed = text.partition("Not timed:")[2].splitlines()[2:5]
    assert listed == [
        "- **wrong**: `torch`: wrong: relative error 1.0e-01, at most 1e-05 is right "
        "(1 picture, 10 boxes, float32, forward)",
        "- `original`: would take about 36 GB beside its inputs; 20 GB are free "
        "(1 picture, 10 boxes, float32, forward)",
        "- `original compiled`: failed: RuntimeError: a \\| b (1 picture, 10 boxes, float32, forward)",
    ]
    assert column(text, "1 picture, 10 boxes", "× original") == "**wrong**"


def test_a_refused_original_sends_to_the_list():
    text = report.markdown([row("original", None, reason="too large"), row("torch", 2.0)])
    assert column(text, "1 picture, 10 boxes", "× original") == "not timed"


def test_rates_are_ratios_on_a_cpu_and_numbers_on_a_gpu():
    rate = "tokens_per_second"
    on_cpu = [row("original", 10.0, details={rate: 20.0}), row("torch", 8.0, details={rate: 25.0})]
    assert column(report.markdown(on_cpu), "1 picture, 10 boxes", rate) == "1.25 times the original's"
    assert column(report.markdown(on_cpu[1:]), "1 picture, 10 boxes", rate) == "-"
    for op in ("preprocessing", "conversion"):
        own_work = [dataclasses.replace(one, op=op) for one in on_cpu]
        assert column(report.markdown(own_work), "1 picture, 10 boxes", rate) == "25 on this machine"
    on_gpu = [gpu_row("original", 10.0, details={rate: 20.0}), gpu_row("triton", 8.0, details={rate: 25.0})]
    assert column(report.markdown(on_gpu), "1 picture, 10 boxes", rate) == "25"


def test_without_a_gpu_there_is_a_prediction_marked_as_one():
    text = report.markdown([row("original", 10.0), row("torch")], predicted="A100")
    section = text.partition("## GPUs: not yet measured")[2].partition("\n## ")[0]
    assert "**prediction**" in section
    assert "NVIDIA A100 80GB SXM" in section
    # Eight times 26.5 MB of maps and the vectors at 2.039 TB/s.
    line = next(line for line in section.splitlines() if line.startswith("| pooled_roi_align |"))
    assert line.split(" | ")[1] == "8 pictures, 100 boxes each"
    assert 100 < float(line.split(" | ")[4]) < 110
    assert text.index("### neck") < text.index("## GPUs: not yet measured")
    listed = {
        line.split(" | ")[0].removeprefix("| ") for line in section.splitlines() if line.count(" | ") == 5
    }
    assert listed >= set(OPS)


def test_no_rows_at_all_make_a_report():
    assert "not yet measured" in report.markdown([])


def test_the_same_rows_make_the_same_bytes_in_any_process(tmp_path):
    measured = [row("original", 10.0), row("torch", 2.0), gpu_row(), gpu_row("original", 4.0)]
    rows.add(measured, tmp_path)
    (tmp_path / "README.md").write_text("of an earlier report")
    command = [sys.executable, "-m", "benchmarks.report", "--results", str(tmp_path)]
    texts = set()
    for _ in range(2):
        subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
        texts.add((tmp_path / "README.md").read_bytes())
    assert len(texts) == 1
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_an_interrupted_report_leaves_the_old_one(tmp_path, monkeypatch):
    rows.add([row()], tmp_path)
    (tmp_path / "README.md").write_text("old")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)

    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(report.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        report.write(tmp_path)
    assert (tmp_path / "README.md").read_text() == "old"


def test_without_matplotlib_the_tables_are_written_and_no_plot_is_linked(tmp_path, monkeypatch):
    rows.add([row("original", 10.0), row()], tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert report.write(tmp_path) == [tmp_path / "README.md"]
    assert ".png" not in (tmp_path / "README.md").read_text()


def test_rows_of_another_folder_are_merged_by_key(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    rows.add([gpu_row("original", 9.0), gpu_row(median=3.0)], here)
    rows.add([gpu_row(median=2.0, run=LATER), gpu_row(median=1.0, case="another case")], there)
    command = [sys.executable, "-m", "benchmarks.report", "--results", str(here), "--merge"]
    subprocess.run([*command, str(there)], check=True, cwd=ROOT, capture_output=True)
    found = {(one.case, one.provider): one.milliseconds["median"] for one in rows.read_all(here)}
    assert found == {
        ("1 picture, 10 boxes", "original"): 9.0,
        ("1 picture, 10 boxes", "triton"): 2.0,
        ("another case", "triton"): 1.0,
    }
    failed = subprocess.run([*command, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert failed.returncode == 2
    assert "no rows there" in failed.stderr
    with rows.locked(here):
        failed = subprocess.run([*command, str(there)], cwd=ROOT, capture_output=True, text=True)
    assert failed.returncode == 2
    assert failed.stderr == f"{here}: another run is writing here; wait for it, or stop it\n"


def test_a_broken_line_of_the_rows_is_one_line_of_the_report(tmp_path):
    rows.add([row()], tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_text(path.read_text() + '{"op": "ne')
    command = [sys.executable, "-m", "benchmarks.report", "--results", str(tmp_path)]
    failed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert failed.returncode == 2
    assert failed.stderr.startswith(f"{path}:2 is no row of this format")
    assert len(failed.stderr.splitlines()) == 1


def test_an_ablation_is_shown_where_there_is_one(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    rows.add([row()], tmp_path)
    report.write(tmp_path)
    assert "ablation" not in (tmp_path / "README.md").read_text()
    for name in ("ablation.md", "ablation.png"):
        (tmp_path / name).touch()
    report.write(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "[Ablation](ablation.md)" in text
    assert "](ablation.png)" in text


def test_the_repository_s_readme_agrees_with_its_rows():
    """After new rows: python -m benchmarks.report."""
    text = report.README.read_text(encoding="utf-8")
    between = text.partition(report.BEGIN)[2].partition(report.END)[0]
    assert between.strip() == report.readme(rows.read_all()).strip()
    plots = [line for line in between.splitlines() if line.startswith("![")]
    assert all((ROOT / line.partition("](")[2].rstrip(")")).is_file() for line in plots)
    assert len(plots) >= 2


def test_the_results_agree_with_their_rows():
    """After new rows: python -m benchmarks.report."""
    text = (rows.RESULTS / "README.md").read_text(encoding="utf-8")
    plots = [line for line in text.splitlines() if line.startswith("![")]
    assert len(plots) >= 2
    for line in plots:
        name = line.partition("](")[2].rstrip(")")
        assert (rows.RESULTS / name).is_file()
        if not name.startswith("ablation"):
            text = text.replace(f"{line}\n\n", "")
    ablation = [name for name in ("ablation.md", "ablation.png") if (rows.RESULTS / name).is_file()]
    assert text == report.markdown(rows.read_all(), ablation=ablation)


def test_a_loss_is_in_bold_only_if_it_is_sure():
    def shown(ours: Row, original: Row) -> tuple[str, str]:
        text = report.markdown([original, ours])
        listed = text.partition("Where it is slower")[2].splitlines()[2]
        return column(text, "1 picture", "× original"), listed.partition("forward: ")[2]

    slow, original = calm("torch", 10.0), calm("original", 8.0)
    unsure = ("0.80, slower", "0.80 times as fast as `original` (noisy, or of few times)")
    assert shown(slow, original) == ("**0.80, slower**", "**0.80 times as fast** as `original`")
    assert shown(slow, dataclasses.replace(original, samples=report.FEW - 1)) == unsure
    noisy = dataclasses.replace(slow, milliseconds=slow.milliseconds | {"p80": 13.0})
    assert shown(noisy, original) == unsure


def test_the_readme_says_how_far_to_trust_a_ratio():
    original = row("original", 20.0, samples=2, milliseconds=CALM | {"median": 20.0})
    ours = row(samples=3, milliseconds=CALM)
    rival = row("another rival", 5.0, milliseconds=CALM | {"median": 5.0})

    def speed(*measured: Row) -> str:
        return cells(report.readme(measured), "`neck`")[3]

    assert speed(dataclasses.replace(original, samples=3), ours) == "2.00"
    assert speed(original, ours) == "2.00 (n = 3, original's 2)"
    assert (
        speed(dataclasses.replace(original, samples=3), ours, rival)
        == "2.00 (best rival `another rival`: 0.50, slower)"
    )
    noisy = dataclasses.replace(ours, milliseconds=CALM | {"p80": 13.0})
    assert speed(dataclasses.replace(original, samples=3), noisy) == "2.00, *noisy*"
    assert column(report.markdown([original, ours]), "1 picture", "n") == "3, original's 2"


def test_the_readme_names_who_was_never_timed_and_what_times_leave_out():
    on_gpus = {"median": None, "reason": "compiled rivals run on a GPU"}
    measured = [
        row("original", 9.0),
        row(),
        row("original compiled", **on_gpus),
        row("original max-autotune", **on_gpus),
        # It was timed elsewhere: its reason is one of a case.
        row("original", None, case="1 picture, 1,000 boxes", reason="too large"),
        row("original", 9.0, op="generation", case="shallow model, 1 picture", origin="2 layers"),
        row(op="generation", case="shallow model, 1 picture", origin="2 layers"),
    ]
    text = report.readme(measured)
    never = "- In no row timed here: `original compiled`, `original max-autotune` (compiled rivals run on a GPU).\n"
    assert never in text
    assert "Shallow model: 2 layers. The published model has 24 ViT layers, 27 blocks" in text
    assert "- `neck`: Backward computes the gradients of the neck's weights" in text
    assert report.PUBLISHED_NOTE in report.markdown(measured)
    deep = report.readme(measured[:2])
    assert "In no row timed" not in deep
    assert "hallow" not in deep


def test_times_without_a_rival_show_their_own_spread():
    text = report.markdown([row("mgllava", milliseconds=CALM | {"p80": 13.0})])
    assert column(text, "1 picture", "p20 to p80") == "0.95 to 1.30 of its median, *noisy*"


def test_the_readme_shows_ratios_conditions_and_losses(tmp_path):
    measured = [
        row("original", 30.0, extra_bytes=10**9, note="on one thread", milliseconds=CALM | {"median": 30.0}),
        row("torch", 2.0, extra_bytes=10**8, commit="def", milliseconds=CALM | {"median": 2.0}),
        row("original", 40.0, mode="both"),
        row("torch", 10.0, mode="both"),
        row("torchvision", 1.0, op="roi_align", case="large", run="2026-01-01T10:04:00+00:00"),
        row("torch", 2.0, op="roi_align", case="large", run="2026-01-01T10:04:00+00:00"),
        # After a night.
        row("torch", 2.0, op="conv_gate", case="1 picture", run=LATER),
    ]
    text = report.readme(measured, tmp_path)
    assert cells(text, "`neck`") == [
        "`neck`",
        "1 picture, 10 boxes",
        "float32",
        "15.0",
        "4.00, *noisy*",
        "10.0",
    ]
    assert cells(text, "`roi_align`") == [
        "`roi_align`",
        "large",
        "float32",
        "0.50, slower, *noisy*",
        "-",
        "-",
    ]
    lost = "in 1 of 3 comparisons: `roi_align` 0.50 times as fast as `torchvision` (noisy, or of few times) (large, "
    assert lost in text
    assert "a CPU, 2 threads; commit abc, def; 2026-01-01 10:00" in text
    assert "torch 2.11" in text
    assert "about 4 minutes" in text
    assert "`original`: on one thread." in text
    assert "No run on a GPU is recorded yet" in text
    assert ".png" not in text
    (tmp_path / "speed_up.cpu.png").touch()
    assert "](benchmarks/results/speed_up.cpu.png)" in report.readme(measured, tmp_path)
    both = report.readme([*measured, gpu_row("original", 4.0), gpu_row()], tmp_path)
    assert both.index("| bfloat16 | 4.00, *noisy* |") < both.index("a CPU, 2 threads")
    assert "No run on a GPU" not in both


def test_the_readme_names_the_worst_loss_of_each_kind():
    measured = [gpu_row("original", 2.0, extra_bytes=10), gpu_row(median=1.0, extra_bytes=20)]
    for launch in ("eager", "graph"):
        for case, best in (("a", 0.9), ("b", 0.5), ("c", 2.0)):
            times = {"original": 4.0, "original max-autotune": best, "torch": 3.0, "triton": 1.0}
            for one in (calm(name, median, gpu_row) for name, median in times.items()):
                measured.append(dataclasses.replace(one, op="conv_gate", case=case, launch=launch))
    text = report.readme(measured)
    assert (
        "in 3 of 4 comparisons: `neck` **2.0 times the memory** of `original` "
        "(1 picture, 10 boxes, bfloat16, forward); `conv_gate` **0.50 times as fast** as "
        "`original max-autotune` (b, bfloat16, forward; the worst of 2)."
    ) in text


def test_a_readme_without_marks_is_left_alone(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.update_readme([row("original", 9.0), row()], path)
    text = path.read_text()
    assert text.startswith(f"before\n{report.BEGIN}\n")
    assert text.endswith(f"\n{report.END}\nafter\n")
    assert "old" not in text
    path.write_text("no marks")
    with pytest.raises(ValueError, match="has no lines"):
        report.update_readme([row()], path)
    assert path.read_text() == "no marks"


def grown() -> list[Row]:
    """Curves of the neck on a CPU and a GPU; the original is refused at 1,000 boxes."""
    found = []
    for make, ours in ((row, "torch"), (gpu_row, "triton")):
        for boxes in (0, 1, 10, 100, 1000):
            shape = {"images": 1, "boxes": boxes, "canvas": 768}
            case = {"case": f"1 picture, {boxes} boxes", "shape": shape}
            refused = {"median": None, "reason": "too large"} if boxes == 1000 else {"median": 5.0 + boxes}
            found.append(make("original", extra_bytes=10**9 + 10**7 * boxes, **case, **refused))
            found.append(make(ours, 1.0 + boxes / 500, extra_bytes=10**7, share=0.5, **case))
        # Another axis, and the same number of boxes with other sizes: no points of this curve.
        shape = {"images": 8, "boxes": 100, "canvas": 768}
        found.append(make(ours, 99.0, case="8 pictures, 100 boxes each", shape=shape))
    return found


@with_plots
def test_curves_have_one_point_for_each_value_of_their_axis():
    from benchmarks import plots

    found = compare([one for one in grown() if one.kind == "cpu"])
    (curve,) = plots.curves(found, "boxes")
    xs, ys = curve.values(lambda one: comparison.median(one.ours))
    assert xs == [0, 1, 10, 100, 1000]
    assert ys == [1.0, 1.002, 1.02, 1.2, 3.0]
    assert curve.values(lambda one: one.baseline and 1.0)[0] == [0, 1, 10, 100]
    assert plots.curves(found, "canvas") == []


@with_plots
def test_plots_are_written_linked_and_the_same_every_time(tmp_path):
    rows.add(grown(), tmp_path)
    written = report.write(tmp_path)
    plots = sorted(path for path in written if path.suffix == ".png")
    kinds = ("cpu", "NVIDIA_H100_80GB_HBM3")
    names = ("speed_up", "share_of_floor", "memory_against_boxes", "cost_against_boxes")
    assert set(report.README_PLOTS) <= set(names)
    assert {path.name for path in plots} == {f"{name}.{kind}.png" for name in names for kind in kinds}
    text = (tmp_path / "README.md").read_text()
    for path in plots:
        assert f"]({path.name})" in text
        assert path.read_bytes().startswith(b"\x89PNG")
    before = {path: path.read_bytes() for path in plots}
    report.write(tmp_path)
    assert {path: path.read_bytes() for path in plots} == before


@with_plots
@pytest.mark.parametrize(("axis", "values"), [("images", (1, 4, 16)), ("canvas", (384, 768, 1536))])
def test_time_and_memory_are_drawn_against_pictures_and_canvas_too(axis, values):
    from benchmarks import plots

    measured = []
    for value in values:
        shape = {"images": 1, "boxes": 10, "canvas": 768} | {axis: value}
        case = {"case": f"{axis} {value}", "shape": shape, "extra_bytes": 10**6 * value}
        measured += [row("original", 9.0 * value, **case), row(median=1.0 * value, **case)]
    (place,) = places(measured)
    for draw in (plots.cost, plots.memory):
        figure = draw(compare(measured), place, axis)
        assert [tuple(line.get_xdata()) for line in figure.axes[0].get_lines()] == [values, values]


@with_plots
def test_the_torch_path_of_a_gpu_is_a_line_and_a_mark_of_its_own():
    from benchmarks import plots

    measured = []
    for boxes in (1, 10, 100):
        case = {
            "case": f"1 picture, {boxes} boxes",
            "shape": {"images": 1, "boxes": boxes, "canvas": 768},
            "extra_bytes": 10**6,
        }
        times = (("original", 9.0 * boxes), ("torch", 3.0 * boxes), ("triton", 1.0 * boxes))
        measured += [gpu_row(name, median, **case) for name, median in times]
    (place,) = places(measured)
    found = compare(measured)
    for draw in (plots.cost, plots.memory):
        names = {text.get_text() for text in draw(found, place, "boxes").axes[0].texts}
        assert names == {"original", "torch path", "this package"}
    legend = plots.speed_ups(found, place).axes[0].get_legend()
    assert "against this package's torch path" in {text.get_text() for text in legend.get_texts()}


def test_each_op_is_shown_at_its_worst_too():
    measured = []
    for case, original in (
        ("1 picture, 0 boxes", 0.1),
        ("1 picture, 10 boxes", 0.5),
        ("1 picture, 100 boxes", 9.0),
    ):
        measured += [row("original", original, case=case), row(case=case)]
    shown = [(one.first.case, worst) for one, worst in report.representatives(compare(measured))]
    assert shown == [("1 picture, 100 boxes", False), ("1 picture, 10 boxes", True)]
    assert "| 1 picture, 10 boxes (worst: forward) |" in report.readme(measured)


@with_plots
def test_losses_are_bold_and_left_of_the_axis_as_in_the_tables():
    from benchmarks import plots

    measured = []
    times = {"neck": 2.0, "pooled_roi_align": 0.997, "conv_gate": 0.99, "projectors": 0.5}
    for op, original in times.items():
        measured += [row("original", original, op=op), row(op=op)]
    measured += [row("original", 2.0, op="preprocessing"), row(op="preprocessing")]
    measured.append(row("another rival", 0.62, op="preprocessing"))
    (place,) = places(measured)
    labels = plots.speed_ups(compare(measured), place).axes[0].texts
    found = [(text.get_text(), text.get_fontweight(), text.get_ha()) for text in labels]
    win, loss = ("normal", "left"), ("bold", "right")
    assert found == [
        *(("2.00×", *win), ("1.00×", *win), ("0.99×", *loss), ("0.50×", *loss)),
        *(("2.00×", *win), ("0.62×", *loss)),
    ]


@with_plots
def test_speed_ups_show_how_far_to_trust_them():
    from benchmarks import plots

    noted = {"note": "on one thread; noisy: p80 / p20 is 1.4"}
    measured = [calm("original", 4.0, op="neck", **noted), calm("torch", 2.0, op="neck")]
    measured += [row("original", 4.0, op="conv_gate"), calm("torch", 2.0, op="conv_gate")]
    (place,) = places(measured)
    figure = plots.speed_ups(compare(measured), place)
    lines = figure.axes[0].get_lines()
    dots = [line for line in lines if list(line.get_xdata()) == [2.0]]
    assert [dot.get_markerfacecolor() == "white" for dot in dots] == [False, True]
    whiskers = [tuple(line.get_xdata()) for line in lines if line.get_marker() == "|"]
    assert whiskers == [
        pytest.approx((2 * 9.5 / 10.5, 2 * 10.5 / 9.5)),
        pytest.approx((2 * 9.0 / 10.5, 2 * 12.5 / 9.5)),
    ]
    below = figure.get_supxlabel().splitlines()
    assert below[0].startswith("Whiskers: p20 to p80. Hollow:")
    assert below[1:] == ["'original': on one thread."]


@with_plots
def test_a_line_that_ends_early_is_named_there_and_the_reason_stands_below():
    from benchmarks import plots

    measured = [one for one in grown() if one.kind == "cpu"]
    (place,) = places(measured)
    for draw in (plots.cost, plots.memory):
        figure = draw(compare(measured), place, "boxes")
        names = {text.get_text(): text for text in figure.axes[0].texts}
        assert set(names) == {"original", "this package"}
        assert names["original"].xy[0] == 100
        assert figure.get_supxlabel() == "neck: no original at 1,000: too large"


@with_plots
@pytest.mark.parametrize(
    ("axis", "values", "words"),
    [
        ("boxes", (0, 1, 10, 100, 300), "1 picture, 304 cells wide"),
        ("width", (76, 152, 304), "1 picture, 100 boxes"),
    ],
)
def test_plain_roi_align_has_curves_too(axis, values, words):
    from benchmarks import plots

    measured = []
    for case in BENCHMARKS["roi_align"].cases:
        fixed = {"op": "roi_align", "case": case.name, "shape": case.sizes}
        measured += [row("torchvision", 9.0, **fixed), row(**fixed)]
        assert case.modes == ("forward",) or case.sizes["images"] == 2
    (place,) = places(measured)
    figure = plots.cost(compare(measured), place, axis)
    (axes, *others) = [one for one in figure.axes if one.get_visible()]
    assert others == []
    assert [tuple(line.get_xdata()) for line in axes.get_lines()] == [values, values]
    assert words in axes.get_xlabel()


@with_plots
def test_axes_count_in_words():
    from benchmarks import plots

    def words(axis: str, **shape: int) -> str:
        one = compare([row(shape=shape)])[0]
        return plots._others(plots.Curve("neck", {1: one}), axis).strip()

    assert words("canvas", images=1, boxes=1, canvas=768) == "(1 picture, 1 box)"
    assert words("canvas", images=1, boxes=10, canvas=768) == "(1 picture, 10 boxes)"
    assert words("images", images=4, boxes=10, canvas=768) == "(10 boxes each, 768 px)"
    assert words("canvas", images=2, boxes=1, canvas=768) == "(2 pictures, 1 box each)"


@with_plots
def test_a_cpu_s_cost_is_in_units_of_this_package_s_own_time():
    from benchmarks import plots

    measured = [one for one in grown() if one.kind == "cpu"]
    (place,) = places(measured)
    figure = plots.cost(compare(measured), place, "boxes")
    lines = {tuple(line.get_xdata()): list(line.get_ydata()) for line in figure.axes[0].get_lines()}
    unit = 1.002  # one box: with none there may be nothing to do
    assert lines[0, 1, 10, 100, 1000] == pytest.approx([y / unit for y in (1.0, 1.002, 1.02, 1.2, 3.0)])
    assert lines[0, 1, 10, 100] == pytest.approx([y / unit for y in (5.0, 6.0, 15.0, 105.0)])


def measured_lines(slack: float) -> list[Row]:
    """Rows of a GPU that meet every bound of the acceptance with `slack` above 1, and miss it below."""
    found = []
    for line, number in zip(acceptance.LINES, itertools.count()):
        bound = line.bound * slack if line.least else line.bound / slack
        for case, dtype in itertools.product(line.cases, line.dtypes):
            fixed = {"op": line.op, "case": case, "dtype": dtype, "mode": line.mode}
            fixed |= {"run": f"2026-01-01T10:{number:02d}:00+00:00"}
            own = {"median": 1.0, "extra_bytes": 1000}
            rivals = {"original": 1e9, "original max-autotune": 1e9, "torchvision": 1e9, "cuBLAS bias": 1e9}
            if "share" in line.text and "memory" not in line.text:
                own["share"] = bound
            elif "memory" in line.text:
                own["extra_bytes"] = int(1000 * bound)
            elif line.bound == 40:
                own["median"] = bound / 1e3
            else:
                name = "cuBLAS bias" if "best torch call" in line.text else None
                name = name or next(
                    one for one in ("max-autotune", "torchvision", "original") if one in line.text
                )
                rivals["original max-autotune" if name == "max-autotune" else name] = bound
            for launch in ("eager", "graph"):
                found.append(gpu_row("triton", launch=launch, **(fixed | own)))
                for name, median in rivals.items():
                    found.append(gpu_row(name, median, launch=launch, extra_bytes=1000, **fixed))
    return found


@pytest.mark.parametrize(
    "number", range(len(acceptance.LINES)), ids=lambda number: acceptance.LINES[number].text
)
@pytest.mark.parametrize(("slack", "state"), [(1.01, MET), (0.99, MISSED)])
def test_each_line_of_the_acceptance_is_judged_on_both_sides(number, slack, state):
    line = acceptance.LINES[number]
    runs = f"2026-01-01T10:{number:02d}:00+00:00"
    own = [one for one in measured_lines(slack) if one.run == runs]
    verdict = line.judge(compare(own))
    assert verdict.state == state, verdict
    assert str(verdict).startswith(state.upper())
    unit = line.unit(line.bound)
    assert unit in verdict.wanted
    assert line.unit(line.bound * slack if line.least else line.bound / slack) in verdict.found


def test_the_worst_case_decides():
    verdict = a_line().judge(compare([*conv_gate("1 picture", 3.0), *conv_gate("32 pictures", 0.9)]))
    assert verdict.state == MISSED
    assert verdict.found == "0.9 times at 32 pictures, the least of 2 in a CUDA graph"


def test_a_case_without_a_rival_leaves_the_line_open_unless_it_is_missed_already():
    for original, state in ((3.0, NOT_MEASURED), (0.9, MISSED)):
        verdict = a_line().judge(
            compare([*conv_gate("1 picture", original), *conv_gate("32 pictures", None)])
        )
        assert verdict.state == state
        assert verdict.found.endswith("not measured: 32 pictures")


def test_nothing_measured_is_not_met():
    assert {verdict.state for verdict in acceptance.judge([])} == {NOT_MEASURED}
    assert {verdict.state for verdict in acceptance.judge([row("original", 9.0), row()])} == {NOT_MEASURED}


def test_a_kernel_that_is_wrong_misses_the_line():
    wrong = conv_gate("1 picture", 3.0, None, wrong=True, reason="wrong: relative error 1e-1")
    verdict = a_line().judge(compare([*wrong, *conv_gate("32 pictures", 3.0)]))
    assert verdict.state == MISSED
    assert "wrong: relative error" in verdict.found


def test_launched_times_are_judged_where_a_graph_cannot_be_captured():
    launched = [*conv_gate("1 picture", 3.0, launch="eager"), *conv_gate("32 pictures", 2.0, launch="eager")]
    verdict = a_line().judge(compare(launched))
    assert (verdict.state, verdict.found) == (
        MET,
        "2 times at 32 pictures, the least of 2 launched by the host",
    )


def test_projectors_without_cublas_or_a_compiled_rival_have_no_verdict():
    line = next(line for line in acceptance.LINES if "best torch call" in line.text)

    def state(*rivals: str) -> str:
        own = [
            gpu_row(name, 1.0 if name == "triton" else 3.0, op="projectors", case=case, launch="graph")
            for case in line.cases
            for name in ("original", "triton", *rivals)
        ]
        return line.judge(compare(own)).state

    assert state() == state("cuBLAS bias") == state("original compiled") == NOT_MEASURED
    assert state("cuBLAS bias", "original compiled") == MET
    assert state("cuBLAS bias", "original max-autotune") == MET
