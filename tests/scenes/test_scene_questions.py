"""Right answers, and no way to guess them."""

import math
from collections import Counter, defaultdict

import pytest
import scene_oracle

from mgllava.scenes import CHANCE, FAMILIES, SHAPES, ask, detect, sample_scene, things_of_boxes
from mgllava.scenes.blind import measure_blind_scores

NUM_SCENES = 4000


@pytest.fixture(scope="module")
def asked():
    """(scene, turn) of many training scenes."""
    scenes = [sample_scene("train", index) for index in range(NUM_SCENES)]
    return [(scene, turn) for scene in scenes for turn in ask(scene, len(FAMILIES))]


@pytest.fixture(scope="module")
def num_boxes(asked):
    """How many boxes the model gets, by the scene's id."""
    scenes = {scene.id: scene for scene, _ in asked}
    return {id: len(things_of_boxes(scene, detect(scene))) for id, scene in scenes.items()}


def _shares(answers: list[str]) -> dict[str, float]:
    return {answer: count / len(answers) for answer, count in Counter(answers).items()}


def _bound(probability: float, count: int) -> float:
    """Four standard errors of a share out of so many."""
    return 4 * math.sqrt(probability * (1 - probability) / count)


def test_answers_are_what_the_truth_says(asked):
    for scene, turn in asked:
        assert turn.answer == scene_oracle.answer(scene, turn.question), (scene.id, turn)


@pytest.mark.parametrize("split", ["validation", "test"])
def test_answers_are_right_in_the_other_splits(split):
    for index in range(500):
        scene = sample_scene(split, index)
        for turn in ask(scene, len(FAMILIES)):
            assert turn.answer == scene_oracle.answer(scene, turn.question), (scene.id, turn)


def test_nearly_every_scene_can_be_asked_every_family(asked):
    counts = Counter(turn.family for _, turn in asked)
    assert set(counts) == set(FAMILIES)
    assert min(counts.values()) > 0.99 * NUM_SCENES


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "read_digits"])
def test_answers_are_equally_frequent_in_a_family_and_for_each_text(asked, family):
    by_text = defaultdict(list)
    for _, turn in asked:
        if turn.family == family:
            by_text[turn.question].append(turn.answer)
    pooled = _shares([answer for answers in by_text.values() for answer in answers])
    assert len(pooled) == round(1 / CHANCE[family])
    total = sum(map(len, by_text.values()))
    for answer, share in pooled.items():
        assert abs(share - CHANCE[family]) < _bound(CHANCE[family], total), (answer, share)
    for text, answers in by_text.items():
        if len(answers) >= 50:
            for answer, share in _shares(answers).items():
                # Hundreds of shares are looked at here: a little more room than four standard errors.
                assert abs(share - CHANCE[family]) < 1.25 * _bound(CHANCE[family], len(answers)), (
                    text,
                    answer,
                )


def test_read_digits_has_one_two_and_three_digits_equally_often_and_no_favourites(asked):
    answers = [turn.answer.split() for _, turn in asked if turn.family == "read_digits"]
    for share in _shares([str(len(answer)) for answer in answers]).values():
        assert abs(share - 1 / 3) < _bound(1 / 3, len(answers))
    digits = [digit for answer in answers for digit in answer]
    for share in _shares(digits).values():
        assert abs(share - 1 / 10) < _bound(1 / 10, len(digits))
    assert CHANCE["read_digits"] == pytest.approx(1 / 30)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "read_digits"])
def test_the_number_of_boxes_says_nothing_about_the_answer(asked, num_boxes, family):
    by_count = defaultdict(list)
    for scene, turn in asked:
        if turn.family == family:
            by_count[num_boxes[scene.id]].append(turn.answer)
    assert len(by_count) > 3
    for count, answers in by_count.items():
        if len(answers) >= 100:
            for answer, share in _shares(answers).items():
                assert abs(share - CHANCE[family]) < 1.25 * _bound(CHANCE[family], len(answers)), (
                    count,
                    answer,
                )


def test_half_of_the_absent_shapes_have_a_colour_and_a_kind_that_occur_apart(asked):
    both = []
    for scene, turn in asked:
        if turn.family == "exist_shape" and turn.answer == "no":
            *_, colour, kind = turn.question.rstrip("?").split()
            colours, kinds = ({getattr(thing, name) for thing in scene.shapes} for name in ("colour", "kind"))
            both.append(colour in colours and kind in kinds)
    assert abs(sum(both) / len(both) - 0.5) < _bound(0.5, len(both))


def test_a_good_share_of_questions_hangs_on_small_things(asked):
    small = defaultdict(list)
    for scene, turn in asked:
        if turn.things:
            small[turn.family].append(any(scene.things[index].size == "small" for index in turn.things))
    shares = {family: sum(values) / len(values) for family, values in small.items()}
    assert min(shares.values()) > 0.4, shares


def test_the_things_of_a_turn_are_those_its_answer_hangs_on(asked):
    for scene, turn in asked[:2000]:
        things = [scene.things[index] for index in turn.things]
        if turn.family in ("exist_shape", "exist_digit"):
            assert bool(things) == (turn.answer == "yes")
        elif turn.family.startswith("count"):
            assert len(things) == int(turn.answer)
        elif turn.family in ("digit_in_frame", "read_digits"):
            assert " ".join(str(thing.digit) for thing in things) == turn.answer
        elif turn.family == "left_or_right":
            assert len(things) == 2
        else:
            assert [getattr(things[0], {"colour_at": "colour", "shape_at": "kind"}[turn.family])] == [
                turn.answer
            ]


def test_questions_are_the_same_again_and_differ_with_the_seed():
    scene = sample_scene("train", 5)
    assert ask(scene, 6) == ask(scene, 6)
    assert ask(scene, 10) != ask(scene, 10, seed=1)
    assert len({turn.family for turn in ask(scene, 6)}) == 6


def test_families_come_again_after_all_others_and_no_question_twice():
    scene = sample_scene("train", 5)
    assert ask(scene, 24)[:6] == ask(scene, 6)
    turns = ask(scene, 24)
    assert len({turn.question for turn in turns}) == len(turns) == 24
    assert {turn.family for turn in turns[:10]} == set(FAMILIES)
    (reading,) = ask(scene, 5, ["read_digits"])  # there is but one such question
    assert reading.family == "read_digits"


@pytest.mark.parametrize("family", FAMILIES)
def test_one_family_alone_can_be_asked(family):
    turns = [turn for index in range(5) for turn in ask(sample_scene("test", index), 1, [family])]
    assert turns
    assert {turn.family for turn in turns} == {family}


@pytest.mark.parametrize(
    ("count", "families", "message"),
    [
        (0, None, "count is 0 of 10 families; expected at least 1"),
        (1, [], "count is 1 of 0 families; expected at least 1"),
        (1, ["weather"], "family is 'weather'; expected one of exist_shape"),
    ],
)
def test_bad_arguments_are_refused(count, families, message):
    with pytest.raises(ValueError, match=message):
        ask(sample_scene("train", 0), count, families)


def test_blind_models_score_near_chance():
    rows = {row.family: row for row in measure_blind_scores(2000, 1000)}
    assert set(rows) == {*FAMILIES, "all"}
    for family in FAMILIES:
        row = rows[family]
        assert row.chance == CHANCE[family]
        for score in (row.constant, row.classifier):
            assert abs(score - row.chance) < _bound(row.chance, row.questions) + 0.01, row
    assert rows["all"].questions > 9900
    assert max(rows["all"].constant, rows["all"].classifier) < rows["all"].chance + 0.015
    assert rows["exist_shape"].texts == 8 * len(SHAPES)


def test_blind_scores_need_scenes():
    with pytest.raises(ValueError, match="0 training and 5 test scenes"):
        measure_blind_scores(0, 5)
