"""Alignment: what makes a group's members alike its anchor before they are averaged.

All aligners but `soft` and the published `rowwise` move weights by exact symmetries (symmetry.py),
so that a layer's function stays the same (docs/method.md, symmetries 1 to 5).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lmerge.assignment import Sketch, assign
from lmerge.heads import match_heads
from lmerge.llama import MATRICES, HeadSpec, LayerTensors
from lmerge.neurons import balanced_scales, neuron_similarity, reorder_neurons
from lmerge.sketch import best_similarity
from lmerge.soft import (
    BLEND_FIELDS,
    TEMPERATURE,
    Blend,
    blend_from_tensors,
    blend_neurons,
    blend_of,
    blend_tensors,
)
from lmerge.symmetry import (
    Transform,
    apply_transform,
    identity,
    reorder_rows,
    transform_from_tensors,
    transform_tensors,
)

Aligner = Literal["weights", "activations", "both", "full", "soft", "rowwise", "none"]
Reference = Literal["anchor", "joint"]

Motion = Tensor | Transform | Blend | dict[str, Tensor]
"""An order of neurons (F,), a transform, (`soft`) a blend of neurons, or (`rowwise`) an order of
each matrix's rows."""
Orders = dict[int, Motion]
"""Source layer -> how it is moved."""

BY_ACTIVATIONS: tuple[Aligner, ...] = ("activations", "both")
"""Aligners that need the neurons' activations on calibration tokens."""
WITHOUT_ORDER: tuple[Aligner, ...] = ("soft", "rowwise", "none")
"""Aligners that need no order of neurons; each member is matched to the anchor alone."""


class Pair(NamedTuple):
    """Two layers of a group in one frame of norms, and what is known of them."""

    anchor: LayerTensors
    member: LayerTensors
    spec: HeadSpec
    correlation_FF: Tensor | None = None
    """Correlation of the anchor's activations (rows) with the member's; for some aligners."""
    temperature: float = TEMPERATURE
    """Of the aligner `soft`; above 0."""


def move(layer: LayerTensors, motion: Motion | None) -> LayerTensors:
    """Return the layer moved by an order of neurons, a transform, or orders of rows."""
    if motion is None:
        return layer
    if isinstance(motion, Transform):
        return apply_transform(layer, motion)
    if isinstance(motion, Blend):
        return blend_neurons(layer, motion)
    if isinstance(motion, Tensor):
        return reorder_neurons(layer, motion)
    return reorder_rows(layer, motion)


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
    return assign(best_similarity(anchor, member)).order_F


def with_scales(pair: Pair, order_F: Tensor) -> Transform:
    """Return the transform of an order of neurons, with the signs and scales that fit it."""
    scale_F = balanced_scales(pair.anchor, pair.member, order_F)
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
        orders[name] = assign(unit @ unit2.T).order_F
    return orders


def mix(pair: Pair, order_F: Tensor) -> Blend:
    """Return the soft blend of the member's neurons; the order is not needed."""
    similarity_FF = neuron_similarity(pair.anchor, pair.member)
    return blend_of(pair.anchor, pair.member, similarity_FF, pair.temperature)


ALIGNERS: dict[Aligner, Callable[[Pair, Tensor], Motion]] = {
    "weights": with_scales,
    "activations": with_scales,
    "both": with_scales,
    "full": with_heads,
    "soft": mix,
    "rowwise": match_rows,
    "none": leave,
}
"""Aligner -> what is done once the order of the neurons is known."""


def align(pair: Pair, aligner: Aligner) -> Motion:
    """Return how the member of a pair is moved to be most like the anchor."""
    if aligner in WITHOUT_ORDER:
        return ALIGNERS[aligner](pair, torch.arange(len(pair.member["gate_proj"])))
    similarity: Tensor | Sketch
    if aligner in BY_ACTIVATIONS:
        similarity = pair_similarity(pair, aligner)
    else:
        similarity = best_similarity(pair.anchor, pair.member)
    return ALIGNERS[aligner](pair, assign(similarity).order_F)


def motion_parts(motion: Motion) -> Tensor | dict[str, Tensor]:
    """Return a motion as plain tensors."""
    if isinstance(motion, Blend):
        return blend_tensors(motion)
    return transform_tensors(motion) if isinstance(motion, Transform) else motion


def motion_of(parts: Tensor | dict[str, Tensor]) -> Motion:
    """Return the motion that `motion_parts` took apart.

    Raises:
        ValueError: When it is none.
    """
    if isinstance(parts, Tensor):
        return _order(parts)
    if set(parts) <= set(MATRICES):
        return {name: _order(order_O) for name, order_O in parts.items()}
    return (
        blend_from_tensors(parts) if set(parts) == BLEND_FIELDS else transform_from_tensors(parts)
    )


def _order(tensor: Tensor) -> Tensor:
    whole = tensor.ndim == 1 and tensor.dtype in (torch.int32, torch.int64)
    if not whole or not torch.equal(tensor.sort().values.long(), torch.arange(len(tensor))):
        raise ValueError("it is no permutation")
    return tensor.long()
