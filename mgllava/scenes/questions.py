"""Questions about a scene, in families. Each has one right answer, and its words do not tell which.

Within a family, and given the question's exact text and the number of boxes, all answers are equally likely:
where a scene allows it the answer is drawn before the question, and elsewhere kinds, colours and digits are
exchangeable in `sample_scene`. (The length of what `read_digits` reads is uniform, and the digits are.)
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import permutations
from random import Random

from .objects import COLOURS, DIGIT, PLACES, PLURALS, SHAPES
from .scene import Scene, Thing

__all__ = ["CHANCE", "FAMILIES", "Turn", "ask"]

SIDE_GAP = 24.0  # between the centres of two things of which one lies left of the other, in pixels
COUNTS = (0, 1, 2, 3)


@dataclass(frozen=True)
class Turn:
    """One question and its answer.

    Attributes:
        question, answer: text in the words of `vocabulary.WORDS`.
        family: a name of `FAMILIES` or `CAPTION_FAMILIES`.
        things: indices, in the scene, of the things the answer hangs on.
    """

    question: str
    answer: str
    family: str
    things: tuple[int, ...]


Draw = tuple[str, str, list[Thing]]  # question, answer and the things it hangs on


def ask(scene: Scene, count: int = 6, families: Sequence[str] | None = None, seed: int = 0) -> list[Turn]:
    """Different questions, in random order, each family once before any comes again; the same for the same arguments.

    Asked in one conversation, an earlier answer can give away part of a later one: measure a model with one
    question to a conversation.

    Args:
        scene: what is asked about.
        count: how many. Fewer come back where a round through the families finds nothing new to ask.
        families: names to draw from, all of `FAMILIES` by default.
        seed: another one draws other questions.

    Raises:
        ValueError: unknown family, no family, or `count` below 1.
    """
    names = list(FAMILIES) if families is None else list(dict.fromkeys(families))
    for name in names:
        if name not in FAMILIES:
            raise ValueError(f"family is {name!r}; expected one of {', '.join(FAMILIES)}")
    if not names or count < 1:
        raise ValueError(f"count is {count} of {len(names)} families; expected at least 1 of each")
    rng = Random(f"questions {scene.split} {scene.index} {seed}")
    turns: dict[str, Turn] = {}
    while True:
        asked_before = len(turns)
        rng.shuffle(names)
        for name in names:
            drawn = FAMILIES[name](scene, rng)
            if drawn is not None and drawn[0] not in turns:
                question, answer, things = drawn
                turns[question] = Turn(question, answer, name, tuple(map(scene.things.index, things)))
            if len(turns) == count:
                return list(turns.values())
        if len(turns) == asked_before:
            return list(turns.values())


def exist_shape(scene: Scene, rng: Random) -> Draw:
    """Half of the answers are no, and for half of those both the colour and the kind occur, apart."""
    present = {(thing.colour, thing.kind) for thing in scene.shapes}
    if rng.random() < 0.5:
        colour, kind = rng.choice(sorted(present))
    else:
        colours, kinds = {colour for colour, _ in present}, {kind for _, kind in present}
        absent = [(colour, kind) for colour in COLOURS for kind in SHAPES if (colour, kind) not in present]
        both_occur = rng.random() < 0.5
        colour, kind = rng.choice(
            [pair for pair in absent if (pair[0] in colours and pair[1] in kinds) == both_occur]
        )
    answer = "yes" if (colour, kind) in present else "no"
    things = [thing for thing in scene.shapes if (thing.colour, thing.kind) == (colour, kind)]
    return f"is there {_article(colour)} {kind}?", answer, things


def exist_digit(scene: Scene, rng: Random) -> Draw:
    """Half of the answers are no."""
    present = {thing.digit for thing in scene.digits}
    is_present = rng.random() < 0.5
    value = rng.choice([value for value in range(10) if (value in present) == is_present])
    things = [thing for thing in scene.digits if thing.digit == value]
    return f"is there {'an' if value == 8 else 'a'} {value}?", "yes" if is_present else "no", things


def count_kind(scene: Scene, rng: Random) -> Draw:
    """None, one, two and three are equally frequent."""
    counts = Counter(thing.kind for thing in scene.shapes)
    wanted = rng.choice(COUNTS)
    kind = rng.choice([kind for kind in SHAPES if counts[kind] == wanted])
    things = [thing for thing in scene.shapes if thing.kind == kind]
    return f"how many {PLURALS[kind]} are there?", str(wanted), things


def count_colour(scene: Scene, rng: Random) -> Draw:
    """None, one, two and three are equally frequent. Digits and frames are no shapes."""
    counts = Counter(thing.colour for thing in scene.shapes)
    wanted = rng.choice(COUNTS)
    colour = rng.choice([colour for colour in COLOURS if counts[colour] == wanted])
    things = [thing for thing in scene.shapes if thing.colour == colour]
    return f"how many {colour} shapes are there?", str(wanted), things


def count_digits(scene: Scene, rng: Random) -> Draw:
    """One, two and three are equally frequent."""
    return "how many digits are there?", str(len(scene.digits)), scene.digits


def colour_at(scene: Scene, rng: Random) -> Draw | None:
    """Asked of places that hold one thing, a shape."""
    thing = _alone_at_a_place(scene, rng)
    if thing is None:
        return None
    return f"what colour is the shape at the {thing.place}?", thing.colour, [thing]


def shape_at(scene: Scene, rng: Random) -> Draw | None:
    """Asked of places that hold one thing, a shape."""
    thing = _alone_at_a_place(scene, rng)
    if thing is None:
        return None
    return f"what shape is at the {thing.place}?", thing.kind, [thing]


def digit_in_frame(scene: Scene, rng: Random) -> Draw:
    """Frames of one scene differ in colour."""
    thing = rng.choice([thing for thing in scene.digits if thing.frame is not None])
    return f"what digit is in the {thing.frame} frame?", str(thing.digit), [thing]


def read_digits(scene: Scene, rng: Random) -> Draw:
    """One to three digits, separated by spaces."""
    answer = " ".join(str(thing.digit) for thing in scene.digits)
    return "read the digits from left to right.", answer, scene.digits


def left_or_right(scene: Scene, rng: Random) -> Draw | None:
    """Asked of two things that their names single out and that lie well apart across the picture."""
    names = Counter(_name(thing) for thing in scene.things)
    single = [thing for thing in scene.things if names[_name(thing)] == 1]
    pairs = [
        pair for pair in permutations(single, 2) if abs(pair[0].centre[0] - pair[1].centre[0]) >= SIDE_GAP
    ]
    if not pairs:
        return None
    first, second = rng.choice(pairs)
    answer = "left" if first.centre[0] < second.centre[0] else "right"
    return f"is the {_name(first)} left or right of the {_name(second)}?", answer, [first, second]


FAMILIES: dict[str, Callable[[Scene, Random], Draw | None]] = {
    "exist_shape": exist_shape,
    "exist_digit": exist_digit,
    "count_kind": count_kind,
    "count_colour": count_colour,
    "count_digits": count_digits,
    "colour_at": colour_at,
    "shape_at": shape_at,
    "digit_in_frame": digit_in_frame,
    "read_digits": read_digits,
    "left_or_right": left_or_right,
}

# The best that words alone can score: the share of the likeliest answer to a question's text.
CHANCE: dict[str, float] = {
    "exist_shape": 1 / 2,
    "exist_digit": 1 / 2,
    "count_kind": 1 / len(COUNTS),
    "count_colour": 1 / len(COUNTS),
    "count_digits": 1 / 3,
    "colour_at": 1 / len(COLOURS),
    "shape_at": 1 / len(SHAPES),
    "digit_in_frame": 1 / 10,
    "read_digits": 1 / 3 / 10,
    "left_or_right": 1 / 2,
}


def _article(colour: str) -> str:
    return f"an {colour}" if colour[0] in "aeiou" else f"a {colour}"


def _name(thing: Thing) -> str:
    return str(thing.digit) if thing.kind == DIGIT else f"{thing.colour} {thing.kind}"


def _alone_at_a_place(scene: Scene, rng: Random) -> Thing | None:
    occupants = {place: [thing for thing in scene.things if thing.place == place] for place in PLACES}
    alone = [things[0] for things in occupants.values() if len(things) == 1 and things[0].kind != DIGIT]
    return rng.choice(alone) if alone else None
