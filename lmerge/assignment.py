"""Optimal assignment for thousands of neurons: a sparse problem with a certificate for the whole.

Almost every neuron of an optimal assignment gets one of its few most similar partners. So the
problem is solved exactly on a sparse graph of candidates (scipy's LAPJVsp; Jonker and Volgenant
1987, doi:10.1007/BF02278710), prices of the columns are read off its solution, and one pass over
the whole matrix either proves that no other pair helps, or adds the pairs that might (column
generation). Linear programming duality bounds what is left.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import min_weight_full_bipartite_matching
from torch import Tensor

BLOCK = 1024
"""Rows of the similarity that are looked at together."""
TOLERANCE = 1e-9
"""Gain of a pair that counts as rounding of float64 sums."""
SLACK = 1e-5
"""Margin of the float32 comparison before the float64 one, as a share of the largest value."""

Edges = NDArray[np.int64]
"""Candidate pairs as row * size + column, sorted."""


class Assignment(NamedTuple):
    """An assignment of columns to rows, and how far it can be from the best."""

    order_F: Tensor
    """Row i takes column order_F[i]; int64."""
    total: float
    """Summed similarity of the pairs, in float64."""
    gap: float
    """The best total is at most `total + gap`: a proof by LP duality, up to float64 rounding."""


def assign(
    similarity_FF: Tensor, *, num_candidates: int = 16, max_rounds: int = 20, gap: float = 0.0
) -> Assignment:
    """Return the assignment with the largest total similarity, and its certificate.

    Args:
        similarity_FF: Any float dtype, finite. It is read in blocks and never copied whole.
        num_candidates: Partners that each row and each column starts with.
        max_rounds: Passes over the matrix at most; the certificate holds after each of them.
        gap: Share of the total that the answer may lie below the best, as proven; 0 is exact up
            to rounding.
    """
    best = _greedy(similarity_FF)
    if best is not None:
        return best
    size = len(similarity_FF)
    edges = _candidates(similarity_FF, min(num_candidates, size))
    lower, upper = -np.inf, np.inf
    for _round in range(max_rounds):
        value = _values(similarity_FF, edges)
        column = _solve(edges, value, size)
        total = float(_values(similarity_FF, np.arange(size) * size + column).sum())
        price = _prices(edges, value, column, size)
        bound, missing = _check(similarity_FF, price, column)
        lower, upper = max(lower, total), min(upper, bound)
        added = np.union1d(edges, missing)
        if upper - lower <= gap * abs(lower) or len(added) == len(edges):
            break
        edges = added
    # The sparse problem only grows, so the last total is the largest.
    return Assignment(torch.from_numpy(column).long(), total, max(0.0, upper - total))


def _greedy(similarity_FF: Tensor) -> Assignment | None:
    """Return each row's best column where no two rows want the same one: nothing can be better."""
    value_F, order_F = similarity_FF.max(dim=1)
    if len(order_F.unique()) < len(order_F):
        return None
    return Assignment(order_F.cpu(), float(value_F.double().sum()), 0.0)


def _candidates(similarity_FF: Tensor, num_candidates: int) -> Edges:
    """Return about the best partners of every row and column, and the diagonal.

    A threshold is far cheaper than sorting: it is the normal quantile that `num_candidates` would
    exceed. Each row's and column's best pair is always there; what is missing otherwise is found
    later. The diagonal makes sure that one matching is.
    """
    size, device = len(similarity_FF), similarity_FF.device
    quantile = torch.tensor(max(num_candidates / size, 1 / size)).clamp(max=0.5)
    z = -float(torch.special.ndtri(quantile))
    row_F1, column_1F = (_threshold(similarity_FF, axis, z) for axis in (1, 0))
    place_F = torch.arange(size, device=device)
    edges = [place_F * size + place_F]
    budget = 8 * num_candidates + 64
    for start in range(0, size, BLOCK):
        block = similarity_FF[start : start + BLOCK]
        wanted = block >= torch.minimum(row_F1[start : start + BLOCK], column_1F)
        row_E, col_E = wanted.nonzero(as_tuple=True)
        if len(row_E) > budget * len(block):  # tails too heavy for a quantile of the normal
            col_BK = block.topk(min(num_candidates, size), dim=1, sorted=False).indices
            row_E = torch.arange(len(block), device=device).repeat_interleave(col_BK.shape[1])
            col_E = col_BK.flatten()
        edges.append((row_E + start) * size + col_E)
    return np.unique(torch.cat(edges).cpu().numpy())


def _threshold(similarity_FF: Tensor, axis: int, z: float) -> Tensor:
    """Return mean + z standard deviations along an axis, or the largest value where that is less.

    Sums of squares are much faster than `torch.var`; a threshold needs no more precision.
    """
    size, parts = len(similarity_FF), similarity_FF.split(BLOCK, dim=1 - axis)
    mean = torch.cat([p.float().mean(dim=axis, keepdim=True) for p in parts], dim=1 - axis)
    norm = torch.cat([p.float().norm(dim=axis, keepdim=True) for p in parts], dim=1 - axis)
    std = (norm.square() / size - mean.square()).clamp(min=0).sqrt()
    return torch.minimum(mean + z * std, similarity_FF.amax(dim=axis, keepdim=True).float())


def _values(similarity_FF: Tensor, edges: Edges) -> NDArray[np.float64]:
    row, column = np.divmod(edges, len(similarity_FF))
    device = similarity_FF.device
    at = similarity_FF[torch.from_numpy(row).to(device), torch.from_numpy(column).to(device)]
    return at.double().cpu().numpy()


def _solve(edges: Edges, value: NDArray[np.float64], size: int) -> NDArray[np.int64]:
    row, column = np.divmod(edges, size)
    # A zero would be no edge, so all costs are moved to 1 and above.
    cost = value.max() - value + 1.0
    graph = csr_matrix((cost, (row, column)), shape=(size, size))
    rows, columns = min_weight_full_bipartite_matching(graph)
    order: NDArray[np.int64] = np.empty(size, dtype=np.int64)
    order[rows] = columns
    return order


def _prices(
    edges: Edges, value: NDArray[np.float64], column: NDArray[np.int64], size: int
) -> NDArray[np.float64]:
    """Return prices of the columns at which every row is content with its own.

    The least prices p >= 0 with value[i, m(i)] - p[m(i)] >= value[i, j] - p[j] on all candidates:
    longest paths, by Bellman and Ford, over all edges at once. They exist at an optimum.
    """
    row, target = np.divmod(edges, size)
    own = np.empty(size)
    mine = column[row] == target
    own[row[mine]] = value[mine]
    gain = value - own[row]
    order = np.argsort(target, kind="stable")
    start = column[row[order]]
    gain, target = gain[order], target[order]
    first = np.flatnonzero(np.r_[True, target[1:] != target[:-1]])
    price = np.zeros(size)
    for _ in range(size):
        raised = np.maximum(price, np.maximum.reduceat(price[start] + gain, first))
        if float((raised - price).max()) <= 1e-12:
            break
        price = raised
    return price


def _check(
    similarity_FF: Tensor, price: NDArray[np.float64], column: NDArray[np.int64]
) -> tuple[float, Edges]:
    """Return the dual bound at these prices, and the pairs that rows would rather have."""
    size = len(similarity_FF)
    price_F = torch.from_numpy(price).to(similarity_FF.device)
    column_F = torch.from_numpy(column).to(similarity_FF.device)
    bound, missing = float(price.sum()), []
    for start in range(0, size, BLOCK):
        block = similarity_FF[start : start + BLOCK]
        mine_B = column_F[start : start + BLOCK]
        own_B = block.gather(1, mine_B[:, None])[:, 0].double() - price_F[mine_B]
        # In float32 a hair is lost, so what decides is formed anew in float64.
        slack = SLACK * max(1.0, float(block.abs().max()))
        near = (block - price_F.float()) > (own_B - slack).float()[:, None]
        row_E, col_E = near.nonzero(as_tuple=True)
        gain_E = block[row_E, col_E].double() - price_F[col_E] - own_B[row_E]
        best_B = torch.zeros_like(own_B).scatter_reduce(0, row_E, gain_E, "amax")
        bound += float((own_B + best_B).sum())
        wanted = gain_E > TOLERANCE
        missing.append(((row_E + start) * size + col_E)[wanted].cpu().numpy())
    return bound, np.concatenate(missing)
