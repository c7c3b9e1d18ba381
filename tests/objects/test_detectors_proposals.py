"""Proposals without weights: recall on the scenes, coordinates, limits, pictures with nothing in them."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from mgllava.objects.boxes import detections_to_boxes
from mgllava.objects.detector import Detections
from mgllava.objects.detectors import load_detector

GROUND, MARK = (60, 70, 80), (230, 60, 40)


def test_without_opencv_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ImportError, match=r"'proposals' needs OpenCV.*pip install opencv-python-headless"):
        load_detector("proposals")


def test_it_has_no_weights_to_load():
    with pytest.raises(ValueError, match="'proposals' has no weights, but checkpoint is 'some/folder'"):
        load_detector("proposals", checkpoint="some/folder")


@pytest.fixture
def detector():
    pytest.importorskip("cv2")
    return load_detector("proposals")


def picture_of(size, *boxes, ground=GROUND, mark=MARK):
    """Filled rectangles on a plain ground."""
    picture = Image.new("RGB", size, ground)
    for x1, y1, x2, y2 in boxes:
        picture.paste(mark, (x1, y1, x2, y2))
    return picture


def test_it_finds_what_lies_in_the_scenes(detector):
    pytest.importorskip("sklearn")
    from torchvision.ops import box_iou

    from mgllava.scenes import CANVAS, render, sample_scene

    scenes = [sample_scene("validation", index) for index in range(5000, 5020)]
    found: dict[str, list[bool]] = {}
    tight, spurious = [], []
    for scene, detections in zip(scenes, detector([render(scene) for scene in scenes]), strict=True):
        boxes, labels = detections_to_boxes(
            **detections.as_dict(), image_size=(CANVAS, CANVAS), high_res_size=CANVAS
        )
        assert set(labels) == {"object"}
        overlaps = box_iou(torch.tensor([thing.box for thing in scene.things]), boxes)
        for thing, best in zip(scene.things, overlaps.amax(dim=1).tolist(), strict=True):
            found.setdefault(thing.size, []).append(best >= 0.5)
        tight += overlaps.amax(dim=1).tolist()
        spurious.append(int((overlaps.amax(dim=0) < 0.5).sum()))
    assert set(found) == {"small", "medium", "large"}
    assert all(np.mean(hits) >= 0.97 for hits in found.values())
    assert np.mean(tight) > 0.9
    assert np.mean(spurious) < 0.5


@pytest.mark.parametrize("size", [(200, 200), (300, 120), (90, 250)])
@pytest.mark.parametrize(
    ("ground", "mark"), [(GROUND, MARK), ((240, 240, 240), (30, 30, 30)), ((120, 120, 120), (60, 130, 200))]
)
def test_boxes_are_in_pixels_of_the_picture(detector, size, ground, mark):
    wanted = [(5, 10, 35, 30), (50, 90, 61, 101)]
    (found,) = detector([picture_of(size, *wanted, ground=ground, mark=mark)])
    assert sorted(found.boxes) == wanted
    assert found.labels == ("object", "object")
    assert list(found.scores) == sorted(found.scores, reverse=True)
    assert all(0.6 < score < 1 for score in found.scores)


def test_a_large_picture_is_shrunk_and_its_boxes_are_not(detector):
    wanted = [(100, 50, 400, 250), (1203, 607, 1377, 693)]
    found = detector([picture_of((1500, 800), *wanted), picture_of((100, 100), (20, 30, 40, 50))])
    assert np.abs(np.array(sorted(found[0].boxes)) - wanted).max() <= 3
    assert found[1].boxes == ((20.0, 30.0, 40.0, 50.0),)


def test_a_frame_keeps_what_is_in_it_and_a_stain_keeps_its_neighbours(detector):
    picture = picture_of((200, 100))
    draw = ImageDraw.Draw(picture)
    draw.rectangle((20, 20, 79, 79), outline=MARK, width=4)
    draw.rectangle((40, 40, 59, 59), fill=(240, 240, 240))
    # A stain around a mark is no frame: the mark is a part of it.
    draw.rectangle((120, 20, 179, 79), fill=(150, 155, 160))
    draw.rectangle((140, 40, 159, 59), fill=(240, 240, 240))
    (found,) = detector([picture])
    assert sorted(found.boxes) == [
        (20.0, 20.0, 80.0, 80.0),
        (120.0, 20.0, 180.0, 80.0),
        (140.0, 40.0, 160.0, 60.0),
    ]


def test_a_texture_is_not_taken_for_things(detector):
    dots = [(x, y, x + 6, y + 6) for x in range(2, 196, 10) for y in range(2, 196, 10)]
    picture = picture_of((200, 200), *dots, mark=(110, 120, 130))
    picture.paste(MARK, (80, 90, 120, 115))
    (found,) = detector([picture])
    assert found.boxes == ((80.0, 90.0, 120.0, 115.0),)


def test_specks_of_a_large_picture_are_none_of_its_things(detector):
    speck = (50, 50, 55, 55)
    small, large = detector([picture_of((200, 100), speck), picture_of((2000, 1000), speck)])
    assert small.boxes == (speck,)
    assert large.boxes == ()


def test_the_limit_is_by_score_alone(detector):
    picture = picture_of((480, 480))
    for number in range(225):
        row, column = divmod(number, 15)
        shade = 150 + number * 100 // 225
        x, y = 8 + 31 * column, 8 + 31 * row
        picture.paste((shade, 70, 80), (x, y, x + 14, y + 14))
    (found,) = detector([picture])
    assert len(found.boxes) == 100
    # The strongest contrasts are the last ones.
    assert min(y1 for _, y1, _, _ in found.boxes) >= 8 + 31 * 7
    boxes, labels = detections_to_boxes(**found.as_dict(), image_size=(480, 480), high_res_size=480)
    assert len(boxes) == len(labels) == 100


def test_a_higher_threshold_leaves_the_stronger_ones():
    pytest.importorskip("cv2")
    picture = picture_of((200, 100), (10, 10, 40, 40))
    picture.paste((95, 70, 80), (100, 10, 140, 40))
    counts = [
        len(load_detector("proposals", threshold=threshold)([picture])[0].boxes)
        for threshold in (0.3, 0.8, 0.99)
    ]
    assert counts == [2, 1, 0]


@pytest.mark.parametrize("size", [(1, 1), (1, 900), (900, 1), (3, 2), (64, 64)])
def test_a_plain_picture_has_none(detector, size):
    assert detector([Image.new("RGB", size, MARK)]) == [Detections((), (), ())]


def test_noise_and_no_pictures(detector):
    noise = np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8)
    (found,) = detector([Image.fromarray(noise)])
    assert len(found.boxes) <= 100
    assert detector([]) == []
