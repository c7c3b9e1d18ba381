"""Drawings: boxes where they are, texts that can be read, what was dropped and why."""

import math

import numpy as np
import pytest
from PIL import Image, ImageDraw

from mgllava.objects.draw import DROPPED, Mark, colour_of, draw_detections, draw_marks, explain_selection

RED = (255, 0, 0)


@pytest.fixture
def texts(monkeypatch):
    """The texts that are written, in order."""
    written = []
    write = ImageDraw.ImageDraw.text

    def record(self, place, text, *arguments, **options):
        written.append(text)
        return write(self, place, text, *arguments, **options)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", record)
    return written


def _where(picture, colour):
    rows, columns = np.nonzero((np.asarray(picture) == colour).all(axis=-1))
    return set(zip(columns.tolist(), rows.tolist(), strict=True))


def _changed(picture, drawn):
    return int((np.asarray(picture) != np.asarray(drawn)).any(axis=-1).sum())


def test_an_outline_runs_around_its_box():
    drawn = draw_marks(Image.new("RGB", (20, 12)), [Mark((3, 2, 8, 7), "", RED)])
    around = {(x, y) for x in range(2, 9) for y in range(1, 8)}
    inside = {(x, y) for x in range(3, 8) for y in range(2, 7)}
    assert _where(drawn, RED) == around - inside


def test_a_dashed_outline_lies_on_the_same_pixels_with_gaps():
    marks = [Mark((10, 10, 70, 60), "", RED)]
    whole = _where(draw_marks(Image.new("RGB", (90, 90)), marks), RED)
    dashed = _where(draw_marks(Image.new("RGB", (90, 90)), [marks[0]._replace(dashed=True)]), RED)
    assert dashed < whole
    assert 0.4 < len(dashed) / len(whole) < 0.7


@pytest.mark.parametrize("box", [(-50, -50, -10, -10), (500, 3, 900, 9), (-1e30, 0, 1e30, 5), (5, 5, 5, 5)])
@pytest.mark.parametrize("dashed", [False, True])
def test_a_box_outside_or_without_area_shows_at_the_border(box, dashed):
    picture = Image.new("RGB", (30, 20))
    drawn = draw_marks(picture, [Mark(box, "", RED, dashed)])
    assert drawn.size == (30, 20)
    assert _changed(picture, drawn)


@pytest.mark.parametrize("size", [(1, 1), (1, 400), (400, 1)])
def test_a_picture_of_one_pixel(size):
    drawn = explain_selection(Image.new("RGB", size), [[0, 0, 1, 1]] * 2, ["dot", "dot"], [0.9, 0.8])
    assert drawn.size == size


def test_the_picture_itself_stays_as_it_is():
    picture = Image.new("L", (40, 40))
    drawn = draw_detections(picture, [[5, 5, 30, 30]], ["cat"], [0.5])
    assert picture.getextrema() == (0, 0)
    assert drawn.mode == "RGB"


def test_labels_and_scores_are_written(texts):
    draw_detections(
        Image.new("RGB", (200, 200)), [[5, 50, 30, 80], [80, 90, 120, 150]], ["cat", "dog"], [0.987, 0.5]
    )
    assert texts == ["cat 0.99", "dog 0.50"]


def test_boxes_without_labels_and_scores_have_no_text(texts):
    picture = Image.new("RGB", (200, 200))
    assert _changed(picture, draw_detections(picture, [[5, 50, 30, 80]]))
    assert texts == []


def test_long_labels_are_cut_and_lines_joined(texts):
    draw_detections(Image.new("RGB", (100, 100)), [[5, 5, 9, 9]], ["a\nb " + "x" * 80])
    assert texts == ["a b " + "x" * 35 + "…"]


def test_a_colour_belongs_to_its_label():
    names = [f"label {number}" for number in range(40)]
    colours = [colour_of(name) for name in names]
    assert colours == [colour_of(name) for name in names]
    assert len(set(colours)) > 35
    assert DROPPED not in colours


@pytest.mark.parametrize("label", ["cat", "dog", "person", "tree", "sky", "digit"])
def test_text_stands_out_from_its_ground(label):
    """Contrast as WCAG 2.1 defines it, 4.5 being what it asks of text."""

    def luminance(colour):
        linear = [
            v / 12.92 if v <= 0.03928 else ((v + 0.055) / 1.055) ** 2.4 for v in (c / 255 for c in colour)
        ]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    ground = colour_of(label)
    drawn = draw_detections(Image.new("RGB", (1500, 1000), ground), [[200, 400, 1000, 900]], [label])
    found = [colour for _, colour in drawn.getcolors(1 << 20)]
    contrast = max(
        (max(a, b) + 0.05) / (min(a, b) + 0.05)
        for a, b in ((luminance(ground), luminance(colour)) for colour in found)
    )
    assert contrast > 4.5


def test_texts_of_boxes_in_one_place_do_not_cover_each_other():
    picture = Image.new("RGB", (300, 300))
    marks = [Mark((100, 100, 200, 200), "first", RED), Mark((101, 101, 201, 201), "second", (0, 0, 255))]
    alone = len(_where(draw_marks(picture, marks[:1]), RED))
    both = len(_where(draw_marks(picture, marks), RED))
    assert both > alone - 100  # what the second text hides of the first outline


def test_what_the_model_gets_is_numbered_and_what_it_does_not_has_a_reason(texts):
    boxes = [[0, 0, 20, 20], [50, 50, 90, 90], [52, 50, 90, 90], [300, 300, 310, 310], [10, 60, 30, 80]]
    labels, scores = ["cat", "dog", "dog", "cat", "cat"], [0.5, 0.9, 0.8, 0.7, 0.2]
    drawn = explain_selection(
        Image.new("RGB", (100, 100)), boxes, labels, scores, max_objects=1, max_per_category=2
    )
    assert texts == ["overlap dog 0.80", "limit cat 0.20", "outside cat 0.70", "1 dog 0.90", "2 cat 0.50"]
    assert _where(drawn, DROPPED)


def test_regions_somebody_chose_are_all_numbered(texts):
    explain_selection(Image.new("RGB", (100, 100)), [[5, 5, 50, 50]] * 2, ["a", "a"])
    assert texts == ["1 a", "2 a"]


def test_wrong_boxes_are_refused():
    with pytest.raises(ValueError, match="1 boxes but 2 labels"):
        draw_detections(Image.new("RGB", (9, 9)), [[0, 0, 1, 1]], ["a", "b"])
    with pytest.raises(ValueError, match="finite"):
        explain_selection(Image.new("RGB", (9, 9)), [[0, 0, 1, math.nan]])
