"""Alignment: what makes a group's members alike its anchor before they are averaged.

All aligners but the published `rowwise` move weights by exact symmetries (symmetry.py), so that a
layer's function stays the same (docs/method.md, symmetries 1 to 5).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lmerge.assignment import assign
from lmerge.heads import match_heads
from lmerge.llama import MATRICES, NEURON_AXIS, HeadSpec, LayerTensors
from lmerge.plan import Group
from lmerge.symmetry import Transform, apply_transform, identity, reorder_rows

Aligner = Literal["weights", "activations", "both", "full", "rowwise", "none"]
Reference = Literal["anchor", "joint"]

Motion = Tensor | Transform | dict[str, Tensor]
"""An order of neurons (F,), a transform, or (`rowwise`) an order of each matrix's rows."""
Orders = dict[int, Motion]
"""Source layer -> how it is moved."""

BY_ACTIVATIONS: tuple[Aligner, ...] = ("activations", "both")
"""Aligners that need the neurons' activations on calibration tokens."""
BLOCK = 1024
"""Neurons of the anchor whose similarities are formed together."""


class Pair(NamedTuple):
    """Two layers of a group in one frame of norms, and what is known of them."""

    anchor: LayerTensors
    member: LayerTensors
    spec: HeadSpec
    correlation_FF: Tensor | None = None
    """Correlation of the anchor's activations (rows) with the member's; for some aligners."""


def move(layer: LayerTensors, motion: Motion | None) -> LayerTensors:
    """Return the layer moved by an order of neurons, a transform, or orders of rows."""
    if motion is None:
        return layer
    if isinstance(motion, Transform):
        return apply_transform(layer, motion)
    if isinstance(motion, Tensor):
        return reorder_neurons(layer, motion)
    return reorder_rows(layer, motion)


def reorder_neurons(layer: LayerTensors, order_F: Tensor) -> LayerTensors:
    """Return the layer with its MLP neurons in a new order; its function is unchanged."""
    return {
        name: t.index_select(NEURON_AXIS[name], order_F.to(t.device)) if name in NEURON_AXIS else t
        for name, t in layer.items()
    }


def neuron_similarity(anchor: LayerTensors, member: LayerTensors) -> Tensor:
    """Return how alike every two MLP neurons are, from their weights alone.

    cos(gate, gate') + cos(up, up') * cos(down, down'): the product does not change when a
    neuron's up row is scaled by c and its down column by 1 / c, whatever the sign of c, which
    leaves the function alone (docs/method.md, symmetry 2). Formed in blocks: beside the result it
    needs the float32 copies of two of the member's matrices.

    Returns:
        (F, F) float32 in [-2, 2]; row i is the anchor's neuron i, column j the member's neuron j.
    """
    num_neurons, device = len(anchor["gate_proj"]), anchor["gate_proj"].device
    similarity_FF = torch.empty(num_neurons, len(member["gate_proj"]), device=device)
    gate_FD = _unit_neurons(member, "gate_proj")
    for rows in _blocks(num_neurons):
        torch.mm(_unit_neurons(anchor, "gate_proj", rows), gate_FD.T, out=similarity_FF[rows])
    del gate_FD
    up_FD, down_FD = _unit_neurons(member, "up_proj"), _unit_neurons(member, "down_proj")
    for rows in _blocks(num_neurons):
        up_BF = _unit_neurons(anchor, "up_proj", rows) @ up_FD.T
        down_BF = _unit_neurons(anchor, "down_proj", rows) @ down_FD.T
        similarity_FF[rows].addcmul_(up_BF, down_BF)
    return similarity_FF


def _blocks(size: int) -> list[slice]:
    return [slice(start, start + BLOCK) for start in range(0, size, BLOCK)]


def _unit_neurons(layer: LayerTensors, name: str, rows: slice = slice(None)) -> Tensor:
    """Return some neurons' rows or columns of a matrix as rows of length 1, float32."""
    return normalize(layer[name].movedim(NEURON_AXIS[name], 0)[rows].float(), dim=1)


def correlation(act_NF: Tensor, act2_NF: Tensor) -> Tensor:
    """Return the correlation of every neuron of one layer with every neuron of another, (F, F).

    Args:
        act_NF: Neuron activations (the input of down) at calibration positions.
        act2_NF: The other layer's at the same positions.
    """
    unit_FN, unit2_FN = (
        normalize((act - act.mean(dim=0)).float(), dim=0) for act in (act_NF, act2_NF)
    )
    return unit_FN.T @ unit2_FN


def balanced_scales(anchor: LayerTensors, member: LayerTensors) -> Tensor:
    """Return the factors of the member's up rows that bring its neurons to the anchor's scale.

    The sign is that of cos(up) + cos(down); the size gives up and down the same ratio of lengths
    to the anchor's. A scale that was planted on equal neurons is undone exactly.
    """

    def rows(layer: LayerTensors, name: str) -> Tensor:
        return layer[name].movedim(NEURON_AXIS[name], 0).double().cpu()

    up, up2 = rows(anchor, "up_proj"), rows(member, "up_proj")
    down, down2 = rows(anchor, "down_proj"), rows(member, "down_proj")
    cosine_F = (normalize(up, dim=1) * normalize(up2, dim=1)).sum(dim=1)
    cosine_F += (normalize(down, dim=1) * normalize(down2, dim=1)).sum(dim=1)
    ratio_F = up.norm(dim=1) * down2.norm(dim=1) / (up2.norm(dim=1) * down.norm(dim=1))
    usable_F = ratio_F.isfinite() & (ratio_F > 0)
    size_F = torch.where(usable_F, ratio_F, 1.0).sqrt()
    return torch.where(cosine_F < 0, -size_F, size_F)


def pair_similarity(pair: Pair, aligner: Aligner) -> Tensor:
    """Return the (F, F) similarity of neurons that an aligner maximises.

    Activations change sign with c (symmetry 2), so their correlation counts by its size.
    """
    if aligner not in BY_ACTIVATIONS:
        return neuron_similarity(pair.anchor, pair.member)
    assert pair.correlation_FF is not None
    by_activations_FF = pair.correlation_FF.abs()
    if aligner == "activations":
        return by_activations_FF
    return by_activations_FF + neuron_similarity(pair.anchor, pair.member)


def match_neurons(anchor: LayerTensors, member: LayerTensors) -> Tensor:
    """Return the order of the member's neurons that is most like the anchor's by weights.

    The assignment is optimal (see assignment.py for the proof that comes with it).

    Returns:
        (F,) int64 on the CPU, a permutation.
    """
    return assign(neuron_similarity(anchor, member)).order_F.cpu()


def with_scales(pair: Pair, order_F: Tensor) -> Transform:
    """Return the transform of an order of neurons, with the signs and scales that fit it."""
    device = pair.member["gate_proj"].device
    moved = reorder_neurons(pair.member, order_F.to(device))
    scale_F = balanced_scales(pair.anchor, moved)
    if pair.correlation_FF is not None:
        paired_F = pair.correlation_FF.cpu()[torch.arange(len(order_F)), order_F]
        scale_F = torch.where(paired_F < 0, -scale_F.abs(), scale_F.abs())
    return replace(identity(len(order_F), pair.spec), neuron_F=order_F, scale_F=scale_F)


def with_heads(pair: Pair, order_F: Tensor) -> Transform:
    """Return the transform of neurons and attention (heads, value bases, rotary pairs)."""
    heads = match_heads(pair.anchor, pair.member, pair.spec)
    neurons = with_scales(pair, order_F)
    return replace(heads, neuron_F=neurons.neuron_F, scale_F=neurons.scale_F)


def leave(pair: Pair, order_F: Tensor) -> Transform:
    """Return the transform that leaves the member as it is (the baseline without alignment)."""
    return identity(len(pair.member["gate_proj"]), pair.spec)


def match_rows(pair: Pair, order_F: Tensor) -> dict[str, Tensor]:
    """Return an order of rows for each of the seven matrices on its own: the published procedure.

    It changes the member's function and is kept for comparison alone.
    """
    orders = {}
    for name in MATRICES:
        unit, unit2 = (normalize(layer[name].float()) for layer in (pair.anchor, pair.member))
        orders[name] = assign(unit @ unit2.T).order_F.cpu()
    return orders


ALIGNERS: dict[Aligner, Callable[[Pair, Tensor], Motion]] = {
    "weights": with_scales,
    "activations": with_scales,
    "both": with_scales,
    "full": with_heads,
    "rowwise": match_rows,
    "none": leave,
}
"""Aligner -> what is done once the order of the neurons is known."""


def align(pair: Pair, aligner: Aligner) -> Motion:
    """Return how the member of a pair is moved to be most like the anchor."""
    if aligner in ("rowwise", "none"):
        return ALIGNERS[aligner](pair, torch.arange(len(pair.member["gate_proj"])))
    order_F = assign(pair_similarity(pair, aligner)).order_F.cpu()
    return ALIGNERS[aligner](pair, order_F)


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
            orders[i] = assign(similarity(anchor, i)).order_F.cpu()
    totals = [_total(similarity, orders)]
    while True:
        for i in members:
            if i != anchor:
                others = [similarity(j, i)[orders[j]] for j in members if j != i]
                orders[i] = assign(torch.stack(others).sum(dim=0)).order_F.cpu()
        totals.append(_total(similarity, orders))
        if totals[-1] <= totals[-2] + 1e-6 * abs(totals[-2]):
            return orders, totals


def _total(similarity: Callable[[int, int], Tensor], orders: Mapping[int, Tensor]) -> float:
    pairs = [(i, j) for i in orders for j in orders if i < j]
    return sum(float(similarity(i, j)[orders[i], orders[j]].double().sum()) for i, j in pairs)


def align_group(
    group: Group,
    layers: Mapping[int, LayerTensors],
    aligner: Aligner,
    spec: HeadSpec,
    *,
    reference: Reference = "anchor",
    activations: Mapping[int, Tensor] | None = None,
) -> Orders:
    """Return how a group's members are moved; the anchor is left as it is.

    Args:
        group: Members and anchor.
        layers: The members in one frame of norms, by source layer.
        aligner: What is matched, and by what.
        spec: How the attention is cut into heads.
        reference: Whether neurons are matched to the anchor's, or to all other members' (`joint`).
        activations: Neuron activations (N, F) of each member at the same positions, for the
            aligners in `BY_ACTIVATIONS`.
    """

    def pair(i: int, j: int) -> Pair:
        known = activations if aligner in BY_ACTIVATIONS else None
        correlation_FF = correlation(known[i], known[j]) if known else None
        return Pair(layers[i], layers[j], spec, correlation_FF)

    orders: Orders = {group.anchor: identity(len(layers[group.anchor]["gate_proj"]), spec)}
    others = [i for i in group.members if i != group.anchor]
    if reference == "joint" and len(others) > 1 and aligner not in ("rowwise", "none"):
        neurons, _totals = joint_orders(
            lambda i, j: pair_similarity(pair(i, j), aligner), group.members, group.anchor
        )
        made = {i: ALIGNERS[aligner](pair(group.anchor, i), neurons[i]) for i in others}
    else:
        made = {i: align(pair(group.anchor, i), aligner) for i in others}
    return orders | made


def matched_similarity(anchor: LayerTensors, member: LayerTensors, order_F: Tensor) -> Tensor:
    """Return the similarity of each anchor neuron to the member's neuron in its slot, (F,)."""
    aligned = reorder_neurons(member, order_F.to(member["gate_proj"].device))

    def cosine(name: str) -> Tensor:
        return (_unit_neurons(anchor, name) * _unit_neurons(aligned, name)).sum(dim=1)

    return cosine("gate_proj") + cosine("up_proj") * cosine("down_proj")


def matrix_similarity(anchor: LayerTensors, member: LayerTensors) -> dict[str, float]:
    """Return the cosine of each of the seven matrices with the anchor's, as they lie."""
    return {
        name: float(
            torch.cosine_similarity(
                anchor[name].double().flatten(), member[name].double().flatten(), dim=0
            )
        )
        for name in MATRICES
    }
