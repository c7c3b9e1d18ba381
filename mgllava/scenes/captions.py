"""Captions, for towers and projectors to learn from before there are questions."""

from collections.abc import Sequence

from .objects import DIGIT, PLACES
from .questions import Turn
from .scene import Scene, Thing

__all__ = ["CAPTION_FAMILIES", "caption", "describe"]

# What asks for each caption.
CAPTION_FAMILIES: dict[str, str] = {
    "objects": "name the objects.",
    "objects_with_places": "name the objects and their places.",
    "places": "name what is at each place.",
}


def caption(scene: Scene, things: Sequence[Thing | None], family: str = "objects") -> Turn:
    """A caption and what asks for it.

    Args:
        scene: what is described.
        things: what each box shows, as `things_of_boxes` returns it: the captions `objects` and
            `objects_with_places` name every box in the order of the model's object tokens, `nothing` where
            there is only texture. The caption `places` goes through the named places instead, from the truth.
        family: a name of `CAPTION_FAMILIES`.

    Raises:
        ValueError: unknown family.
    """
    if family not in CAPTION_FAMILIES:
        raise ValueError(f"family is {family!r}; expected one of {', '.join(CAPTION_FAMILIES)}")
    if family == "places":
        answer, named = _places_caption(scene), list(scene.things)
    else:
        names = [describe(thing) for thing in things]
        if family == "objects_with_places":
            names = [
                name + (f" at the {thing.place}" if thing else "")
                for name, thing in zip(names, things, strict=True)
            ]
        answer, named = ", ".join(names) + ".", [thing for thing in things if thing]
    return Turn(CAPTION_FAMILIES[family], answer, family, tuple(map(scene.things.index, named)))


def describe(thing: Thing | None) -> str:
    """`red circle`, `white 7`, `white 7 in a red frame`, `nothing`."""
    if thing is None:
        return "nothing"
    name = f"{thing.colour} {thing.digit if thing.kind == DIGIT else thing.kind}"
    return (
        name
        if thing.frame is None
        else f"{name} in {'an' if thing.frame == 'orange' else 'a'} {thing.frame} frame"
    )


def _places_caption(scene: Scene) -> str:
    sentences = []
    for place in PLACES:
        things = sorted(
            (thing for thing in scene.things if thing.place == place), key=lambda thing: thing.centre
        )
        sentences.append(f"{place}: {', '.join(map(describe, things) if things else [describe(None)])}.")
    return " ".join(sentences)
