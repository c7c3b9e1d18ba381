"""MG-LLaVA: a vision-language model that looks at low resolution, high resolution and objects.

Importing the package registers its classes with transformers' Auto classes.
"""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
)

from ._version import __version__
from .configuration_mgllava import MGLlavaConfig, MGLlavaHighResConfig
from .modeling_mgllava import MGLlavaForConditionalGeneration, MGLlavaModel

AutoConfig.register(MGLlavaHighResConfig.model_type, MGLlavaHighResConfig)
AutoConfig.register(MGLlavaConfig.model_type, MGLlavaConfig)
AutoModel.register(MGLlavaConfig, MGLlavaModel)
AutoModelForImageTextToText.register(MGLlavaConfig, MGLlavaForConditionalGeneration)
AutoModelForMultimodalLM.register(MGLlavaConfig, MGLlavaForConditionalGeneration)

__all__ = [
    "MGLlavaConfig",
    "MGLlavaForConditionalGeneration",
    "MGLlavaHighResConfig",
    "MGLlavaModel",
    "__version__",
]
