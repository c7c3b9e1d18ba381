"""The digits' splits."""

import builtins

import numpy as np
import pytest
from sklearn.datasets import load_digits

from mgllava.scenes import SPLITS, digits, sample_scene
from mgllava.scenes.digits import digit_picture, ink_bounds, pictures_of


def test_every_picture_belongs_to_exactly_one_split_and_is_listed_under_its_value():
    bunch = load_digits()
    owners = {}
    for split in SPLITS:
        for value in range(10):
            for picture in pictures_of(split, value):
                assert owners.setdefault(picture, split) == split
                assert bunch.target[picture] == value
    assert sorted(owners) == list(range(len(bunch.target)))


def test_no_two_splits_share_the_pixels_of_a_picture():
    seen = {}
    for split in SPLITS:
        for value in range(10):
            for picture in pictures_of(split, value):
                assert seen.setdefault(digit_picture(picture).tobytes(), split) == split


@pytest.mark.parametrize("split", SPLITS)
def test_each_split_has_its_share_of_each_digit(split):
    for value in range(10):
        total = sum(len(pictures_of(name, value)) for name in SPLITS)
        assert abs(len(pictures_of(split, value)) / total - SPLITS[split]) < 0.02


@pytest.mark.parametrize("split", SPLITS)
def test_scenes_show_pictures_of_their_own_split_alone(split):
    target = load_digits().target
    own = {picture for value in range(10) for picture in pictures_of(split, value)}
    shown = {
        (thing.picture, thing.digit) for index in range(300) for thing in sample_scene(split, index).digits
    }
    assert {picture for picture, _ in shown} <= own
    assert all(target[picture] == value for picture, value in shown)
    assert len({value for _, value in shown}) == 10


def test_ink_bounds_are_tight():
    for picture in range(50):
        left, top, right, bottom = ink_bounds(picture)
        ink = digit_picture(picture) * 16 >= 4
        assert not np.delete(ink, np.s_[top:bottom], axis=0).any()
        assert not np.delete(ink, np.s_[left:right], axis=1).any()
        assert ink[top].any()
        assert ink[bottom - 1].any()
        assert ink[:, left].any()
        assert ink[:, right - 1].any()


def test_an_unknown_split_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match="'dev'; expected one of train, validation, test"):
        pictures_of("dev", 3)


def test_without_scikit_learn_the_error_says_how_to_get_it(monkeypatch):
    real_import = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.startswith("sklearn"):
            raise ImportError("No module named 'sklearn'")
        return real_import(name, *args, **kwargs)

    digits._load.cache_clear()
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r"pip install 'mgllava\[train\]'"):
        digit_picture(0)
