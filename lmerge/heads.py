"""Matching of attention heads under grouped queries, and of the bases inside them.

What two heads are compared by does not change under the symmetries that remain inside a head: the
product of o and v, and for each rotary pair the product of the complex query and key rows.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from lmerge.llama import HeadSpec, LayerTensors
from lmerge.symmetry import Transform, apply_transform, identity

TINY = 1e-30
"""Added to norms, so that a head of zeros is like nothing instead of undefined."""


def match_heads(anchor: LayerTensors, member: LayerTensors, spec: HeadSpec) -> Transform:
    """Return the transform of the member's attention that makes it most like the anchor's.

    Key/value groups are assigned to groups and query heads to heads inside them (both optimal,
    Hungarian algorithm); then the value basis of each group is turned by orthogonal Procrustes, and
    each rotary pair is turned and stretched by its least-squares angle and balanced scale. The
    neurons stay as they are.
    """
    orders = _match_groups(head_similarity(anchor, member, spec), spec)
    plain = identity(len(member["gate_proj"]), spec)
    ordered = replace(plain, group_K=orders[0], head_KR=orders[1])
    moved = apply_transform(member, ordered)
    angle_KP, stretch_KP = _match_pairs(anchor, moved, spec)
    value_KCC = _match_values(anchor, moved, spec)
    return replace(ordered, value_KCC=value_KCC, angle_KP=angle_KP, stretch_KP=stretch_KP)


def head_similarity(anchor: LayerTensors, member: LayerTensors, spec: HeadSpec) -> Tensor:
    """Return how alike every two query heads are, with their keys and values.

    The cosine of the products o v plus the cosine of the rotary pairs' products of q and k.

    Returns:
        (H, H) float64 in [-2, 2]; row h is the anchor's head h, column j the member's head j.
    """
    cross = _value_products(anchor, member, spec)
    scale = torch.outer(_value_norms(anchor, spec), _value_norms(member, spec))
    pair = _pair_products(anchor, member, spec)
    pair_scale = torch.outer(_pair_norms(anchor, spec), _pair_norms(member, spec))
    return cross / (scale + TINY) + pair / (pair_scale + TINY)


def matched_heads(anchor: LayerTensors, member: LayerTensors, spec: HeadSpec) -> Tensor:
    """Return the similarity of each of the anchor's heads to the member's in its slot, (H,)."""
    return head_similarity(anchor, member, spec).diagonal()


def _match_groups(similarity_HH: Tensor, spec: HeadSpec) -> tuple[Tensor, Tensor]:
    num_groups = spec.num_kv_heads
    blocks_KKRR = (
        similarity_HH.unflatten(0, (num_groups, -1)).unflatten(2, (num_groups, -1)).transpose(1, 2)
    )
    per_group = blocks_KKRR.shape[-1]
    head_KKR = torch.empty(num_groups, num_groups, per_group, dtype=torch.int64)
    total_KK = torch.empty(num_groups, num_groups, dtype=torch.float64)
    for i in range(num_groups):
        for j in range(num_groups):
            rows, columns = linear_sum_assignment(blocks_KKRR[i, j].numpy(), maximize=True)
            head_KKR[i, j] = torch.from_numpy(columns)
            total_KK[i, j] = blocks_KKRR[i, j][rows, columns].sum()
    group_K = torch.from_numpy(linear_sum_assignment(total_KK.numpy(), maximize=True)[1]).long()
    return group_K, head_KKR[torch.arange(num_groups), group_K]


def _match_values(anchor: LayerTensors, member: LayerTensors, spec: HeadSpec) -> Tensor:
    """Return for each group the rotation of the member's values nearest to the anchor's, (K, C, C).

    It minimises |R v' - v|^2 + sum_h |o'_h R^T - o_h|^2 (orthogonal Procrustes).
    """
    value_KCI, value2_KCI = (_values(layer, spec) for layer in (anchor, member))
    out_HDC, out2_HDC = (_outputs(layer, spec) for layer in (anchor, member))
    from_out_HCC = torch.einsum("hdc,hde->hce", out_HDC, out2_HDC)
    from_out_KCC = from_out_HCC.unflatten(0, (spec.num_kv_heads, -1)).sum(dim=1)
    left_KCC, _s, right_KCC = torch.linalg.svd(value_KCI @ value2_KCI.mT + from_out_KCC)
    rotation_KCC: Tensor = left_KCC @ right_KCC
    return rotation_KCC


def _match_pairs(
    anchor: LayerTensors, member: LayerTensors, spec: HeadSpec
) -> tuple[Tensor, Tensor]:
    """Return the angles and scales of the member's rotary pairs, each (K, P)."""
    query, query2 = (_queries_by_group(layer, spec) for layer in (anchor, member))
    key, key2 = (_pairs(layer, "k_proj", spec) for layer in (anchor, member))
    cross_KP = (query2.conj() * query).sum(dim=(1, 3)) + (key2.conj() * key).sum(dim=2)
    if "q_norm" in member or "k_norm" in member:
        angle_KP = (cross_KP.real < 0).double() * torch.pi
        return angle_KP, torch.ones_like(angle_KP)
    ratio_KP = _size(query, (1, 3)) * _size(key2, (2,)) / (_size(query2, (1, 3)) * _size(key, (2,)))
    return cross_KP.angle(), ratio_KP.sqrt()


def _size(complex_tensor: Tensor, axes: tuple[int, ...]) -> Tensor:
    return complex_tensor.abs().square().sum(dim=axes).sqrt().clamp(min=1e-12)


def _queries_by_group(layer: LayerTensors, spec: HeadSpec) -> Tensor:
    query_KRPI: Tensor = _pairs(layer, "q_proj", spec).unflatten(0, (spec.num_kv_heads, -1))
    return query_KRPI


def _with_bias(layer: LayerTensors, name: str) -> Tensor:
    """Return a matrix in float64 with its bias as one more column, on the CPU."""
    weight_OI = layer[name].double().cpu()
    bias = layer.get(f"{name}.bias")
    return weight_OI if bias is None else torch.cat([weight_OI, bias.double().cpu()[:, None]], 1)


def _pairs(layer: LayerTensors, name: str, spec: HeadSpec) -> Tensor:
    """Return the rows of each head as complex numbers, one for a rotary pair: (heads, P, I)."""
    rows = torch.unflatten(_with_bias(layer, name), 0, (-1, 2, spec.head_dim // 2))
    return torch.complex(rows[:, 0].contiguous(), rows[:, 1].contiguous())


def _values(layer: LayerTensors, spec: HeadSpec) -> Tensor:
    value_KCI: Tensor = _with_bias(layer, "v_proj").unflatten(0, (spec.num_kv_heads, -1))
    return value_KCI


def _outputs(layer: LayerTensors, spec: HeadSpec) -> Tensor:
    out_DHC: Tensor = layer["o_proj"].double().cpu().unflatten(1, (spec.num_heads, -1))
    return out_DHC.transpose(0, 1)


def _value_products(anchor: LayerTensors, member: LayerTensors, spec: HeadSpec) -> Tensor:
    """Return the inner products <o_h v, o'_j v'> of all heads, (H, H), without forming o v."""
    per_group = spec.num_heads // spec.num_kv_heads
    out_HDC, out2_HDC = _outputs(anchor, spec), _outputs(member, spec)
    value_KCI, value2_KCI = _values(anchor, spec), _values(member, spec)
    rows = []
    for h in range(spec.num_heads):
        out_JCC = torch.einsum("dc,jde->jce", out_HDC[h], out2_HDC)
        value_KCC = torch.einsum("ci,kei->kce", value_KCI[h // per_group], value2_KCI)
        value_JCC = value_KCC.repeat_interleave(per_group, dim=0)
        rows.append((out_JCC * value_JCC).sum(dim=(1, 2)))
    return torch.stack(rows)


def _value_norms(layer: LayerTensors, spec: HeadSpec) -> Tensor:
    per_group = spec.num_heads // spec.num_kv_heads
    out_HDC, value_KCI = _outputs(layer, spec), _values(layer, spec)
    value_KCC = value_KCI @ value_KCI.mT
    out_HCC = out_HDC.mT @ out_HDC
    squared_H = (out_HCC * value_KCC.repeat_interleave(per_group, dim=0)).sum(dim=(1, 2))
    return squared_H.clamp(min=0).sqrt()


def _pair_products(anchor: LayerTensors, member: LayerTensors, spec: HeadSpec) -> Tensor:
    """Return Re sum_p <q_p, q'_p> conj(<k_p, k'_p>) of all heads, (H, H)."""
    per_group = spec.num_heads // spec.num_kv_heads
    query, query2 = _pairs(anchor, "q_proj", spec), _pairs(member, "q_proj", spec)
    key, key2 = _pairs(anchor, "k_proj", spec), _pairs(member, "k_proj", spec)
    query_HJP = torch.einsum("hpi,jpi->hjp", query.conj(), query2)
    key_KLP = torch.einsum("kpi,lpi->klp", key.conj(), key2)
    key_HJP = key_KLP.repeat_interleave(per_group, 0).repeat_interleave(per_group, 1)
    return (query_HJP * key_HJP.conj()).real.sum(dim=2)


def _pair_norms(layer: LayerTensors, spec: HeadSpec) -> Tensor:
    per_group = spec.num_heads // spec.num_kv_heads
    query_HP = _pairs(layer, "q_proj", spec).abs().square().sum(dim=2)
    key_KP = _pairs(layer, "k_proj", spec).abs().square().sum(dim=2)
    return (query_HP * key_KP.repeat_interleave(per_group, dim=0)).sum(dim=1).sqrt()
