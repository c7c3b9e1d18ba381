"""What the detectors with weights share: loading, and checks of the input."""

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig

from ..detector import Detections
from .output import to_detections

__all__ = ["PretrainedDetector"]

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


class PretrainedDetector(ABC):
    """A detector on a model of transformers. Subclasses say which, and how a batch goes through it.

    Args:
        name: what it is called on the command line.
        checkpoint: folder or hub id.
        device: where it runs.
        threshold: detections scored at or below it are left out; `default_threshold` where it is None.

    Raises:
        ValueError: the checkpoint is of another architecture.
        OSError: the weights are neither here nor can they be downloaded, or are damaged.
    """

    needs_tags: ClassVar[bool]
    default_threshold: ClassVar[float]
    auto_model: ClassVar[Any]
    auto_processor: ClassVar[Any]
    model_types: ClassVar[tuple[str, ...]]

    def __init__(
        self,
        name: str,
        checkpoint: str,
        *,
        device: str | torch.device = "cpu",
        threshold: float | None = None,
    ) -> None:
        self.name = name
        self.threshold = self.default_threshold if threshold is None else threshold
        self.device = torch.device(device)
        self.model, self.processor = self._load(checkpoint)

    @torch.inference_mode()
    def __call__(
        self, pictures: Sequence[Image.Image], tags: Sequence[Sequence[str]] | None = None
    ) -> list[Detections]:
        """See `mgllava.objects.detector.Detector`. A picture with no tags to look for has no detections."""
        found = [Detections((), (), ())] * len(pictures)
        if self.needs_tags:
            if tags is None or len(tags) != len(pictures):
                got = "none" if tags is None else f"{len(tags)} lists"
                raise ValueError(
                    f"{self.name} looks for the names it is given: expected one list of tags for each of "
                    f"{len(pictures)} pictures, got {got}"
                )
            for index, names in enumerate(tags):
                if isinstance(names, str):
                    raise ValueError(
                        f"tags[{index}] is {names!r}; expected a list of names for each picture, as in [['cat']]"
                    )
            chosen = [index for index, names in enumerate(tags) if names]
            names = [list(tags[index]) for index in chosen]
        else:
            chosen, names = list(range(len(pictures))), []
        if chosen:
            batch = [pictures[index] for index in chosen]
            for index, raw in zip(chosen, self._detect(batch, names), strict=True):
                found[index] = to_detections(*raw, size=pictures[index].size)
        return found

    @abstractmethod
    def _detect(
        self, pictures: list[Image.Image], tags: list[list[str]]
    ) -> list[tuple[Tensor, Sequence[str], Tensor]]:
        """Boxes (N, 4) in pixels of the picture, N labels and scores (N,) for each picture.

        `tags` are not empty, one list for each picture; where `needs_tags` is False there are none at all.
        """

    def _load(self, checkpoint: str) -> tuple[Any, Any]:
        try:
            model_type = AutoConfig.from_pretrained(checkpoint).model_type
            if model_type in self.model_types:
                processor = self.auto_processor.from_pretrained(checkpoint)
                model = self.auto_model.from_pretrained(checkpoint, dtype=torch.float32)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            # RuntimeError: weights that are not of the shapes which the configuration says.
            reason = str(error).strip().partition("\n")[0].rstrip(".")
            is_hub_id = HUB_ID.fullmatch(checkpoint) and not Path(checkpoint).exists()
            hint = f", or, with a network, fetch them first: hf download {checkpoint}" if is_hub_id else ""
            raise OSError(
                f"detector {self.name!r} cannot load its weights from {checkpoint!r}: {reason}. Give a folder or a hub "
                f"id that holds them as checkpoint{hint}"
            ) from error
        if model_type not in self.model_types:
            raise ValueError(
                f"detector {self.name!r} runs checkpoints of type {', '.join(self.model_types)}; {checkpoint!r} is "
                f"of type {model_type}"
            )
        return model.eval().to(self.device), processor
