"""Optimal assignment for thousands of neurons: a sparse problem with a certificate for the whole.

Almost every neuron of an optimal assignment gets one of its few most similar partners. So the
problem is solved exactly on a sparse graph of candidates (scipy's LAPJVsp; Jonker and Volgenant
1987, doi:10.1007/BF02278710), prices of the columns are read off its solution, and one pass over
the whole matrix either proves that no other pair helps, or adds the pairs that might (column
generation). Linear programming duality bounds what is left. From the second round on the solver
starts from the prices, which leaves it little to do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import min_weight_full_bipartite_matching
from torch import Tensor

BLOCK = 256
"""Rows of the similarity that are looked at together."""
TOLERANCE = 1e-9
"""Gain of a pair that counts as rounding of float64 sums."""
SLACK = 1e-6
"""Rounding of the float32 comparison before the float64 one, as a share of the largest value."""
MARGIN = 12.0
"""Rough values are trusted up to so many times their root mean square error."""
NEAR = 0.1
"""Pairs this close to a gain join the sparse problem too, in standard deviations of the matrix."""

Edges = NDArray[np.int64]
"""Pairs as row * size + column, sorted."""
Values = NDArray[np.float64]


class Sketch(NamedTuple):
    """A similarity that is known roughly everywhere, and exactly where one asks."""

    rough_FF: Tensor
    """Any float dtype."""
    exact: Callable[[Tensor, Tensor], Tensor]
    """Rows and columns of some pairs -> their similarities."""


class Assignment(NamedTuple):
    """An assignment of columns to rows, and how far it can be from the best."""

    order_F: Tensor
    """Row i takes column order_F[i]; int64."""
    total: float
    """Summed similarity of the pairs, in float64."""
    gap: float
    """The best total is at most `total + gap`: a proof by LP duality, up to float64 rounding.

    On a sketch it takes for granted that no rough value is off by more than `MARGIN` times the root
    mean square error, which is measured on the candidates."""


def assign(
    similarity: Tensor | Sketch,
    *,
    num_candidates: int = 16,
    max_rounds: int = 20,
    gap: float = 0.0,
) -> Assignment:
    """Return the assignment with the largest total similarity, and its certificate.

    Args:
        similarity: (F, F), any float dtype, finite; it is read in blocks and never copied whole. Or
            a sketch of it, which costs less to form and leads to the same pairs.
        num_candidates: Partners that each row and each column starts with.
        max_rounds: Passes over the matrix at most; the certificate holds after each of them.
        gap: Share of the total that the answer may lie below the best, as proven; 0 is exact up
            to rounding.
    """
    if isinstance(similarity, Tensor):
        sketch = _as_sketch(similarity)
        column, price, margin = _start(sketch, num_candidates)
    else:
        sketch = similarity
        column, price, margin = _start(sketch, num_candidates)
        if price.any():
            # Exact values are dear, so they wait until the rough ones have done their part.
            rough = _as_sketch(sketch.rough_FF)
            *_found, column, price = _improve(rough, column, price, margin, max_rounds, gap, margin)
    column, lower, upper, *_last = _improve(sketch, column, price, margin, max_rounds, gap)
    return Assignment(torch.from_numpy(column).long(), lower, max(0.0, upper - lower))


def _improve(
    sketch: Sketch,
    column: Edges,
    price: Values,
    margin: float,
    max_rounds: int,
    gap: float,
    tolerance: float = TOLERANCE,
) -> tuple[Edges, float, float, Edges, Values]:
    """Add pairs until none is better than a tolerance.

    Returns:
        The best assignment, its total, the bound on all totals, and the last assignment with its
        prices.
    """
    size = len(column)
    edges, value = np.empty(0, dtype=np.int64), np.empty(0)
    lower, upper, best = -np.inf, np.inf, column
    for _round in range(max_rounds):
        mine = np.arange(size) * size + column
        edges, value = _with_exact(sketch, edges, value, mine)
        own = value[np.searchsorted(edges, mine)] - price[column]
        near = _near(sketch.rough_FF, price, own, margin)
        edges, value = _with_exact(sketch, edges, value, near)
        row, target = np.divmod(edges, size)
        gain = value - price[target] - own[row]
        total = float((own + price[column]).sum())
        upper = min(upper, float(price.sum() + own.sum() + _largest(gain, row, size).sum()))
        if total > lower:
            lower, best = total, column
        if upper - lower <= gap * abs(lower) or float(gain.max()) <= tolerance:
            break
        column = _solve(edges, value, price)
        price = _prices(edges, value, column, price)
    return best, lower, upper, column, price


def _as_sketch(similarity_FF: Tensor) -> Sketch:
    return Sketch(similarity_FF, lambda row_E, col_E: similarity_FF[row_E, col_E])


def _blocks(rough_FF: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield rows in float32, in memory that the next rows take over."""
    scratch = torch.empty(BLOCK, rough_FF.shape[1], device=rough_FF.device)
    for start in range(0, len(rough_FF), BLOCK):
        rows = rough_FF[start : start + BLOCK]
        yield start, scratch[: len(rows)].copy_(rows)


def _places(mask_BF: Tensor, start: int) -> Edges:
    """Return the pairs where a mask of some rows is set."""
    # On the CPU numpy finds a few set bits ten times as fast as torch.
    if mask_BF.device.type == "cpu":
        return np.flatnonzero(mask_BF.numpy()) + start * mask_BF.shape[1]
    found: Edges = mask_BF.flatten().nonzero()[:, 0].cpu().numpy() + start * mask_BF.shape[1]
    return found


def _start(sketch: Sketch, num_candidates: int) -> tuple[Edges, Values, float]:
    """Return a first assignment, its prices, and how near to a gain a rough value must come.

    Where each row's best column is another one, nothing can be better, and the prices are 0.
    """
    rough_FF = sketch.rough_FF
    size = len(rough_FF)
    num_candidates = min(num_candidates, size)
    best_F, column_1F = _extremes(rough_FF)
    row_F = torch.arange(size, device=best_F.device)
    top_F1 = rough_FF[row_F, best_F].float()[:, None]
    sample = rough_FF[:BLOCK].float()
    floor = SLACK * float(top_F1.abs().max()) + NEAR * float(sample.std(correction=0))
    if len(best_F.unique()) == size:
        error_F = sketch.exact(row_F, best_F).double() - top_F1[:, 0].double()
        margin = max(floor, MARGIN * float(error_F.square().mean().sqrt()))
        return best_F.cpu().numpy(), np.zeros(size), margin
    edges = _candidates(rough_FF, num_candidates, top_F1, column_1F)
    value = _at(rough_FF, edges)
    column = _solve(edges, value, np.zeros(size))
    price = _prices(edges, value, column, np.zeros(size))
    own = np.arange(size) * size + column
    row_E, col_E = _row_column(own, size, best_F.device)
    error = (sketch.exact(row_E, col_E).double().cpu().numpy() - _at(rough_FF, own)) ** 2
    return column, price, max(floor, MARGIN * float(np.sqrt(error.mean())))


def _extremes(rough_FF: Tensor) -> tuple[Tensor, Tensor]:
    """Return each row's best column, (F,), and each column's largest value, (1, F)."""
    best, column_1F = [], None
    for _start, block in _blocks(rough_FF):
        best.append(block.argmax(dim=1))
        top_1F = block.amax(dim=0, keepdim=True)
        column_1F = top_1F if column_1F is None else torch.maximum(column_1F, top_1F)
    assert column_1F is not None
    return torch.cat(best), column_1F


def _candidates(
    rough_FF: Tensor, num_candidates: int, row_top_F1: Tensor, column_top_1F: Tensor
) -> Edges:
    """Return about the best partners of every row and column, and the diagonal.

    A threshold is far cheaper than sorting: it is the normal quantile that `num_candidates` would
    exceed. Each row's and column's best pair is always there; what is missing otherwise is found
    later. The diagonal makes sure that one matching is.
    """
    size = len(rough_FF)
    quantile = torch.tensor(max(num_candidates / size, 1 / size)).clamp(max=0.5)
    z = -float(torch.special.ndtri(quantile))
    stride = max(1, size // 256)  # a few hundred values tell the spread
    row_F1 = torch.minimum(_quantile(rough_FF[:, ::stride], 1, z), row_top_F1)
    column_1F = torch.minimum(_quantile(rough_FF[::stride], 0, z), column_top_1F)
    edges = [np.arange(size) * (size + 1)]
    budget = 8 * num_candidates + 64
    for start, block in _blocks(rough_FF):
        wanted = (block >= column_1F).logical_or_(block >= row_F1[start : start + BLOCK])
        found = _places(wanted, start)
        if len(found) > budget * len(block):  # tails too heavy for a quantile of the normal
            col_BK = block.topk(min(num_candidates, size), dim=1, sorted=False).indices
            row_B1 = torch.arange(start, start + len(block), device=block.device)[:, None]
            found = (row_B1 * size + col_BK).flatten().cpu().numpy()
        edges.append(found)
    return np.unique(np.concatenate(edges))


def _quantile(sample: Tensor, axis: int, z: float) -> Tensor:
    """Return mean + z standard deviations along an axis."""
    std, mean = torch.std_mean(sample.float(), dim=axis, keepdim=True, correction=0)
    return mean + z * std


def _row_column(edges: Edges, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    row, column = np.divmod(edges, size)
    return torch.from_numpy(row).to(device), torch.from_numpy(column).to(device)


def _at(rough_FF: Tensor, edges: Edges) -> Values:
    """Return the rough values of some pairs."""
    value: Values = (
        rough_FF[_row_column(edges, len(rough_FF), rough_FF.device)].double().cpu().numpy()
    )
    return value


def _with_exact(sketch: Sketch, edges: Edges, value: Values, added: Edges) -> tuple[Edges, Values]:
    """Return the pairs with others added, and their exact values."""
    new = np.setdiff1d(added, edges)
    if not len(new):
        return edges, value
    row_E, col_E = _row_column(new, len(sketch.rough_FF), sketch.rough_FF.device)
    found = sketch.exact(row_E, col_E).double().cpu().numpy()
    edges, value = np.concatenate([edges, new]), np.concatenate([value, found])
    order = np.argsort(edges, kind="stable")
    return edges[order], value[order]


def _near(rough_FF: Tensor, price: Values, own: Values, margin: float) -> Edges:
    """Return the pairs that rows would rather have, or would but for a margin."""
    price_F = torch.from_numpy(price).to(rough_FF.device).float()
    least_F1 = (torch.from_numpy(own).to(rough_FF.device) - margin).float()[:, None]
    near = [
        _places(block.sub_(price_F) > least_F1[start : start + BLOCK], start)
        for start, block in _blocks(rough_FF)
    ]
    return np.concatenate(near)


def _largest(gain: Values, row: NDArray[np.int64], size: int) -> Values:
    """Return the largest gain of each row, at least 0."""
    most = np.zeros(size)
    np.maximum.at(most, row, gain)
    return most


def _solve(edges: Edges, value: Values, price: Values) -> NDArray[np.int64]:
    """Return the best assignment on the candidates; good prices make it fast."""
    size = len(price)
    row, column = np.divmod(edges, size)
    net = value - price[column]
    cost = np.maximum.reduceat(net, np.flatnonzero(np.r_[True, row[1:] != row[:-1]]))[row] - net
    # A zero would be no edge, so all costs are moved to 1 and above.
    graph = csr_matrix((cost + 1.0, (row, column)), shape=(size, size))
    rows, columns = min_weight_full_bipartite_matching(graph)
    order: NDArray[np.int64] = np.empty(size, dtype=np.int64)
    order[rows] = columns
    return order


def _prices(edges: Edges, value: Values, column: NDArray[np.int64], price: Values) -> Values:
    """Return prices of the columns at which every row is content with its own.

    The least prices, not below the given ones, with value[i, m(i)] - p[m(i)] >= value[i, j] - p[j]
    on all candidates: longest paths, by Bellman and Ford, over all edges at once. They exist at an
    optimum.
    """
    row, target = np.divmod(edges, len(column))
    own = value[np.searchsorted(edges, np.arange(len(column)) * len(column) + column)]
    gain = value - own[row]
    order = np.argsort(target, kind="stable")
    start = column[row[order]]
    gain, target = gain[order], target[order]
    first = np.flatnonzero(np.r_[True, target[1:] != target[:-1]])
    for _ in range(len(column)):
        raised = np.maximum(price, np.maximum.reduceat(price[start] + gain, first))
        if float((raised - price).max()) <= 1e-12:
            break
        price = raised
    return price
