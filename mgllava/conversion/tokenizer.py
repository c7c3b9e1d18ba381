"""The language model's tokenizer, held against the file it was published as, with the placeholders added.

transformers 5 rebuilds some tokenizers from their vocabulary by class name, with splitting rules of its own:
`LlamaTokenizer` and relatives drop the spaces of byte-level vocabularies, and one of the spaces that a text
begins with. The published models were trained on what their files say, so the files decide.
"""

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .parts import Part
from .tensors import ConversionError

IMAGE_TOKEN, OBJECT_TOKEN = "<image>", "<object>"

_PROBES = (
    "USER: What's in the image?\n  Two cats (1.5 m apart), naïve café — 猫が2匹。 ASSISTANT:",
    "  two spaces first",
)
_SETTINGS = ("bos_token", "eos_token", "unk_token", "pad_token", "model_max_length", "chat_template")


def load_tokenizer(part: Part, notes: list[str]) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder; where its class and its file disagree, the file's, and a note.

    Raises:
        ConversionError: if it is missing or cannot be read.
    """
    fast, sentencepiece = part.folder / "tokenizer.json", part.folder / "tokenizer.model"
    if not fast.is_file() and not sentencepiece.is_file():
        raise ConversionError(
            f"{part.option} {part.name}: the folder has no tokenizer.json or tokenizer.model"
        )
    if not fast.is_file():
        return _load_sentencepiece(part, sentencepiece, notes)
    tokenizer = _load_by_class(part)
    if not _agrees(tokenizer, fast):
        notes.append(
            f"{type(tokenizer).__name__} splits text differently from {part.name}'s tokenizer.json; the file was used"
        )
        tokenizer = _tokenizer_of_file(part, fast, tokenizer.chat_template)
    return tokenizer


def add_placeholders(tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """Add `<image>` and `<object>` as special tokens; returns their ids.

    Raises:
        ConversionError: if the tokenizer gives them ids that other tokens have.
    """
    before = tokenizer.get_vocab()
    tokens = (IMAGE_TOKEN, OBJECT_TOKEN)
    tokenizer.add_tokens(
        [AddedToken(token, special=True, normalized=False) for token in tokens], special_tokens=True
    )
    after = tokenizer.get_vocab()
    taken: dict[int | None, str] = {number: token for token, number in before.items()}
    ids = []
    for token in tokens:
        number = after.get(token)
        if number is None or taken.get(number, token) != token:
            raise ConversionError(
                f"the tokenizer cannot take {token}: it gives it the id {number} of {taken.get(number)!r}"
            )
        ids.append(number)
    image_token_id, object_token_id = ids
    return image_token_id, object_token_id


def _load_by_class(part: Part) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(part.folder, trust_remote_code=False)
    except Exception as error:  # tokenizers raises bare exceptions
        raise ConversionError(f"{part.option} {part.name}: its tokenizer cannot be read: {error}") from error


def _agrees(tokenizer: PreTrainedTokenizerBase, file: Path) -> bool:
    """Whether a loaded tokenizer encodes and decodes as its tokenizer.json says."""
    raw = Tokenizer.from_file(str(file))
    for probe in _PROBES:
        ids = raw.encode(probe, add_special_tokens=False).ids
        decoded = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        if decoded.strip() != raw.decode(ids, skip_special_tokens=False).strip():
            return False
        if tokenizer.encode(probe, add_special_tokens=False) != ids:
            return False
    return True


def _tokenizer_of_file(part: Part, file: Path, chat_template: str | dict | None) -> PreTrainedTokenizerFast:
    has_settings = (part.folder / "tokenizer_config.json").is_file()
    settings = part.read_json("tokenizer_config.json") if has_settings else {}
    # The class may have made up special tokens that the vocabulary does not have; the settings have not.
    values = {name: settings[name] for name in _SETTINGS if settings.get(name) is not None}
    # A token may be written as text or as an AddedToken's fields.
    values = {name: value["content"] if isinstance(value, dict) else value for name, value in values.items()}
    return PreTrainedTokenizerFast(tokenizer_file=str(file), **{**values, "chat_template": chat_template})


def _load_sentencepiece(part: Part, file: Path, notes: list[str]) -> PreTrainedTokenizerBase:
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError as error:
        raise ConversionError(
            f"{part.option} {part.name}: its tokenizer is a SentencePiece model; reading it takes "
            "`pip install sentencepiece protobuf`"
        ) from error
    tokenizer = _load_by_class(part)
    expected = [SentencePieceProcessor(model_file=str(file)).encode(probe) for probe in _PROBES]

    def encoded(candidate: PreTrainedTokenizerBase) -> list[list[int]]:
        return [candidate.encode(probe, add_special_tokens=False) for probe in _PROBES]

    if encoded(tokenizer) == expected:
        return tokenizer
    # SentencePiece puts one more space before every text, also before one that begins with spaces.
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.pre_tokenizer = None
    settings = {name: getattr(tokenizer, name) for name in _SETTINGS}
    rebuilt = PreTrainedTokenizerFast(tokenizer_object=backend, **settings)
    if encoded(rebuilt) == expected:
        return rebuilt
    notes.append(f"{type(tokenizer).__name__} splits text differently from {part.name}'s tokenizer.model")
    return tokenizer
