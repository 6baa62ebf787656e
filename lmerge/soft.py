"""Soft alignment: a blend of the member's neurons in every slot, by entropic optimal transport.

Unlike an order of neurons, a soft plan does not keep the member's function; it does in the limit of
low temperature, where it becomes the optimal order (Cuturi 2013, arXiv:1306.0895; the neurons of
two networks by optimal transport: Singh and Jaggi 2020, arXiv:1910.05653).
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lmerge.axes import NEURON_AXIS, NEURON_SCALE
from lmerge.llama import LayerTensors
from lmerge.neurons import neuron_rows

TEMPERATURE = 0.02
"""Default temperature, in units of a neuron similarity that lies between -2 and 2."""


@dataclass(frozen=True, kw_only=True)
class Blend:
    """How each neuron slot is mixed from a layer's neurons; the function is not kept."""

    signed_FF: Tensor
    """Row i holds the shares of the neurons in slot i, their sizes summing to 1; negative where
    the up row and down column enter with the other sign."""
    row_F: Tensor
    """Factor of the up row in each slot, whose down column is divided by it; above 0."""
    column_F: Tensor
    """Factor of each neuron's up row before the mixing, likewise; above 0."""


def soft_plan(similarity_FF: Tensor, temperature: float, *, max_iterations: int = 300) -> Tensor:
    """Return the transport plan that maximises <plan, similarity> + temperature * entropy.

    Solved by POT's Sinkhorn in the log domain. It needs the package POT (`pip install POT`).

    Args:
        similarity_FF: Rows are the anchor's neurons, columns the member's.
        temperature: In units of the similarity; above 0. Near 0 the plan is the optimal order.
        max_iterations: Sinkhorn iterations at most. The closer to 0 the temperature, the more it
            takes until the rows sum to 1 as the columns do.

    Returns:
        (F, F) of the similarity's dtype, on the CPU, rows and columns summing to 1.

    Raises:
        ValueError: On a temperature that is not above 0, or without POT.
    """
    check_temperature(temperature)
    size = len(similarity_FF)
    share_F = torch.full((size,), 1 / size, dtype=similarity_FF.dtype)
    plan_FF: Tensor = load_pot().sinkhorn(
        share_F,
        share_F,
        (similarity_FF.max() - similarity_FF).cpu(),
        reg=temperature,
        method="sinkhorn_log",
        numItermax=max_iterations,
        stopThr=1e-6,
        warn=False,
    )
    return plan_FF * size


def load_pot() -> Any:
    """Return the package POT, imported when it is needed.

    Raises:
        ValueError: When it is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of POT's own optional imports
            import ot  # optional: the extra `soft`
    except ImportError:
        raise ValueError(
            "soft alignment needs the package POT, which is not installed. Run `pip install POT`."
        ) from None
    return ot


def check_temperature(temperature: float) -> None:
    """Raise ValueError on a temperature that is not above 0."""
    if not 0 < temperature < float("inf"):
        raise ValueError(
            f"`temperature` must be above 0, got {temperature}. Use the aligner `weights` for a "
            "hard order."
        )


def blend_of(
    anchor: LayerTensors, member: LayerTensors, similarity_FF: Tensor, temperature: float
) -> Blend:
    """Return the blend that makes a member's neurons like the anchor's.

    Signs and scales between up and down are those of a hard order (see `balanced_scales`), for
    every pair; so at low temperature the blend is the aligner `weights`.
    """
    plan_FF = soft_plan(similarity_FF, temperature)
    plan_FF = plan_FF / plan_FF.sum(dim=1, keepdim=True)
    (up, down), (up2, down2) = (
        [neuron_rows(layer, name).float().cpu() for name in ("up_proj", "down_proj")]
        for layer in (anchor, member)
    )
    cosine_FF = normalize(up) @ normalize(up2).T + normalize(down) @ normalize(down2).T
    return Blend(
        signed_FF=torch.where(cosine_FF < 0, -plan_FF, plan_FF),
        row_F=_root_ratio(up, down),
        column_F=_root_ratio(down2, up2),
    )


def _root_ratio(left_FD: Tensor, right_FD: Tensor) -> Tensor:
    """Return the root of the ratio of the rows' lengths, 1 where it is no number above 0."""
    ratio_F = left_FD.norm(dim=1) / right_FD.norm(dim=1)
    return torch.where(ratio_F.isfinite() & (ratio_F > 0), ratio_F, 1.0).sqrt()


def blend_neurons(layer: LayerTensors, blend: Blend) -> LayerTensors:
    """Return the layer with each neuron slot a blend of its neurons; a hard blend reorders them."""
    blended = dict(layer)
    for name, axis in NEURON_AXIS.items():
        if name in layer:
            power = NEURON_SCALE.get(name, 0)
            mix_FF = _mix(blend, power).to(layer[name].device)
            moved = torch.tensordot(mix_FF, layer[name].double(), ([1], [axis]))
            blended[name] = moved.movedim(0, axis).to(layer[name].dtype)
    return blended


def _mix(blend: Blend, power: int) -> Tensor:
    signed_FF = blend.signed_FF.double()
    if power == 0:
        return signed_FF.abs()
    return blend.row_F.double()[:, None] ** power * signed_FF * blend.column_F.double() ** power


def blend_tensors(blend: Blend) -> dict[str, Tensor]:
    """Return the blend's fields by name."""
    return {field.name: getattr(blend, field.name) for field in fields(Blend)}


BLEND_FIELDS = frozenset(field.name for field in fields(Blend))
"""Names of the tensors of a blend."""


def blend_from_tensors(tensors: dict[str, Tensor]) -> Blend:
    """Return the blend that `blend_tensors` took apart.

    Raises:
        ValueError: When the shares of a slot do not sum to 1, or a factor is not above 0.
    """
    blend = Blend(**tensors)
    size, signed_FF = len(blend.row_F), blend.signed_FF
    square = signed_FF.shape == (size, size) and blend.column_F.shape == (size,)
    factors = torch.stack([blend.row_F, blend.column_F]) if square else torch.zeros(1)
    positive = bool((factors > 0).all() and factors.isfinite().all())
    if not positive or not bool(((signed_FF.abs().sum(dim=1) - 1).abs() < 1e-3).all()):
        raise ValueError("a blend must hold shares that sum to 1, and factors above 0.")
    return blend
