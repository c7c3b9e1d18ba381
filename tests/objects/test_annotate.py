"""Annotation in one process: what is written, resumed, refused."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from annotate_cases import (
    SETTINGS,
    Numbers,
    assert_complete,
    found_on,
    lines_of,
    looked_at,
    run,
    write_picture,
    write_pictures,
)
from PIL import Image

from mgllava.objects import annotate as module
from mgllava.objects.annotate import annotate
from mgllava.objects.annotation_files import PartFile, errors_file, parts_folder
from mgllava.objects.boxes import load_detections
from mgllava.objects.detector import Detections
from mgllava.objects.drawings import drawing_name, save_drawing
from mgllava.objects.pictures import Picture, find_pictures
from mgllava.objects.tags import FixedTags
from mgllava.training import Record
from mgllava.training.records import LlavaRecords


@pytest.fixture
def folder(tmp_path):
    write_pictures(tmp_path / "pictures", 10)
    return tmp_path


def test_every_picture_has_its_entry_in_order(folder):
    done = run(folder)
    assert_complete(folder, 10)
    assert (done.output, done.num_pictures, done.num_failed) == (folder / "boxes.json", 10, 0)
    assert done.num_boxes == sum(number % 3 for number in range(10))
    assert not done.errors.exists()


def test_workers_change_nothing(folder):
    run(folder, num_workers=2, batch_size=3)
    assert_complete(folder, 10)


def test_the_box_file_is_read_by_chat_and_by_training(folder):
    run(folder)
    assert load_detections(folder / "boxes.json", image="elsewhere/0001.jpg") == {
        "boxes": [[0.0, 0.0, 3.0, 1.29]],
        "labels": ["number 1"],
        "scores": [0.875],
    }
    records = [{"id": "0001", "image": "0001.png", "conversations": [{"from": "human", "value": "<image>\nWhat?"},
               {"from": "gpt", "value": "That."}]}]  # fmt: skip
    (folder / "records.json").write_text(json.dumps(records))
    record = LlavaRecords(folder / "records.json", folder / "pictures", folder / "boxes.json")[0]
    assert isinstance(record, Record)
    assert record.detections["labels"] == ["number 1"]


def test_a_second_call_looks_at_new_pictures_only(folder):
    run(folder)
    write_picture(folder / "pictures" / "0010.png", 10, (8, 9))
    run(folder)
    assert_complete(folder, 11)
    assert looked_at(folder) == list(range(11))


def test_no_detector_is_made_where_nothing_is_left(folder):
    run(folder)
    before = (folder / "boxes.json").read_bytes()
    (folder / "boxes.json").unlink()

    def load():
        raise AssertionError

    pictures = find_pictures([folder / "pictures"])
    assert annotate(pictures, load, folder / "boxes.json", settings=SETTINGS).num_pictures == 10
    assert (folder / "boxes.json").read_bytes() == before


@pytest.mark.parametrize("cut", [1, 2, 20])
def test_a_line_cut_in_half_is_dropped(folder, cut):
    run(folder)
    (folder / "boxes.json").unlink()
    part = parts_folder(folder / "boxes.json") / "process-0.jsonl"
    part.write_bytes(part.read_bytes()[:-cut])
    run(folder)
    assert_complete(folder, 10)
    # Without its end alone the line is whole.
    assert looked_at(folder) == [*range(10), *([9] if cut > 1 else [])]


def test_damaged_lines_in_the_middle_are_done_again(folder):
    run(folder)
    part = parts_folder(folder / "boxes.json") / "process-0.jsonl"
    lines = part.read_bytes().splitlines(keepends=True)
    lines[3], lines[5] = b"\0" * 40 + b"\n", b"\xff\xfe\n"
    part.write_bytes(b"".join(lines))
    run(folder)
    assert_complete(folder, 10)
    assert sorted(looked_at(folder)) == sorted([*range(10), 3, 5])


@pytest.mark.parametrize("key", sorted(SETTINGS))
def test_other_settings_are_refused(folder, key):
    run(folder)
    with pytest.raises(ValueError, match=rf"begun with {key} = {SETTINGS[key]!r}, now it is 'other'"):
        run(folder, settings=SETTINGS | {key: "other"})
    assert_complete(folder, 10)


def test_settings_count_once_there_are_detections(folder):
    """Whoever corrects a setting after a run that failed at once is not asked to remove anything."""

    class Broken(Numbers):
        def __call__(self, pictures, tags=None):
            raise RuntimeError("broken")

    with pytest.raises(
        RuntimeError, match="numbers fails on one picture after the other.*RuntimeError: broken"
    ):
        run(folder, detector=Broken(), settings=SETTINGS | {"threshold": 0.9})
    run(folder)
    with pytest.raises(ValueError, match="begun with threshold = 0.2, now it is 0.9"):
        run(folder, settings=SETTINGS | {"threshold": 0.9})


def test_of_long_lists_the_first_that_differs_is_named(folder):
    names = [f"name {number}" for number in range(100)]
    run(folder, settings=SETTINGS | {"tags": names})
    with pytest.raises(ValueError, match=r"begun with tags\[50\] = 'name 50', now it is 'other'"):
        run(folder, settings=SETTINGS | {"tags": [*names[:50], "other", *names[51:]]})


def test_it_says_how_many_were_done_before(folder, capsys):
    run(folder, progress=True)
    assert "done before" not in capsys.readouterr().err
    write_picture(folder / "pictures" / "0010.png", 10, (8, 9))
    run(folder, progress=True)
    assert f"10 of 11 pictures were done before, by {folder}/boxes.json.parts" in capsys.readouterr().err
    (folder / "pictures").rename(folder / "moved")
    write_pictures(folder / "pictures" / "new", 3)
    run(folder, progress=True)
    assert "0 of 3 pictures were done before" in capsys.readouterr().err


def test_a_picture_that_was_replaced_is_done_again(folder):
    run(folder)
    write_picture(folder / "pictures" / "0003.png", 4, (11, 8))
    for _ in range(2):
        run(folder)
        assert json.loads((folder / "boxes.json").read_text())[3]["labels"] == ["number 4"]
    assert looked_at(folder) == [*range(10), 4]
    (folder / "pictures" / "0003.png").write_text("this is a text")
    assert run(folder).num_failed == 1
    assert "0003" not in _first_ids(folder)


def test_a_second_process_on_the_same_file_is_refused(folder):
    part = parts_folder(folder / "boxes.json") / "process-0.jsonl"
    part.parent.mkdir()
    hold = (
        "import fcntl, sys; file = open(sys.argv[1], 'ab'); fcntl.lockf(file, fcntl.LOCK_EX); "
        "print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(part)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(OSError, match=r"another process writes .*process-0.jsonl; wait for it or name"):
            run(folder)
        assert looked_at(folder) == []
        other.stdin.close()
    run(folder)
    assert_complete(folder, 10)


def test_what_a_kill_left_of_former_box_files_is_removed(folder):
    for name in (
        ".boxes.json.0123abcd",
        ".boxes.errors.json.0123abcd",
        ".other.json.0123abcd",
        ".boxes.json.old",
    ):
        (folder / name).touch()
    run(folder)
    assert {path.name for path in folder.iterdir() if path.name.startswith(".")} == {
        ".other.json.0123abcd",
        ".boxes.json.old",
    }


def test_lost_settings_are_an_error(folder):
    run(folder)
    (parts_folder(folder / "boxes.json") / "settings.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read.*remove"):
        run(folder)


def test_a_box_file_of_others_is_not_overwritten(folder):
    (folder / "boxes.json").write_text("[]")
    with pytest.raises(ValueError, match="exists, but not .*boxes.json.parts"):
        run(folder)
    assert (folder / "boxes.json").read_text() == "[]"
    assert looked_at(folder) == []


def test_pictures_that_cannot_be_read_are_listed_with_the_reason(folder):
    pictures = folder / "pictures"
    (pictures / "0003.jpg").write_text("this is a text")
    (pictures / "0003.png").unlink()
    (pictures / "0005.png").write_bytes((pictures / "0005.png").read_bytes()[:40])
    (pictures / "0007.png").write_bytes(b"")
    done = run(folder)
    assert (done.num_pictures, done.num_failed) == (7, 3)
    ids = [entry["id"] for entry in json.loads((folder / "boxes.json").read_text())]
    assert ids == ["0000", "0001", "0002", "0004", "0006", "0008", "0009"]
    errors = json.loads((folder / "boxes.errors.json").read_text())
    assert [error["id"] for error in errors] == ["0003", "0005", "0007"]
    assert errors[0]["picture"] == str(pictures / "0003.jpg")
    assert "cannot identify image file" in errors[0]["error"]
    assert all(error["error"] for error in errors)
    assert sum("error" in line and "boxes" not in line for line in lines_of(folder)) == 3


def test_a_picture_that_was_mended_is_taken_and_no_longer_listed(folder):
    picture = folder / "pictures" / "0003.png"
    picture.write_text("this is a text")
    assert run(folder).num_failed == 1
    write_picture(picture, 3, (11, 8))
    done = run(folder)
    assert (done.num_pictures, done.num_failed) == (10, 0)
    assert not (folder / "boxes.errors.json").exists()
    assert looked_at(folder) == [0, 1, 2, 4, 5, 6, 7, 8, 9, 3]


def test_no_readable_picture_at_all_is_an_error(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "notes.jpg").write_text("this is a text")
    with pytest.raises(
        ValueError, match=r"none of the pictures \(1\) could be used, .*notes.jpg.*cannot identify"
    ):
        run(tmp_path)
    assert not (tmp_path / "boxes.json").exists()
    assert len(json.loads((tmp_path / "boxes.errors.json").read_text())) == 1


def test_pictures_reach_the_detector_upright_and_in_rgb(tmp_path):
    seen = []

    class Watching(Numbers):
        def __call__(self, pictures, tags=None):
            seen.extend((picture.mode, picture.size) for picture in pictures)
            return [Detections((), (), ()) for _ in pictures]

    (tmp_path / "pictures").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("L", (20, 10)).save(tmp_path / "pictures" / "turned.jpg", exif=exif)
    Image.new("RGBA", (1, 1)).save(tmp_path / "pictures" / "dot.png")
    run(tmp_path, detector=Watching(), num_workers=1)
    assert seen == [("RGB", (1, 1)), ("RGB", (10, 20))]
    assert json.loads((tmp_path / "boxes.json").read_text())[0] == {
        "id": "dot",
        "boxes": [],
        "scores": [],
        "labels": [],
    }


def test_one_picture_the_detector_refuses_does_not_take_its_batch_along(folder):
    done = run(folder, detector=Numbers(folder / "log", refuses=(5,)), batch_size=10)
    assert (done.num_pictures, done.num_failed) == (9, 1)
    (error,) = json.loads((folder / "boxes.errors.json").read_text())
    assert (error["id"], error["error"]) == ("0005", "numbers refuses it: number 5 is too much")


def test_detections_of_a_wrong_form_do_not_reach_the_file(folder):
    class Odd(Numbers):
        def __call__(self, pictures, tags=None):
            return [Detections(((5.0, 0.0, 1.0, 1.0),), ("x",), (float("nan"),)) for _ in pictures]

    with pytest.raises(
        ValueError, match=r"none of the pictures \(10\).*boxes\[0\] is \[5.0, 0.0, 1.0, 1.0\]"
    ):
        run(folder, detector=Odd())


def _first_ids(folder):
    return [entry["id"] for entry in json.loads((folder / "boxes.json").read_text())]


@pytest.mark.parametrize("error", [RuntimeError, IndexError, MemoryError, torch.OutOfMemoryError])
@pytest.mark.parametrize("batch_size", [1, 10])
def test_whatever_one_picture_brings_to_light_is_recorded_and_the_others_are_done(folder, error, batch_size):
    done = run(folder, detector=Numbers(refuses=(0, 5), error=error), batch_size=batch_size)
    assert (done.num_pictures, done.num_failed) == (8, 2)
    assert _first_ids(folder) == [f"{number:04}" for number in (1, 2, 3, 4, 6, 7, 8, 9)]
    first, second = json.loads((folder / "boxes.errors.json").read_text())
    assert (first["id"], second["id"]) == ("0000", "0005")
    assert second["error"] == f"numbers fails on it: {error.__name__}: number 5 is too much"


def test_where_memory_runs_out_batches_become_smaller_and_stay_so(folder, capsys):
    sizes = []

    class Small(Numbers):
        def __call__(self, pictures, tags=None):
            sizes.append(len(pictures))
            if len(pictures) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().__call__(pictures, tags)

    write_pictures(folder / "pictures", 16)
    run(folder, detector=Small(), batch_size=8)
    assert_complete(folder, 16)
    assert sizes == [8, 4, *[2] * 8]
    said = capsys.readouterr().err
    assert "out of memory with 8 pictures at once; going on with 4 (--batch-size 4)" in said
    assert "out of memory with 4 pictures at once; going on with 2 (--batch-size 2)" in said


def test_a_detector_that_refuses_everything_stops_the_run(folder, monkeypatch):
    monkeypatch.setattr(module, "MOST_FAILED_IN_A_ROW", 6)
    with pytest.raises(
        ValueError, match=r"numbers fails on one .* after the other \(6\), at last .*: number 5 is too much"
    ):
        run(folder, detector=Numbers(refuses=range(10)), batch_size=1)


def test_a_detector_that_breaks_on_the_way_stops_the_run_which_can_go_on(folder, monkeypatch):
    monkeypatch.setattr(module, "MOST_FAILED_IN_A_ROW", 4)
    with pytest.raises(RuntimeError, match=r"after the other \(4\), at last .*RuntimeError: number 6 is too"):
        run(folder, detector=Numbers(refuses=range(3, 10), error=RuntimeError), batch_size=1)
    assert not (folder / "boxes.json").exists()
    done = run(folder)
    assert (done.num_pictures, done.num_failed) == (10, 0)
    assert looked_at(folder) == [7, 8, 9, 3, 4, 5, 6]  # those that failed come last


def test_many_bad_pictures_in_a_row_do_not_stop_every_start(folder, monkeypatch):
    monkeypatch.setattr(module, "MOST_FAILED_IN_A_ROW", 4)
    bad = Numbers(refuses=range(2, 8), error=RuntimeError)
    with pytest.raises(RuntimeError, match=r"after the other \(4\)"):
        run(folder, detector=bad, batch_size=1)
    for _ in range(2):
        assert run(folder, detector=bad, batch_size=1).num_failed == 6


def test_refused_pictures_that_are_left_over_do_not_stop_a_later_start(folder, monkeypatch):
    monkeypatch.setattr(module, "MOST_FAILED_IN_A_ROW", 3)
    for _ in range(2):
        assert run(folder, detector=Numbers(refuses=(1, 3, 5, 7))).num_failed == 4
    write_picture(folder / "pictures" / "0010.png", 10, (8, 9))
    assert run(folder, detector=Numbers(refuses=(1, 3, 5, 7, 10))).num_failed == 5


@pytest.mark.parametrize(("error", "calls"), [(KeyboardInterrupt, 1), (AttributeError, 3)])
def test_an_interrupt_and_a_mistake_in_a_program_stop_soon(folder, error, calls):
    seen = []

    class Wrong(Numbers):
        def __call__(self, pictures, tags=None):
            seen.append(len(pictures))
            raise error("no such thing")

    with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else RuntimeError):
        run(folder, detector=Wrong(), batch_size=1)
    assert len(seen) == calls


def test_a_result_too_few_is_an_error(folder):
    class Short(Numbers):
        def __call__(self, pictures, tags=None):
            return super().__call__(pictures, tags)[:-1]

    with pytest.raises(RuntimeError, match="0 results for 1 pictures"):
        run(folder, detector=Short())


def test_a_reader_that_dies_names_where_it_was(folder, monkeypatch):
    read = module.load_picture

    def deadly(path):
        return os._exit(1) if path.stem == "0005" else read(path)

    monkeypatch.setattr(module, "load_picture", deadly)
    with pytest.raises(ChildProcessError, match="a process that reads pictures ended .*follow .*000[04].png"):
        run(folder, num_workers=1)


def test_tags_reach_an_open_vocabulary_detector(folder):
    asked = []

    class Open(Numbers):
        needs_tags = True

        def __call__(self, pictures, tags=None):
            asked.extend(tags)
            return [Detections((), (), ()) for _ in pictures]

    with pytest.raises(ValueError, match="numbers looks for the names it is given"):
        run(folder, detector=Open())
    run(folder, detector=Open(), tagger=FixedTags(["cat", "dog"]))
    assert asked == [["cat", "dog"]] * 10


def test_a_detector_with_names_of_its_own_gets_none(folder):
    run(folder, tagger=FixedTags(["cat"]))
    assert_complete(folder, 10)


def test_one_picture_of_two_records_is_looked_at_once(folder):
    path = str(folder / "pictures" / "0004.png")
    detector = Numbers(folder / "log")
    annotate(
        [Picture(7, path), Picture("8", path)], lambda: (detector, None), folder / "boxes.json", settings={}
    )
    entries = json.loads((folder / "boxes.json").read_text())
    assert [entry["id"] for entry in entries] == [7, "8"]
    assert entries[0]["labels"] == entries[1]["labels"] == ["number 4"]
    assert looked_at(folder) == [4]


def test_a_drawing_of_every_picture(folder):
    nested = write_picture(folder / "pictures" / "more" / "0001.png", 301, (40, 30))
    run(folder, draw=folder / "drawn")
    assert len(list((folder / "drawn").iterdir())) == 11
    with Image.open(folder / "drawn" / "more%2F0001.png.jpg") as drawing, Image.open(nested) as picture:
        assert drawing.size == picture.size


def test_pictures_done_before_are_drawn_too_unless_they_are(folder):
    run(folder)
    run(folder, draw=folder / "drawn")
    assert len(list((folder / "drawn").iterdir())) == 10
    first, second = folder / "drawn" / "0000.jpg", folder / "drawn" / "0001.jpg"
    (expected,) = [second.read_bytes()]
    first.write_bytes(b"kept")
    second.unlink()
    write_picture(folder / "pictures" / "0010.png", 10, (8, 9))
    run(folder, draw=folder / "drawn")
    assert len(list((folder / "drawn").iterdir())) == 11
    assert (first.read_bytes(), second.read_bytes()) == (b"kept", expected)


def test_drawings_of_long_ids(folder):
    ids = ["x" * 400 + end for end in "ab"]
    pictures = [Picture(id, str(folder / "pictures" / f"{number:04}.png")) for number, id in enumerate(ids)]
    annotate(
        pictures, lambda: (Numbers(), None), folder / "boxes.json", settings={}, draw=folder / "drawn",
        num_workers=0,
    )  # fmt: skip
    assert len(list((folder / "drawn").iterdir())) == 2


def test_chat_finds_the_boxes_of_pictures_of_equal_stems(tmp_path, monkeypatch):
    for number, name in enumerate(("train/1.png", "test/1.png", "test/deep/1.png", "test/2.png"), start=1):
        write_picture(tmp_path / "pictures" / name, number)
    run(tmp_path)
    boxes = tmp_path / "boxes.json"
    monkeypatch.chdir(tmp_path / "pictures" / "test")
    for name, number in (("../train/1.png", 1), ("1.png", 2), (tmp_path / "pictures/test/deep/1.png", 3)):
        found = load_detections(boxes, image=name)
        assert found["labels"] == list(found_on(number, (8, 8)).labels)
    with pytest.raises(
        ValueError, match="0 entries of id '3' among 4, .* its ids are 'test/1.png', '2', .*, ..."
    ):
        load_detections(boxes, image="3.png")


class FullDisk:
    """A file on a disk that has room for `room` more bytes."""

    def __init__(self, file, room):
        self._file, self._room = file, room

    def write(self, content):
        if not self._room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = self._file.write(content[: self._room])
        self._room -= written
        return written

    def close(self):
        self._file.close()


@pytest.mark.parametrize("room", [0, 1, 300, 700])
def test_a_full_disk_loses_nothing(folder, monkeypatch, room):
    opened = PartFile.__enter__

    def on_full_disk(self):
        opened(self)
        self._file = FullDisk(self._file, room)
        return self

    with monkeypatch.context() as full:
        full.setattr(PartFile, "__enter__", on_full_disk)
        with pytest.raises(
            OSError, match="No space left on device; nothing found before is lost.*process-0.jsonl"
        ):
            run(folder, batch_size=2)
    kept = [line["picture"] for line in lines_of(folder)]
    assert not (folder / "boxes.json").exists()
    before = len(looked_at(folder))
    run(folder)
    assert_complete(folder, 10)
    assert len(looked_at(folder)) - before == 10 - len(kept)


def test_a_line_that_the_system_takes_in_pieces_is_written_whole(folder, monkeypatch):
    opened = PartFile.__enter__

    class Pieces(FullDisk):
        def write(self, content):
            return self._file.write(content[:7])

    def in_pieces(self):
        opened(self)
        self._file = Pieces(self._file, None)
        return self

    monkeypatch.setattr(PartFile, "__enter__", in_pieces)
    run(folder)
    assert_complete(folder, 10)


def test_a_disk_that_fills_while_merging_leaves_the_former_box_file(folder, monkeypatch):
    run(folder)
    write_picture(folder / "pictures" / "0010.png", 10, (8, 9))
    before = (folder / "boxes.json").read_bytes()

    synced = []

    def no_room(*arguments):
        synced.append(arguments)
        if len(synced) > 1:  # after the settings
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as full:
        full.setattr("mgllava.files.os.fsync", no_room)
        with pytest.raises(OSError, match="No space left on device.*boxes.json'"):
            run(folder)
    assert (folder / "boxes.json").read_bytes() == before
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    run(folder)
    assert_complete(folder, 11)


def test_batches_need_a_picture(folder):
    with pytest.raises(ValueError, match="batch_size is 0"):
        run(folder, batch_size=0)


NO_FILES = {"nul": "a\0b.png", "half": "\ud800.png", "long": "x" * 300 + ".png"}


def test_records_of_names_that_no_file_can_have_do_not_stop_the_others(folder):
    records = [{"id": id, "image": name} for id, name in NO_FILES.items()] + [
        {"id": "a", "image": "0002.png"}
    ]
    (folder / "records.json").write_text(json.dumps(records))
    found = find_pictures([folder / "records.json"], folder / "pictures")
    done = annotate(found, lambda: (Numbers(), None), folder / "boxes.json", settings={}, num_workers=0)
    assert (done.num_pictures, done.num_failed) == (1, 3)
    errors = json.loads((folder / "boxes.errors.json").read_text())
    assert [error["id"] for error in errors] == list(NO_FILES)
    assert all(error["error"] for error in errors)


def test_one_id_for_names_that_no_file_can_have(folder):
    records = [{"id": 1, "image": "a\0.png"}, {"id": 1, "image": "b\0.png"}]
    (folder / "records.json").write_text(json.dumps(records))
    with pytest.raises(ValueError, match="the id 1 stands for"):
        find_pictures([folder / "records.json"], folder)


def test_what_is_no_file_is_not_waited_for(folder):
    os.mkfifo(folder / "pictures" / "pipe.png")
    assert run(folder).num_failed == 1
    (error,) = json.loads((folder / "boxes.errors.json").read_text())
    assert error["error"] == "it is a folder, a pipe or a device"


@pytest.mark.parametrize(
    "damaged",
    [
        {"picture": ["x"], "boxes": [], "scores": [], "labels": []},
        {"boxes": [[1, 2, 3, 4]]},
        {"scores": []},
        {"labels": None},
        {"boxes": [[1, 2]], "scores": [0.5], "labels": ["x"]},
    ],
)
def test_damaged_lines_that_are_still_json_are_done_again(folder, damaged):
    run(folder)
    part = parts_folder(folder / "boxes.json") / "process-0.jsonl"
    lines = part.read_text().splitlines()
    lines[2] = json.dumps(json.loads(lines[2]) | damaged)
    part.write_text("\n".join([*lines, "[" * 100_000, ""]))
    run(folder)
    assert looked_at(folder) == [*range(10), 2]
    assert json.loads((folder / "boxes.json").read_text())[2]["labels"] == ["number 2", "picture"]


def test_a_kill_leaves_no_half_drawing(folder, monkeypatch):
    run(folder)
    save = Image.Image.save

    def cut(self, path, **options):
        save(self, path, **options)
        path.write_bytes(path.read_bytes()[:100])
        raise KeyboardInterrupt

    with monkeypatch.context() as killed:
        killed.setattr(Image.Image, "save", cut)
        with pytest.raises(KeyboardInterrupt):
            run(folder, draw=folder / "drawn")
    run(folder, draw=folder / "drawn")
    for number in range(10):
        with Image.open(folder / "drawn" / f"{number:04}.jpg") as drawing:
            drawing.load()
    assert len(list((folder / "drawn").iterdir())) == 10


def test_a_drawing_that_cannot_be_written_says_so(folder):
    with pytest.raises(OSError, match=r"the drawing cannot be written: .*drawn/a.jpg"):
        save_drawing(Image.new("RGB", (2, 2)), folder / "drawn" / "a.jpg")


def test_every_id_has_its_own_drawing():
    ids = [
        "a/b",
        "a%2Fb",
        "a\0b",
        "a%00b",
        "\udcfe",
        "\udcff",
        "x" * 300,
        "x" * 301,
        "\u00e4" * 150,
        "..",
        "a\nb",
    ]
    names = [drawing_name(id) for id in ids]
    assert len(set(names)) == len(ids)
    assert all(len(os.fsencode(name)) < 220 and not set("/\0") & set(name) for name in names)
    assert drawing_name(7, ".png") == "7.png"


def test_a_folder_is_no_box_file(folder):
    (folder / "boxes.json").mkdir()
    with pytest.raises(ValueError, match="boxes.json is a folder; name the box file to write"):
        run(folder)
    assert looked_at(folder) == []
    assert not parts_folder(folder / "boxes.json").exists()


def test_box_files_that_differ_in_their_suffix_have_their_own_errors():
    files = {errors_file(Path(name)).name for name in ("boxes.json", "boxes.train", "boxes.val")}
    assert files == {"boxes.errors.json", "boxes.train.errors.json", "boxes.val.errors.json"}
