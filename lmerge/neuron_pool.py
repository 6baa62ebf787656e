"""Neurons of a merged layer, chosen among those of all its members.

A merged layer has room for as many neurons as one of its members. Which of all members' neurons
are worth keeping is decided as in Optimal Brain Surgeon (Hassibi and Stork, 1993; for whole
structures ZipLM, arXiv:2302.04089): the down projection of the pool is solved for the source's
states, and the neurons go without which the others, solved again, lose least.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lmerge.axes import NEURON_AXIS
from lmerge.block_refits import spread_places
from lmerge.llama import (
    LayerTensors,
    capture_down_input,
    decoder_layers,
    with_layers,
    with_tensors,
)
from lmerge.merged import MergedLayer, MergedLlama
from lmerge.neurons import reorder_neurons
from lmerge.normal_equations import (
    NormalEquations,
    Rows,
    add_positions,
    fit_and_held,
    position_weights,
    split_held,
)
from lmerge.repair import down_rows
from lmerge.row_refits import solve_rows

logger = logging.getLogger(__name__)

POOL = 12_288
"""Neurons in a pool at most, or twice those of a layer where that is more."""

TOKENS = 24_576
"""Calibration tokens on which neurons are chosen."""

RIDGE = 0.03
"""Regularisation while neurons are chosen, as a share of the Gram matrix's mean diagonal."""

SHRINK = 0.7
"""Share of the pool that a round keeps."""


@torch.no_grad()
def pool_neurons(
    merged: MergedLlama,
    position: int,
    currents_BTD: Tensor,
    targets_BTD: Tensor,
    held_B: Tensor,
    *,
    batch_size: int = 16,
) -> float:
    """Give a merged layer the best of its members' neurons; it is changed in place.

    Gate and up rows are taken as they are, with the norm of the anchor; down is solved for them.
    Where the anchor's own neurons come closer on the held-out blocks, nothing changes.

    Args:
        merged: The merged model.
        position: Index of the merged layer in it.
        currents_BTD: Input states of the layer on the calibration blocks.
        targets_BTD: The source's states at its output.
        held_B: Blocks that choose the regularisation (bool).
        batch_size: Blocks in one forward pass.

    Returns:
        The held-out error as a share of that with the anchor's neurons; 1 where nothing changed.
    """
    layer = decoder_layers(merged.causal_lm)[position]
    assert isinstance(layer, MergedLayer)
    stacked = layer.stacked()
    num_members, num_neurons = stacked["gate_proj"].shape[:2]
    if num_members < 2:
        return 1.0
    blocks = _spread(TOKENS // currents_BTD.shape[1], held_B)
    part = (currents_BTD[blocks], targets_BTD[blocks], held_B[blocks])
    pool = _pool(stacked)
    room = room_of(num_neurons)
    if num_members * num_neurons > room:
        pool = reorder_neurons(pool, _strongest(merged, position, pool, part, batch_size, room))
    fit = _fitted_sums(merged, position, pool, part, batch_size)
    pool = reorder_neurons(pool, select_neurons(fit, num_neurons))
    chosen = solve_rows(*_sums(merged, position, pool, part, batch_size))
    anchors = {name: stacked[name][layer.anchor] for name in pool}
    own = solve_rows(*_sums(merged, position, anchors, part, batch_size)).holdout_error
    if not chosen.holdout_error < own:
        return 1.0
    down_DF = chosen.change_DF.to(pool["down_proj"])
    merged.refit_layer(position, {**pool, "down_proj": down_DF})
    share = chosen.holdout_error / own if own > 0 else 1.0
    logger.info("layer %d has neurons of all its members: held-out error %.3f", position, share)
    return share


def select_neurons(sums: NormalEquations, count: int) -> Tensor:
    """Return which `count` neurons do best without the others, in ascending order (F,).

    Args:
        sums: Weighted sums over positions: neurons' activations, and what they are to add up to.
        count: Neurons to keep, at most as many as there are.
    """
    kept_F = torch.arange(len(sums.gram_FF), device=sums.gram_FF.device)
    while len(kept_F) > count:
        now = sums.of(kept_F)
        diagonal_F = now.gram_FF.diagonal()  # of a copy, so that it may be changed
        diagonal_F += RIDGE * diagonal_F.mean().clamp_min(1e-200)
        factor_FF = torch.linalg.cholesky(now.gram_FF)
        change_FD = torch.cholesky_solve(now.cross_DF.T, factor_FF)
        loss_F = change_FD.square().sum(dim=1) / torch.cholesky_inverse(factor_FF).diagonal()
        size = max(count, int(SHRINK * len(kept_F)))
        kept_F = kept_F[loss_F.topk(size).indices.sort().values]
    return kept_F


def room_of(num_neurons: int) -> int:
    """Return how many neurons a pool has room for, for layers of `num_neurons` neurons."""
    return max(POOL, 2 * num_neurons)


Part = tuple[Tensor, Tensor, Tensor]
"""Input states, target states and which blocks are held out."""


def _spread(count: int, held_B: Tensor) -> Tensor:
    """Return about `count` blocks, evenly spread, some of them held out."""
    places, num_blocks = torch.arange(len(held_B)), len(held_B)
    parts = (places[~held_B.cpu()], places[held_B.cpu()])
    counts = [max(1, round(count * len(part) / num_blocks)) for part in parts]
    return torch.cat([spread_places(*pair) for pair in zip(parts, counts, strict=True)])


def _pool(stacked: LayerTensors) -> LayerTensors:
    """Return the members' neurons side by side: gate, up and down, and biases where there are."""
    names = [name for name in NEURON_AXIS if name in stacked]
    return {name: torch.cat(list(stacked[name]), dim=NEURON_AXIS[name]) for name in names}


def _rows(
    merged: MergedLlama, position: int, pool: LayerTensors, part: Part, batch_size: int
) -> Iterator[Rows]:
    """Yield activations of the pool, and what the layer lacks without any neuron."""
    layer = decoder_layers(merged.causal_lm)[position]
    assert isinstance(layer, MergedLayer)
    silent = {**pool, "down_proj": torch.zeros_like(pool["down_proj"])}
    wide: nn.Module = with_tensors(layer.template, {**layer.tensors(), **silent})
    origin = merged.plan.origins()[position]
    one = with_layers(merged.causal_lm, [wide], [origin], final_norm=False)
    batches = zip(part[0].split(batch_size), part[1].split(batch_size), strict=True)
    with capture_down_input(wide) as inputs:
        for current_BTD, target_BTD in batches:
            yield down_rows(one, inputs, current_BTD, target_BTD)


def _sums(
    merged: MergedLlama, position: int, pool: LayerTensors, part: Part, batch_size: int
) -> tuple[NormalEquations, NormalEquations]:
    rows = _rows(merged, position, pool, part, batch_size)
    return fit_and_held(split_held(rows, part[2].split(batch_size)))


def _fitted_sums(
    merged: MergedLlama, position: int, pool: LayerTensors, part: Part, batch_size: int
) -> NormalEquations:
    """Return the sums over the blocks that are not held out alone: a pool's are large."""
    fitted = (part[0][~part[2]], part[1][~part[2]], part[2][~part[2]])
    total: NormalEquations | None = None
    for rows in _rows(merged, position, pool, fitted, batch_size):
        a_NF, residual_ND, target_ND = (x.flatten(0, 1) for x in rows)
        total = add_positions(total, (a_NF, residual_ND, target_ND))
    if total is None:
        raise ValueError(
            "choosing neurons needs calibration blocks that are not held out. "
            "Raise `num_calibration_tokens`."
        )
    return total


def _strongest(
    merged: MergedLlama,
    position: int,
    pool: LayerTensors,
    part: Part,
    batch_size: int,
    count: int,
) -> Tensor:
    """Return the `count` neurons that write most to the residual stream, in ascending order."""
    power_F = pool["down_proj"].new_zeros(pool["down_proj"].shape[1], dtype=torch.float64)
    for features, _, target_BTD in _rows(merged, position, pool, part, batch_size):
        weight_N = position_weights(target_BTD.flatten(0, 1))
        power_F += (features.flatten(0, 1).double().square() * weight_N[:, None]).sum(dim=0)
    power_F *= pool["down_proj"].double().square().sum(dim=0)
    return power_F.topk(count).indices.sort().values
