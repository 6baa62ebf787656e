"""Repair in closed form: refit the merged layers' down projections to the source's states."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lmerge.llama import capture_down_input, decoder_layers, run_span, span
from lmerge.merged import MergedLayer, MergedLlama
from lmerge.normal_equations import Positions, Rows, fit_and_held, split_held
from lmerge.progress import track

logger = logging.getLogger(__name__)

RepairMethod = Literal["down", "deep", "none"]
NeuronChoice = Literal["own", "pooled"]

RIDGES = (1.0, 3e-1, 1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4)
"""Regularisation strengths tried, as shares of the mean diagonal of the Gram matrix."""


@dataclass(frozen=True, kw_only=True)
class RepairConfig:
    """How the merged layers are refitted after the alphas are learned."""

    method: RepairMethod = "down"
    """`down` refits the down projection of each merged layer; `deep` refits o and down of each
    merged layer and of the layers above it, with a regularisation for each channel; `none` does
    nothing."""
    num_after: int = 2
    """Layers above each merged one that `deep` refits too; at least 0."""
    num_epochs: int = 0
    """Passes over the calibration blocks in which `deep` then trains all matrices of each refitted
    layer towards the source's states; at least 0. 3 lower the error by some 7% more."""

    neurons: NeuronChoice = "own"
    """Neurons of the merged layers in `deep`: `own`, those of the merged weights, or `pooled`,
    chosen among those of all members and taken as they are."""

    @property
    def pools(self) -> bool:
        """Whether neurons are chosen among those of all members."""
        return self.method == "deep" and self.neurons == "pooled"

    def __post_init__(self) -> None:
        if self.num_after < 0:
            raise ValueError(f"`num_after` must be at least 0, got {self.num_after}. Try 2.")
        if self.num_epochs < 0:
            raise ValueError(f"`num_epochs` must be at least 0, got {self.num_epochs}. Try 3.")


class Refit(NamedTuple):
    """The outcome of one refit."""

    change_DF: Tensor
    """What to add to the matrix, float64."""
    ridge: float
    """The regularisation that the held-out positions chose; infinite where no refit helps them."""
    holdout_error: float
    """Weighted squared error on the held-out positions as a share of that before the refit."""


def refit(batches: Iterable[tuple[Positions, bool]]) -> Refit:
    """Return the ridge refit of a matrix (docs/method.md, repair).

    Args:
        batches: Positions, and whether they are held out. The held-out ones choose the
            regularisation; then all of them are used. Where none lowers their error, the matrix
            stays as it is.

    Raises:
        ValueError: When one of the two parts is empty.
    """
    fit, held = fit_and_held(batches)
    errors = {ridge: held.error(fit.solve(ridge)) for ridge in RIDGES}
    ridge = min(errors, key=errors.__getitem__)
    if not errors[ridge] < 1:
        return Refit(torch.zeros_like(held.cross_DF), math.inf, 1.0)
    return Refit((held + fit).solve(ridge), ridge, errors[ridge])


@torch.no_grad()
def refit_groups(
    source: PreTrainedModel,
    merged: MergedLlama,
    prefix_BTD: Tensor,
    held_B: Tensor,
    config: RepairConfig,
    *,
    batch_size: int = 4,
) -> list[Refit]:
    """Refit the down projection of every merged layer, from the lowest up.

    Each refit sees the states that the already repaired model below it really produces, and aims
    at the source's states after the group.

    Args:
        source: The source model.
        merged: The merged model; changed in place.
        prefix_BTD: Input states of the first merged layer on the calibration blocks.
        held_B: Which blocks choose the regularisation (bool).
        config: The options; none of them concerns this method.
        batch_size: Blocks in one forward pass.

    Returns:
        One refit a group.
    """
    refits = []
    targets = currents = list(prefix_BTD.split(batch_size))
    source_at = merged_at = merged.first_merged
    plan, model = merged.plan, merged.causal_lm
    for group, layer in zip(plan.groups, merged.merged_layers(), strict=True):
        position = plan.position(group)
        name = f"repair {group.members[0]}-{group.members[-1]}"
        targets = _advance(span(source, source_at, group.stop), targets, f"{name}: targets")
        currents = _advance(span(model, merged_at, position), currents, f"{name}: inputs")
        one = span(model, position, position + 1)
        held = held_B.split([len(current_BTD) for current_BTD in currents])
        outcome = refit(split_held(_rows(one, layer, currents, targets, name), held))
        weight_DF = layer.tensors()["down_proj"]
        layer.refit("down_proj", (weight_DF.double() + outcome.change_DF).to(weight_DF.dtype))
        currents = _advance(one, currents, f"{name}: outputs")
        source_at, merged_at = group.stop, position + 1
        refits.append(outcome)
        logger.info(
            "layer %d refitted: ridge %g, held-out error %.3f of that before",
            position,
            outcome.ridge,
            outcome.holdout_error,
        )
    return refits


def down_rows(
    one: PreTrainedModel, inputs: list[Tensor], state_BTD: Tensor, target_BTD: Tensor
) -> Rows:
    """Run one layer and return its neurons' activations, residuals and targets, (B, T, ...) each.

    Args:
        one: The layer, as a part of a model.
        inputs: The list of `capture_down_input` on that layer.
        state_BTD: Input states of the layer.
        target_BTD: Wanted output states.
    """
    output_BTD = run_span(one, state_BTD.to(one.device)).float()
    target_BTD = target_BTD.to(output_BTD)
    return inputs.pop(), target_BTD - output_BTD, target_BTD


def _advance(part: PreTrainedModel, states: list[Tensor], description: str) -> list[Tensor]:
    """Return the states after a part of a model, batch by batch, on the states' device."""
    if not len(decoder_layers(part)):
        return states
    return [
        run_span(part, s_BTD.to(part.device)).to(s_BTD.device)
        for s_BTD in track(states, description, total=len(states))
    ]


def _rows(
    one: PreTrainedModel,
    layer: MergedLayer,
    currents: list[Tensor],
    targets: list[Tensor],
    description: str,
) -> Iterator[Rows]:
    """Yield activations, residuals and targets of a merged layer."""
    with capture_down_input(layer.template) as inputs:
        batches = zip(currents, targets, strict=True)
        for current_BTD, target_BTD in track(batches, description, total=len(currents)):
            yield down_rows(one, inputs, current_BTD, target_BTD)
