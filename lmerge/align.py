"""Alignment: orders of MLP neurons relative to a group's anchor, by optimal assignment.

A permutation of a layer's F neurons moves the rows of gate and up and the columns of down
together, so the layer's function stays the same (docs/method.md, symmetry 1).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.functional import normalize

from lmerge.llama import NEURON_AXIS, LayerTensors
from lmerge.plan import Group

Aligner = Literal["weights", "none"]

Orders = dict[int, Tensor]
"""Source layer -> order of its neurons (F,), int64; slot i takes neuron order[i]."""


def reorder_neurons(layer: LayerTensors, order_F: Tensor) -> LayerTensors:
    """Return the layer with its MLP neurons in a new order; its function is unchanged."""
    return {
        name: tensor.index_select(NEURON_AXIS[name], order_F) if name in NEURON_AXIS else tensor
        for name, tensor in layer.items()
    }


def neuron_similarity(anchor: LayerTensors, member: LayerTensors) -> Tensor:
    """Return how alike every two MLP neurons are, from their weights alone.

    cos(gate, gate') + cos(up, up') * cos(down, down'): the product does not change when a
    neuron's up row is scaled by c and its down column by 1 / c, whatever the sign of c, which
    leaves the function alone (docs/method.md, symmetry 2).

    Returns:
        (F, F) float32 in [-2, 2]; row i is the anchor's neuron i, column j the member's neuron j.
    """

    def cosine(name: str) -> Tensor:
        return _unit_neurons(anchor, name) @ _unit_neurons(member, name).T

    return cosine("gate_proj") + cosine("up_proj") * cosine("down_proj")


def _unit_neurons(layer: LayerTensors, name: str) -> Tensor:
    """Return each neuron's row or column of a matrix as a row of length 1, (F, D) float32."""
    return normalize(layer[name].float().movedim(NEURON_AXIS[name], 0), dim=1)


def match_neurons(anchor: LayerTensors, member: LayerTensors) -> Tensor:
    """Return the order of the member's neurons that is most like the anchor's.

    The assignment is optimal (Hungarian algorithm, scipy's `linear_sum_assignment`).

    Returns:
        (F,) int64 on the CPU, a permutation.
    """
    similarity_FF = neuron_similarity(anchor, member).cpu().numpy()
    _rows, order = linear_sum_assignment(similarity_FF, maximize=True)
    return torch.from_numpy(order).long()


def identity_order(anchor: LayerTensors, member: LayerTensors) -> Tensor:
    """Return the order that leaves the member as it is (the baseline without alignment)."""
    return torch.arange(len(member["gate_proj"]))


ALIGNERS: dict[Aligner, Callable[[LayerTensors, LayerTensors], Tensor]] = {
    "weights": match_neurons,
    "none": identity_order,
}


def align_group(group: Group, layers: dict[int, LayerTensors], aligner: Aligner) -> Orders:
    """Return the orders of a group's members relative to its anchor, whose own is the identity."""
    anchor = layers[group.anchor]
    return {
        i: ALIGNERS["none" if i == group.anchor else aligner](anchor, layers[i])
        for i in group.members
    }


def matched_similarity(anchor: LayerTensors, member: LayerTensors, order_F: Tensor) -> Tensor:
    """Return the similarity of each anchor neuron to the member's neuron in its slot, (F,)."""
    aligned = reorder_neurons(member, order_F.to(member["gate_proj"].device))

    def cosine(name: str) -> Tensor:
        return (_unit_neurons(anchor, name) * _unit_neurons(aligned, name)).sum(dim=1)

    return cosine("gate_proj") + cosine("up_proj") * cosine("down_proj")
