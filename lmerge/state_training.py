"""Training of one layer towards the source's states at its depth: what no closed form reaches.

A refit in closed form changes the matrices that write to the residual stream, and takes heads and
neurons as they are. Here Adam moves all seven matrices of one layer, on the states that the model
below it really produces. Neither predictions nor labels are looked at, and a step costs one layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lmerge.llama import MATRICES, decoder_layers, run_span, with_layer_index, with_layers
from lmerge.losses import relative_error
from lmerge.merged import MergedLlama
from lmerge.progress import track
from lmerge.trained_layers import FreeLayer, learning_rate_share

LR = 5e-4
"""Largest learning rate of Adam; it rises, then falls as a cosine."""


def train_layer(
    merged: MergedLlama,
    position: int,
    currents_BTD: Tensor,
    targets_BTD: Tensor,
    held_B: Tensor,
    *,
    num_epochs: int,
    batch_size: int = 4,
    seed: int = 0,
) -> float:
    """Train the matrices of one layer; they are changed in place where held-out blocks gain.

    Args:
        merged: The merged model.
        position: Index of the layer in it.
        currents_BTD: Input states of the layer on the calibration blocks.
        targets_BTD: The source's states at its output.
        held_B: Blocks that are not trained on, but choose the epoch (bool).
        num_epochs: Passes over the other blocks.
        batch_size: Blocks in a step.
        seed: Seed of the order of the blocks.

    Returns:
        The held-out error as a share of that before; 1 where no epoch lowered it.
    """
    plain = decoder_layers(merged.plain())[position]
    with torch.inference_mode(False), torch.no_grad():
        layer = FreeLayer(with_layer_index(plain, 0))
    origin = merged.plan.origins()[position]
    one = with_layers(merged.causal_lm, [layer], [origin], final_norm=False)
    block_N = (~held_B).nonzero().flatten()
    orders = _orders(block_N, num_epochs, batch_size, seed)
    adam = torch.optim.Adam(layer.free.values(), lr=LR, betas=(0.9, 0.98))
    before = least = _held_error(one, currents_BTD, targets_BTD, held_B, batch_size)
    best: dict[str, Tensor] | None = None
    num_steps, step = sum(map(len, orders)), 0
    for order in track(orders, f"training layer {position}", total=num_epochs):
        for chosen_B in order:
            for group in adam.param_groups:
                group["lr"] = LR * learning_rate_share(step, num_steps)
            with torch.enable_grad():
                loss = _error(one, currents_BTD[chosen_B], targets_BTD[chosen_B])
                adam.zero_grad()
                loss.backward()
            adam.step()
            step += 1
        error = _held_error(one, currents_BTD, targets_BTD, held_B, batch_size)
        if error < least:
            least, best = error, _copy(layer)
    if best is None:
        return 1.0
    merged.refit_layer(position, best)
    return least / before


def _copy(layer: FreeLayer) -> dict[str, Tensor]:
    tensors = layer.tensors()
    return {name: tensors[name].detach().clone() for name in MATRICES}


def _orders(block_N: Tensor, num_epochs: int, batch_size: int, seed: int) -> list[Sequence[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        block_N[torch.randperm(len(block_N), generator=generator)].split(batch_size)
        for _ in range(num_epochs)
    ]


def _error(one: PreTrainedModel, current_BTD: Tensor, target_BTD: Tensor) -> Tensor:
    output_BTD = run_span(one, current_BTD.to(one.device)).float()
    return relative_error(output_BTD, target_BTD.to(output_BTD))


@torch.no_grad()
def _held_error(
    one: PreTrainedModel,
    currents_BTD: Tensor,
    targets_BTD: Tensor,
    held_B: Tensor,
    batch_size: int,
) -> float:
    blocks = held_B.nonzero().flatten()
    parts = [
        float(_error(one, currents_BTD[b], targets_BTD[b])) * len(b)
        for b in blocks.split(batch_size)
    ]
    return sum(parts) / len(blocks)
