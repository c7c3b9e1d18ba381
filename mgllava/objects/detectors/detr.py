"""DETR (arXiv 2005.12872), RT-DETR (2304.08069) and whatever transformers offers for object detection."""

from collections.abc import Sequence

from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForObjectDetection
from transformers.models.auto.modeling_auto import MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES

from .output import target_sizes
from .pretrained import PretrainedDetector

__all__ = ["DetrDetector"]


class DetrDetector(PretrainedDetector):
    """Finds the categories it was trained on (`config.id2label`)."""

    needs_tags = False
    default_threshold = 0.5
    auto_model = AutoModelForObjectDetection
    auto_processor = AutoImageProcessor
    model_types = tuple(MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES)

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
