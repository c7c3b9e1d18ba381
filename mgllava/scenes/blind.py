"""What can be answered without looking: from a question's words and the number of boxes."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .detections import detect, things_of_boxes
from .questions import CHANCE, FAMILIES, ask
from .scene import sample_scene
from .vocabulary import split_words

__all__ = ["BlindScore", "measure_blind_scores"]


@dataclass(frozen=True)
class BlindScore:
    """Exact-match accuracy of blind models in one family, on test scenes.

    Attributes:
        family: its name, or `all` for the mean over families.
        questions: number of test questions.
        texts, answers: how many different ones occur.
        chance: what is possible by construction.
        constant: the commonest training answer of the exact text.
        classifier: a random forest on n-grams of the text and the number of boxes.
    """

    family: str
    questions: int
    texts: int
    answers: int
    chance: float
    constant: float
    classifier: float


Sample = tuple[str, int, str]  # question, number of boxes, answer


def measure_blind_scores(num_train: int = 10000, num_test: int = 4000) -> list[BlindScore]:
    """Fit blind models on training scenes and score them on test scenes, family by family and on average.

    Raises:
        ValueError: less than one scene.
    """
    if min(num_train, num_test) < 1:
        raise ValueError(f"{num_train} training and {num_test} test scenes; expected at least one of each")
    train, test = _samples("train", num_train), _samples("test", num_test)
    rows = []
    for family in FAMILIES:
        seen, unseen = train[family], test[family]
        rows.append(
            BlindScore(
                family=family,
                questions=len(unseen),
                texts=len({text for text, _, _ in seen + unseen}),
                answers=len({answer for _, _, answer in seen + unseen}),
                chance=CHANCE[family],
                constant=_constant_score(seen, unseen),
                classifier=_classifier_score(seen, unseen),
            )
        )
    overall = BlindScore(
        family="all",
        questions=sum(row.questions for row in rows),
        texts=sum(row.texts for row in rows),
        answers=len({answer for samples in (*train.values(), *test.values()) for _, _, answer in samples}),
        chance=float(np.mean([row.chance for row in rows])),
        constant=float(np.mean([row.constant for row in rows])),
        classifier=float(np.mean([row.classifier for row in rows])),
    )
    return [*rows, overall]


def _samples(split: str, num_scenes: int) -> dict[str, list[Sample]]:
    samples: dict[str, list[Sample]] = defaultdict(list)
    for index in range(num_scenes):
        scene = sample_scene(split, index)
        num_boxes = len(things_of_boxes(scene, detect(scene)))
        for turn in ask(scene, len(FAMILIES)):
            samples[turn.family].append((turn.question, num_boxes, turn.answer))
    return samples


def _constant_score(train: Sequence[Sample], test: Sequence[Sample]) -> float:
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for text, _, answer in train:
        answers[text][answer] += 1
    overall = Counter(answer for _, _, answer in train)
    guesses = ((answers.get(text, overall).most_common(1)[0][0], answer) for text, _, answer in test)
    return float(np.mean([guess == answer for guess, answer in guesses]))


def _classifier_score(train: Sequence[Sample], test: Sequence[Sample]) -> float:
    from scipy.sparse import csr_matrix, hstack
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.feature_extraction.text import CountVectorizer

    words = CountVectorizer(analyzer=_ngrams).fit([text for text, _, _ in train])

    def features(samples: Sequence[Sample]) -> csr_matrix:
        counts = csr_matrix([[num_boxes] for _, num_boxes, _ in samples], dtype=float)
        return hstack([words.transform([text for text, _, _ in samples]), counts], format="csr")

    forest = RandomForestClassifier(50, min_samples_leaf=25, random_state=0)
    forest.fit(features(train), [answer for _, _, answer in train])
    return float(forest.score(features(test), [answer for _, _, answer in test]))


def _ngrams(text: str) -> list[str]:
    words = split_words(text)
    return [" ".join(words[start : start + length]) for length in (1, 2, 3) for start in range(len(words))]
