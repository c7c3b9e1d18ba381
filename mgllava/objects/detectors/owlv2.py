"""OWLv2 (Minderer et al., arXiv 2306.09683), the detector of the paper: open vocabulary."""

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor

from .output import target_sizes
from .pretrained import PretrainedDetector

__all__ = ["Owlv2Detector"]

PROMPT = "a photo of {}"


class Owlv2Detector(PretrainedDetector):
    """Looks for "a photo of {tag}" and keeps what scores above 0.2, as the paper does.

    A prompt longer than the text tower takes (16 tokens in the published ones) is cut.
    """

    needs_tags = True
    default_threshold = 0.2
    auto_model = AutoModelForZeroShotObjectDetection
    auto_processor = AutoProcessor
    model_types = ("owlv2",)

    def _detect(
        self, pictures: list[Image.Image], tags: list[list[str]]
    ) -> list[tuple[Tensor, Sequence[str], Tensor]]:
        inputs = self.processor(
            text=[[PROMPT.format(tag) for tag in names] for names in tags],
            padding="max_length",
            truncation=True,
            max_length=self.model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        ).to(self.device)
        # One by one: at full size the square, float32 copies of a batch of photographs take gigabytes.
        squares = [
            self.processor.image_processor(picture, return_tensors="pt")["pixel_values"]
            for picture in pictures
        ]
        outputs = self.model(**inputs, pixel_values=torch.cat(squares).to(self.device))
        # Pictures with fewer tags are filled up with the prompt " ", which the model scores like any other.
        for logits, names in zip(outputs.logits, tags, strict=True):
            logits[:, len(names) :] = -torch.inf
        # The picture is padded to a square at the right and bottom; the boxes come back in its own pixels.
        results = self.processor.post_process_grounded_object_detection(
            outputs, threshold=self.threshold, target_sizes=target_sizes(pictures), text_labels=tags
        )
        return [(result["boxes"], result["text_labels"], result["scores"]) for result in results]
