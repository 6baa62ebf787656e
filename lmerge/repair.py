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

    def __post_init__(self) -> None:
        if self.num_after < 0:
            raise ValueError(f"`num_after` must be at least 0, got {self.num_after}. Try 2.")
        if self.num_epochs < 0:
            raise ValueError(f"`num_epochs` must be at least 0, got {self.num_epochs}. Try 3.")


class NormalEquations(NamedTuple):
    """Running sums of a weighted least-squares problem, in float64.

    The products of one batch are float32 where its tensors are: over a few thousand positions that
    rounds far below the ridge, and takes half the time.
    """

    gram_FF: Tensor
    """Sum of w a a^T over positions."""
    cross_DF: Tensor
    """Sum of w r a^T over positions."""
    energy: Tensor
    """Sum of w |r|^2 over positions, the error of changing nothing (scalar)."""

    @classmethod
    def zeros(cls, num_inputs: int, num_outputs: int, device: torch.device) -> NormalEquations:
        """Return the sums over no position."""
        zeros = torch.zeros(num_inputs, num_inputs, dtype=torch.float64, device=device)
        cross = torch.zeros(num_outputs, num_inputs, dtype=torch.float64, device=device)
        return cls(zeros, cross, cross.new_zeros(()))

    def update(self, a_NF: Tensor, residual_ND: Tensor, weight_N: Tensor) -> NormalEquations:
        """Return the sums with more positions added.

        Args:
            a_NF: Inputs of the matrix.
            residual_ND: What its output should change by.
            weight_N: Weight of each position.
        """
        a_NF, residual_ND = _at_least_float(a_NF), _at_least_float(residual_ND)
        weighted_NF = a_NF * weight_N.to(a_NF)[:, None]
        return NormalEquations(
            self.gram_FF + weighted_NF.T @ a_NF,
            self.cross_DF + residual_ND.T @ weighted_NF.to(residual_ND),
            self.energy + (residual_ND.double().square().sum(dim=1) * weight_N.double()).sum(),
        )

    def __add__(self, other: object) -> NormalEquations:
        """Return the sums over both sets of positions."""
        assert isinstance(other, NormalEquations)
        return NormalEquations(*(a + b for a, b in zip(self, other, strict=True)))

    def of(self, kept_F: Tensor) -> NormalEquations:
        """Return the sums of the problem with some of the inputs alone."""
        gram_FF = self.gram_FF[kept_F][:, kept_F]
        return NormalEquations(gram_FF, self.cross_DF[:, kept_F], self.energy)

    def solve(self, ridge: float) -> Tensor:
        """Return the change (D, F) that minimises error + lambda |change|^2, in float64.

        Args:
            ridge: lambda as a share of the mean diagonal of the Gram matrix; above 0.
        """
        scale = self.gram_FF.diagonal().mean().clamp_min(1e-200)  # neurons may all be silent
        eye_FF = torch.eye(len(self.gram_FF), dtype=torch.float64, device=self.gram_FF.device)
        factor_FF = torch.linalg.cholesky(self.gram_FF + ridge * scale * eye_FF)
        return torch.cholesky_solve(self.cross_DF.T, factor_FF).T

    def error(self, change_DF: Tensor) -> float:
        """Return the weighted squared error after a change, as a share of the error before.

        1 where there was none before.
        """
        if not self.energy > 0:
            return 1.0
        fitted = (change_DF * self.cross_DF).sum()
        size = ((change_DF @ self.gram_FF) * change_DF).sum()
        return float((self.energy - 2 * fitted + size) / self.energy)


def _at_least_float(x_NF: Tensor) -> Tensor:
    return x_NF if x_NF.dtype == torch.float64 else x_NF.float()


class Refit(NamedTuple):
    """The outcome of one refit."""

    change_DF: Tensor
    """What to add to the matrix, float64."""
    ridge: float
    """The regularisation that the held-out positions chose; infinite where no refit helps them."""
    holdout_error: float
    """Weighted squared error on the held-out positions as a share of that before the refit."""


def position_weights(target_ND: Tensor) -> Tensor:
    """Return 1 / |target|^2 for each position: massive activations must not decide everything."""
    return 1 / target_ND.double().square().sum(dim=1).clamp_min(1e-12)


Positions = tuple[Tensor, Tensor, Tensor]
"""Inputs a_NF, residuals r_ND and targets t_ND of one batch of calibration positions."""


def refit(batches: Iterable[tuple[Positions, bool]]) -> Refit:
    """Return the ridge refit of a matrix (docs/method.md, repair).

    Args:
        batches: Positions, and whether they are held out. The held-out ones choose the
            regularisation; then all of them are used. Where none lowers their error, the matrix
            stays as it is.

    Raises:
        ValueError: When one of the two parts is empty.
    """
    parts: dict[bool, NormalEquations] = {}
    for (a_NF, residual_ND, target_ND), held in batches:
        if held not in parts:
            parts[held] = NormalEquations.zeros(a_NF.shape[1], residual_ND.shape[1], a_NF.device)
        parts[held] = parts[held].update(a_NF, residual_ND, position_weights(target_ND))
    if len(parts) < 2:
        raise ValueError(
            "a refit needs calibration blocks to fit and others to hold out. "
            "Raise `num_calibration_tokens`."
        )
    errors = {ridge: parts[True].error(parts[False].solve(ridge)) for ridge in RIDGES}
    ridge = min(errors, key=errors.__getitem__)
    if not errors[ridge] < 1:
        return Refit(torch.zeros_like(parts[True].cross_DF), math.inf, 1.0)
    return Refit((parts[True] + parts[False]).solve(ridge), ridge, errors[ridge])


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
        outcome = refit(_positions(one, layer, currents, targets, held_B, name))
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
) -> Positions:
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


def _positions(
    one: PreTrainedModel,
    layer: MergedLayer,
    currents: list[Tensor],
    targets: list[Tensor],
    held_B: Tensor,
    description: str,
) -> Iterator[tuple[Positions, bool]]:
    """Yield activations, residuals and targets of a merged layer, and whether they are held out."""
    sizes = [len(current_BTD) for current_BTD in currents]
    held = held_B.split(sizes)
    with capture_down_input(layer.template) as inputs:
        batches = zip(currents, targets, held, strict=True)
        for current_BTD, target_BTD, is_held_B in track(batches, description, total=len(currents)):
            rows = down_rows(one, inputs, current_BTD, target_BTD)
            for is_held in (False, True):
                chosen_B = (is_held_B == is_held).to(rows[0].device)
                if chosen_B.any():
                    a_NF, residual_ND, target_ND = (x[chosen_B].flatten(0, 1) for x in rows)
                    yield (a_NF, residual_ND, target_ND), is_held
