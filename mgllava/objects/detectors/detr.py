"""DETR (arXiv 2005.12872), RT-DETR (2304.08069) and their next of kin."""

from collections.abc import Sequence

from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForObjectDetection

from .output import target_sizes
from .pretrained import PretrainedDetector

__all__ = ["DetrDetector"]


class DetrDetector(PretrainedDetector):
    """Finds the categories it was trained on (`config.id2label`)."""

    needs_tags = False
    default_threshold = 0.5
    auto_model = AutoModelForObjectDetection
    auto_processor = AutoImageProcessor
    # No others: YOLOS reads a picture's padding as part of it, and OCR models give other outputs.
    model_types = ("detr", "conditional_detr", "deformable_detr", "rt_detr", "rt_detr_v2")

    def _detect(
        self, pictures: list[Image.Image], tags: list[list[str]]
    ) -> list[tuple[Tensor, Sequence[str], Tensor]]:
        inputs = self.processor(images=pictures, return_tensors="pt").to(self.device)
        outputs = self.model(**inputs)
        results = self.processor.post_process_object_detection(
            outputs, threshold=self.threshold, target_sizes=target_sizes(pictures)
        )
        names = self.model.config.id2label
        return [
            (result["boxes"], [names[label] for label in result["labels"].tolist()], result["scores"])
            for result in results
        ]
