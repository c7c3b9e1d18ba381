"""What every object detector is to the rest: pictures in, boxes in their own pixels out."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from PIL import Image

__all__ = ["Detections", "Detector"]


@dataclass(frozen=True)
class Detections:
    """The raw detections of one picture, before any selection.

    Attributes:
        boxes: x1, y1, x2, y2 in pixels of the upright picture, inside it, x1 <= x2 and y1 <= y2.
        labels: a name for each box.
        scores: between 0 and 1, one for each box.
    """

    boxes: tuple[tuple[float, float, float, float], ...]
    labels: tuple[str, ...]
    scores: tuple[float, ...]

    def as_dict(self) -> dict[str, Any]:
        """The form `MGLlavaProcessor` takes and annotation files hold."""
        return {
            "boxes": [list(box) for box in self.boxes],
            "labels": list(self.labels),
            "scores": list(self.scores),
        }


class Detector(Protocol):
    """An object detector.

    Attributes:
        name: what it is called on the command line.
        needs_tags: whether it looks for the names it is given (open vocabulary).
    """

    name: str
    needs_tags: bool

    def __call__(
        self, pictures: Sequence[Image.Image], tags: Sequence[Sequence[str]] | None = None
    ) -> list[Detections]:
        """Detect the objects of a batch of pictures.

        Args:
            pictures: upright RGB pictures, of any sizes.
            tags: for each picture the names to look for; None where `needs_tags` is False.

        Returns:
            One `Detections` for each picture, scores falling.

        Raises:
            ValueError: tags are missing, or not one list for each picture.
        """
        ...
