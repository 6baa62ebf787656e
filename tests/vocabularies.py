"""Tokenizers of every kind, trained on the bundled bank in well under a second."""

from collections.abc import Callable

from conftest import byte_tokenizer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from lmerge.data.prompts import calibration_text
from lmerge.data.questions import load_questions


def corpus() -> list[str]:
    return [calibration_text(q) + "\n\n" for q in load_questions("bank", "val")]


def bpe(pre_tokenizer: pre_tokenizers.PreTokenizer) -> Tokenizer:
    """A BPE tokenizer trained on the bank; it has tokens for " A" and for double line breaks."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1500, initial_alphabet=alphabet, show_progress=False, special_tokens=["<s>"]
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    return tokenizer


def fast(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def add_ends(tokenizer: Tokenizer) -> Tokenizer:
    """Make the tokenizer put <s> before and after each text."""
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A <s>", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return tokenizer


def sentencepiece_bpe() -> Tokenizer:
    """Spaces become ▁ and one stands before each text, as in Llama 2."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    special = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=2000, show_progress=False, special_tokens=special)
    tokenizer.train_from_iterator(corpus(), trainer)
    return add_ends(tokenizer)


def unigram() -> Tokenizer:
    """Segments a whole text by likelihood; spaces become ▁ and one stands before each text."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=1500, unk_token="<unk>", show_progress=False, special_tokens=["<unk>", "<s>"]
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    return tokenizer


TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "byte": byte_tokenizer,
    "bpe": lambda: fast(bpe(pre_tokenizers.ByteLevel(add_prefix_space=False))),
    "bos": lambda: fast(add_ends(bpe(pre_tokenizers.ByteLevel(add_prefix_space=False)))),
    # Without word boundaries a token may join the end of a text with what follows it.
    "greedy": lambda: fast(bpe(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))),
    "sentencepiece": lambda: fast(sentencepiece_bpe()),
    "unigram": lambda: fast(unigram()),
}
