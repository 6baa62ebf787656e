"""Calibration blocks of several texts: what they are made of, how they are mixed and held out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lmerge.data.batching import DomainSubjects, by_domain_language, permutation
from lmerge.data.prompts import questions_text
from lmerge.data.records import Question
from lmerge.data.text import token_blocks

logger = logging.getLogger(__name__)

Mix = Literal["length", "equal"]


def calibration_streams(
    questions: Sequence[Question],
    domain_subjects: DomainSubjects,
    texts: Mapping[str, str],
    tokenizer: PreTrainedTokenizerBase,
) -> list[list[int]]:
    """Return the token ids of each text to calibrate on.

    One stream per (domain, language), of its questions with their answers, then one per prose
    text. A question of several domains counts once. No stream holds BOS, since most blocks start
    in the middle of a text.
    """
    streams, seen = [], set()
    for group in by_domain_language(questions, domain_subjects).values():
        new = [question for question in group if (question.id, question.language) not in seen]
        seen |= {(question.id, question.language) for question in new}
        streams.append(questions_text(new))
    ids = tokenizer([*streams, *texts.values()], add_special_tokens=False, verbose=False)
    return [list(stream) for stream in ids["input_ids"]]


def mix_blocks(
    streams: Sequence[Sequence[int]],
    *,
    block_size: int,
    num_blocks: int,
    seed: int,
    mix: Mix = "length",
) -> Tensor:
    """Return blocks of all streams, spread evenly.

    Args:
        streams: Token ids of each text.
        block_size: Tokens in a block.
        num_blocks: Blocks to return; fewer where the streams hold fewer.
        mix: A row of `SHARES`.
        seed: Chooses the blocks of a stream that has more than its share.

    Returns:
        Blocks (N, T), int64; equal arguments give equal blocks.

    Raises:
        ValueError: If no stream fills a block.
    """
    blocks = [token_blocks(ids, block_size) for ids in streams if len(ids) >= block_size]
    if not blocks:
        longest = max((len(ids) for ids in streams), default=0)
        raise ValueError(
            f"`block_size` must be at most the {longest} tokens of the longest calibration text, "
            f"got {block_size}; lower it or give more text."
        )
    counts = [len(block_BT) for block_BT in blocks]
    if sum(counts) < num_blocks:
        logger.info("%d calibration blocks, since there is no more text", sum(counts))
    shares = SHARES[mix](counts, min(num_blocks, sum(counts)))
    placed = []
    for stream, (block_BT, share) in enumerate(zip(blocks, shares, strict=True)):
        chosen = sorted(permutation(len(block_BT), seed)[:share])
        placed += [((i + 0.5) / share, stream, block_BT[j]) for i, j in enumerate(chosen)]
    return torch.stack([token_T for *_, token_T in sorted(placed, key=lambda item: item[:2])])


def held_blocks(num_blocks: int, holdout: float) -> Tensor:
    """Return which blocks are held out: at least one, spread evenly (bool)."""
    num_held = max(1, round(num_blocks * holdout))
    place_B = (torch.arange(num_held) + 0.5) * num_blocks / num_held
    held_B = torch.zeros(num_blocks, dtype=torch.bool)
    held_B[place_B.long()] = True
    return held_B


def _shares(counts: Sequence[int], total: int) -> list[int]:
    """Split `total`, at most their sum, in proportion to `counts` (largest remainders)."""
    available = sum(counts)
    shares = [total * count // available for count in counts]
    remainders = sorted(range(len(counts)), key=lambda i: -(total * counts[i] % available))
    for i in remainders[: total - sum(shares)]:
        shares[i] += 1
    return shares


def _equal_shares(counts: Sequence[int], total: int) -> list[int]:
    """Split `total`, at most their sum, into shares as equal as the counts allow."""
    shares, left = [0] * len(counts), total
    for done, i in enumerate(sorted(range(len(counts)), key=lambda i: counts[i])):
        shares[i] = min(counts[i], left // (len(counts) - done))
        left -= shares[i]
    return shares


SHARES: dict[Mix, Callable[[Sequence[int], int], list[int]]] = {
    "length": _shares,
    "equal": _equal_shares,
}
"""How calibration blocks are shared out among texts: in proportion to their lengths, or equally as
far as each text goes."""
