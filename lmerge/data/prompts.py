"""Few-shot prompts, and batches of questions that share one.

The `letter` format is byte for byte that of Hendrycks et al. (arXiv:2009.03300, their
evaluate.py), two spaces before the subject included. Departures of others: lm-eval's `mmlu` task
has one space there and strips white space around the question; the original reads CSV with pandas,
which rewrites some cells (a column of 6 and 7.5 becomes 6.0 and 7.5, None becomes nan). Header
and "Answer:" stay English in every language. SmolLM2's tokenizer adds no BOS and lm-eval adds none
to it; a tokenizer that puts tokens before a text by itself keeps them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lmerge.data.records import LETTERS, PADDING_SEGMENT, ChoiceBatch, Question, Scoring
from lmerge.data.tokens import encode, letter_ids, shared_length
from lmerge.progress import track

logger = logging.getLogger(__name__)

Examples = Mapping[tuple[str, str], Sequence[Question]]
"""Few-shot examples of each (subject, language), in the order of the file."""

BATCH_SHARE = 32
"""A batch costs as much time as this fraction of the tokens that fill one, whatever its size."""


def letter_question(question: Question) -> str:
    """Return the question with lettered choices, up to "Answer:"."""
    lines = [
        f"{letter}. {choice}" for letter, choice in zip(LETTERS, question.choices, strict=True)
    ]
    return "\n".join([question.text, *lines, "Answer:"])


def cloze_question(question: Question) -> str:
    """Return the question without its choices, up to "Answer:"."""
    return f"{question.text}\nAnswer:"


QUESTION_TEXTS: dict[Scoring, Callable[[Question], str]] = {
    "letter": letter_question,
    "cloze": cloze_question,
}
ANSWER_TEXTS: dict[Scoring, Callable[[Question], str]] = {
    "letter": lambda question: f" {LETTERS[question.answer]}",
    "cloze": lambda question: f" {question.choices[question.answer]}",
}


def prefix_text(subject: str, examples: Sequence[Question], scoring: Scoring) -> str:
    """Return the header and the answered examples."""
    header = "The following are multiple choice questions (with answers) about "
    # The original's `format_subject` puts a space before every word: hence two spaces.
    words = "".join(f" {word}" for word in subject.split("_"))
    shots = [QUESTION_TEXTS[scoring](q) + ANSWER_TEXTS[scoring](q) + "\n\n" for q in examples]
    return f"{header}{words}.\n\n{''.join(shots)}"


def prompt_text(question: Question, examples: Sequence[Question], scoring: Scoring) -> str:
    """Return the whole prompt, up to the last "Answer:"."""
    return prefix_text(question.subject, examples, scoring) + QUESTION_TEXTS[scoring](question)


def calibration_text(question: Question) -> str:
    """Return a question with its choices and the right answer, letter and text, as prose."""
    answer = f"{LETTERS[question.answer]}. {question.choices[question.answer]}"
    return f"{letter_question(question)} {answer}"


def questions_text(questions: Iterable[Question]) -> str:
    """Return questions with their answers as one text, an empty line in between."""
    return "\n\n".join(map(calibration_text, questions))


def check_shots(questions: Sequence[Question], examples: Examples, num_shots: int) -> None:
    """Raise ValueError where a subject and language has fewer than `num_shots` examples."""
    for subject, language in dict.fromkeys((q.subject, q.language) for q in questions):
        found = len(examples.get((subject, language), ()))
        if found < num_shots:
            raise ValueError(
                f"`num_shots` must be at most the {found} dev examples of {subject} in language "
                f"{language!r}, got {num_shots}; lower it or add examples."
            )


def build_choice_batches(
    questions: Sequence[Question],
    examples: Examples,
    tokenizer: PreTrainedTokenizerBase,
    *,
    scoring: Scoring,
    num_shots: int,
    max_tokens_per_batch: int,
    max_length: int | None = None,
) -> list[ChoiceBatch]:
    """Return batches of questions that share subject and language, short questions first.

    The prefix is the part of the few-shot text whose tokens are the same in every prompt of the
    group, so that prefix and tail together are exactly the tokens of the whole prompt.

    Args:
        questions: Questions of any subjects and languages; `index_B` is the position in here.
        examples: Few-shot examples; the first `num_shots` are used.
        tokenizer: Tokenizer of the model.
        scoring: Format of the prompt and shape of a row, see `ChoiceBatch`.
        num_shots: Examples in a prompt; at least 0.
        max_tokens_per_batch: Bound on B times T, prefix not counted; a longer row is alone.
        max_length: Longest prompt with an answer, in tokens; a question whose prompt is longer
            gets fewer examples, as in the original. None for no limit.

    Raises:
        ValueError: If examples are missing, or a question without examples is too long.
    """
    check_shots(questions, examples, num_shots)
    letter_ids_4 = torch.tensor(letter_ids(tokenizer))
    groups: dict[tuple[str, str], list[int]] = {}
    for index, question in enumerate(questions):
        groups.setdefault((question.subject, question.language), []).append(index)
    batches = []
    for key, members in track(groups.items(), f"prompts ({scoring})", total=len(groups)):
        group = [questions[index] for index in members]
        shots = list(examples.get(key, ()))[:num_shots]
        for encoded in _encode_within(group, shots, tokenizer, scoring, max_length):
            for part in cut_rows(
                [len(row.token_ids) for row in encoded.rows], max_tokens_per_batch
            ):
                asked = [encoded.members[i] for i in part]
                token_BT, segment_BT = _pad([encoded.rows[i] for i in part])
                lengths = [list(map(len, group[i].choices)) for i in asked]
                batch = ChoiceBatch(
                    scoring=scoring,
                    index_B=torch.tensor([members[i] for i in asked]),
                    prefix_P=torch.tensor(encoded.prefix),
                    token_BT=token_BT,
                    segment_BT=segment_BT,
                    letter_ids_4=letter_ids_4,
                    choice_length_B4=torch.tensor(lengths),
                    answer_B=torch.tensor([group[i].answer for i in asked]),
                )
                batches.append(batch)
    return batches


def cut_rows(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Return positions of rows, shortest rows first, each part at most `max_tokens` when padded.

    Padding costs time and so does a batch: of all ways to cut the sorted rows, the one with the
    least sum of both is taken.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    batch_cost = max_tokens // BATCH_SHARE
    # Of the first n rows: the least cost, and where their last part starts.
    best = [(0, 0)]
    for stop in range(1, len(order) + 1):
        width = lengths[order[stop - 1]]
        first = max(0, stop - max(1, max_tokens // width))
        best.append(
            min(
                (best[start][0] + (stop - start) * width + batch_cost, start)
                for start in range(first, stop)
            )
        )
    parts, stop = [], len(order)
    while stop:
        start = best[stop][1]
        parts.append(order[start:stop])
        stop = start
    return parts[::-1]


@dataclass(frozen=True, kw_only=True)
class _Row:
    token_ids: list[int]
    segments: list[int]
    depth: int
    """Positions that the row takes: the question and its longest answer."""


class _Encoded(NamedTuple):
    """Questions of one group that show the same examples."""

    members: list[int]
    """Places in the group."""
    prefix: list[int]
    rows: list[_Row]


def _encode_within(
    group: Sequence[Question],
    shots: Sequence[Question],
    tokenizer: PreTrainedTokenizerBase,
    scoring: Scoring,
    max_length: int | None,
) -> Iterator[_Encoded]:
    """Encode each question with as many examples as fit, those with equally many together."""
    pending = list(range(len(group)))
    where = f"{group[0].subject} ({group[0].language}, {scoring})"
    for num_shots in range(len(shots), -1, -1):
        asked = [group[i] for i in pending]
        prefix, rows = _encode(asked, shots[:num_shots], tokenizer, scoring)
        fits = [max_length is None or len(prefix) + row.depth <= max_length for row in rows]
        fitting = list(compress(pending, fits))
        if fitting and num_shots < len(shots):
            message = "%s: %d of %d examples fit into %d tokens for %d of %d questions"
            logger.info(message, where, num_shots, len(shots), max_length, len(fitting), len(group))
        if fitting:
            yield _Encoded(fitting, prefix, list(compress(rows, fits)))
        pending = [i for i, fit in zip(pending, fits, strict=True) if not fit]
        if not pending:
            return
    longest = len(prefix) + max(row.depth for row in rows)
    raise ValueError(
        f"prompts must have at most {max_length} tokens, got {longest} without examples for "
        f"{group[pending[0]].id} of {where}; remove the question or use a model with a longer "
        "context."
    )


def _encode(
    group: Sequence[Question],
    shots: Sequence[Question],
    tokenizer: PreTrainedTokenizerBase,
    scoring: Scoring,
) -> tuple[list[int], list[_Row]]:
    prefix = prefix_text(group[0].subject, shots, scoring)
    # A letter after the prompt makes the tokens before it those of running text, whether the space
    # belongs to the letter or not.
    end = " A" if scoring == "letter" else ""
    texts = [prompt_text(question, shots, scoring) + end for question in group]
    alone, *whole = encode(tokenizer, [prefix, *texts])
    # A tokenizer may join the prefix's last line break with what follows, or only when nothing
    # follows; what is cut off here goes to the tails.
    cut = shared_length(alone, *whole)
    assert cut > 0
    return alone[:cut], ROWS[scoring](group, [ids[cut:] for ids in whole], tokenizer)


def _letter_rows(
    group: Sequence[Question], tails: Sequence[list[int]], tokenizer: PreTrainedTokenizerBase
) -> list[_Row]:
    rows = [tail[:-1] for tail in tails]
    return [_Row(token_ids=ids, segments=[0] * len(ids), depth=len(ids)) for ids in rows]


def _cloze_rows(
    group: Sequence[Question], tails: Sequence[list[int]], tokenizer: PreTrainedTokenizerBase
) -> list[_Row]:
    texts = [
        cloze_question(question) + continuation
        for question in group
        for continuation in ("", *(f" {choice}" for choice in question.choices))
    ]
    ids = encode(tokenizer, texts)
    return [_tree(tail, *ids[5 * i : 5 * i + 5]) for i, tail in enumerate(tails)]


def _tree(tail: list[int], question: list[int], *answered: list[int]) -> _Row:
    """Return the row of a question whose prompt ends with `tail`.

    Args:
        tail: Tokens after the prefix.
        question: Tokens of the question alone.
        answered: Tokens of the question followed by each answer.
    """
    # Nearly always the whole question. A tokenizer that joins its end with an answer's start
    # moves the joined token from the question to the answers.
    shared = shared_length(question, *answered)
    stem = tail[: len(tail) - (len(question) - shared)]
    parts = [stem, *(ids[shared:] for ids in answered)]
    return _Row(
        token_ids=[token for part in parts for token in part],
        segments=[segment for segment, part in enumerate(parts) for _ in part],
        depth=len(stem) + max(len(part) for part in parts[1:]),
    )


ROWS: dict[Scoring, Callable[..., list[_Row]]] = {"letter": _letter_rows, "cloze": _cloze_rows}


def _pad(rows: Sequence[_Row]) -> tuple[Tensor, Tensor]:
    width = max(len(row.token_ids) for row in rows)
    # Any id will do for padding: nothing attends to it, nothing is read from it.
    tokens = [row.token_ids + [0] * (width - len(row.token_ids)) for row in rows]
    segments = [row.segments + [PADDING_SEGMENT] * (width - len(row.segments)) for row in rows]
    return torch.tensor(tokens), torch.tensor(segments)
