"""What learns in each stage."""

import torch
from torch import nn

from ..modeling_mgllava import MGLlavaForConditionalGeneration
from .neck import is_neck
from .recipe import LoraRecipe

__all__ = ["add_adapters", "choose_learners", "keep_learners_in_float32"]

LANGUAGE_MODEL = ("model.language_model.", "lm_head.")


def choose_learners(model: MGLlavaForConditionalGeneration, stage: int) -> None:
    """Freeze all but the neck (stage 1), or all but the neck and the language model with its head (stage 2)."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_neck(name) or (stage == 2 and name.startswith(LANGUAGE_MODEL)))


def add_adapters(model: MGLlavaForConditionalGeneration, lora: LoraRecipe) -> nn.Module:
    """A PEFT model in which the neck and adapters on the language model's linear layers learn."""
    from peft import LoraConfig, get_peft_model

    layers = {
        name.rsplit(".", 1)[-1]
        for name, module in model.model.language_model.named_modules()
        if isinstance(module, nn.Linear)
    }
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=rf"model\.language_model\..*\.({'|'.join(sorted(layers))})",
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if is_neck(name):
            parameter.requires_grad_(True)
    return adapted


def keep_learners_in_float32(model: nn.Module) -> None:
    """Steps of the optimiser are smaller than bfloat16 can tell apart."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()
