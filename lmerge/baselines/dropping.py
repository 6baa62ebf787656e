"""Baselines that delete layers and change no weight."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from lmerge.baselines.calibration import Calibration, Shallow, keep_layers, spread_blocks, without
from lmerge.llama import lm_logits, run_span, span
from lmerge.plan import block_groups
from lmerge.progress import track
from lmerge.similarity import angular_similarity

SLEB_TOKENS = 2048
"""Calibration tokens that SLEB measures the loss on, at each removal and for each layer."""


def drop_last(data: Calibration, num_removed: int) -> Shallow:
    """Remove the last layers: a control, and what MKA's released code amounts to.

    MKA's released code (arXiv:2406.16330) puts the fused tensors into a dict that is thrown away;
    the layer that others were to be merged into keeps its own weights.
    """
    return keep_layers(data.source, range(data.depth - num_removed))


def drop_random(data: Calibration, num_removed: int) -> Shallow:
    """Remove layers drawn at random with the seed of `data`, any but the first and the last."""
    inner = torch.arange(1, data.depth - 1)
    inner = inner if len(inner) >= num_removed else torch.arange(1, data.depth)
    generator = torch.Generator().manual_seed(data.seed)
    drawn = inner[torch.randperm(len(inner), generator=generator)[:num_removed]]
    return keep_layers(data.source, without(data.depth, drawn.tolist()))


def block_influences(states: list[Tensor]) -> Tensor:
    """Return 1 - cos(input, output) of each layer, averaged over tokens, (L,) float64.

    ShortGPT, arXiv:2403.03853, eq. 1.
    """
    cosines = [
        F.cosine_similarity(x.double(), y.double(), dim=-1).mean() for x, y in pairwise(states)
    ]
    return 1 - torch.stack(cosines)


def drop_shortgpt(data: Calibration, num_removed: int) -> Shallow:
    """Remove the layers of least block influence, wherever they are (arXiv:2403.03853, sec. 3)."""
    order = block_influences(data.states).argsort()[:num_removed]
    return keep_layers(data.source, without(data.depth, order.tolist()))


def drop_angular(data: Calibration, num_removed: int) -> Shallow:
    """Remove the block of least angular distance at the last token (arXiv:2403.17887, sec. 3.2).

    The distance is taken between the input of the block's first layer and that of the layer after
    it, so a block may start at any layer but the first; the last layer stays (`plan.block_groups`).
    """
    last_LBD = torch.stack([state_BTD[:, -1] for state_BTD in data.states[1:]])
    (group,) = block_groups(angular_similarity(last_LBD), num_removed)
    return keep_layers(data.source, without(data.depth, group.members[1:]))


@torch.no_grad()
def drop_sleb(data: Calibration, num_removed: int) -> Shallow:
    """Remove one layer at a time, that whose removal costs least loss (arXiv:2402.09025).

    The first and the last of the remaining layers stay, as in the released code. Departure: the
    loss is measured on `SLEB_TOKENS` tokens of the calibration blocks, not on 128 x 2,048. A larger
    budget goes on from where a smaller one ended.
    """
    token_BT = spread_blocks(data.token_BT, SLEB_TOKENS)
    removed = data.sleb_removed
    missing = range(len(removed), num_removed)
    for _ in track(missing, "SLEB", total=len(missing)):
        kept = without(data.depth, removed)
        losses = _losses_without(data.source, kept, token_BT)
        removed.append(kept[1 + int(losses.argmin())])
    return keep_layers(data.source, without(data.depth, removed[:num_removed]))


def _losses_without(source: PreTrainedModel, kept: list[int], token_BT: Tensor) -> Tensor:
    """Return the loss without each of the inner layers of `kept`, in order."""
    model = keep_layers(source, kept).model
    token_BT = token_BT.to(source.device)
    state_BTD = run_span(span(model, 0, 1), model.get_input_embeddings()(token_BT))
    losses = []
    for place in range(1, len(kept) - 1):  # what is below the removed layer is run once
        above = span(model, place + 1, len(kept), final_norm=True)
        losses.append(_loss(source, run_span(above, state_BTD), token_BT))
        state_BTD = run_span(span(model, place, place + 1), state_BTD)
    return torch.stack(losses)


def _loss(source: PreTrainedModel, normed_BTD: Tensor, token_BT: Tensor) -> Tensor:
    parts = [
        F.cross_entropy(lm_logits(source, s_TD[:-1]).float(), t_T[1:], reduction="sum").double()
        for s_TD, t_T in zip(normed_BTD, token_BT, strict=True)
    ]
    return torch.stack(parts).sum().cpu()
