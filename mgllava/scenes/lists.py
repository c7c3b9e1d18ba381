"""Requests to name all that a question of the task could be about: practice in finding, before there is counting."""

from collections.abc import Callable, Sequence
from random import Random

from .captions import describe
from .objects import COLOURS, PLACES, PLURALS, SHAPES
from .questions import Turn
from .scene import Scene, Thing

__all__ = ["LIST_FAMILIES", "MOST_LISTS", "list_things"]

Draw = tuple[str, list[Thing], Callable[[Thing], str]]  # request, what it is about, and how that is named


def _of_colour(scene: Scene, colour: str) -> Draw:
    things = [thing for thing in scene.shapes if thing.colour == colour]
    return f"name the {colour} shapes from left to right.", things, lambda thing: thing.kind


def _of_kind(scene: Scene, kind: str) -> Draw:
    things = [thing for thing in scene.shapes if thing.kind == kind]
    request = f"read the colour of the {PLURALS[kind]} from left to right."
    return request, things, lambda thing: thing.colour


def _at_place(scene: Scene, place: str) -> Draw:
    things = [thing for thing in scene.things if thing.place == place]
    return f"name what is at the {place}.", things, describe


def _in_frames(scene: Scene, _: str) -> Draw:
    things = [thing for thing in scene.things if thing.frame is not None]
    return "name what is in each frame from left to right.", things, describe


# Each with what it may be asked about.
LIST_FAMILIES: dict[str, tuple[Callable[[Scene, str], Draw], Sequence[str]]] = {
    "list_colour": (_of_colour, tuple(COLOURS)),
    "list_kind": (_of_kind, tuple(SHAPES)),
    "list_place": (_at_place, PLACES),
    "list_frames": (_in_frames, ("frame",)),
}
MOST_LISTS = sum(len(subjects) for _, subjects in LIST_FAMILIES.values())


def list_things(scene: Scene, count: int, seed: int = 0) -> list[Turn]:
    """Different requests, of each family once before any comes again; answers go from left to right, or are `nothing`.

    A question's answer (how many, which colour, is there one) follows from the list of what it is about, and lists
    teach a language model to find things by what they are: after 1,250 steps it counted 58% of colours, which lists
    name as questions do, and 30% of shapes, which they then named in the singular.

    Args:
        scene: what is asked about.
        count: how many, up to `MOST_LISTS`.
        seed: another one draws other requests.

    Raises:
        ValueError: `count` below 0 or beyond what there is to ask.
    """
    if not 0 <= count <= MOST_LISTS:
        raise ValueError(f"count is {count}; expected 0 to {MOST_LISTS}")
    rng = Random(f"lists {scene.split} {scene.index} {seed}")
    left = {family: rng.sample(subjects, len(subjects)) for family, (_, subjects) in LIST_FAMILIES.items()}
    turns: list[Turn] = []
    while len(turns) < count:
        families = [family for family in left if left[family]]
        for family in rng.sample(families, min(len(families), count - len(turns))):
            request, things, name = LIST_FAMILIES[family][0](scene, left[family].pop())
            things = sorted(things, key=lambda thing: thing.centre)
            answer = ", ".join(map(name, things)) if things else describe(None)
            turns.append(Turn(request, f"{answer}.", family, tuple(map(scene.things.index, things))))
    return turns
