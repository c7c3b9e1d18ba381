"""Small tokenizers, built on the spot, with the habits of the published language models' own."""

from functools import cache
from pathlib import Path

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoTokenizer, PreTrainedTokenizerFast

GOLDEN = Path(__file__).parents[1] / "golden"
PLACEHOLDERS = ["<image>", "<object>"]
CORPUS = [
    "USER: What is in the picture? ASSISTANT: A cat sits on a red chair near the window.",
    "USER: How many dogs are there? ASSISTANT: There are two dogs, and one of them sleeps.",
    "system user assistant\nDescribe the image in detail.\n\nThe image shows a street with cars.",
    "Answer with one word. Yes. No. 1 2 3 4 5 6 7 8 9 0",
] * 4
PHI_TOKENS = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
LLAMA_3_TOKENS = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
CHATML_TOKENS = ["<|im_start|>", "<|im_end|>"]


def build(name: str) -> PreTrainedTokenizerFast:
    """A fresh tokenizer of that name, with the placeholders in its vocabulary."""
    tokenizer = {
        "legacy-llama": lambda: _sentencepiece("<s>", "</s>", prefix=True, adds_bos=True),
        "phi-like": _phi,
        "llama-3-like": _llama_3,
        "yi-like": _yi,
        "golden": lambda: AutoTokenizer.from_pretrained(GOLDEN / "end_to_end" / "llm"),
    }[name]()
    tokenizer.add_tokens(PLACEHOLDERS, special_tokens=True)
    return tokenizer


NAMES = ["legacy-llama", "phi-like", "llama-3-like", "yi-like", "golden"]
# The chat template of each.
OWN_TEMPLATE = {
    "legacy-llama": "vicuna",
    "phi-like": "phi-3",
    "llama-3-like": "llama-3",
    "yi-like": "chatml",
    "golden": "vicuna",
}


def _phi() -> PreTrainedTokenizerFast:
    tokenizer = _sentencepiece("<s>", "<|endoftext|>", prefix=True, adds_bos=True)
    # Such tokens swallow the white space that follows them.
    added = [AddedToken(token, rstrip=True, normalized=False, special=True) for token in PHI_TOKENS]
    tokenizer.add_tokens(added, special_tokens=True)
    return tokenizer


def _yi() -> PreTrainedTokenizerFast:
    tokenizer = _sentencepiece("<|startoftext|>", "<|endoftext|>", prefix=False, adds_bos=False)
    tokenizer.add_tokens(CHATML_TOKENS, special_tokens=True)
    return tokenizer


def _sentencepiece(bos: str, eos: str, prefix: bool, adds_bos: bool) -> PreTrainedTokenizerFast:
    """SentencePiece's BPE: a space before every text where `prefix`, bytes for unknown characters."""
    tokenizer = Tokenizer.from_str(_sentencepiece_model(bos, eos, prefix))
    if adds_bos:
        tokenizer.post_processor = _leading(bos, 1)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, unk_token="<unk>", pad_token="<unk>"
    )


@cache
def _sentencepiece_model(bos: str, eos: str, prefix: bool) -> str:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    spaces = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokens = ["<unk>", bos, eos, *(f"<0x{byte:02X}>" for byte in range(256))]
    lines = [line.replace("\n", " ") for line in CORPUS]  # line breaks stay bytes
    tokenizer.train_from_iterator(lines, trainers.BpeTrainer(vocab_size=420, special_tokens=tokens))
    tokenizer.pre_tokenizer = None
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return tokenizer.to_str()


def _llama_3() -> PreTrainedTokenizerFast:
    bos, eos = "<|begin_of_text|>", "<|end_of_text|>"
    tokenizer = Tokenizer.from_str(_byte_level_model())
    first = tokenizer.get_vocab_size()
    tokenizer.add_special_tokens([bos, eos, *LLAMA_3_TOKENS])
    tokenizer.post_processor = _leading(bos, first)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=eos)


@cache
def _byte_level_model() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=sorted(alphabet))
    )
    return tokenizer.to_str()


def _leading(token: str, token_id: int) -> processors.TemplateProcessing:
    return processors.TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A {token} $B", special_tokens=[(token, token_id)]
    )
