"""Scores of answers about scenes."""

import pytest

from mgllava.scenes import FAMILIES, SceneDataset, evaluate
from mgllava.scenes.evaluate import evaluate_answers


def test_scores_count_exact_answers_by_family_and_size(monkeypatch):
    def right_about_colours(model, processor, items, show, detector):
        answers = []
        for item in items:
            (turn,) = item["turns"]
            answers.append(f" {turn.answer.upper()} " if turn.family == "colour_at" else "mauve")
        return answers

    monkeypatch.setattr(evaluate, "_answers", right_about_colours)
    scores = {score.group: score for score in evaluate_answers(None, None, num_scenes=150, batch_size=7)}
    families = [turn.family for item in SceneDataset("test", 150, turns=1) for turn in item["turns"]]
    assert scores["all"].questions == len(families)
    assert scores["all"].right == scores["colour_at"].right == families.count("colour_at") > 0
    assert scores["colour_at"].accuracy == 1
    assert scores["colour_at"].margin == 0
    assert scores["shape_at"].accuracy == 0
    for family in FAMILIES:
        assert scores[family].questions == families.count(family)
    sized = sum(scores[size].questions for size in ("small", "medium", "large"))
    assert 0 < sized <= len(families)
    half = scores["all"]
    assert half.margin == pytest.approx(1.96 * (half.accuracy * (1 - half.accuracy) / 150) ** 0.5)


def test_what_is_shown_must_be_known():
    with pytest.raises(
        ValueError, match="show is 'everything'; expected one of all, proposals, no_objects, low_res"
    ):
        evaluate_answers(None, None, show="everything")
