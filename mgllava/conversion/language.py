"""The language model beside its weights: tokenizer, chat template, generation settings."""

from dataclasses import dataclass, field

from transformers import GenerationConfig, PreTrainedTokenizerBase

from ..chat_templates import TEMPLATES, adapt_language_model_template, load_chat_template, stop_token_ids
from .parts import Part
from .tensors import ConversionError
from .tokenizer import add_placeholders, load_tokenizer

DEFAULT_TEMPLATE = "vicuna"

_SAMPLING_SETTINGS = ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")


@dataclass
class Language:
    """What the output folder needs of the language model beside weights.

    Attributes:
        tokenizer: with both placeholders added.
        image_token_id, object_token_id: the placeholders' ids.
        vocab_size: rows the embedding table needs; the language model's own number where it has spare ones.
        chat_template: Jinja source.
        generation: generation settings, the template's stop tokens among the end tokens.
        notes: what the user should know.
    """

    tokenizer: PreTrainedTokenizerBase
    image_token_id: int
    object_token_id: int
    vocab_size: int
    chat_template: str
    generation: GenerationConfig
    notes: list[str] = field(default_factory=list)


def read_language(part: Part, vocab_size: int, template: str | None) -> Language:
    """Load and extend the tokenizer, choose the chat template, complete the generation settings.

    Args:
        part: the language model.
        vocab_size: rows of its embedding table.
        template: name of a built-in template, or None for the language model's own.

    Raises:
        ConversionError: for an unknown template, or a tokenizer that is missing, cannot be read or is another
            model's.
    """
    check_template(template)
    notes: list[str] = []
    tokenizer = load_tokenizer(part, notes)
    image_token_id, object_token_id = add_placeholders(tokenizer)
    rows = _rows(tokenizer, vocab_size, max(image_token_id, object_token_id))
    source, stop_ids = _choose_template(tokenizer, template, notes)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    tokenizer.chat_template = None  # the processor's is the one that counts
    # Batches are for generation, which reads on from the right end; what is saved are the init arguments.
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"
    for how_it_was_loaded in ("is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(how_it_was_loaded, None)
    generation = _generation_settings(part, tokenizer, stop_ids, notes)
    return Language(tokenizer, image_token_id, object_token_id, rows, source, generation, notes)


def _rows(tokenizer: PreTrainedTokenizerBase, vocab_size: int, last_placeholder: int) -> int:
    """Rows of the embedding table with the placeholders; more than `vocab_size` only if they do not fit.

    Rows that are added have no training, so none may ever be generated. The model hides those up to the last
    placeholder; hence that one must be the last row.

    Raises:
        ConversionError: if the tokenizer has tokens beyond both the table and the placeholders.
    """
    token, last = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if last >= vocab_size and last > last_placeholder:
        raise ConversionError(
            f"the tokenizer gives {token!r} the id {last}, the language model has only {vocab_size} rows; "
            "is it the tokenizer of another model?"
        )
    return max(vocab_size, last + 1)


def check_template(template: str | None) -> None:
    """Raises ConversionError for a name that is no built-in chat template."""
    if template is not None:
        try:
            load_chat_template(template)
        except ValueError as error:
            raise ConversionError(str(error)) from error


def _choose_template(
    tokenizer: PreTrainedTokenizerBase, template: str | None, notes: list[str]
) -> tuple[str, list[int]]:
    own = tokenizer.chat_template
    if isinstance(own, dict):
        own = own.get("default")
    if template is None and own:
        # Generation settings published beside a template often lack the token that ends its turns.
        vocabulary = tokenizer.get_vocab()
        stops = {token: name for name in TEMPLATES for token in load_chat_template(name).stop_tokens}
        known = [token for token in stops if token in vocabulary]
        stop_ids = [vocabulary[token] for token in known if token in own]
        # Even where its text is the same its ids may differ: it is tokenised whole, training was piece by piece.
        note = "uses the language model's own chat template"
        family = next((stops[token] for token in sorted(known, key=lambda token: token not in own)), None)
        if family:
            note += f"; published MG-LLaVA checkpoints of this family were trained with --template {family}"
        notes.append(note)
        return adapt_language_model_template(own), stop_ids
    if template is None:
        notes.append(
            f"the language model has no chat template; {DEFAULT_TEMPLATE} is used (choose with --template)"
        )
    chosen = load_chat_template(template or DEFAULT_TEMPLATE)
    try:
        return chosen.source, stop_token_ids(tokenizer, chosen)
    except ValueError as error:
        raise ConversionError(str(error)) from error


def _generation_settings(
    part: Part, tokenizer: PreTrainedTokenizerBase, stop_ids: list[int], notes: list[str]
) -> GenerationConfig:
    file = part.folder / "generation_config.json"
    settings = part.read_json(file.name) if file.is_file() else {}
    settings = {name: value for name, value in settings.items() if not name.startswith("_")}
    settings.pop("transformers_version", None)
    if not settings.get("do_sample"):
        # Without sampling they have no effect, and saving refuses the contradiction.
        settings = {name: value for name, value in settings.items() if name not in _SAMPLING_SETTINGS}
    configured = settings.get("eos_token_id")
    end_ids = configured if isinstance(configured, list) else [configured]
    end_ids = [number for number in (*end_ids, tokenizer.eos_token_id, *stop_ids) if number is not None]
    ids = {"eos_token_id": list(dict.fromkeys(end_ids)), "pad_token_id": tokenizer.pad_token_id}
    if tokenizer.bos_token_id is not None:
        ids["bos_token_id"] = tokenizer.bos_token_id
    try:
        generation = GenerationConfig(**{**settings, **ids})
        generation.validate(strict=True)  # as saving will
    except ValueError as error:
        notes.append(f"{part.name}'s generation settings contradict themselves and are left out: {error}")
        generation = GenerationConfig(**ids)
    return generation
