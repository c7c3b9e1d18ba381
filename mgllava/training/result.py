"""The folder that stage 2 leaves behind."""

from pathlib import Path

import torch
from transformers import GenerationConfig

from ..configuration_mgllava import MGLlavaConfig
from ..files import replace_folder
from ..modeling_mgllava import MGLlavaForConditionalGeneration
from ..processing_mgllava import MGLlavaProcessor
from .neck import load_neck
from .recipe import Recipe

__all__ = ["write_model"]


def write_model(recipe: Recipe, checkpoint: Path, folder: Path) -> None:
    """Write a model that `from_pretrained` loads, in the recipe's precision; adapters are merged into it.

    Args:
        recipe: of the run.
        checkpoint: its last one.
        folder: what to write; what is there is replaced once the new one is complete.
    """
    dtype = getattr(torch, recipe.precision)
    config = MGLlavaConfig.from_pretrained(recipe.model)
    if recipe.lora is None:
        model = MGLlavaForConditionalGeneration.from_pretrained(checkpoint, config=config, dtype=dtype)
    else:
        from peft import PeftModel

        model = MGLlavaForConditionalGeneration.from_pretrained(recipe.model, dtype=dtype)
        load_neck(model, checkpoint)
        model = PeftModel.from_pretrained(model, checkpoint).merge_and_unload()
    model.generation_config = GenerationConfig.from_pretrained(recipe.model)
    with replace_folder(folder) as scratch:
        # By the model's own names: what ZeRO-3 wrote has older ones, which would be given back.
        model.save_pretrained(scratch, save_original_format=False)
        MGLlavaProcessor.from_pretrained(recipe.model).save_pretrained(scratch)
