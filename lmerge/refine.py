"""Deep repair in closed form: o and down of the merged layers and of some layers above them.

What distinguishes it from `repair.refit_groups`: the regularisation is chosen for each residual
channel on its own, since a few channels with massive activations would otherwise choose it for all;
o is refitted together with down; and the layers above a merged one take up what it left.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lmerge.llama import capture_input, decoder_layers, layer_tensors, run_span, span
from lmerge.merged import MergedLayer, MergedLlama
from lmerge.neuron_pool import pool_neurons
from lmerge.normal_equations import NormalEquations, Rows, fit_and_held, split_held
from lmerge.progress import track
from lmerge.repair import RepairConfig
from lmerge.row_refits import RowRefit, solve_rows
from lmerge.state_training import train_layer

logger = logging.getLogger(__name__)

JOINT = ("o_proj", "down_proj")
"""Both matrices that write to the residual stream: head outputs and neurons are the features."""


@torch.no_grad()
def refine_layers(
    source: PreTrainedModel,
    merged: MergedLlama,
    prefix_BTD: Tensor,
    held_B: Tensor,
    config: RepairConfig,
    *,
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
        config: The options of `deep`.
        batch_size: Blocks in one forward pass.

    Returns:
        The last refit (of down) of each layer, by its position in the merged model.
    """
    stops = _stops(merged)
    chosen, merged_at = merged.positions(config.num_after), merged.positions(0)
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
            if config.pools and position in merged_at:
                pool_neurons(merged, position, currents, targets, held_B)
            outcome = _refine_layer(merged, position, currents, targets, held_B, batch_size)
            share = outcome.holdout_error
            if config.num_epochs:
                share *= train_layer(
                    merged, position, currents, targets, held_B, num_epochs=config.num_epochs
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
        return fit_and_held(split_held(rows, held))

    fit, held_out = sums(JOINT)
    neuron_F = torch.arange(width, len(fit.gram_FF), device=fit.gram_FF.device)
    alone = solve_rows(fit.of(neuron_F), held_out.of(neuron_F))
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


def _changed(weight: Tensor, refit: RowRefit, width: int | None = None) -> Tensor:
    change = refit.change_DF[:, :width].to(weight.device)
    return (weight.double() + change).to(weight.dtype)


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
