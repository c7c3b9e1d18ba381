"""The rows of benchmarks/results: their format, and files that are never half written."""

import dataclasses
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from row_cases import a_line, conv_gate

from benchmarks import acceptance, comparison, rows
from benchmarks.rows import Row

ROW = Row(
    op="neck",
    kind="cpu",
    device="a CPU, 2 threads",
    case="1 picture",
    shape={"images": 1},
    dtype="float32",
    mode="forward",
    provider="torch",
    launch="eager",
    versions={"torch": "2"},
    commit="abc",
    run="2026-01-01T00:00:00+00:00",
    origin="a test",
    milliseconds={"median": 1.5},
    samples=3,
)


def changed(**values) -> Row:
    return dataclasses.replace(ROW, **values)


def test_rows_come_back_as_they_were_written(tmp_path):
    path = tmp_path / "rows.jsonl"
    written = [ROW, changed(provider="original", milliseconds=None, reason="µ: no memory")]
    rows.write(path, written)
    assert rows.read(path) == written
    assert len(path.read_text(encoding="utf-8").splitlines()) == 2


def test_a_missing_file_has_no_rows(tmp_path):
    assert rows.read(tmp_path / "none.jsonl") == []


def test_rows_go_to_one_file_per_op_and_kind_of_device(tmp_path):
    rows.add([ROW, changed(op="roi_align"), changed(kind="NVIDIA H100 80GB HBM3")], tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["neck.NVIDIA_H100_80GB_HBM3.jsonl", "neck.cpu.jsonl", "roi_align.cpu.jsonl"]
    assert len(rows.read_all(tmp_path)) == 3


def test_a_rerun_replaces_the_row_of_the_same_key_and_no_other(tmp_path):
    others = [
        changed(mode="backward"),
        changed(provider="original"),
        changed(dtype="float16"),
        changed(launch="graph"),
        changed(versions={"torch": "3"}),
        changed(device="another CPU"),
        changed(shape={"images": 2}),
    ]
    rows.add([ROW, *others], tmp_path)
    again = changed(commit="def", milliseconds={"median": 2.5})
    rows.add([again], tmp_path)
    assert rows.read_all(tmp_path) == [*others, again]


def test_an_interrupted_write_leaves_the_old_rows(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    rows.write(path, [ROW])

    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(rows.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        rows.write(path, [])
    assert rows.read(path) == [ROW]


@pytest.mark.parametrize("line", ["{", '{"op": "neck"}', '{"unknown": 1}'])
def test_a_line_of_another_format_is_named(tmp_path, line):
    path = tmp_path / "rows.jsonl"
    rows.write(path, [ROW])
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ValueError, match=r"rows.jsonl:2 is no row"):
        rows.read(path)


def test_one_run_at_a_time_writes_into_a_folder(tmp_path):
    with rows.locked(tmp_path / "new"):
        with pytest.raises(RuntimeError, match="another run is writing here"), rows.locked(tmp_path / "new"):
            pass
        with rows.locked(tmp_path / "other"):
            pass
    with rows.locked(tmp_path / "new"):
        pass
    assert not list((tmp_path / "new").iterdir())


def test_a_run_that_was_killed_leaves_no_lock(tmp_path):
    program = (
        "import os, signal, sys; from pathlib import Path; from benchmarks import rows\n"
        "with rows.locked(Path(sys.argv[1])): os.kill(os.getpid(), signal.SIGKILL)"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    root = Path(rows.__file__).parents[1]
    assert subprocess.run(command, cwd=root).returncode == -signal.SIGKILL
    with rows.locked(tmp_path):
        pass


def test_another_path_does_not_stand_in_for_a_kernel_without_a_row():
    """As of a run that was cut off before its last provider."""
    line = a_line(cases=("1 picture",))
    found = conv_gate("1 picture", 3.0)
    assert line.judge(comparison.compare(found)).state == acceptance.MET
    torch_alone = [dataclasses.replace(row, provider="torch") for row in found if row.provider == "triton"]
    cut_off = comparison.compare([found[0], *torch_alone])
    assert cut_off[0].ours is None
    assert line.judge(cut_off).state == acceptance.NOT_MEASURED
