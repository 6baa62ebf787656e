"""Alignment of whole groups: each member to the anchor, or all members to each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from lmerge.align import (
    ALIGNERS,
    BY_ACTIVATIONS,
    WITHOUT_ORDER,
    Aligner,
    Orders,
    Pair,
    Reference,
    align,
    pair_similarity,
)
from lmerge.assignment import assign
from lmerge.llama import HeadSpec, LayerTensors
from lmerge.neurons import correlation
from lmerge.soft import TEMPERATURE
from lmerge.symmetry import identity


def joint_orders(
    similarity: Callable[[int, int], Tensor], members: tuple[int, ...], anchor: int
) -> tuple[dict[int, Tensor], list[float]]:
    """Return orders that make all members alike each other, and the total after each sweep.

    Members start aligned to the anchor. Each in turn is aligned to all others at once, by the
    assignment that maximises the sum of its similarities to them; so the total similarity over
    all pairs never falls (its cost never rises), and sweeps end when it no longer rises.

    Args:
        similarity: (F, F) similarity of two members' neurons, by their source layers.
        members: Source layers of the group.
        anchor: The layer whose neurons keep their order.
    """
    orders = {anchor: torch.arange(len(similarity(anchor, anchor)))}
    for i in members:
        if i != anchor:
            orders[i] = assign(similarity(anchor, i)).order_F
    totals = [_total(similarity, orders)]
    while True:
        for i in members:
            if i != anchor:
                others = [j for j in members if j != i]
                summed_FF = similarity(others[0], i)[orders[others[0]]]
                for j in others[1:]:
                    summed_FF += similarity(j, i)[orders[j]]
                orders[i] = assign(summed_FF).order_F
        totals.append(_total(similarity, orders))
        if totals[-1] <= totals[-2] + 1e-6 * abs(totals[-2]):
            return orders, totals


def _total(similarity: Callable[[int, int], Tensor], orders: Mapping[int, Tensor]) -> float:
    pairs = [(i, j) for i in orders for j in orders if i < j]
    return sum(float(similarity(i, j)[orders[i], orders[j]].double().sum()) for i, j in pairs)


def align_members(
    anchor: int,
    layers: Mapping[int, LayerTensors],
    aligner: Aligner,
    spec: HeadSpec,
    *,
    reference: Reference = "anchor",
    activations: Mapping[int, Tensor] | None = None,
    temperature: float = TEMPERATURE,
) -> Orders:
    """Return how the members of a group are moved; the anchor is left as it is.

    Args:
        anchor: The layer that the others are aligned to.
        layers: All members in one frame of norms, by source layer.
        aligner: What is matched, and by what.
        spec: How the attention is cut into heads.
        reference: Whether neurons are matched to the anchor's, or to all other members' (`joint`).
        activations: Neuron activations (N, F) of each member at the same positions, for the
            aligners in `BY_ACTIVATIONS`.
        temperature: Of the aligner `soft`.
    """

    def pair(i: int, j: int) -> Pair:
        known = activations if aligner in BY_ACTIVATIONS else None
        correlation_FF = correlation(known[i], known[j]) if known else None
        return Pair(layers[i], layers[j], spec, correlation_FF, temperature)

    orders: Orders = {anchor: identity(len(layers[anchor]["gate_proj"]), spec)}
    others = [i for i in layers if i != anchor]
    if is_joint(tuple(layers), aligner, reference):
        neurons, _totals = joint_orders(
            lambda i, j: pair_similarity(pair(i, j), aligner), tuple(layers), anchor
        )
        made = {i: ALIGNERS[aligner](pair(anchor, i), neurons[i]) for i in others}
    else:
        made = {i: align(pair(anchor, i), aligner) for i in others}
    return orders | made


def is_joint(members: tuple[int, ...], aligner: Aligner, reference: Reference) -> bool:
    """Return whether the members of a group are matched all at once."""
    return reference == "joint" and len(members) > 2 and aligner not in WITHOUT_ORDER
