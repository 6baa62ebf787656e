"""KL from the source's next-token distribution: from logits, or from states below the head.

The head is linear, so the source enters a KL through two things alone: with p its distribution, h
the merged model's state and E the head, KL(p || q) = sum p log p - h . (p E) + logsumexp(E h). The
mean embedding p E and the negative entropy are as small as a state, and nothing is truncated.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

CHUNK_SIZE = 128
"""Positions whose logits exist at once; some 25 MB of them for 49,152 tokens."""


def kl_rows(source_NV: Tensor, merged_NV: Tensor) -> Tensor:
    """Return KL(source || merged) at each position in nats, from logits; float32 sums.

    Float64 logits are summed in float64. Rounding can take equal models slightly below zero.
    """
    logp_NV, logq_NV = _log_softmax(source_NV), _log_softmax(merged_NV)
    return (logp_NV.exp() * (logp_NV - logq_NV)).sum(dim=-1)


def _log_softmax(logits_NV: Tensor) -> Tensor:
    return wide(logits_NV).log_softmax(dim=-1)


def wide(tensor: Tensor) -> Tensor:
    """Return a tensor in float32, or as it is in float64: the dtype that losses are summed in."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


class Targets(NamedTuple):
    """All that a KL from the source needs to know of it at each position; exact."""

    mean_ND: Tensor
    """Mean of the head's rows under the source's distribution, float32 or float64."""
    plogp_N: Tensor
    """Sum of p log p, the negative entropy in nats."""


@torch.no_grad()
def source_targets(source_ND: Tensor, head_VD: Tensor) -> Targets:
    """Return the targets of some positions.

    Args:
        source_ND: The source's states after the final norm.
        head_VD: Weights of the head, float32 or float64: a mean in 16 bits would not be exact.
    """
    parts = []
    for chunk_ND in source_ND.split(CHUNK_SIZE):
        logp_NV = _log_softmax(chunk_ND @ head_VD.T)
        p_NV = logp_NV.exp()
        # Probabilities that sum to 1 + 1e-6 would shift h . (p E), which is some 20 nats, by 2e-5.
        excess_N = p_NV.sum(dim=-1, dtype=torch.float64).log().to(p_NV)
        p_NV *= excess_N.neg().exp()[:, None]
        parts.append((p_NV @ head_VD, (p_NV * logp_NV).sum(dim=-1) - excess_N))
    return Targets(*(torch.cat(part) for part in zip(*parts, strict=True)))


def head_kl(state_ND: Tensor, source: Targets | Tensor, head_VD: Tensor) -> Tensor:
    """Return KL(source || merged) in nats, mean over positions, one chunk of logits at a time.

    Its gradient is computed with it, (q - p) E / N, so that no logits are kept.

    Args:
        state_ND: The merged model's states after the final norm.
        source: `source_targets` of the same positions, or the source's states there, from which
            the same value comes at the cost of its logits; with a head in 16 bits give states,
            since q E and p E would cancel.
        head_VD: Weights of the head; frozen, and without a bias.
    """
    parts = source if isinstance(source, Targets) else (source,)
    value: Tensor = _HeadKL.apply(state_ND, head_VD, *parts)
    return value


class _HeadKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, state_ND: Tensor, head_VD: Tensor, *source: Tensor) -> Tensor:
        step = _from_targets if len(source) > 1 else _from_states
        total, grads = wide(state_ND).new_zeros(()), []
        for chunk_ND, *known in zip(
            *(part.split(CHUNK_SIZE) for part in (state_ND, *source)), strict=True
        ):
            kl_N, grad_ND = step(chunk_ND, head_VD, *known, needs_grad=ctx.needs_input_grad[0])
            total += kl_N.sum()
            grads.append(grad_ND)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(torch.cat(grads) / len(state_ND))
        return total / len(state_ND)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_ND,) = ctx.saved_tensors
        others = [None] * (len(ctx.needs_input_grad) - 1)
        return grads[0].to(grad_ND) * grad_ND, *others


def _from_targets(
    state_ND: Tensor, head_VD: Tensor, mean_ND: Tensor, plogp_N: Tensor, *, needs_grad: bool
) -> tuple[Tensor, Tensor]:
    logits_NV = state_ND @ head_VD.T
    lse_N = logits_NV.logsumexp(dim=-1)
    kl_N = plogp_N + lse_N - (state_ND * mean_ND).sum(dim=-1)
    if not needs_grad:
        return kl_N, state_ND
    q_NV = logits_NV.sub_(lse_N[:, None]).exp_()
    return kl_N, q_NV @ head_VD - mean_ND


def _from_states(
    state_ND: Tensor, head_VD: Tensor, source_ND: Tensor, *, needs_grad: bool
) -> tuple[Tensor, Tensor]:
    logp_NV, logq_NV = (_log_softmax(x_ND @ head_VD.T) for x_ND in (source_ND, state_ND))
    p_NV = logp_NV.exp()
    kl_N = (p_NV * logp_NV.sub_(logq_NV)).sum(dim=-1)
    if not needs_grad:
        return kl_N, state_ND
    gap_NV = logq_NV.exp_().sub_(p_NV)
    return kl_N, gap_NV.to(head_VD.dtype) @ head_VD


def exact_kl(source_NV: Tensor, merged_NV: Tensor) -> Tensor:
    """Return the mean of `kl_rows` over positions."""
    return kl_rows(source_NV, merged_NV).mean()


class TopLogits(NamedTuple):
    """The source's distribution over its most probable tokens and one remainder, float32."""

    logp_NK: Tensor
    """Log-probability of each of the K tokens, highest first."""
    token_NK: Tensor
    """Its token id (int64)."""
    log_rest_N: Tensor
    """Log-probability of all other tokens together; -inf where there are none."""

    def rows(self, index: tuple[Tensor, ...]) -> TopLogits:
        """Return some of the positions."""
        return TopLogits(*(part[index] for part in self))


def top_logits(logits_NV: Tensor, num_top: int) -> TopLogits:
    """Return the `num_top` most probable tokens and what is left for the others."""
    logits_NV = logits_NV.float()
    token_NK = logits_NV.topk(min(num_top, logits_NV.shape[-1]), dim=-1).indices
    return TopLogits(*_log_parts(logits_NV, token_NK))


def _log_parts(logits_NV: Tensor, token_NK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # The remainder is summed itself: 1 minus the others rounds to 0 where they are nearly all.
    total_N = logits_NV.logsumexp(dim=-1)
    others_NV = logits_NV.scatter(-1, token_NK, -torch.inf)
    logp_NK = logits_NV.gather(-1, token_NK) - total_N[..., None]
    return logp_NK, token_NK, others_NV.logsumexp(dim=-1) - total_N


def truncated_kl(top: TopLogits, merged_NV: Tensor) -> Tensor:
    """Return the KL in nats of the distributions over the source's top tokens and one remainder.

    Merging outcomes can only lower a KL (data processing inequality), so it is at most
    `exact_kl`, and equal where the remainder is one token or none.
    """
    logq_NK, _, log_rest_N = _log_parts(merged_NV.float(), top.token_NK)
    kl_N = (top.logp_NK.exp() * (top.logp_NK - logq_NK)).sum(dim=-1)
    if top.token_NK.shape[-1] < merged_NV.shape[-1]:
        kl_N = kl_N + top.log_rest_N.exp() * (top.log_rest_N - log_rest_N)
    return kl_N.mean()
