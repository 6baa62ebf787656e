"""Log-probabilities of answers and texts under a model.

Shapes beyond the usual legend: P positions of a shared prefix, S prefix and row positions together,
4 the choices of a question. Relies on `model.model`, `model.lm_head`, `model.config` and
`model.device` alone, so that a wrapper which merges weights on the fly can be scored too. The
attention implementation must take a 4D additive mask: `sdpa` or `eager`.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from lmerge.data.records import IGNORE, PADDING_SEGMENT, ChoiceBatch, TextBatch
from lmerge.divergence import kl_rows
from lmerge.grouped import grouped_attention
from lmerge.llama import cache_argument
from lmerge.prefix import PrefixCache

__all__ = [
    "PrefixCache",
    "TextScores",
    "compare_text",
    "normalise_cloze",
    "score_choices",
    "score_text",
    "score_text_pair",
]

CHUNK_SIZE = 256
"""Positions whose logits exist at once; 256 x 128k float32 logits are 131 MB."""


class TextScores(NamedTuple):
    """Two models on the same tokens; zero (False) where nothing is predicted."""

    source_nll_BT: Tensor
    """Negative log-likelihood of the target under the source, in nats (float64)."""
    merged_nll_BT: Tensor
    """The same under the merged model."""
    kl_BT: Tensor
    """KL(source || merged) of the next-token distributions, in nats (float64)."""
    agree_BT: Tensor
    """Whether both models' most probable token is the same (bool)."""
    mask_BT: Tensor
    """Where a target exists (bool)."""


@torch.no_grad()
def score_choices(model: PreTrainedModel, batch: ChoiceBatch, prefixes: PrefixCache) -> Tensor:
    """Return the log-probability of the four choices of each question, in nats.

    Args:
        model: A causal language model in eval mode.
        batch: Questions with a common prefix. Answer segments are contiguous, after segment 0.
        prefixes: Cache that encodes the prefix, or already holds it; not changed otherwise.

    Returns:
        float64 (B, 4) on the model's device. `letter`: of the letter's token after segment 0,
        over the full vocabulary. `cloze`: summed over the tokens of the answer, not normalised.

    Raises:
        ValueError: If a row lacks a question or an answer, or exceeds a sliding window.
    """
    segment_BT = batch.segment_BT.to(model.device)
    prefix_length = len(batch.prefix_P)
    _check_segments(segment_BT, cloze=batch.scoring == "cloze")
    rank_BT, position_BT = _positions(segment_BT, prefix_length)
    _check_window(model, int(position_BT.max()) + 1)
    states = prefixes.encode(model, batch.prefix_P)
    mask_B1TS = _tree_mask(segment_BT, prefix_length, states.dtype)
    with grouped_attention(model) as num_groups:
        state_BTD = _decode(
            model,
            input_ids=batch.token_BT.to(model.device),
            attention_mask=mask_B1TS.repeat(1, 1, num_groups, 1),
            position_ids=position_BT,
            use_cache=True,
            **cache_argument(model.model, states),
        )
    last_B = (segment_BT == 0).sum(dim=1) - 1
    if batch.scoring == "letter":
        state_BD = state_BTD[torch.arange(len(last_B), device=last_B.device), last_B]
        logp_BV = _logits(model, state_BD).log_softmax(dim=-1)
        return logp_BV[:, batch.letter_ids_4.to(model.device)].double()
    # The last position of the question predicts the first token of every answer.
    before_BT = torch.arange(segment_BT.shape[1], device=model.device) - 1
    before_BT = torch.where(rank_BT == 0, last_B[:, None], before_BT)
    return _answer_logp(model, batch, state_BTD, segment_BT, before_BT)


def normalise_cloze(logp_B4: Tensor, choice_length_B4: Tensor) -> Tensor:
    """Return log-probability per character of the answer text (lm-eval's `acc_norm`).

    Args:
        logp_B4: Summed log-probabilities of `score_choices`.
        choice_length_B4: Characters of each answer text.

    Raises:
        ValueError: If an answer text is empty.
    """
    if bool((choice_length_B4 < 1).any()):
        raise ValueError(
            f"`choice_length_B4` must be at least 1, got {int(choice_length_B4.min())}. "
            "Remove questions with an empty answer text."
        )
    return logp_B4 / choice_length_B4.to(logp_B4)


@torch.no_grad()
def score_text(model: PreTrainedModel, batch: TextBatch, *, chunk_size: int = CHUNK_SIZE) -> Tensor:
    """Return the negative log-likelihood of each target in nats, float64 (B, T), 0 at `IGNORE`."""
    target_BT = batch.target_BT.to(model.device)
    mask_BT = target_BT != IGNORE
    state_ND = _text_states(model, batch)[mask_BT]
    return _spread(_token_nll(model, state_ND, target_BT[mask_BT], chunk_size=chunk_size), mask_BT)


@torch.no_grad()
def score_text_pair(
    source: PreTrainedModel,
    merged: PreTrainedModel,
    batch: TextBatch,
    *,
    chunk_size: int = CHUNK_SIZE,
) -> TextScores:
    """Score a text under two models and compare their predictions, one chunk of logits at a time.

    Args:
        source: The loaded model.
        merged: The model made from it: same vocabulary, same device.
        batch: Blocks of a text; positions whose target is `IGNORE` do not count.
        chunk_size: Positions whose logits exist at once.
    """
    target_BT = batch.target_BT.to(source.device)
    mask_BT = target_BT != IGNORE
    parts = []
    for source_ND, merged_ND, target_N in zip(
        _text_states(source, batch)[mask_BT].split(chunk_size),
        _text_states(merged, batch)[mask_BT].split(chunk_size),
        target_BT[mask_BT].split(chunk_size),
        strict=True,
    ):
        source_NV, merged_NV = _logits(source, source_ND), _logits(merged, merged_ND)
        nlls = [F.cross_entropy(x, target_N, reduction="none") for x in (source_NV, merged_NV)]
        parts.append((*nlls, *_compare(source_NV, merged_NV)))
    source_N, merged_N, kl_N, agree_N = (torch.cat(column) for column in zip(*parts, strict=True))
    return TextScores(
        source_nll_BT=_spread(source_N, mask_BT),
        merged_nll_BT=_spread(merged_N, mask_BT),
        kl_BT=_spread(kl_N, mask_BT),
        agree_BT=_spread(agree_N, mask_BT).bool(),
        mask_BT=mask_BT,
    )


def compare_text(
    source_logits_NV: Tensor, merged_logits_NV: Tensor, *, chunk_size: int = CHUNK_SIZE
) -> tuple[Tensor, Tensor]:
    """Return KL(source || merged) in nats (float64 N) and whether the top tokens agree (bool N).

    Args:
        source_logits_NV: Logits of the source at some positions, any float dtype.
        merged_logits_NV: Logits of the merged model at the same positions.
        chunk_size: Positions in float32 at once.

    Raises:
        ValueError: If the shapes differ.
    """
    if source_logits_NV.shape != merged_logits_NV.shape:
        raise ValueError(
            "`merged_logits_NV` must have the shape of `source_logits_NV`, got "
            f"{tuple(merged_logits_NV.shape)} and {tuple(source_logits_NV.shape)}. "
            "Use one tokenizer and the same positions for both models."
        )
    chunks = zip(
        source_logits_NV.split(chunk_size), merged_logits_NV.split(chunk_size), strict=True
    )
    parts = [_compare(source_NV.float(), merged_NV.float()) for source_NV, merged_NV in chunks]
    kls, agreements = zip(*parts, strict=True)
    return torch.cat(kls).double(), torch.cat(agreements)


def _compare(source_NV: Tensor, merged_NV: Tensor) -> tuple[Tensor, Tensor]:
    agree_N = source_NV.argmax(dim=-1) == merged_NV.argmax(dim=-1)
    return kl_rows(source_NV, merged_NV).clamp_min(0), agree_N


def _answer_logp(
    model: PreTrainedModel,
    batch: ChoiceBatch,
    state_BTD: Tensor,
    segment_BT: Tensor,
    before_BT: Tensor,
) -> Tensor:
    """Return summed log-probabilities (B, 4); `before_BT` is the position that predicts a token."""
    answer_BT = segment_BT > 0
    row_N = answer_BT.nonzero()[:, 0]
    state_ND = state_BTD[row_N, before_BT[answer_BT]]
    target_N = batch.token_BT.to(model.device)[answer_BT]
    logp_BT = -_spread(_token_nll(model, state_ND, target_N, chunk_size=CHUNK_SIZE), answer_BT)
    # Sums over a dense axis: unlike scatter_add they have one order on every device.
    return torch.stack([(logp_BT * (segment_BT == s)).sum(dim=1) for s in range(1, 5)], dim=1)


def _positions(segment_BT: Tensor, prefix_length: int) -> tuple[Tensor, Tensor]:
    """Return each token's rank in its segment and its position in the text the model sees."""
    member_BT5 = segment_BT[..., None] == torch.arange(5, device=segment_BT.device)
    rank_BT = (member_BT5.cumsum(dim=1) * member_BT5).sum(dim=-1) - 1
    question_length_B1 = member_BT5[..., 0].sum(dim=1, keepdim=True)
    return rank_BT, prefix_length + rank_BT + (segment_BT > 0) * question_length_B1


def _tree_mask(segment_BT: Tensor, prefix_length: int, dtype: torch.dtype) -> Tensor:
    """Return the additive mask (B, 1, T, S): the prefix, the question and one's own answer."""
    length = segment_BT.shape[1]
    key_B1T, query_BT1 = segment_BT[:, None, :], segment_BT[:, :, None]
    causal_TT = torch.ones(length, length, dtype=torch.bool, device=segment_BT.device).tril()
    see_BTT = ((key_B1T == 0) | (key_B1T == query_BT1)) & causal_TT & (key_B1T != PADDING_SEGMENT)
    hidden_BTS = F.pad(~see_BTT, (prefix_length, 0), value=False)
    mask_BTS = torch.zeros(hidden_BTS.shape, dtype=dtype, device=segment_BT.device)
    # The least finite number, not -inf: it stays a number in every attention kernel.
    return mask_BTS.masked_fill_(hidden_BTS, torch.finfo(dtype).min)[:, None]


def _check_segments(segment_BT: Tensor, *, cloze: bool) -> None:
    for segment in range(5 if cloze else 1):
        missing_B = (segment_BT != segment).all(dim=1)
        if bool(missing_B.any()):
            raise ValueError(
                f"`segment_BT` must have a token of segment {segment} in every row, got none in "
                f"row {int(missing_B.nonzero()[0])}. Remove empty questions and answers."
            )


def _check_window(model: PreTrainedModel, length: int) -> None:
    window = getattr(model.config, "sliding_window", None)
    if window is not None and length > window:
        raise ValueError(
            f"A question with its prefix must fit the model's sliding window of {window} tokens, "
            f"got {length}. Use fewer shots."
        )


def _text_states(model: PreTrainedModel, batch: TextBatch) -> Tensor:
    # Padding is on the right, where a causal model cannot see it: no mask is needed.
    return _decode(model, input_ids=batch.token_BT.to(model.device), use_cache=False)


def _decode(model: PreTrainedModel, **inputs: object) -> Tensor:
    return cast(Tensor, cast(nn.Module, model.model)(**inputs).last_hidden_state)


def _logits(model: PreTrainedModel, state_ND: Tensor) -> Tensor:
    return cast(Tensor, cast(nn.Module, model.lm_head)(state_ND)).float()


def _token_nll(
    model: PreTrainedModel, state_ND: Tensor, target_N: Tensor, *, chunk_size: int
) -> Tensor:
    chunks = zip(state_ND.split(chunk_size), target_N.split(chunk_size), strict=True)
    parts = [F.cross_entropy(_logits(model, x), target, reduction="none") for x, target in chunks]
    return torch.cat(parts)


def _spread(value_N: Tensor, mask_BT: Tensor) -> Tensor:
    """Return float64 (B, T) with the values where the mask is set and 0 elsewhere."""
    value_BT = torch.zeros(mask_BT.shape, dtype=torch.float64, device=mask_BT.device)
    value_BT[mask_BT] = value_N.double()
    return value_BT
