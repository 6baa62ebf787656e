"""The records that flow from the data files to the model.

Batches have a fixed composition that does not depend on the number of processes, so that a
metric is the same number, bit for bit, on one process and on many.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Split = Literal["dev", "val", "test"]
Scoring = Literal["letter", "cloze"]

LETTERS = ("A", "B", "C", "D")

PADDING_SEGMENT = -1
"""Segment of a padded position in `ChoiceBatch.segment_BT`."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """One multiple-choice question with four choices."""

    id: str
    """Unique inside a split and language; equal for translations of one question."""
    subject: str
    """MMLU subject, such as `clinical_knowledge`."""
    split: Split
    """`dev` holds few-shot examples, `val` calibration, `test` the final score."""
    language: str
    """ISO 639-1 code."""
    text: str
    """The question without letters and choices."""
    choices: tuple[str, str, str, str]
    """The four answer texts."""
    answer: int
    """Index of the right choice, 0 to 3."""


@dataclass(frozen=True, kw_only=True)
class ChoiceBatch:
    """Questions that share one few-shot prefix, ready for a model.

    A row is a tree: segment 0 is the question, segments 1 to 4 are answer texts that each see the
    prefix, segment 0 and themselves, but not each other. `letter` rows have segment 0 alone.
    """

    scoring: Scoring
    index_B: Tensor
    """Position of each question in the data module's list of its split (int64)."""
    prefix_P: Tensor
    """Token ids of the shared prefix (int64); at least one token."""
    token_BT: Tensor
    """Token ids after the prefix, padded on the right (int64)."""
    segment_BT: Tensor
    """Segment of each token (int64): 0 question, 1 to 4 answers, `PADDING_SEGMENT` padding."""
    letter_ids_4: Tensor
    """Token ids of the four answer letters as they follow the prompt (int64)."""
    choice_length_B4: Tensor
    """Characters of each answer text (int64), the length that `cloze` normalises by."""
    answer_B: Tensor
    """Index of the right choice (int64)."""


@dataclass(frozen=True, kw_only=True)
class TextBatch:
    """Blocks of one text."""

    name: str
    """What the text is called in logs, such as `en`."""
    index_B: Tensor
    """Position of each block in its text (int64)."""
    token_BT: Tensor
    """Token ids, padded on the right (int64)."""
    target_BT: Tensor
    """Next-token ids, already shifted; `IGNORE` where nothing is predicted (int64)."""


@dataclass(frozen=True, kw_only=True)
class WordBatch(TextBatch):
    """Texts, one to a row, of which only the tokens of the last word are targets."""


IGNORE = -100
"""Target of a position that does not count, as in `torch.nn.functional.cross_entropy`."""
