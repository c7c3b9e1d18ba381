"""A tokenizer of whole words, for a language model whose world is small."""

from collections.abc import Sequence

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

__all__ = ["build_tokenizer"]

PAD, BOS, EOS, UNKNOWN = "<pad>", "<s>", "</s>", "<unk>"
# What the chat template writes around questions and answers.
TEMPLATE_WORDS = ("user", "assistant", "\n")


def build_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """A tokenizer that knows these words, digits and signs, in lower case, and nothing else.

    Args:
        words: lower-case words and single signs, without spaces.

    Returns:
        A tokenizer with beginning, end, padding and unknown tokens; it adds none of them by itself.
    """
    known = dict.fromkeys((PAD, BOS, EOS, UNKNOWN, *TEMPLATE_WORDS, *words))
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(known)}, UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n|[a-z]+|[^a-z\s]"), "removed", invert=True)
    # Words with spaces between them, signs without one in front.
    tokenizer.decoder = decoders.Sequence(
        [decoders.WordPiece(prefix="##", cleanup=True), decoders.Replace(" :", ":")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
    )
