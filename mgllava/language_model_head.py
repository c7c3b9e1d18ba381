"""The last step of any causal language model: its output layer, and what it does to the logits."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.utils import logging

from .cache_name import CACHE_NAME

logger = logging.get_logger(__name__)


def language_model_head(text_config: PreTrainedConfig) -> nn.Linear:
    """An output layer of the shape of the causal language model's own: with a bias where that has one.

    Raises:
        ValueError: if that model does something to its logits which `scale_logits` does not do as well, or takes no
            cache of keys and values.
    """
    with torch.device("meta"):
        causal = AutoModelForCausalLM.from_config(text_config)
    if CACHE_NAME not in inspect.signature(causal.base_model.forward).parameters:
        raise ValueError(
            f"language models of type {text_config.model_type!r} take no {CACHE_NAME} (before transformers 5.24 pure "
            "state-space models do not); MG-LLaVA cannot generate with them"
        )
    bias = getattr(causal.get_output_embeddings(), "bias", None) is not None
    check_scaling(causal)
    return nn.Linear(text_config.hidden_size, text_config.vocab_size, bias=bias)


def scale_logits(text_config: PreTrainedConfig, logits: Tensor) -> Tensor:
    """What causal language models do to their logits: a soft cap (Gemma) or a scale (Cohere, Granite, Falcon-H1)."""
    for name in ("final_logit_softcapping", "logits_soft_cap"):
        if (soft_cap := getattr(text_config, name, None)) is not None:
            logits = torch.tanh(logits / soft_cap) * soft_cap
    for name in ("logit_scale", "lm_head_multiplier"):
        if (scale := getattr(text_config, name, None)) is not None:
            logits = logits * scale
    if (divisor := getattr(text_config, "logits_scaling", None)) is not None:
        logits = logits / divisor
    return logits


def check_scaling(causal: nn.Module) -> None:
    """Compare `scale_logits` with what is left of a causal model once its base and its head let inputs through.

    Costs no weights: the model may lie on the meta device. A model that cannot be probed so is let pass, with a
    warning.

    Raises:
        ValueError: if they differ.
    """
    config = causal.config
    setattr(causal, causal.base_model_prefix, _PassThrough())
    causal.set_output_embeddings(_IdentityHead())
    # Not the default dtype, which is a half one while such a model loads: some models scale in float32.
    probe = torch.linspace(-3, 3, config.hidden_size, device="cpu", dtype=torch.float32)[None, None]
    try:
        with torch.no_grad():
            logits = causal.eval()(inputs_embeds=probe, use_cache=False, return_dict=True).logits
    except Exception as error:  # 150 model classes, each with assumptions of its own about its parts
        logger.warning(
            f"the logits of {config.model_type!r} could not be compared with the language model's own "
            f"({type(error).__name__}: {error})"
        )
        return
    if not torch.allclose(scale_logits(config, probe), logits.to(probe), rtol=1e-4, atol=1e-5):
        raise ValueError(
            f"language models of type {config.model_type!r} change their logits in a way that MG-LLaVA does not know"
        )


class _HiddenStates(tuple):
    """Outputs of a base model that has nothing to say beside its hidden states."""

    def __getattr__(self, name: str) -> Tensor | None:
        return self[0] if name == "last_hidden_state" else None


class _PassThrough(nn.Module):
    def forward(self, *args: Any, inputs_embeds: Tensor, **kwargs: Any) -> _HiddenStates:
        return _HiddenStates((inputs_embeds,))


class _IdentityHead(nn.Module):
    weight = torch.empty(0)  # some models cast to the dtype of their head
    bias = None

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states
