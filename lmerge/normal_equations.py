"""Weighted least squares from running sums, over positions that are fitted to or held out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

Positions = tuple[Tensor, Tensor, Tensor]
"""Inputs a_NF, residuals r_ND and targets t_ND of one batch of calibration positions."""

Rows = tuple[Tensor, Tensor, Tensor]
"""The same of whole blocks: (B, T, F), (B, T, D) and (B, T, D)."""


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


def position_weights(target_ND: Tensor) -> Tensor:
    """Return 1 / |target|^2 for each position: massive activations must not decide everything."""
    return 1 / target_ND.double().square().sum(dim=1).clamp_min(1e-12)


def fit_and_held(
    batches: Iterable[tuple[Positions, bool]],
) -> tuple[NormalEquations, NormalEquations]:
    """Return the sums over the positions that are fitted to and over the held-out ones.

    Raises:
        ValueError: When one of the two parts is empty.
    """
    parts: dict[bool, NormalEquations] = {}
    for positions, held in batches:
        parts[held] = add_positions(parts.get(held), positions)
    if len(parts) < 2:
        raise ValueError(
            "a refit needs calibration blocks to fit and others to hold out. "
            "Raise `num_calibration_tokens`."
        )
    return parts[False], parts[True]


def add_positions(sums: NormalEquations | None, positions: Positions) -> NormalEquations:
    """Return the sums, or none yet, with the positions added; `position_weights` weighs them."""
    a_NF, residual_ND, target_ND = positions
    if sums is None:
        sums = NormalEquations.zeros(a_NF.shape[1], residual_ND.shape[1], a_NF.device)
    return sums.update(a_NF, residual_ND, position_weights(target_ND))


def split_held(rows: Iterable[Rows], held: Iterable[Tensor]) -> Iterator[tuple[Positions, bool]]:
    """Yield the positions of each batch that are fitted to, and those that are held out.

    Args:
        rows: Rows of each batch.
        held: Which blocks of each batch are held out (bool).
    """
    for batch, is_held_B in zip(rows, held, strict=True):
        for is_held in (False, True):
            chosen_B = (is_held_B == is_held).to(batch[0].device)
            if chosen_B.any():
                a_NF, residual_ND, target_ND = (x[chosen_B].flatten(0, 1) for x in batch)
                yield (a_NF, residual_ND, target_ND), is_held
