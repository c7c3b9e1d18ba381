"""Detections of scenes: faults as announced, and what the model's boxes show."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from torchvision.ops import box_iou

from mgllava.image_processing_mgllava import MGLlavaImageProcessor
from mgllava.objects.boxes import check_detections, detections_to_boxes
from mgllava.scenes import CANVAS, KINDS, Detections, detect, render, sample_scene, things_of_boxes
from mgllava.scenes.detections import DUPLICATE_SHARE, MISSED_SHARE

SCENES = [sample_scene("train", index) for index in range(600)]


def test_detections_are_the_same_again():
    assert [detect(scene) for scene in SCENES[:20]] == [detect(scene) for scene in SCENES[:20]]


def test_they_are_in_the_form_the_model_takes():
    for scene in SCENES:
        found = detect(scene).as_dict()
        boxes, labels, scores = check_detections(**found)
        assert boxes.min() >= 0
        assert boxes.max() <= CANVAS
        assert ((boxes[:, 2:] - boxes[:, :2]) > 2).all()
        assert set(labels) <= set(KINDS)
        assert scores.min() > 0
        assert scores.max() < 1
        assert len(boxes) <= 22


def _within(count: int, total: int, probability: float) -> bool:
    return abs(count / total - probability) < 4 * math.sqrt(probability * (1 - probability) / total)


def test_misses_duplicates_and_false_positives_are_as_frequent_as_announced():
    found = [detect(scene) for scene in SCENES]
    things = sum(len(scene.things) for scene in SCENES)
    sources = [Counter(source for source in one.sources if source is not None) for one in found]
    assert _within(things - sum(len(counts) for counts in sources), things, MISSED_SHARE)
    seen = [count for counts in sources for count in counts.values()]
    assert set(seen) == {1, 2}
    assert _within(seen.count(2), len(seen), DUPLICATE_SHARE)
    false = Counter(one.sources.count(None) for one in found)
    assert set(false) == {0, 1, 2}
    assert all(_within(count, len(found), 1 / 3) for count in false.values())


def test_small_things_are_missed_as_often_as_large_ones():
    missed, total = Counter(), Counter()
    for index in range(2500):
        scene = sample_scene("train", index)
        sources = set(detect(scene).sources)
        for number, thing in enumerate(scene.things):
            total[thing.size] += 1
            missed[thing.size] += number not in sources
    assert all(_within(missed[size], total[size], MISSED_SHARE) for size in total)


def test_boxes_lie_about_their_things_and_false_ones_touch_none():
    overlaps = []
    for scene in SCENES:
        found = detect(scene)
        truth = torch.tensor([thing.box for thing in scene.things])
        overlap = box_iou(torch.tensor(found.boxes), truth)
        for row, label, source in zip(overlap, found.labels, found.sources, strict=True):
            if source is None:
                assert row.max() == 0
            else:
                assert row.argmax() == source
                assert label == scene.things[source].kind
                overlaps.append(row[source].item())
    assert 0.75 < np.mean(overlaps) < 0.92
    assert min(overlaps) > 0.3


@pytest.mark.parametrize("high_res_size", [256, 768])
def test_things_of_boxes_follow_the_boxes_the_processor_makes(high_res_size):
    """Checked by overlap with the truth, on the boxes of the image processor itself."""
    processor = MGLlavaImageProcessor(high_res_size=high_res_size, low_res_size=high_res_size * 7 // 16)
    duplicates = 0
    for scene in SCENES[:60]:
        found = detect(scene)
        inputs = processor(render(scene), found.as_dict())
        boxes = inputs["boxes"][0]
        things = things_of_boxes(scene, found, high_res_size)
        assert len(things) == inputs["num_boxes"].item() == len(boxes)
        truth = torch.tensor([thing.box for thing in scene.things]) * high_res_size / CANVAS
        for row, thing in zip(box_iou(boxes, truth), things, strict=True):
            if thing is None:
                assert row.max() < 0.05
            else:
                assert scene.things[row.argmax()] is thing
        shown = [thing for thing in things if thing is not None]
        duplicates += len(shown) - len(set(shown))
    assert duplicates <= 3  # suppression leaves next to none


def test_selection_settings_reach_the_boxes():
    crowded = next(
        scene for scene in SCENES if len(set(detect(scene).sources)) < len(detect(scene).sources) - 2
    )
    found = detect(crowded)
    assert len(things_of_boxes(crowded, found, iou_threshold=1.0)) == len(found.boxes)
    few = things_of_boxes(crowded, found, max_objects=1, max_per_category=1)
    boxes, _ = detections_to_boxes(
        **found.as_dict(),
        image_size=(CANVAS, CANVAS),
        high_res_size=CANVAS,
        max_objects=1,
        max_per_category=1,
    )
    assert len(few) == len(boxes) == len(set(found.labels))


def test_no_detection_stands_for_one_empty_box():
    assert things_of_boxes(SCENES[0], Detections((), (), (), ())) == [None]
