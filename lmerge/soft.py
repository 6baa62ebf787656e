"""Soft alignment: a blend of the member's neurons in every slot, by entropic optimal transport.

Unlike an order of neurons, a soft plan does not keep the member's function; it does in the limit of
low temperature, where it becomes the optimal order (Cuturi 2013, arXiv:1306.0895; the neurons of
two networks by optimal transport: Singh and Jaggi 2020, arXiv:1910.05653).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lmerge.llama import NEURON_AXIS, LayerTensors


def soft_plan(similarity_FF: Tensor, temperature: float, *, max_iterations: int = 10_000) -> Tensor:
    """Return the transport plan that maximises <plan, similarity> + temperature * entropy.

    Solved by POT's Sinkhorn in the log domain. It needs the package POT (`pip install POT`).

    Args:
        similarity_FF: Rows are the anchor's neurons, columns the member's.
        temperature: In units of the similarity; above 0. Near 0 the plan is the optimal order.
        max_iterations: Sinkhorn iterations at most.

    Returns:
        (F, F) float64, rows and columns summing to 1.

    Raises:
        ValueError: On a temperature that is not above 0, or without POT.
    """
    if not temperature > 0:
        raise ValueError(
            f"`temperature` must be above 0, got {temperature}. Use the aligner `weights` for a "
            "hard order."
        )
    try:
        import ot  # optional
    except ImportError:
        raise ValueError(
            "soft alignment needs the package POT, which is not installed. Run `pip install POT`."
        ) from None
    size = len(similarity_FF)
    share_F = torch.full((size,), 1 / size, dtype=torch.float64)
    cost_FF = (similarity_FF.max() - similarity_FF).double().cpu()
    plan_FF: Tensor = ot.sinkhorn(
        share_F,
        share_F,
        cost_FF,
        reg=temperature,
        method="sinkhorn_log",
        numItermax=max_iterations,
        stopThr=1e-10,
        warn=False,
    )
    return plan_FF * size


def blend_neurons(layer: LayerTensors, plan_FF: Tensor) -> LayerTensors:
    """Return the layer with each neuron slot a blend of its neurons; a hard plan reorders them."""
    blended = dict(layer)
    for name, axis in NEURON_AXIS.items():
        if name in layer:
            moved = torch.tensordot(
                plan_FF.to(layer[name].device), layer[name].double(), ([1], [axis])
            )
            blended[name] = moved.movedim(0, axis).to(layer[name].dtype)
    return blended
