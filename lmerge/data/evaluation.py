"""The batches that a stage measures on: texts, last words and questions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lmerge.data.prompts import build_choice_batches
from lmerge.data.records import IGNORE, ChoiceBatch, Scoring, TextBatch, WordBatch
from lmerge.data.stage import StageData
from lmerge.data.text import block_batches, text_batches
from lmerge.data.words import word_batches

EvaluationBatch = TextBatch | ChoiceBatch

HELD_OUT = "held-out"
"""Name of the held-out calibration blocks among the texts that a fit measures on."""


def held_out_batches(block_NT: Tensor, *, max_tokens: int) -> list[EvaluationBatch]:
    """Return the batches that a fit measures on.

    Args:
        block_NT: The calibration blocks that are never trained on.
        max_tokens: Bound on the tokens in a batch.
    """
    return list(block_batches(HELD_OUT, block_NT, _blocks_per_batch(max_tokens, block_NT.shape[1])))


def evaluation_batches(
    data: StageData,
    tokenizer: PreTrainedTokenizerBase,
    *,
    scorings: Sequence[Scoring],
    num_shots: int,
    block_size: int,
    stride: int | None,
    max_tokens: int,
    max_length: int,
) -> list[EvaluationBatch]:
    """Return the batches of all texts, then of last words, then of questions for each scoring.

    Args:
        data: What the stage has read.
        tokenizer: Tokenizer of the source.
        scorings: How questions are scored.
        num_shots: Answered examples before each question.
        block_size: Tokens in a block of text.
        stride: Tokens from one block's start to the next; None for `block_size`.
        max_tokens: Bound on the tokens in a batch, few-shot examples not counted.
        max_length: Tokens that the model can see.
    """
    batches: list[EvaluationBatch] = []
    for name, text in data.eval_texts.items():
        batches += text_batches(
            name,
            text,
            tokenizer,
            block_size=block_size,
            stride=stride or block_size,
            batch_size=_blocks_per_batch(max_tokens, block_size),
        )
    for name, texts in data.last_words.items():
        batches += word_batches(
            name, texts, tokenizer, max_tokens=max_tokens, max_length=max_length
        )
    for scoring in dict.fromkeys(scorings):
        batches += build_choice_batches(
            data.questions,
            data.examples,
            tokenizer,
            scoring=scoring,
            num_shots=num_shots,
            max_tokens_per_batch=max_tokens,
            max_length=max_length,
        )
    return batches


def count_tokens(batches: Iterable[EvaluationBatch], names: Iterable[str]) -> dict[str, int]:
    """Return the predicted tokens of each text, by name."""
    counts = dict.fromkeys(names, 0)
    for batch in batches:
        if isinstance(batch, TextBatch) and not isinstance(batch, WordBatch):
            counts[batch.name] += int((batch.target_BT != IGNORE).sum())
    return counts


def _blocks_per_batch(max_tokens: int, block_size: int) -> int:
    return max(1, max_tokens // block_size)
