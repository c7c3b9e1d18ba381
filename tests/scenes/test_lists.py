"""Requests to name things."""

import pytest

from mgllava.scenes import COLOURS, LIST_FAMILIES, PLACES, SHAPES, describe, list_things, sample_scene
from mgllava.scenes.lists import MOST_LISTS


def _expected(scene, turn):
    """The answer found another way: by the words of the request."""
    things = sorted(scene.things, key=lambda thing: thing.centre[0])
    shapes = [thing for thing in things if thing.digit is None]
    if turn.family == "list_colour":
        colour = turn.question.removeprefix("name the ").removesuffix(" shapes from left to right.")
        assert colour in COLOURS
        return [thing.kind for thing in shapes if thing.colour == colour]
    if turn.family == "list_kind":
        plural = turn.question.removeprefix("read the colour of the ").removesuffix(" from left to right.")
        kind = next(kind for kind in SHAPES if plural in (f"{kind}s", f"{kind}es"))
        return [thing.colour for thing in shapes if thing.kind == kind]
    if turn.family == "list_frames":
        return [describe(thing) for thing in things if thing.frame]
    place = turn.question.removeprefix("name what is at the ").removesuffix(".")
    assert place in PLACES
    return [describe(thing) for thing in things if thing.place == place]


def test_lists_name_all_that_is_asked_for_from_left_to_right():
    families, empty = set(), 0
    for index in range(100):
        scene = sample_scene("train", index)
        turns = list_things(scene, 6)
        assert len({turn.question for turn in turns}) == 6
        assert {turn.family for turn in turns[:4]} == set(LIST_FAMILIES)
        for turn in turns:
            families.add(turn.family)
            names = _expected(scene, turn)
            empty += not names
            assert turn.answer == (", ".join(names) or "nothing") + "."
            assert len(turn.things) == len(names)
    assert families == set(LIST_FAMILIES)
    assert 50 < empty < 300


def test_the_same_arguments_give_the_same_lists_and_seeds_others():
    scene = sample_scene("train", 1)
    assert list_things(scene, 5, seed=3) == list_things(scene, 5, seed=3)
    assert list_things(scene, 5, seed=3) != list_things(scene, 5, seed=4)
    assert list_things(scene, 0) == []
    assert len({turn.question for turn in list_things(scene, MOST_LISTS)}) == MOST_LISTS


@pytest.mark.parametrize("count", [-1, 25])
def test_no_more_lists_than_there_are_names(count):
    with pytest.raises(ValueError, match=f"count is {count}; expected 0 to 24"):
        list_things(sample_scene("train", 0), count)
