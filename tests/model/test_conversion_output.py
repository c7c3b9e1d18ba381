"""Where the converter writes: no finished work is lost, and killed conversions leave nothing for good."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from conversion_cases import GOLDEN, Sources, failure
from safetensors.torch import load_file

from mgllava.conversion import ConversionError, write

# Converts the golden model, and dies of the signal before the second shard is written.
KILLED = """
import os
import sys

from mgllava.conversion import convert_checkpoint, write

save, saved = write.save_file, []


def save_or_die(tensors, path, metadata):
    if saved:
        os.kill(os.getpid(), int(sys.argv[1]))
    saved.append(path)
    save(tensors, path, metadata=metadata)


write.save_file = save_or_die
convert_checkpoint(*sys.argv[2:], progress=False, max_shard_bytes=300_000)
"""


def is_complete(folder):
    names = {path.name for path in folder.iterdir()}
    assert not [name for name in names if name.startswith(".")]
    return {"config.json", "tokenizer.json", "README.md"} <= names and load_file(folder / "model.safetensors")


def killed(output, number):
    """Starts a conversion to `output` and kills it; returns the process's exit status."""
    sources = ("mg_llava.pth", "llm", "clip", "convnext")
    arguments = [str(number), *(str(GOLDEN / name) for name in sources), str(output)]
    return subprocess.run([sys.executable, "-c", KILLED, *arguments], check=False).returncode


# --- the place ------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [".", "link", "new/..", "../here", "~"])
def test_existing_empty_folder_by_any_name(tmp_path, monkeypatch, path):
    here = tmp_path / "here"
    here.mkdir()
    before = here.stat().st_ino
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(here))
    if path == "link":
        (tmp_path / "link").symlink_to(here)
        path = tmp_path / "link"
    result = Sources().convert(Path(path))
    assert result.output == here.resolve()
    assert is_complete(here)
    assert "# here" in (here / "README.md").read_text()
    assert here.stat().st_ino == before
    assert {entry.name for entry in tmp_path.iterdir()} <= {"here", "link"}


def test_mount_point(tmp_path, monkeypatch):
    """It can be neither removed nor replaced, and nothing outside is on its disk."""
    output = tmp_path / "mounted"
    output.mkdir()
    rename, rmdir, usage = Path.rename, Path.rmdir, write.shutil.disk_usage
    measured = []

    def checked_rename(path, target):
        assert Path(target) != output
        assert path.is_relative_to(output)
        return rename(path, target)

    def checked_rmdir(path):
        assert path != output
        rmdir(path)

    monkeypatch.setattr(Path, "rename", checked_rename)
    monkeypatch.setattr(Path, "rmdir", checked_rmdir)
    monkeypatch.setattr(write.shutil, "disk_usage", lambda path: measured.append(path) or usage(path))
    Sources().convert(output)
    assert is_complete(output)
    assert measured == [output]


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, OSError])
def test_interrupted_run_leaves_the_folder_empty(tmp_path, monkeypatch, interruption):
    def stop(tensors, path, metadata):
        assert not list(tmp_path.glob("*.json"))
        raise interruption

    monkeypatch.setattr(write, "save_file", stop)
    with pytest.raises(interruption):
        Sources().convert(tmp_path)
    assert not list(tmp_path.iterdir())


def test_config_comes_last(tmp_path, monkeypatch):
    rename, renamed = Path.rename, []
    monkeypatch.setattr(Path, "rename", lambda path, to: renamed.append(path.name) or rename(path, to))
    Sources().convert(tmp_path)
    assert renamed[-1] == "config.json"
    assert "model.safetensors" in renamed


def test_places_that_cannot_be(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "absent")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    nothing = Sources(llm=tmp_path / "none")  # refused before the sources are looked at
    assert "a link to" in failure(nothing, Path("dangling"))
    assert "--output circle" in failure(nothing, Path("circle"))
    assert "--output circle" in failure(nothing, Path("circle/out")) or sys.version_info >= (3, 13)
    assert "is a file, not a folder" in failure(nothing, Path("file/out"))
    assert "a file already" in failure(nothing, Path("file"))
    assert "not empty" in failure(nothing, Path("new/.."))
    assert "too long" in failure(nothing, Path("x" * 300))
    assert "--output ~nobody-here" in failure(nothing, Path("~nobody-here/out"))


def test_no_permission(tmp_path, monkeypatch):
    # Asked through os.access, because the file modes themselves do not bind a superuser.
    granted = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path and granted(path, mode))
    assert "no permission" in failure(Sources(llm="none"), tmp_path / "out")


@pytest.mark.parametrize("exists", [False, True])
def test_finished_work_is_kept(tmp_path, monkeypatch, exists):
    """Somebody fills the folder while its weights are written."""
    output = tmp_path / "out"
    if exists:
        output.mkdir()
    save = write.save_file

    def save_and_fill(tensors, path, metadata):
        save(tensors, path, metadata=metadata)
        output.mkdir(exist_ok=True)
        (output / "config.json").write_text("mine")

    monkeypatch.setattr(write, "save_file", save_and_fill)
    message = failure(Sources(), output)
    assert "complete" in message
    kept = Path(message.rsplit(" as ", 1)[1])
    assert is_complete(kept)
    assert (output / "config.json").read_text() == "mine"
    # No later conversion takes it for abandoned.
    monkeypatch.undo()
    (output / "config.json").unlink()
    if not exists:
        assert any(str(kept) in note for note in Sources().convert(output).notes)
    assert is_complete(kept)


# --- conversions that were killed -----------------------------------------------------------------


@pytest.mark.skipif(write.fcntl is None, reason="needs file locks")
@pytest.mark.parametrize("exists", [False, True])
def test_next_conversion_removes_what_a_killed_one_left(tmp_path, exists):
    output = tmp_path / "out"
    if exists:
        output.mkdir()
    assert killed(output, signal.SIGKILL) == -signal.SIGKILL
    (left,) = (output if exists else tmp_path).glob(".out.incomplete-*")
    assert list(left.glob("*.safetensors"))
    Sources().convert(output, dry_run=True)
    assert left.is_dir()
    notes = Sources().convert(output).notes
    assert any(str(left) in note and "removed" in note for note in notes)
    assert is_complete(output)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_terminated_conversion_leaves_nothing(tmp_path):
    assert killed(tmp_path / "out", signal.SIGTERM) == 128 + signal.SIGTERM
    assert not list(tmp_path.iterdir())


def test_handler_of_termination(tmp_path, monkeypatch):
    """Set for the time of writing alone, and neither over a program's own nor outside the main thread."""
    seen = []
    save = write.save_file

    def look(tensors, path, metadata):
        seen.append(signal.getsignal(signal.SIGTERM))
        save(tensors, path, metadata=metadata)

    monkeypatch.setattr(write, "save_file", look)
    own = lambda number, frame: None
    for handler in (signal.SIG_DFL, own):
        before = signal.signal(signal.SIGTERM, handler)
        try:
            Sources().convert(tmp_path / str(handler is own))
            assert signal.getsignal(signal.SIGTERM) is handler
        finally:
            signal.signal(signal.SIGTERM, before)
    assert seen[0] is not signal.SIG_DFL
    assert seen[1] is own
    thread = threading.Thread(target=lambda: Sources().convert(tmp_path / "thread"))
    thread.start()
    thread.join()
    assert is_complete(tmp_path / "thread")
    assert seen[2] is signal.getsignal(signal.SIGTERM)


@pytest.mark.parametrize("owner", ["running", "elsewhere", "unknown"])
def test_folders_of_others_stay(tmp_path, monkeypatch, owner):
    output = tmp_path / "out"
    if owner == "running":
        with write.complete_or_absent(output) as scratch:
            notes = write.remove_abandoned(output)
            assert scratch.is_dir()
    else:
        scratch = tmp_path / ".out.incomplete-1234"
        scratch.mkdir()
        if owner == "elsewhere":
            (scratch / ".lock").write_text("another machine")
        notes = write.remove_abandoned(output)
        assert scratch.is_dir()
    assert notes == [f"{scratch} is another conversion's; if none is running, remove it"]


def test_folder_in_use_is_not_empty(tmp_path):
    with write.complete_or_absent(tmp_path), pytest.raises(ConversionError, match="not empty"):
        Sources().convert(tmp_path)
