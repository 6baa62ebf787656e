"""The members of a group in one frame: norms folded, neurons and heads moved, stacked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor
from transformers import PreTrainedModel

from lmerge.align import Motion, Orders, move
from lmerge.llama import (
    MATRICES,
    HeadSpec,
    LayerTensors,
    decoder_layers,
    head_spec,
    layer_tensors,
    stack_layers,
)
from lmerge.merge import fold_norms, reference_norms
from lmerge.plan import Group
from lmerge.soft import Blend
from lmerge.symmetry import Transform


def framed_group(source: PreTrainedModel, group: Group, orders: Orders) -> LayerTensors:
    """Return the tensors of a group's members, in the anchor's frame, stacked along G.

    Args:
        source: The source model.
        group: The layers that become one.
        orders: How each source layer is moved; missing ones are left as they are.

    Raises:
        ValueError: When a motion has not the sizes of its layer.
    """
    layers = [layer_tensors(decoder_layers(source)[i]) for i in group.members]
    shapes = {name: tuple(layers[0][name].shape) for name in MATRICES}
    for i in group.members:
        if i in orders:
            check_motion(i, orders[i], shapes, head_spec(source.config))
    motions = [orders.get(i) for i in group.members]
    return stack_layers(members_in_one_frame(layers, motions, group.anchor_position))


def members_in_one_frame(
    layers: Sequence[LayerTensors], orders: Sequence[Motion | None], anchor: int
) -> list[LayerTensors]:
    """Return a group's members with the anchor's norms, moved as the alignment found."""
    norms = reference_norms(layers[anchor])
    folded = [fold_norms(layer, norms) for layer in layers]
    return [move(layer, motion) for layer, motion in zip(folded, orders, strict=True)]


def check_motion(
    layer: int, motion: Motion, shapes: Mapping[str, tuple[int, ...]], spec: HeadSpec
) -> None:
    """Raise ValueError when the motion of a layer has not the sizes of the layer's matrices.

    Args:
        layer: Number of the source layer.
        motion: Its motion.
        shapes: Shape of each of the seven matrices.
        spec: How its attention is cut into heads.
    """
    num_neurons = shapes["gate_proj"][0]
    if isinstance(motion, Tensor):
        found, wanted = [len(motion)], [num_neurons]
    elif isinstance(motion, Blend):
        found, wanted = list(motion.signed_FF.shape), [num_neurons, num_neurons]
    elif isinstance(motion, Transform):
        found = [len(motion.neuron_F), *motion.head_KR.shape, motion.value_KCC.shape[-1]]
        per_group = spec.num_heads // spec.num_kv_heads
        wanted = [num_neurons, spec.num_kv_heads, per_group, spec.head_dim]
    else:
        found = [len(order_O) for order_O in motion.values()]
        wanted = [shapes[name][0] for name in motion]
    if found != wanted:
        raise ValueError(
            f"orders.safetensors must move layer {layer} of the source by sizes {wanted}, got "
            f"{found}. Use the files of one run, or align again."
        )
