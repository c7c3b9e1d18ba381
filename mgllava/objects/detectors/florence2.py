"""Florence-2 (Xiao et al., arXiv 2311.06242): writes down what is in the picture and where."""

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor, Florence2ForConditionalGeneration

from .pretrained import PretrainedDetector

__all__ = ["Florence2CaptionDetector", "Florence2Detector"]

MAX_NEW_TOKENS = 1024


class Florence2Detector(PretrainedDetector):
    """Finds objects and names them itself. Coordinates have a thousand steps along each side.

    It is sure of all it writes: every score is 1, and boxes keep the order in which they were written. Where
    two of a label overlap, suppression thus keeps the one written first. A threshold would mean nothing.
    """

    task = "<OD>"
    needs_tags = False
    default_threshold = 0.0
    auto_model = Florence2ForConditionalGeneration
    auto_processor = AutoProcessor
    model_types = ("florence2",)

    def __init__(
        self,
        name: str,
        checkpoint: str,
        *,
        device: str | torch.device = "cpu",
        threshold: float | None = None,
    ) -> None:
        if threshold is not None:
            raise ValueError(f"detector {name!r} gives no scores, but threshold is {threshold}")
        super().__init__(name, checkpoint, device=device)

    def _detect(
        self, pictures: list[Image.Image], tags: list[list[str]]
    ) -> list[tuple[Tensor, Sequence[str], Tensor]]:
        inputs = self.processor(
            images=pictures, text=[self.task] * len(pictures), padding=True, return_tensors="pt"
        ).to(self.device)
        written = self.model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        texts = self.processor.batch_decode(written, skip_special_tokens=False)
        found = []
        for text, picture in zip(texts, pictures, strict=True):
            parsed = self.processor.post_process_generation(
                text=text, task=self.task, image_size=picture.size
            )[self.task]
            boxes = torch.tensor(parsed["bboxes"], dtype=torch.float32).reshape(-1, 4)
            ordered = (boxes[:, :2] <= boxes[:, 2:]).all(dim=1)  # nothing makes it write corners in order
            labels = [label for label, keep in zip(parsed["labels"], ordered.tolist(), strict=True) if keep]
            found.append((boxes[ordered], labels, torch.ones(len(labels))))
        return found


class Florence2CaptionDetector(Florence2Detector):
    """Finds regions and gives each a short description for a label."""

    task = "<DENSE_REGION_CAPTION>"
