"""Splits as files."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
from PIL import Image

from mgllava.objects.boxes import load_detections
from mgllava.scenes import FAMILIES, SceneDataset, ask, detect, files, render, sample_scene, write_split


def _contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    return write_split(tmp_path_factory.mktemp("scenes"), "test", 7, turns=4, first=30)


def test_the_files_are_those_announced(written):
    images = {f"images/test-{30 + index:07d}.png" for index in range(7)}
    others = {"boxes.json", "conversations.jsonl", "metadata.jsonl", "settings.json"}
    assert set(_contents(written)) == images | others
    assert written.name == "test"


def test_conversations_are_llava_format_and_hold_the_questions(written):
    rows = _lines(written / "conversations.jsonl")
    assert len(rows) == 7
    for index, row in enumerate(rows):
        scene = sample_scene("test", 30 + index)
        assert set(row) == {"id", "image", "conversations"}
        assert row["id"] == scene.id
        with Image.open(written / row["image"]) as picture:
            assert picture.mode == "RGB"
            assert picture.tobytes() == render(scene).tobytes()
        turns = row["conversations"]
        assert [turn["from"] for turn in turns] == ["human", "gpt"] * 4
        assert turns[0]["value"].startswith("<image>\n")
        assert sum(turn["value"].count("<image>") for turn in turns) == 1
        asked = [turn["value"].removeprefix("<image>\n") for turn in turns]
        assert list(zip(asked[::2], asked[1::2], strict=True)) == [
            (turn.question, turn.answer) for turn in ask(scene, 4)
        ]


def test_boxes_are_found_by_the_picture_s_name_and_equal_those_made_in_memory(written):
    for index in range(7):
        scene = sample_scene("test", 30 + index)
        found = load_detections(written / "boxes.json", image=written / "images" / f"{scene.id}.png")
        assert found == detect(scene).as_dict()
        assert found == SceneDataset("test", 1, first=30 + index)[0]["detections"]


def test_metadata_tells_the_families_the_sizes_and_the_truth(written):
    for index, row in enumerate(_lines(written / "metadata.jsonl")):
        scene = sample_scene("test", 30 + index)
        turns = ask(scene, 4)
        assert row["id"] == scene.id
        assert [turn["family"] for turn in row["turns"]] == [turn.family for turn in turns]
        assert [turn["things"] for turn in row["turns"]] == [list(turn.things) for turn in turns]
        for turn in row["turns"]:
            heights = [scene.things[thing].size for thing in turn["things"]]
            expected = min(heights, key=["small", "medium", "large"].index, default=None)
            assert turn["smallest"] == expected
        assert row["scene"] == json.loads(json.dumps(asdict(scene)))


def test_captions_can_be_written(tmp_path):
    target = write_split(tmp_path, "train", 3, turns=1, families=["objects"])
    for row, boxes in zip(
        _lines(target / "conversations.jsonl"), json.loads((target / "boxes.json").read_text()), strict=True
    ):
        question, answer = (turn["value"] for turn in row["conversations"])
        assert question == "<image>\nname the objects."
        assert 1 <= len(answer.split(", ")) <= len(boxes["boxes"])


def test_a_killed_write_goes_on_to_the_same_files(tmp_path):
    whole = write_split(tmp_path / "whole", "train", 60)
    code = f"from mgllava.scenes import write_split; write_split({str(tmp_path / 'cut')!r}, 'train', 60)"
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(root)}, stderr=subprocess.PIPE
    )
    images = tmp_path / "cut" / "train" / "images"
    while process.poll() is None and len(list(images.glob("*.png"))) < 8:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    left = len(list(images.glob("*.png")))
    assert 8 <= left < 60, process.stderr.read().decode()
    assert not (tmp_path / "cut" / "train" / "conversations.jsonl").exists()
    for path in images.glob("*.png"):
        assert path.read_bytes() == (whole / "images" / path.name).read_bytes()

    times = {path: path.stat().st_mtime_ns for path in images.glob("*.png")}
    resumed = write_split(tmp_path / "cut", "train", 60)
    assert _contents(resumed) == _contents(whole)
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())


def test_a_full_disk_leaves_whole_files_only_and_the_next_call_goes_on(tmp_path, monkeypatch):
    expected = _contents(write_split(tmp_path / "whole", "train", 6))
    real_write = Path.write_bytes
    written = []

    def write_bytes(path, content):
        written.append(path)
        if len(written) > 4:
            real_write(path, content[: len(content) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return real_write(path, content)

    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    with pytest.raises(OSError, match="No space left on device"):
        write_split(tmp_path / "full", "train", 6)
    left = _contents(tmp_path / "full" / "train")
    assert len(left) == 4
    assert left.items() <= expected.items()
    monkeypatch.undo()
    assert _contents(write_split(tmp_path / "full", "train", 6)) == expected


def test_a_finished_folder_is_left_as_it_is(tmp_path):
    target = write_split(tmp_path, "validation", 4)
    before = _contents(target)
    assert _contents(write_split(tmp_path, "validation", 4)) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"turns": 3}, "was begun with turns = 2, now it is 3"),
        ({"num_scenes": 5}, "was begun with num_scenes = 4, now it is 5"),
        ({"families": ["count_kind", "shape_at"]}, "was begun with families"),
        ({"first": 1}, "was begun with first = 0, now it is 1"),
    ],
)
def test_a_folder_begun_otherwise_is_not_mixed(tmp_path, change, message):
    target = write_split(tmp_path, "train", 4, turns=2)
    before = _contents(target)
    with pytest.raises(ValueError, match=message):
        write_split(tmp_path, "train", **{"num_scenes": 4, "turns": 2, **change})
    assert _contents(target) == before


def test_pictures_of_another_making_are_not_mixed(tmp_path, monkeypatch):
    write_split(tmp_path, "train", 2)
    monkeypatch.setattr(files, "render", lambda scene: Image.new("RGB", (256, 256)))
    with pytest.raises(ValueError, match="was begun with generator"):
        write_split(tmp_path, "train", 2)


def test_damaged_settings_are_named(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "settings.json").write_text('{"split": ')
    with pytest.raises(ValueError, match=r"settings\.json is damaged"):
        write_split(tmp_path, "train", 2)


def test_bad_arguments_write_nothing(tmp_path):
    for arguments in (
        {"split": "holdout"},
        {"num_scenes": 0},
        {"turns": 0},
        {"families": ["objects"]},
        {"high_res_size": 0},
    ):
        with pytest.raises(ValueError, match="expected"):
            write_split(tmp_path, **{"split": "train", "num_scenes": 2, **arguments})
    assert not list(tmp_path.iterdir())


def test_all_families_appear_in_the_long_run(tmp_path):
    rows = _lines(write_split(tmp_path, "validation", 10, turns=10) / "metadata.jsonl")
    assert {turn["family"] for row in rows for turn in row["turns"]} == set(FAMILIES)
