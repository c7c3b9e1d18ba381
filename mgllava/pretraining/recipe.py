"""Recipes of stage 0."""

from dataclasses import dataclass, field
from typing import Any, Literal

from ..scenes.lists import MOST_LISTS
from ..training.recipe import RunSettings, check_value
from .language import VIEWS

__all__ = ["PretrainingRecipe"]


@dataclass(frozen=True, kw_only=True)
class PretrainingRecipe(RunSettings):
    """A run that makes towers or a language model, on scenes of `mgllava.scenes`.

    Every sample is a scene of its own: step i takes the scenes from `first + i * global_batch` on.

    Attributes:
        stage: 0.
        part: `towers` or `language_model`.
        max_steps: steps of the optimiser.
        vision: arguments of `CLIPVisionConfig`, the low-resolution tower; the language model's image tokens follow
            from `image_size` and `patch_size` too.
        architecture: timm's name of the ConvNeXt, the high-resolution tower.
        text: arguments of `LlamaConfig` (`part: language_model`).
        turns: questions to a scene (`part: language_model`).
        lists: requests to name things among the questions (`part: language_model`).
        views: what of a scene there are symbols of, `cells`, `boxes` or `both`, drawn for each scene
            (`part: language_model`).
        caption_share: share of the scenes that have a caption instead (`part: language_model`).
        start: folder of a finished run of the same part and sizes, whose weights this one begins with; None: none.
        first: number of the first training scene.
    """

    stage: Literal[0]
    part: Literal["towers", "language_model"]
    vision: dict[str, Any]
    architecture: str
    text: dict[str, Any] = field(default_factory=dict)
    turns: int = 6
    lists: int = 0
    views: list[str] = field(default_factory=lambda: list(VIEWS))
    caption_share: float = 0.0
    start: str | None = None
    first: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_value("max_steps", self.max_steps, self.max_steps is not None, "a number of steps")
        check_value("first", self.first, self.first >= 0, "at least 0")
        check_value("turns", self.turns, self.turns >= 1, "at least 1")
        check_value("lists", self.lists, 0 <= self.lists <= MOST_LISTS, f"0 to {MOST_LISTS}")
        check_value(
            "views", self.views, self.views and set(self.views) <= set(VIEWS), f"some of {', '.join(VIEWS)}"
        )
        check_value("caption_share", self.caption_share, 0 <= self.caption_share <= 1, "a share, 0 to 1")
        check_value(
            "text",
            self.text,
            bool(self.text) == (self.part == "language_model"),
            ("arguments of LlamaConfig for a language model, nothing for towers"),
        )
        for name in ("image_size", "patch_size"):
            check_value(
                f"vision.{name}", self.vision.get(name), type(self.vision.get(name)) is int, "a whole number"
            )
