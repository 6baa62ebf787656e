"""How far alphas spread over a group's members: what curves, figures and tables show of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lmerge.alphas import Alphas
from lmerge.plan import MergePlan

ENDS = (0.05, 0.95)
"""Quantiles between which most of a member's alphas lie."""


class Spread(NamedTuple):
    """Alphas of one member, over tensors, heads or neurons."""

    mean: float
    low: float
    """5% of them are lower."""
    high: float
    """5% of them are higher."""


def spread(alphas: Mapping[str, Tensor]) -> list[Spread]:
    """Return the spread of each member's alphas over some matrices together.

    Args:
        alphas: Matrix name -> (G,) or (G, slots), as a group's alphas are.
    """
    all_GS = torch.cat([a.detach().float().reshape(len(a), -1) for a in alphas.values()], dim=1)
    ends_2G = all_GS.quantile(torch.tensor(ENDS, device=all_GS.device), dim=1)
    columns = torch.stack([all_GS.mean(dim=1), *ends_2G]).T.tolist()
    return [Spread(*column) for column in columns]


def spread_by_layer(plan: MergePlan, alphas: Sequence[Alphas]) -> dict[int, Spread]:
    """Return the spread of each merged source layer's alphas over all matrices."""
    groups = zip(plan.groups, alphas, strict=True)
    return {i: s for g, a in groups for i, s in zip(g.members, spread(a), strict=True)}


def logged_alphas(plan: MergePlan, alphas: Sequence[Alphas]) -> dict[str, float]:
    """Return what loggers get: `alpha/mean/13`, `alpha/low/13`, `alpha/high/13` for layer 13."""
    return {
        f"alpha/{name}/{layer}": value
        for layer, found in spread_by_layer(plan, alphas).items()
        for name, value in found._asdict().items()
    }
