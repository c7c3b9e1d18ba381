import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mgllava.objects.boxes import check_detections, detections_to_boxes, load_detections

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = json.loads((GOLDEN / "boxes.json").read_text())["cases"]


@pytest.mark.parametrize("case", CASES, ids=[f"{case['width']}x{case['height']}" for case in CASES])
def test_golden(case):
    settings = {
        key: case[key] for key in ("iou_threshold", "max_objects", "max_per_category", "high_res_size")
    }
    boxes, labels = detections_to_boxes(
        case["boxes"], case["labels"], case["scores"], image_size=(case["height"], case["width"]), **settings
    )
    assert boxes.dtype == torch.float32
    assert boxes.tolist() == case["out_boxes"]
    assert labels == case["out_labels"]


def test_one_box_per_label_near_the_text_limit():
    boxes, labels = detections_to_boxes(
        [[0, 0, 9, 9], [20, 0, 29, 9], [40, 0, 49, 9]],
        ["cat", "dog", "cat"],
        [0.3, 0.5, 0.9],
        image_size=(100, 100),
        high_res_size=100,
        best_per_label=True,
    )
    assert labels == ["cat", "dog"]
    assert boxes.tolist() == [[40, 0, 49, 9], [20, 0, 29, 9]]


def test_boxes_without_scores_keep_number_and_order():
    same = [[10, 10, 20, 20]] * 150
    boxes, labels = detections_to_boxes(same, image_size=(50, 100), high_res_size=100)
    assert boxes.tolist() == [[10, 35, 20, 45]] * 150
    assert labels == [""] * 150


def test_rounds_half_to_even_and_clips():
    boxes, _ = detections_to_boxes([[1, 3, 5, 300]], image_size=(100, 100), high_res_size=50)
    assert boxes.tolist() == [[0, 2, 2, 50]]


def test_labels_with_boxes_left_of_the_picture_do_not_suppress_each_other():
    boxes, labels = detections_to_boxes(
        [[-99, 0, -9, 50], [2, 0, 92, 50]], ["a", "b"], [0.9, 0.8], image_size=(100, 100), high_res_size=100
    )
    assert labels == ["b"]
    assert boxes.tolist() == [[2, 0, 92, 50]]


@pytest.mark.parametrize("boxes", [[], np.zeros((0, 4)), torch.zeros(0, 4), [[-30, -30, -10, -10]]])
def test_no_box_left_gives_the_zero_box(boxes):
    for scores in (None, [0.5] * len(boxes)):
        kept, labels = detections_to_boxes(boxes, ["x"] * len(boxes), scores, image_size=(10, 10))
        assert kept.tolist() == [[0, 0, 0, 0]]
        assert labels == []


@pytest.mark.parametrize(
    ("detections", "message"),
    [
        ({"boxes": [[0, 0, 1, 1], [5, 0, 1, 1]]}, r"boxes\[1\] is \[5.0, 0.0, 1.0, 1.0\].*x1 <= x2"),
        ({"boxes": [[0, 5, 1, 1]]}, r"boxes\[0\].*y1 <= y2"),
        ({"boxes": [[0, 0, math.nan, 1]]}, r"boxes\[0\].*finite"),
        ({"boxes": [[0, 0, math.inf, 1]]}, r"boxes\[0\].*finite"),
        ({"boxes": [[0, 0, 1e300, 1]]}, r"boxes\[0\].*finite"),
        ({"boxes": [[0, 0, 1]]}, r"boxes\[0\] is \[0, 0, 1\], expected \[x1, y1, x2, y2\]"),
        ({"boxes": [0, 0, 1, 1]}, r"boxes\[0\] is 0, expected"),
        ({"boxes": [[0, 0, 1, "a"]]}, "rows of numbers"),
        ({"boxes": [[0, 0, 1, 1]], "labels": []}, "1 boxes but 0 labels"),
        ({"boxes": [[0, 0, 1, 1]], "scores": [0.1, 0.2]}, "1 boxes but 2 scores"),
        ({"boxes": [[0, 0, 1, 1]], "scores": [math.nan]}, r"scores\[0\] is nan"),
        ({"boxes": [[0, 0, 1, 1]], "scores": ["high"]}, "list of numbers"),
    ],
)
def test_wrong_form(detections, message):
    with pytest.raises(ValueError, match=message):
        detections_to_boxes(**detections, image_size=(10, 10))


def test_wrong_image_size():
    with pytest.raises(ValueError, match="positive"):
        detections_to_boxes([], image_size=(0, 4))


coordinate = st.floats(-3000, 3000, width=32)
any_box = st.tuples(coordinate, coordinate, coordinate, coordinate)
legal_box = any_box.map(lambda b: (min(b[0], b[2]), min(b[1], b[3]), max(b[0], b[2]), max(b[1], b[3])))
side = st.integers(1, 2000)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(legal_box, st.sampled_from("abc"), st.floats(0, 1)), max_size=60),
    side,
    side,
    st.booleans(),
)
def test_any_legal_detections(detections, height, width, best):
    boxes, labels, scores = ([d[i] for d in detections] for i in range(3))
    kept, names = detections_to_boxes(
        boxes,
        labels,
        scores,
        image_size=(height, width),
        max_objects=10,
        max_per_category=4,
        best_per_label=best,
    )
    assert kept.shape[0] >= 1
    assert kept.dtype == torch.float32
    assert ((kept >= 0) & (kept <= 768) & (kept == kept.round())).all()
    assert (kept[:, :2] <= kept[:, 2:]).all()
    assert len(names) in (len(kept), 0)
    if best:
        assert len(set(names)) == len(names)
    else:
        assert len(kept) <= 12


@settings(deadline=None, max_examples=60)
@given(st.lists(any_box, max_size=20))
def test_inverted_boxes_are_refused(boxes):
    wrong = [index for index, (x1, y1, x2, y2) in enumerate(boxes) if x2 < x1 or y2 < y1]
    if not wrong:
        detections_to_boxes(boxes, image_size=(30, 40))
    else:
        with pytest.raises(ValueError, match=rf"boxes\[{wrong[0]}\]"):
            detections_to_boxes(boxes, image_size=(30, 40))


@settings(deadline=None, max_examples=20)
@given(
    st.integers(0, 3),
    st.sampled_from([math.nan, math.inf, -math.inf]),
    st.lists(legal_box, min_size=1, max_size=5),
)
def test_a_number_that_is_none_is_refused(place, value, boxes):
    spoilt = [list(box) for box in boxes]
    spoilt[-1][place] = value
    with pytest.raises(ValueError, match=rf"boxes\[{len(boxes) - 1}\]"):
        detections_to_boxes(spoilt, image_size=(30, 40))


def test_thousands_of_boxes():
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(5000, 2, generator=generator) * 900
    boxes = torch.cat([corners, corners + torch.rand(5000, 2, generator=generator) * 90], dim=1)
    scores = torch.rand(5000, generator=generator)
    labels = [f"label {index % 7}" for index in range(5000)]
    kept, names = detections_to_boxes(boxes, labels, scores, image_size=(1000, 800))
    assert len(kept) == len(names) == 140
    assert all(names.count(name) == 20 for name in set(names))


def test_torchvision_is_only_asked_for_detections(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "torchvision.ops", None)
    detections_to_boxes([[0, 0, 1, 1]], image_size=(10, 10))
    with pytest.raises(RuntimeError, match="torchvision"):
        detections_to_boxes([[0, 0, 1, 1]], scores=[0.5], image_size=(10, 10))


ENTRY = {"boxes": [[0, 0, 5, 5]], "labels": ["cat"], "scores": [0.5]}


def write(tmp_path, content):
    path = tmp_path / "boxes.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_load_one_object(tmp_path):
    assert load_detections(write(tmp_path, ENTRY)) == ENTRY
    assert load_detections(write(tmp_path, {"boxes": []})) == {"boxes": []}
    assert load_detections(GOLDEN / "end_to_end" / "detections.json")["labels"] == ["cup"] * 5


def test_load_from_a_list(tmp_path):
    other = {"boxes": [], "labels": [], "scores": []}
    path = write(tmp_path, [{"id": 42, **ENTRY}, {"id": "dog", **other}])
    assert load_detections(path, id=42) == load_detections(path, id="42") == ENTRY
    assert load_detections(path, image="pictures/000042.jpg") == ENTRY
    assert load_detections(path, image="dog.png") == other
    assert load_detections(write(tmp_path, [{"id": 7, **ENTRY}]), image="other.jpg") == ENTRY


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not a JSON file"),
        (3, "expected .* got int"),
        ({"box": []}, r"got keys \['box'\]"),
        ([], "say which one"),
        ([{"id": 1, **ENTRY}, {"id": 2, **ENTRY}], "2 entries; say which one"),
        ([3], "entry 0 is a int"),
        ({"boxes": [[5, 0, 1, 1]]}, r"boxes.json: boxes\[0\]"),
        ({"boxes": {"a": 1}}, r"boxes\[0\] is a"),
        ({"boxes": 3}, "expected a list"),
        ({**ENTRY, "labels": 3}, "expected a list"),
    ],
)
def test_load_wrong_form(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        load_detections(write(tmp_path, content))


def test_load_unknown_or_repeated_id(tmp_path):
    path = write(tmp_path, [{"id": 1, **ENTRY}, {"id": 1, **ENTRY}])
    with pytest.raises(ValueError, match="0 entries of id '3' among 2"):
        load_detections(path, id=3)
    with pytest.raises(ValueError, match="2 entries of id '1' among 2"):
        load_detections(path, id=1)
    with pytest.raises(FileNotFoundError):
        load_detections(tmp_path / "none.json")


def test_a_score_too_large_for_a_float_is_refused():
    with pytest.raises(ValueError, match="scores must be a list of numbers"):
        check_detections([[0, 0, 1, 1]], None, [10**400])


def test_a_mark_of_the_encoding_is_no_part_of_a_box_file(tmp_path):
    (tmp_path / "boxes.json").write_text('{"boxes": [[0, 0, 1, 1]]}', encoding="utf-8-sig")
    assert load_detections(tmp_path / "boxes.json") == {"boxes": [[0, 0, 1, 1]]}
