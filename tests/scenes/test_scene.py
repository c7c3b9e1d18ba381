"""What scenes hold and what their pictures show."""

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from mgllava.scenes import CANVAS, COLOURS, SHAPES, SPLITS, render, sample_scene
from mgllava.scenes.objects import PLACES, SIZES
from mgllava.scenes.textures import TEXTURES

SCENES = [sample_scene("train", index) for index in range(400)]


def test_a_scene_is_a_function_of_split_and_index():
    names = [(split, index) for split in SPLITS for index in (0, 1, 10**9)]
    once = {name: (sample_scene(*name), render(sample_scene(*name)).tobytes()) for name in names}
    for name in reversed(names):
        scene = sample_scene(*name)
        assert (scene, render(scene).tobytes()) == once[name]
    assert len({picture for _, picture in once.values()}) == len(names)


@pytest.mark.parametrize(
    ("split", "index", "message"),
    [("training", 0, "split is 'training'"), ("test", -1, "index is -1; expected 0 or more")],
)
def test_bad_names_are_refused(split, index, message):
    with pytest.raises(ValueError, match=message):
        sample_scene(split, index)


def test_things_keep_apart_and_within_their_places():
    for scene in SCENES:
        for thing in scene.things:
            x1, y1, x2, y2 = thing.box
            column, row = PLACES.index(thing.place) % 3, PLACES.index(thing.place) // 3
            side = CANVAS / 3
            assert side * column + 3 < x1 < x2 < side * (column + 1) - 3
            assert side * row + 3 < y1 < y2 < side * (row + 1) - 3
            for other in scene.things:
                if other is not thing:
                    gap_x = max(other.box[0] - x2, x1 - other.box[2])
                    gap_y = max(other.box[1] - y2, y1 - other.box[3])
                    assert max(gap_x, gap_y) > 5


def test_frames_differ_in_colour_from_each_other_and_from_the_ink():
    for scene in SCENES:
        frames = [thing.frame for thing in scene.digits if thing.frame]
        assert frames
        assert len(set(frames)) == len(frames)
        assert all(thing.frame != thing.colour for thing in scene.digits)


def test_every_kind_colour_size_place_digit_and_texture_occurs():
    things = [thing for scene in SCENES for thing in scene.things]
    assert {thing.kind for thing in things} == {*SHAPES, "digit"}
    assert (
        {thing.colour for thing in things} == {thing.frame for thing in things if thing.frame} == set(COLOURS)
    )
    assert {thing.size for thing in things} == set(SIZES)
    assert {thing.place for thing in things} == set(PLACES)
    assert {thing.digit for thing in things} == {None, *range(10)}
    assert {scene.background.texture for scene in SCENES} == set(TEXTURES)


def test_the_number_of_things_says_nothing_about_how_many_are_digits():
    counts = Counter(
        (len(scene.things), len(scene.digits)) for scene in (sample_scene("train", i) for i in range(6000))
    )
    for total in (9, 10):
        digits = [counts[total, number] for number in (1, 2, 3)]
        expected = sum(digits) / 3
        assert all(abs(count - expected) < 4 * math.sqrt(expected) for count in digits)


def test_a_thing_changes_the_picture_inside_its_box_and_nearly_to_its_edges():
    checked = Counter()
    for scene in SCENES[:40]:
        whole = np.asarray(render(scene), np.int16)
        for index, thing in enumerate(scene.things):
            others = scene.things[:index] + scene.things[index + 1 :]
            without = np.asarray(render(replace(scene, things=others)), np.int16)
            changed = np.abs(whole - without).max(axis=-1)
            rows, columns = np.nonzero(changed > 40)
            x1, y1, x2, y2 = thing.box
            # The blur of a digit's scaled-up ink reaches a little over its bounds, or stays within them.
            slack = 1.0 if thing.kind != "digit" or thing.frame else 1.0 + 0.15 * thing.height
            assert columns.min() + 1 >= x1 - slack / 2
            assert columns.max() <= x2 + slack / 2
            assert rows.min() + 1 >= y1 - slack / 2
            assert rows.max() <= y2 + slack / 2
            assert columns.min() - x1 < 1 + slack
            assert x2 - columns.max() - 1 < 1 + slack
            assert rows.min() - y1 < 1 + slack
            assert y2 - rows.max() - 1 < 1 + slack
            checked[thing.kind] += 1
    assert set(checked) == {*SHAPES, "digit"}


def test_shapes_stand_out_from_the_background_in_their_colour():
    """Small ones too: the pixel nearest to the colour is close to it, and no background pixel comes near it."""
    for scene in SCENES[:60]:
        pixels = np.asarray(render(scene), np.float32)
        bare = np.asarray(render(replace(scene, things=())), np.float32)
        for thing in scene.shapes:
            x1, y1, x2, y2 = (round(edge) for edge in thing.box)
            colour = np.array(COLOURS[thing.colour])
            nearest = np.linalg.norm(pixels[y1:y2, x1:x2] - colour, axis=-1).min()
            background = np.linalg.norm(bare[y1:y2, x1:x2] - colour, axis=-1).min()
            assert nearest < 30
            assert background > 60


def test_colours_are_far_from_each_other():
    names = list(COLOURS)
    for index, name in enumerate(names):
        for other in names[:index]:
            distance = np.linalg.norm(np.subtract(COLOURS[name], COLOURS[other]))
            assert distance > 80, (name, other, distance)
