"""Plans chosen by what they cost once repaired, not by how alike the layers look."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lmerge.divergence import exact_kl
from lmerge.llama import (
    capture_down_input,
    decoder_layers,
    embed,
    layer_tensors,
    lm_logits,
    num_layers,
    run_span,
    span,
    with_layers,
    with_tensors,
)
from lmerge.plan import Group, check_num_removed
from lmerge.progress import track
from lmerge.repair import NormalEquations, down_rows, position_weights

SearchMethod = Literal["block_repaired"]

RIDGE = 0.1
"""Regularisation of the refits in the search, as a share of the mean diagonal."""

POSITIONS = 64
"""Positions of each held-out block whose predictions are compared."""


class Candidate(NamedTuple):
    """A block of layers that could become one, and what that costs after a refit."""

    group: Group
    kl: float
    """KL(source || merged) in nats a token, on the held-out blocks."""


@torch.no_grad()
def repaired_blocks(
    source: PreTrainedModel, token_BT: Tensor, held_B: Tensor, num_removed: int
) -> list[Candidate]:
    """Return the cost of every contiguous block of `num_removed` + 1 layers, best first.

    The block's first layer is its anchor. Its down projection is refitted in closed form to the
    states after the block (docs/method.md, repair), on the blocks of text that are not held out;
    the KL is taken through the rest of the model on those that are.

    Args:
        source: The source model.
        token_BT: Calibration blocks, unpadded.
        held_B: Which of them are held out (bool).
        num_removed: Layers that the block loses.
    """
    depth = num_layers(source)
    check_num_removed(num_removed, depth)
    fit_states = _layer_inputs(source, token_BT[~held_B])
    held_states = _layer_inputs(source, token_BT[held_B])
    source_NV = _logits(source, _after(source, held_states[-1], depth))
    candidates = []
    for first in track(range(depth - num_removed), "plan search", total=depth - num_removed):
        stop = first + num_removed + 1
        repaired = _refitted_layer(source, first, fit_states[first], fit_states[stop])
        above = with_layers(
            source,
            [repaired, *decoder_layers(source)[stop:]],
            [first, *range(stop, depth)],
        )
        kl = exact_kl(source_NV, _logits(source, _run(above, held_states[first])))
        group = Group(members=tuple(range(first, stop)), anchor=first)
        candidates.append(Candidate(group, float(kl)))
    return sorted(candidates, key=lambda c: math.inf if math.isnan(c.kl) else c.kl)


def _layer_inputs(source: PreTrainedModel, token_BT: Tensor) -> list[Tensor]:
    """Return the input of every layer, and the output of the last, each (B, T, D) on the CPU."""
    states = [torch.cat([embed(source, t.to(source.device)).cpu() for t in token_BT.split(4)])]
    for layer in range(num_layers(source)):
        states.append(_run(span(source, layer, layer + 1), states[-1]))
    return states


def _run(part: PreTrainedModel, state_BTD: Tensor) -> Tensor:
    return torch.cat([run_span(part, s.to(part.device)).cpu() for s in state_BTD.split(4)])


def _after(source: PreTrainedModel, state_BTD: Tensor, depth: int) -> Tensor:
    """Return the last layer's output after the final norm."""
    return _run(span(source, depth, depth, final_norm=True), state_BTD)


def _logits(source: PreTrainedModel, normed_BTD: Tensor) -> Tensor:
    """Return next-token logits at evenly spaced positions, (N, V)."""
    length = normed_BTD.shape[1]
    place_P = torch.linspace(0, length - 1, min(POSITIONS, length)).long()
    normed_ND = normed_BTD[:, place_P].flatten(0, 1).to(source.device)
    return lm_logits(source, normed_ND)


def _refitted_layer(
    source: PreTrainedModel, first: int, input_BTD: Tensor, target_BTD: Tensor
) -> torch.nn.Module:
    """Return layer `first` with its down projection refitted to other output states."""
    layer = decoder_layers(source)[first]
    one = span(source, first, first + 1)
    weights = layer_tensors(layer)
    down_DF = weights["down_proj"]
    equations = NormalEquations.zeros(down_DF.shape[1], down_DF.shape[0], down_DF.device)
    with capture_down_input(layer) as inputs:
        for x_BTD, y_BTD in zip(input_BTD.split(4), target_BTD.split(4), strict=True):
            rows = down_rows(one, inputs, x_BTD, y_BTD)
            a_NF, residual_ND, target_ND = (row.flatten(0, 1) for row in rows)
            equations = equations.update(a_NF, residual_ND, position_weights(target_ND))
    changed_DF = (down_DF.double() + equations.solve(RIDGE)).to(down_DF.dtype)
    return with_tensors(layer, {**weights, "down_proj": changed_DF})


SEARCHES: dict[SearchMethod, Callable[[PreTrainedModel, Tensor, Tensor, int], list[Candidate]]] = {
    "block_repaired": repaired_blocks
}
"""Ways to choose groups that run the model; each returns its candidates, best first."""


def search_plan(
    source: PreTrainedModel,
    token_BT: Tensor,
    held_B: Tensor,
    num_removed: int,
    method: SearchMethod,
    *,
    num_fit_tokens: int = 6144,
    num_held_tokens: int = 1024,
) -> list[Candidate]:
    """Return the candidates of a search on a part of the calibration blocks, best first.

    Args:
        source: The source model.
        token_BT: Calibration blocks.
        held_B: Which of them are held out (bool).
        num_removed: Layers to remove.
        method: A row of `SEARCHES`.
        num_fit_tokens: Tokens to refit on, at least one block.
        num_held_tokens: Tokens to compare on, at least one block.
    """
    length = token_BT.shape[1]
    place_B = torch.arange(len(token_BT))
    fit_B = _spread(place_B[~held_B], max(1, num_fit_tokens // length))
    compare_B = _spread(place_B[held_B], max(1, num_held_tokens // length))
    chosen_B = torch.cat([fit_B, compare_B])
    is_held_B = torch.arange(len(chosen_B)) >= len(fit_B)
    return SEARCHES[method](source, token_BT[chosen_B], is_held_B, num_removed)


def _spread(place_B: Tensor, count: int) -> Tensor:
    """Return `count` of the places, evenly spread; all where there are fewer."""
    count = min(count, len(place_B))
    return place_B[((torch.arange(count) + 0.5) * len(place_B) / count).long()]
