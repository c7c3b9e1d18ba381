"""What transformers calls a language model's keys and values: `cache` from 5.24 on, `past_key_values` before."""

import inspect

from transformers import GenerationMixin

__all__ = ["CACHE_NAME"]

_PARAMETERS = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
CACHE_NAME = "cache" if "cache" in _PARAMETERS else "past_key_values"
