"""Symmetries of a decoder layer as data: transforms that move weights and keep the function.

llama.py says which axis of which matrix each symmetry moves; this file applies those tables.
R is the number of query heads of a key/value group, P the number of rotary pairs of a head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from lmerge.axes import GROUP_AXIS, NEURON_AXIS, NEURON_SCALE, QUERY_AXIS, ROTARY_SCALE, VALUE_BASIS
from lmerge.llama import HeadSpec, LayerTensors


@dataclass(frozen=True, kw_only=True)
class Transform:
    """An exact symmetry of a layer: first the orders, then scales and bases in the new slots."""

    neuron_F: Tensor
    """Slot i takes neuron neuron_F[i]; int64."""
    scale_F: Tensor
    """Factor of the up row in slot i, whose down column is divided by it; not 0."""
    group_K: Tensor
    """Slot k takes key/value group group_K[k], with its query heads; int64."""
    head_KR: Tensor
    """Slot r of group slot k takes head head_KR[k, r] of the group that moved there; int64."""
    value_KCC: Tensor
    """Invertible matrix on the value rows of group slot k; its inverse acts on the o columns."""
    angle_KP: Tensor
    """Angle in radians by which the rotary pair (i, i + C/2) of queries and keys is turned."""
    stretch_KP: Tensor
    """Factor of a rotary pair's query rows, whose key rows are divided by it; not 0."""


def identity(num_neurons: int, spec: HeadSpec) -> Transform:
    """Return the transform that leaves a layer as it is, bit for bit."""
    num_groups, width = spec.num_kv_heads, spec.head_dim
    per_group = spec.num_heads // num_groups
    return Transform(
        neuron_F=torch.arange(num_neurons),
        scale_F=torch.ones(num_neurons, dtype=torch.float64),
        group_K=torch.arange(num_groups),
        head_KR=torch.arange(per_group).repeat(num_groups, 1),
        value_KCC=torch.eye(width, dtype=torch.float64).repeat(num_groups, 1, 1),
        angle_KP=torch.zeros(num_groups, width // 2, dtype=torch.float64),
        stretch_KP=torch.ones(num_groups, width // 2, dtype=torch.float64),
    )


def compose(first: Transform, second: Transform) -> Transform:
    """Return the transform that does what `first` and then `second` do."""
    group_K, neuron_F = second.group_K, second.neuron_F
    return Transform(
        neuron_F=first.neuron_F[neuron_F],
        scale_F=first.scale_F[neuron_F] * second.scale_F,
        group_K=first.group_K[group_K],
        head_KR=first.head_KR[group_K].gather(1, second.head_KR),
        value_KCC=second.value_KCC @ first.value_KCC[group_K],
        angle_KP=first.angle_KP[group_K] + second.angle_KP,
        stretch_KP=first.stretch_KP[group_K] * second.stretch_KP,
    )


def inverse(transform: Transform) -> Transform:
    """Return the transform that undoes another one."""
    neuron_F, group_K = transform.neuron_F.argsort(), transform.group_K.argsort()
    return Transform(
        neuron_F=neuron_F,
        scale_F=1 / transform.scale_F[neuron_F],
        group_K=group_K,
        head_KR=transform.head_KR[group_K].argsort(dim=1),
        value_KCC=torch.linalg.inv(transform.value_KCC)[group_K],
        angle_KP=-transform.angle_KP[group_K],
        stretch_KP=1 / transform.stretch_KP[group_K],
    )


def apply_transform(layer: LayerTensors, transform: Transform) -> LayerTensors:
    """Return the layer with its weights moved and its function unchanged.

    Sums run in float64; a part of the transform that does nothing leaves its tensors bit for bit.

    Raises:
        ValueError: When the layer has norms on queries and keys, and the transform turns a rotary
            pair by other than 0 or pi, or stretches one: such norms allow neither.
    """
    _check_norms(layer, transform)
    moved = _permute(layer, transform)
    if bool((transform.scale_F != 1).any()):
        moved = _scale_neurons(moved, transform.scale_F)
    eye_CC = torch.eye(transform.value_KCC.shape[1], dtype=transform.value_KCC.dtype)
    if bool((transform.value_KCC != eye_CC).any()):
        moved = _change_values(moved, transform)
    if bool((transform.angle_KP != 0).any() or (transform.stretch_KP != 1).any()):
        moved = _turn_pairs(moved, transform)
    return moved


def reorder_rows(layer: LayerTensors, order: Mapping[str, Tensor]) -> LayerTensors:
    """Return the layer with the rows of each matrix in an order of its own.

    The published procedure, kept for comparison alone: it changes the layer's function, since rows
    of o and down are channels of the residual stream, and gate, up and down must move together.
    """
    moved = dict(layer)
    for name, order_O in order.items():
        for key in (name, f"{name}.bias"):
            if key in layer:
                moved[key] = layer[key].index_select(0, order_O.to(layer[key].device))
    return moved


def transform_tensors(transform: Transform) -> dict[str, Tensor]:
    """Return the transform's fields by name."""
    return {field.name: getattr(transform, field.name) for field in fields(Transform)}


def transform_from_tensors(tensors: Mapping[str, Tensor]) -> Transform:
    """Return the transform that `transform_tensors` took apart.

    Raises:
        ValueError: When a field is missing, or breaks the rule that it must be invertible.
    """
    names = [field.name for field in fields(Transform)]
    if set(tensors) != set(names):
        raise ValueError(f"a transform needs {', '.join(names)}, got {', '.join(sorted(tensors))}.")
    transform = Transform(**{n: t.long() if n in ORDERS else t for n, t in tensors.items()})
    if _shapes_differ(transform) or not _is_invertible(transform):
        raise ValueError("a transform must hold permutations, and numbers that can be undone.")
    return transform


ORDERS = ("neuron_F", "group_K", "head_KR")
"""Fields of a transform that hold permutations."""


def _shapes_differ(transform: Transform) -> bool:
    shapes = {name: tuple(t.shape) for name, t in transform_tensors(transform).items()}
    if len(shapes["head_KR"]) != 2 or len(shapes["value_KCC"]) != 3:
        return True
    (num_groups, per_group), width = shapes["head_KR"], shapes["value_KCC"][-1]
    wanted = {
        "neuron_F": (transform.neuron_F.numel(),),
        "scale_F": (transform.neuron_F.numel(),),
        "group_K": (num_groups,),
        "head_KR": (num_groups, per_group),
        "value_KCC": (num_groups, width, width),
        "angle_KP": (num_groups, width // 2),
        "stretch_KP": (num_groups, width // 2),
    }
    return shapes != wanted


def _is_invertible(transform: Transform) -> bool:
    tensors = transform_tensors(transform)
    orders = all(
        bool((tensors[n].sort(dim=-1).values == torch.arange(tensors[n].shape[-1])).all())
        for n in ORDERS
    )
    finite = all(bool(t.isfinite().all()) for t in tensors.values())
    scales = bool((transform.scale_F != 0).all() and (transform.stretch_KP != 0).all())
    return orders and finite and scales


def _permute(layer: LayerTensors, transform: Transform) -> LayerTensors:
    (num_groups, per_group), width = transform.head_KR.shape, transform.value_KCC.shape[1]
    head_H = (transform.group_K[:, None] * per_group + transform.head_KR).flatten()
    group_K = transform.group_K
    moved = dict(layer)
    for axes, order, size in (
        (NEURON_AXIS, transform.neuron_F, 1),
        (QUERY_AXIS, head_H, width),
        (GROUP_AXIS, group_K, width),
    ):
        row = (order[:, None] * size + torch.arange(size)).flatten()
        for name, axis in axes.items():
            if name in layer:
                moved[name] = layer[name].index_select(axis, row.to(layer[name].device))
    assert len(group_K) == num_groups
    return moved


def _scale_neurons(layer: LayerTensors, scale_F: Tensor) -> LayerTensors:
    moved = dict(layer)
    for name, power in NEURON_SCALE.items():
        if name in layer:
            factor = scale_F.to(layer[name].device) ** power
            along_rows = NEURON_AXIS[name] == 0 and layer[name].ndim == 2
            factor = factor[:, None] if along_rows else factor
            moved[name] = (layer[name].double() * factor).to(layer[name].dtype)
    return moved


def _change_values(layer: LayerTensors, transform: Transform) -> LayerTensors:
    num_groups, width = transform.value_KCC.shape[:2]
    back_KCC = torch.linalg.inv(transform.value_KCC)
    moved = dict(layer)
    for name, power in VALUE_BASIS.items():
        if name not in layer:
            continue
        tensor = layer[name].double()
        if power == 1:
            row_KCI = tensor.reshape(num_groups, width, -1)
            new = transform.value_KCC.to(tensor) @ row_KCI
        else:
            column_DKRC = tensor.reshape(len(tensor), num_groups, -1, width)
            new = torch.einsum("dkrc,kce->dkre", column_DKRC, back_KCC.to(tensor))
        moved[name] = new.reshape(tensor.shape).to(layer[name].dtype)
    return moved


def _turn_pairs(layer: LayerTensors, transform: Transform) -> LayerTensors:
    num_groups, num_pairs = transform.angle_KP.shape
    turn_KP = torch.polar(torch.ones_like(transform.angle_KP), transform.angle_KP)
    moved = dict(layer)
    for name, power in ROTARY_SCALE.items():
        if name not in layer:
            continue
        tensor = layer[name].double()
        # rotate_half pairs the rows i and i + C/2 of a head: real and imaginary part.
        row_KR2PI = tensor.reshape(num_groups, -1, 2, num_pairs, tensor.numel() // len(tensor))
        real_KRPI, imag_KRPI = row_KR2PI.unbind(dim=2)
        factor_KP = (turn_KP * transform.stretch_KP**power).to(tensor.device)
        new = torch.complex(real_KRPI, imag_KRPI) * factor_KP[:, None, :, None]
        stacked = torch.stack([new.real, new.imag], dim=2)
        moved[name] = stacked.reshape(tensor.shape).to(layer[name].dtype)
    return moved


def _check_norms(layer: LayerTensors, transform: Transform) -> None:
    if "q_norm" not in layer and "k_norm" not in layer:
        return
    straight = transform.angle_KP.sin().abs().max() < 1e-6
    if not straight or bool((transform.stretch_KP != 1).any()):
        raise ValueError(
            "a layer with norms on queries and keys allows a rotary pair to turn by 0 or pi only, "
            "and not to be stretched. Leave `angle_KP` and `stretch_KP` at 0 and 1."
        )
