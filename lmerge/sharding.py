"""FSDP2: the frozen layers of source and merged model split over processes, alphas on each.

Embedding, final norm and head stay whole on every process, so that only passes through layers
communicate, and processes may differ in how many logits they look at.
"""

from __future__ import annotations

import logging

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from lmerge.llama import decoder_layers
from lmerge.merged import MergedLayer, MergedLlama
from lmerge.units import size

logger = logging.getLogger(__name__)

HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
)


def shard_layers(source: PreTrainedModel, merged: MergedLlama, mesh: DeviceMesh) -> None:
    """Split the layers of both models over the processes, in place.

    A layer is put together from all processes when it runs, and taken apart afterwards. Layers
    that both models have are split once.

    Args:
        source: The source model.
        merged: The merged model made from it.
        mesh: Lightning's mesh of processes.

    Raises:
        ValueError: When processes are meant for tensor parallelism.
    """
    if mesh["tensor_parallel"].size() != 1:
        raise ValueError(
            "`trainer.strategy.tensor_parallel_size` must be 1, got "
            f"{mesh['tensor_parallel'].size()}: layers are split by FSDP2 alone. Set it to 1, and "
            "`trainer.strategy.data_parallel_size` to the number of processes."
        )
    mesh, shared = mesh["data_parallel"], decoder_layers(source)
    for layer in shared:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    for layer, origin in zip(decoder_layers(merged.causal_lm), merged.plan.origins(), strict=True):
        if isinstance(layer, MergedLayer):
            # The template's own weights are the source's, and never used.
            whole = {*layer.free.parameters(), *layer.template.parameters()}
            fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
        else:
            _follow(layer, shared[origin])
    weights = {*shared.parameters(), *decoder_layers(merged.causal_lm).parameters()}
    here, everywhere = sum(_local(w).nbytes for w in weights), sum(w.nbytes for w in weights)
    if mesh.get_local_rank() == 0:
        message = "layers split over %d processes: %s of %s on each"
        logger.info(message, mesh.size(), size(here), size(everywhere))


def _follow(layer: nn.Module, origin: nn.Module) -> None:
    """Let a copy of a layer, which shares its weights, put them together as the layer does."""
    for name in HOOKS:
        setattr(layer, name, getattr(origin, name))


def _local(weight: Tensor) -> Tensor:
    return weight.to_local() if isinstance(weight, DTensor) else weight
