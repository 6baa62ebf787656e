"""Merging: the weights of a group's members and their alphas -> the weights of one layer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lmerge.axes import ALPHA_AXIS, COMPANION, FOLDS_INTO
from lmerge.llama import MATRICES, LayerTensors

SMALLEST_GAMMA = 1e-6
"""Anchor norm weights below this share of the largest are not divided by, see `reference_norms`."""
SMALLEST_GAMMA_FLOAT16 = 1e-3
"""The same for float16, whose largest number is 65504."""


def reference_norms(anchor: LayerTensors) -> LayerTensors:
    """Return the norm weights that a group's merged layer will have.

    They are the anchor's, so that the anchor itself is not touched by folding, except where a
    weight is so close to zero that dividing the others' weights by it could overflow: there it is
    1. Trained models do have norm weights of a ten-thousandth of the largest.
    """
    norms = {}
    for name in FOLDS_INTO:
        gamma_D = anchor[name].float()
        half = anchor[name].dtype == torch.float16
        smallest = SMALLEST_GAMMA_FLOAT16 if half else SMALLEST_GAMMA
        keep_D = gamma_D.abs() > smallest * gamma_D.abs().max()
        norms[name] = torch.where(keep_D, gamma_D, 1.0).to(anchor[name].dtype)
    return norms


def fold_norms(layer: LayerTensors, norms: LayerTensors) -> LayerTensors:
    """Return the layer with other norm weights and the same function.

    RMSNorm(x) * gamma feeds q, k, v or gate, up; gamma moves into those matrices:
    W diag(gamma) = (W diag(gamma / gamma')) diag(gamma'). Members of a group must share their
    norms before their matrices can be averaged (docs/method.md, symmetry 6).

    Args:
        layer: The layer to express in other norms; matrices may be left out.
        norms: The wanted norm weights (D,), none of them zero.
    """
    folded = dict(layer)
    for norm, matrices in FOLDS_INTO.items():
        ratio_D = layer[norm].float() / norms[norm].float()
        folded[norm] = norms[norm]
        if bool((ratio_D == 1).all()):
            continue
        for name in matrices:
            if name not in layer:
                continue
            folded[name] = (layer[name].float() * ratio_D).to(layer[name].dtype)
    return folded


def expand_alpha(alpha: Tensor, num_slots: int) -> Tensor:
    """Return alphas (G,) or (G, num_slots) from alphas (G,) or (G, S), S dividing num_slots.

    A head's alpha is repeated over the rows of the head.
    """
    if alpha.ndim == 1 or alpha.shape[1] == num_slots:
        return alpha
    return alpha.repeat_interleave(num_slots // alpha.shape[1], dim=1)


class _Blend(torch.autograd.Function):
    """Sum of weights times alphas, accumulated in float32, that saves no float32 copies.

    It reads every member once in each direction. One einsum over all members would be a batch of
    tiny products, one a row, ten times slower on a CPU.
    """

    @staticmethod
    def forward(ctx: Any, alpha: Tensor, weight_GOI: Tensor, axis: int) -> Tensor:
        ctx.save_for_backward(alpha, weight_GOI)
        ctx.axis = axis
        if alpha.ndim == 1 and weight_GOI.dtype == _accumulator(weight_GOI):
            summed_X = alpha.to(weight_GOI.dtype) @ weight_GOI.flatten(1)
            return summed_X.view_as(weight_GOI[0])
        return weighted_sum(zip(alpha, weight_GOI, strict=True), axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        alpha, weight_GOI = ctx.saved_tensors
        grad_OI = grads[0].to(_accumulator(weight_GOI))
        if alpha.ndim == 1 and weight_GOI.dtype == grad_OI.dtype:
            return (weight_GOI.flatten(1) @ grad_OI.flatten()).to(alpha.dtype), None, None
        # The products of one member at a time: those of all would be as large as the weights.
        products = (torch.mul(grad_OI, weight_OI) for weight_OI in weight_GOI)
        dims = (0, 1) if alpha.ndim == 1 else 1 - ctx.axis
        grad = torch.stack([product.sum(dim=dims) for product in products])
        return grad.to(alpha.dtype), None, None


def weighted_sum(terms: Iterable[tuple[Tensor, Tensor]], axis: int) -> Tensor:
    """Return the sum of alphas times matrices; no more than one term is needed at a time.

    Args:
        terms: For each member its alpha, () or (S,) along `axis`, and its matrix (O, I).
        axis: The axis along which alphas of a finer grain run.

    Returns:
        (O, I) in the matrices' dtype, accumulated in float32 (float64 for float64 matrices).
    """
    total_OI, dtype = None, torch.float32
    for alpha_m, weight_OI in terms:
        if total_OI is None:
            dtype = weight_OI.dtype
            total_OI = torch.zeros_like(weight_OI, dtype=_accumulator(weight_OI))
        total_OI.addcmul_(weight_OI.to(total_OI.dtype), _beside(alpha_m, axis))
    assert total_OI is not None
    return total_OI.to(dtype)


def _accumulator(weight: Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def _beside(alpha_m: Tensor, axis: int) -> Tensor:
    """Shape one member's alpha so that it broadcasts over its matrix."""
    if alpha_m.ndim == 0:
        return alpha_m
    return alpha_m[:, None] if axis == 0 else alpha_m[None, :]


def blend(weight_GOI: Tensor, alpha: Tensor, axis: int) -> Tensor:
    """Return the alpha-weighted sum of one matrix over its group.

    Args:
        weight_GOI: The matrix of each member, in one frame (folded and aligned).
        alpha: (G,) one share a member, or (G, O) for `axis` 0, (G, I) for `axis` 1.
        axis: The axis along which alphas of a finer grain run.

    Returns:
        (O, I) in the weights' dtype, accumulated in float32 (float64 for float64 weights).
    """
    alpha = expand_alpha(alpha, weight_GOI.shape[1 + axis])
    if not torch.is_grad_enabled():  # in the order of sums of an export, to the bit
        return weighted_sum(zip(alpha, weight_GOI, strict=True), axis)
    blended: Tensor = _Blend.apply(alpha, weight_GOI, axis)
    return blended


def merge_group(stacked: LayerTensors, alphas: dict[str, Tensor], anchor: int) -> LayerTensors:
    """Return the tensors of the layer that a group becomes.

    Args:
        stacked: Each tensor of the members stacked along G, folded to one norm and aligned.
        alphas: For each of the seven matrices, its alphas (G,), (G, heads) or (G, slots).
        anchor: Position of the anchor, whose norm weights the members share.
    """
    merged = {name: blend(stacked[name], alphas[name], ALPHA_AXIS[name]) for name in MATRICES}
    return {**merged, **merge_vectors(stacked, alphas, anchor)}


def merge_vectors(stacked: LayerTensors, alphas: dict[str, Tensor], anchor: int) -> LayerTensors:
    """Return what `merge_group` returns beside the seven matrices: biases and norms."""
    merged = {}
    for name, matrix in COMPANION.items():
        if name in stacked:
            by_row = name.endswith(".bias") and ALPHA_AXIS[matrix] == 0
            merged[name] = _blend_vector(stacked[name], alphas[matrix], by_row=by_row)
    return {**merged, **{norm: stacked[norm][anchor] for norm in FOLDS_INTO}}


def _blend_vector(vector_GO: Tensor, alpha: Tensor, *, by_row: bool) -> Tensor:
    """Merge a vector with the alphas of its matrix, or with their mean.

    By row goes a bias whose matrix has alphas along its rows. A head norm is shared by all heads,
    and the bias of o or down by all slots, so none of their alphas is theirs alone.
    """
    share = alpha if alpha.ndim == 1 or by_row else alpha.mean(dim=1)
    share = share[:, None] if share.ndim == 1 else expand_alpha(share, vector_GO.shape[1])
    return (share * vector_GO.float()).sum(dim=0).to(vector_GO.dtype)
