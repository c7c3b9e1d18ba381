"""The five published checkpoints: their language models, and where the placeholders go in each vocabulary."""

from dataclasses import dataclass
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig


@dataclass(frozen=True)
class PublishedModel:
    """One published MG-LLaVA checkpoint.

    Attributes:
        language_model: hub id of the language model it was trained on.
        template: chat template it was trained with, a name of `mgllava.chat_templates`.
        text_vocab_size: rows of the language model's embedding table as published.
        num_tokens: tokens its tokenizer knows; rows beyond them are spare.
        model_type, text_kwargs: the language model's configuration.
    """

    language_model: str
    template: str
    text_vocab_size: int
    num_tokens: int
    model_type: str
    text_kwargs: dict[str, Any]

    @property
    def image_token_id(self) -> int:
        return self.num_tokens

    @property
    def object_token_id(self) -> int:
        return self.num_tokens + 1

    def text_config(self) -> PreTrainedConfig:
        """The language model's configuration, its vocabulary grown only if it has no two spare rows."""
        vocab_size = max(self.text_vocab_size, self.num_tokens + 2)
        return CONFIG_MAPPING[self.model_type](vocab_size=vocab_size, **self.text_kwargs)


VICUNA_7B = PublishedModel(
    language_model="lmsys/vicuna-7b-v1.5",
    template="vicuna",
    text_vocab_size=32000,
    num_tokens=32000,
    model_type="llama",
    text_kwargs={
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "pad_token_id": 0,
    },
)

PUBLISHED = {
    "vicuna-7b": VICUNA_7B,
    "vicuna-13b": PublishedModel(
        language_model="lmsys/vicuna-13b-v1.5",
        template="vicuna",
        text_vocab_size=32000,
        num_tokens=32000,
        model_type="llama",
        text_kwargs={
            "hidden_size": 5120,
            "intermediate_size": 13824,
            "num_hidden_layers": 40,
            "num_attention_heads": 40,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "pad_token_id": 0,
        },
    ),
    "phi-3-mini": PublishedModel(
        language_model="microsoft/Phi-3-mini-4k-instruct",
        template="phi-3",
        text_vocab_size=32064,
        num_tokens=32011,
        model_type="phi3",
        text_kwargs={
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "sliding_window": 2047,
            "bos_token_id": 1,
            "eos_token_id": 32000,
            "pad_token_id": 32000,
        },
    ),
    "llama-3-8b": PublishedModel(
        language_model="meta-llama/Meta-Llama-3-8B-Instruct",
        template="llama-3",
        text_vocab_size=128256,
        num_tokens=128256,
        model_type="llama",
        text_kwargs={
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
            "bos_token_id": 128000,
            "eos_token_id": 128009,
        },
    ),
    "yi-1.5-34b": PublishedModel(
        language_model="01-ai/Yi-1.5-34B-Chat",
        template="chatml",
        text_vocab_size=64000,
        num_tokens=64000,
        model_type="llama",
        text_kwargs={
            "hidden_size": 7168,
            "intermediate_size": 20480,
            "num_hidden_layers": 60,
            "num_attention_heads": 56,
            "num_key_value_heads": 8,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5000000.0},
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
    ),
}
