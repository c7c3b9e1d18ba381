"""Scenes as a map-style dataset: pictures, detections and turns made when they are asked for."""

from collections.abc import Sequence
from random import Random
from typing import Any

from torch.utils.data import Dataset

from .captions import CAPTION_FAMILIES, caption
from .detections import detect, things_of_boxes
from .digits import check_split
from .objects import CANVAS
from .questions import FAMILIES, Turn, ask
from .render import render
from .scene import Scene, Thing, sample_scene

__all__ = ["SceneDataset", "check_families", "turns_of"]


class SceneDataset(Dataset):
    """Scenes `first` to `first + num_scenes - 1` of a split, without files; the same for the same arguments.

    An item is a dictionary: `id`; `image`, a PIL picture; `detections` as `MGLlavaProcessor` takes them;
    `turns`, a list of `Turn`; `things`, what each box shows, in the order of the model's object tokens (`None`
    for texture).

    Args:
        split: `train`, `validation` or `test`.
        num_scenes: length of the dataset. Scenes are free: take other ones in the next epoch rather than these
            again.
        turns: questions to a scene, as `ask` draws them; or captions, at most one of a family.
        families: families of questions, or of captions, to draw from; all questions by default.
        first: number of the first scene.
        seed: another one asks other questions about the same scenes.
        high_res_size: side of the model's canvas, on which boxes are selected for captions and `things`.

    Raises:
        ValueError: unknown split or family, questions and captions mixed, or numbers out of range.
    """

    def __init__(
        self,
        split: str,
        num_scenes: int,
        *,
        turns: int = 6,
        families: Sequence[str] = tuple(FAMILIES),
        first: int = 0,
        seed: int = 0,
        high_res_size: int = CANVAS,
    ) -> None:
        check_split(split)
        check_families(families, turns)
        if num_scenes < 1 or first < 0:
            raise ValueError(
                f"num_scenes is {num_scenes} and first is {first}; expected at least one scene, numbers from 0 up"
            )
        if high_res_size < 1:
            raise ValueError(f"high_res_size is {high_res_size}; expected at least 1 pixel")
        self.split = split
        self.num_scenes = num_scenes
        self.turns = turns
        self.families = tuple(families)
        self.first = first
        self.seed = seed
        self.high_res_size = high_res_size

    def __len__(self) -> int:
        return self.num_scenes

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self.num_scenes:
            raise IndexError(f"index is {index}; the dataset has {self.num_scenes} scenes")
        scene = sample_scene(self.split, self.first + index)
        detections = detect(scene)
        things = things_of_boxes(scene, detections, self.high_res_size)
        return {
            "id": scene.id,
            "image": render(scene),
            "detections": detections.as_dict(),
            "turns": turns_of(scene, things, self.families, self.turns, self.seed),
            "things": things,
        }


def turns_of(
    scene: Scene, things: Sequence[Thing | None], families: Sequence[str], count: int, seed: int = 0
) -> list[Turn]:
    """Questions about the scene, or captions of it, whichever the families are; see `SceneDataset`."""
    if families[0] in FAMILIES:
        return ask(scene, count, families, seed)
    drawn = Random(f"captions {scene.split} {scene.index} {seed}").sample(list(families), count)
    return [caption(scene, things, family) for family in drawn]


def check_families(families: Sequence[str], turns: int) -> None:
    """Raise ValueError unless the families are all questions or all captions, and enough for so many turns."""
    if (
        isinstance(families, str)
        or not families
        or not (set(families) <= set(FAMILIES) or set(families) <= set(CAPTION_FAMILIES))
    ):
        raise ValueError(
            f"families are {families!r}; expected a list out of {', '.join(FAMILIES)} or out of "
            f"{', '.join(CAPTION_FAMILIES)}"
        )
    if turns < 1 or (set(families) <= set(CAPTION_FAMILIES) and turns > len(set(families))):
        raise ValueError(f"turns is {turns}; expected at least 1, of captions at most one of each family")
