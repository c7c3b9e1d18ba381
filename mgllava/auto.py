"""Registration with transformers' Auto classes; importing this module is what registers."""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)

from .configuration_mgllava import MGLlavaConfig, MGLlavaHighResConfig
from .image_processing_mgllava import MGLlavaImageProcessor
from .modeling_mgllava import MGLlavaForConditionalGeneration, MGLlavaModel
from .processing_mgllava import MGLlavaProcessor

AutoConfig.register(MGLlavaHighResConfig.model_type, MGLlavaHighResConfig)
AutoConfig.register(MGLlavaConfig.model_type, MGLlavaConfig)
AutoModel.register(MGLlavaConfig, MGLlavaModel)
AutoModelForImageTextToText.register(MGLlavaConfig, MGLlavaForConditionalGeneration)
AutoModelForMultimodalLM.register(MGLlavaConfig, MGLlavaForConditionalGeneration)
AutoImageProcessor.register(
    MGLlavaConfig,
    image_processor_classes={"pil": MGLlavaImageProcessor, "torchvision": MGLlavaImageProcessor},
)
AutoProcessor.register(MGLlavaConfig, MGLlavaProcessor)

__all__ = [
    "MGLlavaConfig",
    "MGLlavaForConditionalGeneration",
    "MGLlavaHighResConfig",
    "MGLlavaImageProcessor",
    "MGLlavaModel",
    "MGLlavaProcessor",
]
