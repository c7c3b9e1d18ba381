"""Conversion of published MG-LLaVA checkpoints to one folder that `from_pretrained` loads."""

from .convert import ConversionPlan, ConversionResult, convert_checkpoint, plan_conversion
from .tensors import ConversionError

__all__ = ["ConversionError", "ConversionPlan", "ConversionResult", "convert_checkpoint", "plan_conversion"]
