"""What each domain and language gives to a study of transfer: text to plan on, text to measure on.

No question is on both sides, in any language: translations of a question share its id.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lmerge.data.batching import by_domain_language, sample_prompts
from lmerge.data.prompts import calibration_text, questions_text
from lmerge.data.questions import fingerprint, load_questions, resolve_domains
from lmerge.data.records import Question
from lmerge.data.text import token_blocks
from lmerge.data.tokens import encode

CalibrationSplit = Literal["dev", "val"]
EvalSplit = Literal["val", "test"]
Key = tuple[str, str]
"""Split and id of a question; translations share it."""


class DomainTexts(NamedTuple):
    """What one domain and language gives."""

    prompts: list[Tensor]
    """Letter prompts (T,) for layer similarity, from the questions to calibrate on."""
    blocks_BT: Tensor
    """Blocks of those questions with their answers; as many for every domain."""
    questions: list[Tensor]
    """Token ids (T,) of each question with its answer to measure on."""


class Questions(NamedTuple):
    """The questions of a study."""

    calibration: list[Question]
    measured: list[Question]
    subjects: dict[str, tuple[str, ...]]
    """Domain -> its subjects."""

    def fingerprints(self) -> dict[str, str]:
        """Return the fingerprints of both sides."""
        return {
            "calibration": fingerprint(self.calibration),
            "measured": fingerprint(self.measured),
        }


def read_sides(
    source: str,
    domains: Sequence[str],
    languages: Sequence[str],
    *,
    extra_domains: Mapping[str, Sequence[str]] | None,
    calibration_splits: Sequence[CalibrationSplit],
    eval_split: EvalSplit,
    holdout: float,
    seed: int,
) -> Questions:
    """Return the questions to calibrate on and those to measure on.

    Where the split to measure on is also one to calibrate on, a share of each domain's questions
    in it is held out, the same questions in every language.

    Args:
        source: Where the questions are, as in `questions.load_questions`.
        domains: Domains to compare.
        languages: ISO 639-1 codes.
        extra_domains: The user's own domains.
        calibration_splits: Splits to calibrate on.
        eval_split: Split to measure on.
        holdout: Share of a domain's questions in a shared split that are measured on.
        seed: Chooses them.
    """
    splits = dict.fromkeys((*calibration_splits, eval_split))
    found = {split: load_questions(source, split, languages) for split in splits}
    available = {question.subject for group in found.values() for question in group}
    subjects = resolve_domains(domains, extra_domains, available)
    calibration = [q for split in calibration_splits for q in found[split]]
    if eval_split not in calibration_splits:
        return Questions(calibration, found[eval_split], subjects)
    held: set[Key] = set()
    for row in subjects.values():
        keys = shuffled([q for q in found[eval_split] if q.subject in row], seed)
        held |= set(keys[: round(holdout * len(keys))])
    return Questions(
        [q for q in calibration if key_of(q) not in held],
        [q for q in found[eval_split] if key_of(q) in held],
        subjects,
    )


def key_of(question: Question) -> Key:
    """Return what a question and its translations share."""
    return question.split, question.id


def shuffled(questions: Sequence[Question], seed: int) -> list[Key]:
    """Return the questions' keys in an order that depends on them and the seed alone."""
    keys = sorted({key_of(question) for question in questions})
    generator = torch.Generator().manual_seed(seed)
    return [keys[i] for i in torch.randperm(len(keys), generator=generator).tolist()]


def domain_texts(
    questions: Questions,
    tokenizer: PreTrainedTokenizerBase,
    *,
    kept: Mapping[str, Sequence[str]],
    num_prompts: int,
    num_tokens: int,
    block_size: int,
    num_questions: int,
    max_length: int,
    seed: int,
) -> dict[str, DomainTexts]:
    """Return the texts of each `domain/language`.

    Every group calibrates on as many blocks as the one with the least text has, so that topics are
    compared and not sizes.

    Args:
        questions: Both sides.
        tokenizer: Tokenizer of the source.
        kept: Domain -> its languages.
        num_prompts: Prompts for layer similarity, at most.
        num_tokens: Tokens to calibrate on, at most.
        block_size: Tokens in a block.
        num_questions: Questions to measure on, at most.
        max_length: Tokens of a question that the model can see.
        seed: Chooses the questions.

    Raises:
        ValueError: When a group has too little text.
    """
    prompts = sample_prompts(
        questions.calibration, questions.subjects, tokenizer, num_prompts=num_prompts, seed=seed
    )
    blocks = _blocks(questions, tokenizer, kept, block_size, seed)
    num_blocks = min(num_tokens // block_size, *map(len, blocks.values()))
    if num_blocks < 2:
        raise ValueError(
            f"every domain must fill at least 2 blocks of {block_size} tokens to calibrate on, got "
            f"{num_blocks} for {min(blocks, key=lambda name: len(blocks[name]))}. Lower "
            "`block_size`, or give more questions."
        )
    measured = _measured(questions, tokenizer, kept, num_questions, max_length, seed)
    return {
        name: DomainTexts(
            prompts[_pair(name)],
            blocks_BT[:num_blocks],
            [row_T.clone() for row_T in measured[name]],
        )
        for name, blocks_BT in blocks.items()
    }


def _pair(name: str) -> tuple[str, str]:
    domain, _, language = name.rpartition("/")
    return domain, language


def _ordered(
    group: Sequence[Question], all_languages: Sequence[Question], seed: int
) -> list[Question]:
    """Return a group's questions in the order that all languages of the domain share."""
    rank = {key: i for i, key in enumerate(shuffled(all_languages, seed))}
    return sorted(group, key=lambda question: rank[key_of(question)])


def _groups(
    side: Sequence[Question],
    subjects: Mapping[str, Sequence[str]],
    kept: Mapping[str, Sequence[str]],
    seed: int,
) -> dict[str, list[Question]]:
    groups = by_domain_language(side, subjects)
    return {
        f"{domain}/{language}": _ordered(
            groups.get((domain, language), []),
            [q for (name, _), group in groups.items() if name == domain for q in group],
            seed,
        )
        for domain, languages in kept.items()
        for language in languages
    }


def _blocks(
    questions: Questions,
    tokenizer: PreTrainedTokenizerBase,
    kept: Mapping[str, Sequence[str]],
    block_size: int,
    seed: int,
) -> dict[str, Tensor]:
    groups = _groups(questions.calibration, questions.subjects, kept, seed)
    streams = encode(tokenizer, [questions_text(group) for group in groups.values()])
    return {
        name: token_blocks(ids, block_size)
        if len(ids) >= block_size
        else torch.zeros(0, block_size, dtype=torch.long)
        for name, ids in zip(groups, streams, strict=True)
    }


def _measured(
    questions: Questions,
    tokenizer: PreTrainedTokenizerBase,
    kept: Mapping[str, Sequence[str]],
    num_questions: int,
    max_length: int,
    seed: int,
) -> dict[str, list[Tensor]]:
    groups = _groups(questions.measured, questions.subjects, kept, seed)
    rows = {}
    for name, group in groups.items():
        if not group:
            raise ValueError(
                f"{name} must have at least one question to measure on, got none. Raise `holdout`, "
                "or drop the domain or language."
            )
        texts = [calibration_text(question) for question in group[:num_questions]]
        rows[name] = [torch.tensor(ids[:max_length]) for ids in encode(tokenizer, texts)]
    return rows
