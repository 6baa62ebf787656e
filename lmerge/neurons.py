"""MLP neurons of two layers: how alike they are, and what moves them.

A neuron is a row of gate, a row of up and a column of down. Similarities do not change under the
symmetries of a neuron (docs/method.md, symmetries 1 and 2).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lmerge.axes import NEURON_AXIS
from lmerge.llama import MATRICES, LayerTensors

BLOCK = 1024
"""Neurons of the anchor whose similarities are formed together."""


def reorder_neurons(layer: LayerTensors, order_F: Tensor) -> LayerTensors:
    """Return the layer with its MLP neurons in a new order, or with those of `order_F` alone.

    The function is unchanged where all of them are there.
    """
    return {
        name: t.index_select(NEURON_AXIS[name], order_F.to(t.device)) if name in NEURON_AXIS else t
        for name, t in layer.items()
    }


def neuron_rows(layer: LayerTensors, name: str) -> Tensor:
    """Return a view of a matrix with a row for each neuron."""
    return layer[name].movedim(NEURON_AXIS[name], 0)


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
    gate_FD = _unit_rows(member, "gate_proj")
    for rows in _blocks(num_neurons):
        torch.mm(_unit_rows(anchor, "gate_proj", rows), gate_FD.T, out=similarity_FF[rows])
    del gate_FD
    up_FD, down_FD = _unit_rows(member, "up_proj"), _unit_rows(member, "down_proj")
    for rows in _blocks(num_neurons):
        up_BF = _unit_rows(anchor, "up_proj", rows) @ up_FD.T
        down_BF = _unit_rows(anchor, "down_proj", rows) @ down_FD.T
        similarity_FF[rows].addcmul_(up_BF, down_BF)
    return similarity_FF


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


def balanced_scales(anchor: LayerTensors, member: LayerTensors, order_F: Tensor) -> Tensor:
    """Return the factors of the up rows that bring the member's neurons to the anchor's scale.

    Slot i of the result belongs to the member's neuron order_F[i], beside the anchor's neuron i.

    The sign is that of cos(up) + cos(down); the size gives up and down the same ratio of lengths
    to the anchor's. A scale that was planted on equal neurons is undone exactly.
    """
    parts = []
    for rows in _blocks(len(anchor["up_proj"])):
        (up, up2), (down, down2) = (
            (
                neuron_rows(anchor, name)[rows].double().cpu(),
                neuron_rows(member, name)[order_F[rows]].double().cpu(),
            )
            for name in ("up_proj", "down_proj")
        )
        cosine_B = (normalize(up, dim=1) * normalize(up2, dim=1)).sum(dim=1)
        cosine_B += (normalize(down, dim=1) * normalize(down2, dim=1)).sum(dim=1)
        ratio_B = up.norm(dim=1) * down2.norm(dim=1) / (up2.norm(dim=1) * down.norm(dim=1))
        usable_B = ratio_B.isfinite() & (ratio_B > 0)
        size_B = torch.where(usable_B, ratio_B, 1.0).sqrt()
        parts.append(torch.where(cosine_B < 0, -size_B, size_B))
    return torch.cat(parts)


def matched_similarity(anchor: LayerTensors, member: LayerTensors, order_F: Tensor) -> Tensor:
    """Return the similarity of each anchor neuron to the member's neuron in its slot, (F,)."""
    aligned = reorder_neurons(member, order_F.to(member["gate_proj"].device))

    def cosine(name: str) -> Tensor:
        return (_unit_rows(anchor, name) * _unit_rows(aligned, name)).sum(dim=1)

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


def _blocks(size: int) -> list[slice]:
    return [slice(start, start + BLOCK) for start in range(0, size, BLOCK)]


def _unit_rows(layer: LayerTensors, name: str, rows: slice = slice(None)) -> Tensor:
    """Return some neurons' rows or columns of a matrix as rows of length 1, float32."""
    return normalize(neuron_rows(layer, name)[rows].float(), dim=1)
