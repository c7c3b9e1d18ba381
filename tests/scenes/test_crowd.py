"""Crowded scenes."""

import pytest

from mgllava.scenes.crowd import CROWD_SIDES, sample_crowd
from mgllava.scenes.digits import pictures_of
from mgllava.scenes.objects import CANVAS


@pytest.mark.parametrize("rows", CROWD_SIDES)
def test_every_cell_holds_one_whole_thing(rows):
    side = CANVAS / rows
    for index in range(20):
        crowd = sample_crowd("train", index, rows)
        cells = set()
        for thing in crowd.things:
            column, row = (int(value // side) for value in thing.centre)
            cells.add((column, row))
            x1, y1, x2, y2 = thing.box
            assert column * side < x1 < x2 < (column + 1) * side
            assert row * side < y1 < y2 < (row + 1) * side
        assert len(cells) == len(crowd.things) == rows**2
        assert crowd == sample_crowd("train", index, rows)


def test_all_sizes_occur_and_digits_keep_to_their_split():
    for split in ("train", "test"):
        things = [thing for index in range(10) for thing in sample_crowd(split, index, 6).things]
        assert {thing.size for thing in things} >= {"small", "medium"}
        digits = [thing for thing in things if thing.digit is not None]
        assert 0.4 < len(digits) / len(things) < 0.6
        assert all(thing.picture in pictures_of(split, thing.digit) for thing in digits)
        assert all(thing.frame != thing.colour for thing in digits)


def test_bad_arguments():
    with pytest.raises(ValueError, match="split"):
        sample_crowd("tests", 0, 6)
    with pytest.raises(ValueError, match="index is -1"):
        sample_crowd("train", -1, 6)
    with pytest.raises(ValueError, match="rows are 20; expected one of"):
        sample_crowd("train", 0, 20)
