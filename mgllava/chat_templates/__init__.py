"""The chat templates MG-LLaVA was trained with, one for each family of language models.

The published models were trained on text tokenised in pieces: what comes before a picture and after it, each
answer, each separator on its own. Tokenised as a whole the same text has other ids with some tokenizers, so
these templates put `PIECE_SEPARATOR` between the pieces and `MGLlavaProcessor` tokenises piece by piece.
The processor asks for it by the variable `piece_separator`; without that, as in a tokenizer's own
`apply_chat_template`, the text comes out clean.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from importlib import resources
from typing import Any

__all__ = [
    "PIECE_SEPARATOR",
    "TEMPLATES",
    "ChatTemplate",
    "adapt_language_model_template",
    "load_chat_template",
    "stop_token_ids",
]

PIECE_SEPARATOR = "\x1f"

# What ends an answer, beside the tokenizer's end-of-sequence token.
STOP_TOKENS: dict[str, tuple[str, ...]] = {
    "vicuna": (),
    "llama-3": ("<|eot_id|>",),
    "phi-3": ("<|end|>",),
    "chatml": ("<|im_end|>",),
}
TEMPLATES = tuple(STOP_TOKENS)


@dataclass(frozen=True)
class ChatTemplate:
    """A name, a Jinja source, and the tokens that end an answer beside the tokenizer's own."""

    name: str
    source: str
    stop_tokens: tuple[str, ...] = ()


def load_chat_template(name: str) -> ChatTemplate:
    """One of `TEMPLATES`: `vicuna`, `llama-3`, `phi-3` or `chatml` (Yi).

    Raises:
        ValueError: there is no template of that name.
    """
    if name not in TEMPLATES:
        near = difflib.get_close_matches(str(name).lower(), TEMPLATES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown chat template {name!r}, expected one of {', '.join(TEMPLATES)}{hint}")
    source = _read("_content") + _read("_turns") + _read(name)
    return ChatTemplate(name, source, STOP_TOKENS[name])


def adapt_language_model_template(source: str) -> str:
    """Make a language model's own template, which knows text only, render messages that hold pictures.

    Each message's content becomes one string beforehand: `<image>` and a line break for each picture, then
    the text. Everything else is the template's own.
    """
    return _read("_content") + source


def stop_token_ids(tokenizer: Any, template: ChatTemplate | str) -> list[int]:
    """Ids that end an answer: the tokenizer's end-of-sequence token and the template's stop tokens.

    Args:
        tokenizer: a transformers tokenizer.
        template: a `ChatTemplate`, or the name of one.

    Raises:
        ValueError: the tokenizer does not know a stop token as one token, so it is not one for this
            template; or there is nothing that could end an answer.
    """
    if isinstance(template, str):
        template = load_chat_template(template)
    vocabulary = tokenizer.get_vocab()
    missing = [token for token in template.stop_tokens if token not in vocabulary]
    if missing:
        raise ValueError(
            f"the tokenizer has no single token {', '.join(missing)}, which ends answers in chat template "
            f"{template.name!r}; choose the template the language model was trained with"
        )
    ids = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids += [vocabulary[token] for token in template.stop_tokens]
    if not ids:
        raise ValueError(
            f"chat template {template.name!r} ends answers with the end-of-sequence token; there is none"
        )
    return list(dict.fromkeys(ids))


def _read(name: str) -> str:
    return resources.files(__package__).joinpath(f"{name}.jinja").read_text(encoding="utf-8")
