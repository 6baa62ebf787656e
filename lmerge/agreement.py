"""How far similarity matrices agree, and how far that number can be trusted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import combinations
from typing import NamedTuple

import torch
from scipy.stats import rankdata
from torch import Tensor

from lmerge.statistics import Interval

Matrices = Mapping[str, Tensor]


class Agreement(NamedTuple):
    """Correlations of two (L, L) matrices; NaN where too few cells are defined in both."""

    pearson_full: float
    """Over all cells, the constant diagonal included, as published."""
    spearman_full: float
    pearson_upper: float
    """Over the cells above the diagonal: each pair of different layers once."""
    spearman_upper: float
    num_undefined: int
    """Cells above the diagonal that are undefined in one of the matrices, and left out."""


def agreement(a_LL: Tensor, b_LL: Tensor) -> Agreement:
    """Return the correlations of two similarity matrices of equal size.

    Raises:
        ValueError: When the sizes differ.
    """
    if a_LL.shape != b_LL.shape:
        raise ValueError(
            f"matrices must have the same shape, got {tuple(a_LL.shape)} and {tuple(b_LL.shape)}. "
            "Compare domains and languages of one model."
        )
    upper_LL = torch.ones_like(a_LL, dtype=torch.bool).triu(1)
    both_LL = a_LL.isfinite() & b_LL.isfinite()
    full = _correlations(a_LL[both_LL], b_LL[both_LL])
    upper = _correlations(a_LL[both_LL & upper_LL], b_LL[both_LL & upper_LL])
    return Agreement(*full, *upper, int((upper_LL & ~both_LL).sum()))


def upper_pearson(a_LL: Tensor, b_LL: Tensor) -> float:
    """Return `Agreement.pearson_upper` alone, which takes a small part of the time."""
    chosen_LL = (a_LL.isfinite() & b_LL.isfinite()).triu(1)
    return pearson(a_LL[chosen_LL], b_LL[chosen_LL])


def _correlations(a_N: Tensor, b_N: Tensor) -> tuple[float, float]:
    return pearson(a_N, b_N), pearson(_ranks(a_N), _ranks(b_N))


def pearson(a_N: Tensor, b_N: Tensor) -> float:
    """Return Pearson's correlation in [-1, 1]; NaN where one side is constant or has no value."""
    a_N, b_N = a_N.double() - a_N.double().mean(), b_N.double() - b_N.double().mean()
    scale = a_N.norm() * b_N.norm()
    return float((a_N @ b_N) / scale) if scale > 0 else float("nan")


def all_agreements(matrices: Matrices) -> dict[tuple[str, str], Agreement]:
    """Return the agreement of every two matrices, in their order."""
    return {(a, b): agreement(matrices[a], matrices[b]) for a, b in combinations(matrices, 2)}


def resample_matrices(
    states: Mapping[str, Tensor],
    measure: Callable[[Tensor], Tensor],
    *,
    seed: int,
    halves: bool = False,
) -> dict[str, Tensor]:
    """Return the matrix of each group for one resample of its prompts.

    Groups with equally many prompts get the same draw, so translations of one question stay
    together.

    Args:
        states: (L, N, D) of each group.
        measure: States -> matrix.
        seed: Seed of the draw.
        halves: Whether half of the prompts are drawn without replacement, for measures that
            repeated prompts break. For a mean its spread is that of a bootstrap: the variance is
            (2/N - 1/N) of that of one prompt.
    """
    return {name: measure(x_LND[:, _draw(x_LND, seed, halves)]) for name, x_LND in states.items()}


def percentiles(values: list[float]) -> Interval | None:
    """Return the middle 95% of the finite values; None with fewer than 20 of them."""
    value_S = torch.tensor(values, dtype=torch.float64)
    value_S = value_S[value_S.isfinite()]
    if len(value_S) < 20:
        return None
    low, high = torch.quantile(value_S, torch.tensor([0.025, 0.975]).double()).tolist()
    return Interval(low, high)


def split_half(
    states: Mapping[str, Tensor], measure: Callable[[Tensor], Tensor], *, seed: int
) -> dict[tuple[str, str], float]:
    """Return correlations (Pearson, off-diagonal) between matrices of disjoint halves of prompts.

    The first half of one group against the second half of another, or of the same one. Where two
    groups agree no less than each agrees with itself, prompts and not topics make the difference.
    """
    matrices: dict[str, tuple[Tensor, Tensor]] = {}
    for name, x_LND in states.items():
        order_N = _order(x_LND.shape[1], seed)
        middle = len(order_N) // 2
        halves = order_N[:middle], order_N[middle : 2 * middle]
        matrices[name] = (measure(x_LND[:, halves[0]]), measure(x_LND[:, halves[1]]))
    names = list(states)
    return {
        (a, b): (_across(matrices[a], matrices[b]) + _across(matrices[b], matrices[a])) / 2
        for i, a in enumerate(names)
        for b in names[i:]
    }


def _across(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> float:
    return upper_pearson(a[0], b[1])


def _draw(x_LND: Tensor, seed: int, halves: bool) -> Tensor:
    size = x_LND.shape[1]
    if halves:
        return _order(size, seed)[: size // 2]
    return torch.randint(size, (size,), generator=torch.Generator().manual_seed(seed))


def _order(size: int, seed: int) -> Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))


def _ranks(x_N: Tensor) -> Tensor:
    return torch.from_numpy(rankdata(x_N.numpy()))
