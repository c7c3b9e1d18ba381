"""The words of the scenes' questions, captions and answers: a closed set, for a tokenizer of whole words."""

import re

from .objects import COLOURS, KINDS, PLURALS

__all__ = ["WORDS", "split_words"]

WORDS: tuple[str, ...] = (
    *".,:?",
    *"0123456789",
    *COLOURS,
    *KINDS,
    *PLURALS.values(),
    *(
        "a",
        "an",
        "and",
        "are",
        "at",
        "bottom",
        "centre",
        "colour",
        "each",
        "frame",
        "from",
        "how",
        "in",
        "is",
    ),
    *(
        "left",
        "many",
        "name",
        "no",
        "nothing",
        "objects",
        "of",
        "or",
        "places",
        "place",
        "read",
        "right",
        "shape",
    ),
    *("shapes", "the", "their", "there", "to", "top", "what", "yes"),
)


def split_words(text: str) -> list[str]:
    """The words of a text, digits and punctuation on their own."""
    return re.findall(r"[a-z]+|[^a-z\s]", text)
