"""Text to token ids, such that parts of a text have the ids they have in the whole."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from lmerge.data.records import LETTERS


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Return token ids with the tokens that the tokenizer itself puts before a text, if any.

    Tokens that it would put after a text (EOS) are left out: a prompt is to be continued.
    """
    start = start_ids(tokenizer)
    # verbose=False: texts longer than the model's context are cut into blocks later.
    bare = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    return [start + list(ids) for ids in bare]


def start_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return what the tokenizer puts before a text: BOS or nothing."""
    bare = tokenizer("A", add_special_tokens=False)["input_ids"]
    whole = list(tokenizer("A")["input_ids"])
    return whole[: whole.index(bare[0])]


def letter_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the token id of each letter as it follows "Answer:".

    Where a tokenizer spells " A" as " ", "A", it is the id of the second: the first belongs to the
    prompt, since the same factor in all four probabilities decides nothing.

    Raises:
        ValueError: If "Answer: A" to "Answer: D" do not differ by exactly their last token.
    """
    answers = encode(tokenizer, [f"Answer: {letter}" for letter in LETTERS])
    leads, letters = {tuple(ids[:-1]) for ids in answers}, {ids[-1] for ids in answers}
    if len(leads) > 1 or len(letters) < len(LETTERS):
        raise ValueError(
            '`scorings` with letter needs a tokenizer in which "Answer: A" to "Answer: D" differ '
            f"by their last token alone, got {answers}; use scorings=[cloze]."
        )
    return [ids[-1] for ids in answers]


def shared_length(first: Sequence[int], *others: Sequence[int]) -> int:
    """Return how many leading tokens all sequences share."""
    length = len(first)
    for other in others:
        if other[:length] != first[:length]:
            pairs = enumerate(zip(first, other, strict=False))
            length = next((i for i, (a, b) in pairs if a != b), min(length, len(other)))
    return length
