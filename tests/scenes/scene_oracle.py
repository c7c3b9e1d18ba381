"""Answers worked out anew from a scene's truth as plain numbers; shares no code with the questions."""

import re
from dataclasses import asdict

SHAPE_NAMES = {"circle", "square", "triangle", "star", "cross", "ring"}
ROWS = {"top": 0, "bottom": 2}
COLUMNS = {"left": 0, "right": 2}


def truth(scene) -> list[dict]:
    return asdict(scene)["things"]


def answer(scene, question: str) -> str:
    """The answer to a question; AssertionError if it has none or several."""
    things = truth(scene)
    shapes = [thing for thing in things if thing["kind"] in SHAPE_NAMES]
    digits = [thing for thing in things if thing["digit"] is not None]
    assert len(shapes) + len(digits) == len(things)

    if found := re.fullmatch(r"is there an? (\w+) (\w+)\?", question):
        colour, kind = found.groups()
        return _yes_no(any(thing["colour"] == colour and thing["kind"] == kind for thing in shapes))
    if found := re.fullmatch(r"is there an? (\d)\?", question):
        return _yes_no(any(thing["digit"] == int(found[1]) for thing in digits))
    if question == "how many digits are there?":
        return str(len(digits))
    if found := re.fullmatch(r"how many (\w+) shapes are there\?", question):
        return str(len([thing for thing in shapes if thing["colour"] == found[1]]))
    if found := re.fullmatch(r"how many (\w+?)(?:es|s) are there\?", question):
        [kind] = [name for name in SHAPE_NAMES if name in (found[1], found[1] + "e")]
        return str(len([thing for thing in shapes if thing["kind"] == kind]))
    if found := re.fullmatch(r"what (colour is the shape|shape is) at the (.+)\?", question):
        [thing] = [thing for thing in things if _is_at(thing, found[2])]
        assert thing in shapes
        return thing["colour"] if found[1].startswith("colour") else thing["kind"]
    if found := re.fullmatch(r"what digit is in the (\w+) frame\?", question):
        [thing] = [thing for thing in digits if thing["frame"] == found[1]]
        return str(thing["digit"])
    if question == "read the digits from left to right.":
        columns = [thing["centre"][0] for thing in digits]
        assert all(abs(a - b) > 15 for i, a in enumerate(columns) for b in columns[:i])
        return " ".join(
            str(digit) for _, digit in sorted(zip(columns, [t["digit"] for t in digits], strict=True))
        )
    if found := re.fullmatch(r"is the (.+) left or right of the (.+)\?", question):
        first, second = (_named(things, name) for name in found.groups())
        distance = first["centre"][0] - second["centre"][0]
        assert abs(distance) > 15
        return "left" if distance < 0 else "right"
    raise AssertionError(f"no rule for {question!r}")


def _yes_no(value: bool) -> str:
    return "yes" if value else "no"


def _is_at(thing: dict, place: str) -> bool:
    """Whether the whole box lies in the named ninth of a picture of 256 pixels."""
    words = place.split()
    column = next((COLUMNS[word] for word in words if word in COLUMNS), 1)
    row = next((ROWS[word] for word in words if word in ROWS), 1)
    x1, y1, x2, y2 = thing["box"]
    side = 256 / 3
    inside = side * column < x1 and x2 < side * (column + 1) and side * row < y1 and y2 < side * (row + 1)
    # A thing across a border would make the place ambiguous.
    centre = ((x1 + x2) / 2, (y1 + y2) / 2)
    centred = side * column < centre[0] < side * (column + 1) and side * row < centre[1] < side * (row + 1)
    assert inside == centred, (thing, place)
    return inside


def _named(things: list[dict], name: str) -> dict:
    words = name.split()
    if len(words) == 1:
        [thing] = [thing for thing in things if thing["digit"] == int(words[0])]
    else:
        [thing] = [
            thing for thing in things if thing["digit"] is None and [thing["colour"], thing["kind"]] == words
        ]
    return thing
