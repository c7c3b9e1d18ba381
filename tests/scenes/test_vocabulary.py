"""The closed set of words."""

from mgllava.scenes import (
    CAPTION_FAMILIES,
    FAMILIES,
    SPLITS,
    WORDS,
    ask,
    caption,
    detect,
    list_things,
    sample_scene,
    split_words,
    things_of_boxes,
)
from mgllava.scenes.lists import MOST_LISTS


def _texts():
    for split in SPLITS:
        for index in range(250):
            scene = sample_scene(split, index)
            things = things_of_boxes(scene, detect(scene))
            turns = ask(scene, len(FAMILIES)) + [
                caption(scene, things, family) for family in CAPTION_FAMILIES
            ]
            for turn in [*turns, *list_things(scene, MOST_LISTS)]:
                yield turn.question
                yield turn.answer


def test_all_text_is_made_of_these_words_and_all_words_are_used():
    used = {word for text in _texts() for word in split_words(text)}
    assert used == set(WORDS)


def test_no_word_stands_twice_and_there_are_60_to_100():
    assert len(set(WORDS)) == len(WORDS)
    assert 60 <= len(WORDS) <= 100


def test_nothing_of_a_text_is_lost_between_its_words():
    for text in ("is there an orange star?", "top left: red 7 in a blue frame, nothing.", "3 7 5"):
        assert "".join(split_words(text)) == text.replace(" ", "")
