"""Deep repair in closed form: o and down of the merged layers and of some layers above them.

What distinguishes it from `repair.refit_groups`: the regularisation is chosen for each residual
channel on its own, since a few channels with massive activations would otherwise choose it for all;
o is refitted together with down; and the layers above a merged one take up what it left.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import ExitStack
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lmerge.llama import capture_input, decoder_layers, layer_tensors, run_span, span
from lmerge.merged import MergedLayer, MergedLlama
from lmerge.progress import track
from lmerge.repair import NormalEquations, position_weights
from lmerge.state_training import train_layer

logger = logging.getLogger(__name__)

ROW_RIDGES = (30.0, 10.0, 3.0, 1.0, 3e-1, 1e-1, 3e-2, 1e-2, 3e-3, 1e-3)
"""Regularisation strengths tried for each channel, as shares of the Gram matrix's mean diagonal."""

JOINT = ("o_proj", "down_proj")
"""Both matrices that write to the residual stream: head outputs and neurons are the features."""


class RowRefit(NamedTuple):
    """The outcome of one refit with a regularisation for each output."""

    change_DF: Tensor
    """What to add to the matrix, float64."""
    ridge_D: Tensor
    """The regularisation of each output; infinite where no refit helps it."""
    holdout_error: float
    """Weighted squared error on the held-out positions as a share of that before the refit."""


def solve_rows(fit: NormalEquations, held: NormalEquations) -> RowRefit:
    """Return the ridge refit whose strength is chosen for each output on held-out positions.

    Args:
        fit: Sums over the positions that are fitted to.
        held: Sums over those that choose; once they have, they are fitted to as well.
    """
    gain_D = torch.zeros(len(fit.cross_DF), dtype=torch.float64, device=fit.cross_DF.device)
    ridge_D = torch.full_like(gain_D, math.inf)
    for ridge in ROW_RIDGES:
        change_DF = fit.solve(ridge)
        size_D = ((change_DF @ held.gram_FF) * change_DF).sum(dim=1)
        gained_D = 2 * (change_DF * held.cross_DF).sum(dim=1) - size_D
        better_D = gained_D > gain_D
        gain_D = torch.where(better_D, gained_D, gain_D)
        ridge_D = torch.where(better_D, ridge, ridge_D)
    both, change_DF = fit + held, torch.zeros_like(fit.cross_DF)
    for ridge in ridge_D.unique().tolist():
        if math.isfinite(ridge):
            chosen_D = ridge_D == ridge
            change_DF[chosen_D] = both.solve(ridge)[chosen_D]
    error = 1 - float(gain_D.sum() / held.energy) if held.energy > 0 else 1.0
    return RowRefit(change_DF, ridge_D, error)


@torch.no_grad()
def refine_layers(
    source: PreTrainedModel,
    merged: MergedLlama,
    prefix_BTD: Tensor,
    held_B: Tensor,
    *,
    num_after: int,
    num_epochs: int = 0,
    batch_size: int = 4,
) -> dict[int, RowRefit]:
    """Refit o and down of every merged layer and of the layers above it, from the lowest up.

    Each layer sees the states that the repaired model below it really produces, and aims at the
    source's states at its depth.

    Args:
        source: The source model.
        merged: The merged model; changed in place.
        prefix_BTD: Input states of the first merged layer on the calibration blocks.
        held_B: Which blocks choose the regularisation (bool).
        num_after: Layers above each merged one that are refitted too, at least 0.
        num_epochs: Epochs in which all matrices of each of these layers are trained afterwards.
        batch_size: Blocks in one forward pass.

    Returns:
        The last refit (of down) of each layer, by its position in the merged model.
    """
    stops = _stops(merged)
    chosen = merged.positions(num_after)
    found: dict[int, RowRefit] = {}
    if not chosen:
        return found
    targets, currents = prefix_BTD, prefix_BTD
    source_at = merged.first_merged
    for position in track(range(merged.first_merged, chosen[-1] + 1), "deep repair"):
        stop = stops[position]
        targets = _run(span(source, source_at, stop), targets, batch_size)
        source_at = stop
        if position in chosen:
            outcome = _refine_layer(merged, position, currents, targets, held_B, batch_size)
            share = outcome.holdout_error
            if num_epochs:
                share *= train_layer(
                    merged, position, currents, targets, held_B, num_epochs=num_epochs
                )
            found[position] = outcome._replace(holdout_error=share)
            logger.info("layer %d refitted: held-out error %.3f of that before", position, share)
        one = span(merged.causal_lm, position, position + 1)
        currents = _run(one, currents, batch_size)
    return found


def _stops(merged: MergedLlama) -> list[int]:
    """Return, for each merged layer, the source layer after those that it stands for."""
    stops = {group.anchor: group.stop for group in merged.plan.groups}
    return [stops.get(origin, origin + 1) for origin in merged.plan.origins()]


def _run(part: PreTrainedModel, state_BTD: Tensor, batch_size: int) -> Tensor:
    if not len(decoder_layers(part)):
        return state_BTD
    parts = state_BTD.split(batch_size)
    return torch.cat([run_span(part, s.to(part.device)).to(s.device) for s in parts])


def _refine_layer(
    merged: MergedLlama,
    position: int,
    currents_BTD: Tensor,
    targets_BTD: Tensor,
    held_B: Tensor,
    batch_size: int,
) -> RowRefit:
    """Refit o and down together, then down again on the neurons that the new o leads to.

    The joint solution takes the neurons as given; where the new o changes them so much that down
    alone would have come closer on the held-out blocks, o stays as it was.
    """
    held = held_B.split(batch_size)
    layer = decoder_layers(merged.causal_lm)[position]
    tensors = dict(layer.tensors() if isinstance(layer, MergedLayer) else layer_tensors(layer))
    width = tensors["o_proj"].shape[1]

    def sums(names: tuple[str, ...]) -> tuple[NormalEquations, NormalEquations]:
        rows = _rows(merged, position, names, currents_BTD, targets_BTD, batch_size)
        return _sums(rows, held)

    fit, held_out = sums(JOINT)
    alone = solve_rows(_neurons(fit, width), _neurons(held_out, width))
    joint = solve_rows(fit, held_out)
    merged.refit_layer(position, {"o_proj": _changed(tensors["o_proj"], joint, width)})
    again = sums(JOINT[1:])
    after = solve_rows(*again)
    if float(again[1].energy) * after.holdout_error < float(held_out.energy) * alone.holdout_error:
        chosen, share = after, float(again[1].energy / held_out.energy) * after.holdout_error
    else:
        merged.refit_layer(position, {"o_proj": tensors["o_proj"]})
        chosen, share = alone, alone.holdout_error
    merged.refit_layer(position, {"down_proj": _changed(tensors["down_proj"], chosen)})
    return chosen._replace(holdout_error=share)


def _neurons(sums: NormalEquations, width: int) -> NormalEquations:
    """Return the sums of a joint problem without its first `width` features."""
    return NormalEquations(sums.gram_FF[width:, width:], sums.cross_DF[:, width:], sums.energy)


def _changed(weight: Tensor, refit: RowRefit, width: int | None = None) -> Tensor:
    change = refit.change_DF[:, :width].to(weight.device)
    return (weight.double() + change).to(weight.dtype)


Rows = tuple[Tensor, Tensor, Tensor]
"""Features (B, T, F), residuals and targets (B, T, D) of one batch of blocks."""


def _rows(
    merged: MergedLlama,
    position: int,
    names: tuple[str, ...],
    currents_BTD: Tensor,
    targets_BTD: Tensor,
    batch_size: int,
) -> Iterator[Rows]:
    """Yield the inputs of the named matrices, and what the layer's output lacks."""
    layer = decoder_layers(merged.causal_lm)[position]
    inner: nn.Module = layer.template if isinstance(layer, MergedLayer) else layer
    one = span(merged.causal_lm, position, position + 1)
    batches = zip(currents_BTD.split(batch_size), targets_BTD.split(batch_size), strict=True)
    with ExitStack() as stack:
        sinks = [stack.enter_context(capture_input(inner, name)) for name in names]
        for current_BTD, target_BTD in batches:
            output_BTD = run_span(one, current_BTD.to(one.device)).float()
            target_BTD = target_BTD.to(output_BTD)
            features = torch.cat([sink.pop() for sink in sinks], dim=-1)
            yield features, target_BTD - output_BTD, target_BTD


def _sums(
    rows: Iterator[Rows], held: tuple[Tensor, ...]
) -> tuple[NormalEquations, NormalEquations]:
    """Return the sums over the fitted and over the held-out blocks.

    Raises:
        ValueError: When one of the two parts is empty.
    """
    parts: dict[bool, NormalEquations] = {}
    for batch, is_held_B in zip(rows, held, strict=True):
        for is_held in (False, True):
            chosen_B = (is_held_B == is_held).to(batch[0].device)
            if not chosen_B.any():
                continue
            a_NF, residual_ND, target_ND = (x[chosen_B].flatten(0, 1) for x in batch)
            if is_held not in parts:
                zeros = NormalEquations.zeros(a_NF.shape[1], residual_ND.shape[1], a_NF.device)
                parts[is_held] = zeros
            weight_N = position_weights(target_ND)
            parts[is_held] = parts[is_held].update(a_NF, residual_ND, weight_N)
    if len(parts) < 2:
        raise ValueError(
            "a refit needs calibration blocks to fit and others to hold out. "
            "Raise `num_calibration_tokens`."
        )
    return parts[False], parts[True]
