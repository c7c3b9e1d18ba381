"""Captions name what the model gets, in its order."""

import re

import pytest

from mgllava.scenes import (
    CAPTION_FAMILIES,
    COLOURS,
    PLACES,
    SHAPES,
    caption,
    describe,
    detect,
    sample_scene,
    things_of_boxes,
)

SCENES = [sample_scene("validation", index) for index in range(150)]
NAME = re.compile(
    rf"(?P<colour>{'|'.join(COLOURS)}) (?P<kind>{'|'.join(SHAPES)}|\d)(?: in an? (?P<frame>{'|'.join(COLOURS)}) frame)?"
)


def _matches(name: str, thing) -> bool:
    if thing is None:
        return name == "nothing"
    found = NAME.fullmatch(name)
    kind = thing.kind if thing.digit is None else str(thing.digit)
    return (found["colour"], found["kind"], found["frame"]) == (thing.colour, kind, thing.frame)


def test_objects_are_named_in_the_order_of_the_boxes():
    nothing = 0
    for scene in SCENES:
        things = things_of_boxes(scene, detect(scene))
        turn = caption(scene, things)
        names = turn.answer.removesuffix(".").split(", ")
        assert turn.question == "name the objects."
        assert len(names) == len(things)
        assert all(_matches(name, thing) for name, thing in zip(names, things, strict=True))
        assert [scene.things[index] for index in turn.things] == [thing for thing in things if thing]
        nothing += names.count("nothing")
    assert nothing > 50


def test_objects_with_places_add_where_each_lies():
    for scene in SCENES:
        things = things_of_boxes(scene, detect(scene))
        names = caption(scene, things, "objects_with_places").answer.removesuffix(".").split(", ")
        for name, thing in zip(names, things, strict=True):
            if thing is None:
                assert name == "nothing"
            else:
                shape, place = name.split(" at the ")
                assert _matches(shape, thing)
                assert place == thing.place


def test_places_go_through_the_truth_whatever_was_detected():
    for scene in SCENES:
        turn = caption(scene, [], "places")
        sentences = turn.answer.removesuffix(".").split(". ")
        assert [sentence.split(": ")[0] for sentence in sentences] == list(PLACES)
        named = 0
        for sentence in sentences:
            place, names = sentence.split(": ")
            there = sorted(
                (thing for thing in scene.things if thing.place == place), key=lambda thing: thing.centre[0]
            )
            assert all(
                _matches(name, thing) for name, thing in zip(names.split(", "), there or [None], strict=True)
            )
            named += len(there)
        assert named == len(scene.things) == len(turn.things)


def test_an_orange_frame_takes_an():
    framed = [thing for scene in SCENES for thing in scene.digits if thing.frame]
    for thing in framed:
        assert (" in an " in describe(thing)) == (thing.frame == "orange")


def test_an_unknown_caption_is_refused():
    with pytest.raises(ValueError, match=f"family is 'poem'; expected one of {', '.join(CAPTION_FAMILIES)}"):
        caption(SCENES[0], [None], "poem")
