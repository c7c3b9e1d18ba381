"""`mgllava scenes`, and the figures it prints."""

import json

import pytest
from PIL import Image
from typer.testing import CliRunner

from mgllava.cli import friendly_errors
from mgllava.scenes.command import scenes_app
from mgllava.scenes.legibility import measure_legibility
from mgllava.scenes.sheet import draw_sheet

APP = scenes_app(friendly_errors)


def _run(*arguments):
    return CliRunner().invoke(APP, [str(argument) for argument in arguments])


def test_write_writes_a_split(tmp_path):
    result = _run(
        "write", tmp_path, "--split", "test", "--scenes", 3, "--turns", 1, "--family", "read_digits"
    )
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in (tmp_path / "test" / "conversations.jsonl").read_text().splitlines()]
    assert len(rows) == 3
    assert all(
        row["conversations"][0]["value"] == "<image>\nread the digits from left to right." for row in rows
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--split", "dev"), "split is 'dev'"),
        (("--family", "weather", "--turns", 1), "families are ['weather']"),
        (("--family", "objects", "--turns", 2), "turns is 2"),
    ],
)
def test_bad_arguments_end_with_one_line(tmp_path, arguments, message):
    result = _run("write", tmp_path / "out", *arguments)
    assert result.exit_code == 1
    assert message in " ".join(result.output.split())
    assert "Traceback" not in result.output
    assert not (tmp_path / "out").exists()


def test_help_lists_the_commands():
    output = _run("--help").output
    assert all(name in output for name in ("write", "blind", "legibility", "sheet"))


@pytest.mark.filterwarnings("ignore:The number of unique classes")
def test_blind_prints_every_family():
    result = _run("blind", "--train-scenes", 60, "--test-scenes", 20)
    assert result.exit_code == 0, result.output
    lines = result.output.strip().splitlines()
    assert len(lines) == 12
    assert lines[-1].split()[0] == "all"


def test_sheet_draws_scenes_with_their_boxes(tmp_path):
    result = _run("sheet", tmp_path / "sheet.png", "--columns", 2, "--rows", 1, "--scale", 1)
    assert result.exit_code == 0, result.output
    with Image.open(tmp_path / "sheet.png") as picture:
        assert picture.size == (2 * 256 + 3 * 8, 256 + 2 * 8)
        assert (
            len([pixel for pixel in picture.convert("RGB").getcolors(1 << 20) if pixel[1] == (120, 255, 120)])
            == 1
        )


def test_a_sheet_without_scenes_is_refused():
    with pytest.raises(ValueError, match="columns, rows and scale are 0, 3 and 2"):
        draw_sheet("train", columns=0)


def test_small_digits_can_be_read_on_the_canvas_and_hardly_in_a_low_resolution_patch():
    rows = {(row.what, row.size): row for row in measure_legibility(350, 100)}
    small = rows["digit", "small"]
    assert small.low_res_pixels < 6
    assert small.high_res > 0.85
    assert small.high_res - small.low_res > 0.03
    assert small.low_res_patch < 0.35
    assert rows["shape", "small"].high_res > 0.98
    assert rows["shape", "small"].low_res_patch < 0.7
