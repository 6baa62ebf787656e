"""Ridge refits of matrices that write to the residual stream, a strength for each channel."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lmerge.normal_equations import NormalEquations

ROW_RIDGES = (30.0, 10.0, 3.0, 1.0, 3e-1, 1e-1, 3e-2, 1e-2, 3e-3, 1e-3)
"""Regularisation strengths tried for each channel, as shares of the Gram matrix's mean diagonal."""


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
