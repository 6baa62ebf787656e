"""Healing: a short training of the merged model by KL to the source, named as what it is.

Everything else in lmerge changes weights by alphas or in closed form. Here gradients of the
KL(source || merged) reach weights: of one number for each row and column of the layers above the
gap (`scales`, a form of alphas), of the merged layers (`merged`), or of all layers above (`all`).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lmerge.cache import StateCache
from lmerge.divergence import exact_kl, head_kl
from lmerge.llama import (
    MATRICES,
    decoder_layers,
    head_weight,
    lm_logits,
    num_layers,
    run_span,
    span,
    with_layers,
)
from lmerge.merged import MergedLlama
from lmerge.progress import track
from lmerge.trained_layers import FreeLayer, ScaledLayer, learning_rate_share

logger = logging.getLogger(__name__)

CHECK = 40
"""Steps after which the held-out KL is measured, since the weights with the least are kept."""

HealMethod = Literal["none", "scales", "merged", "all"]


@dataclass(frozen=True, kw_only=True)
class HealConfig:
    """A short training by KL after the repair."""

    method: HealMethod = "none"
    """`scales` trains a factor for each row and column of every matrix from the first merged layer
    up; `merged` the weights of the merged layers and of `num_after` layers above each; `all` those
    of all layers from the first merged one up."""
    num_after: int = 0
    """Layers above each merged one that `merged` trains too; at least 0."""
    num_steps: int = 100
    """Steps of Adam; at least 1."""
    lr: float = 0.01
    """Largest learning rate, above 0; it rises, then falls as a cosine. Try 0.01 for `scales`, else
    0.0003."""
    batch_size: int = 4
    """Calibration blocks in a step; at least 1."""
    num_positions: int = 64
    """Positions of each block that the KL looks at; at least 1."""

    def __post_init__(self) -> None:
        for name in ("num_steps", "batch_size", "num_positions"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if self.num_after < 0:
            raise ValueError(f"`num_after` must be at least 0, got {self.num_after}. Try 3.")
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise ValueError(f"`lr` must be above 0 and finite, got {self.lr}. Try 0.01.")


class Healed(NamedTuple):
    """What healing did."""

    kl_before: float
    """KL(source || merged) in nats a token on the held-out blocks before."""
    kl_after: float
    """The least of the same during the training; that of its end where it never fell."""
    kept: bool
    """Whether the change was kept: it is dropped where the held-out KL never fell."""


def heal(
    source: PreTrainedModel,
    merged: MergedLlama,
    cache: StateCache,
    held_B: Tensor,
    config: HealConfig,
    *,
    seed: int = 0,
) -> Healed | None:
    """Train a merged model by KL to the source on cached states; it is changed in place.

    Args:
        source: The source model.
        merged: The merged model, repaired or not.
        cache: The source's states on the calibration blocks.
        held_B: Blocks that are not trained on, but decide which weights are kept (bool).
        config: What is trained, and how long.
        seed: Seed of the blocks and positions of each step.

    Returns:
        The KL before and after; None where nothing is to be done.
    """
    if config.method == "none" or not merged.plan.groups:
        return None
    plain = merged.plain()
    trained = _trained_layers(merged, plain, config)
    suffix = _suffix(plain, merged.first_merged, trained)
    before = held_kl(source, suffix, cache, held_B)
    parameters = [p for layer in trained.values() for p in layer.parameters() if p.requires_grad]
    block_N, least, last = (~held_B).nonzero().flatten(), before, before
    best: dict[int, dict[str, Tensor]] = {}
    for step in _train(source, suffix, cache, block_N, parameters, config, seed):
        if step % CHECK == 0 or step == config.num_steps:
            last = held_kl(source, suffix, cache, held_B)
            logger.info("healing, step %d: held-out KL %.4f", step, last)
            if last < least:
                least, best = last, {p: _matrices(layer) for p, layer in trained.items()}
    for position, tensors in best.items():
        merged.refit_layer(position, tensors)
    logger.info("healing: held-out KL %.4f -> %.4f", before, least if best else last)
    return Healed(before, least if best else last, bool(best))


@torch.no_grad()
def _matrices(layer: TrainedLayer) -> dict[str, Tensor]:
    tensors = layer.tensors()
    return {name: tensors[name].clone() for name in MATRICES}


TrainedLayer = ScaledLayer | FreeLayer


def _trained_layers(
    merged: MergedLlama, plain: PreTrainedModel, config: HealConfig
) -> dict[int, TrainedLayer]:
    layers = decoder_layers(plain)
    if config.method == "merged":
        positions: Sequence[int] = merged.positions(config.num_after)
    else:
        positions = range(merged.first_merged, len(layers))
    make = ScaledLayer if config.method == "scales" else FreeLayer
    with torch.inference_mode(False), torch.no_grad():
        return {position: make(layers[position]) for position in positions}


def _suffix(
    plain: PreTrainedModel, start: int, trained: dict[int, TrainedLayer]
) -> PreTrainedModel:
    layers = list(decoder_layers(plain))
    mixed = [trained.get(i, layer) for i, layer in enumerate(layers)]
    whole = with_layers(plain, mixed, range(len(layers)))
    return span(whole, start, num_layers(plain), final_norm=True)


def _train(
    source: PreTrainedModel,
    suffix: PreTrainedModel,
    cache: StateCache,
    block_N: Tensor,
    parameters: list[nn.Parameter],
    config: HealConfig,
    seed: int,
) -> Iterator[int]:
    """Train, and yield the number of steps done after each."""
    adam = torch.optim.Adam(parameters, lr=config.lr, betas=(0.9, 0.95))
    steps = _batches(block_N, cache.prefix_BTD.shape[1], config, seed)
    for step, (chosen_B, place_P) in enumerate(
        track(steps, f"healing ({config.method})", total=config.num_steps)
    ):
        for group in adam.param_groups:
            group["lr"] = config.lr * learning_rate_share(step, config.num_steps)
        with torch.enable_grad():
            loss = _kl(source, suffix, cache, chosen_B, place_P)
            adam.zero_grad()
            loss.backward()
        if not loss.isfinite():
            raise ValueError(
                f"the loss of healing must be finite, got {float(loss)} in step {step}. "
                "Lower `repair.heal.lr`."
            )
        adam.step()
        yield step + 1


def _batches(
    block_N: Tensor, length: int, config: HealConfig, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield blocks and positions of each step; every block comes once before any comes again."""
    generator = torch.Generator().manual_seed(seed)
    queue = torch.empty(0, dtype=torch.long)
    for _ in range(config.num_steps):
        while len(queue) < config.batch_size:
            order_N = torch.randperm(len(block_N), generator=generator)
            queue = torch.cat([queue, block_N[order_N]])
        chosen_B, queue = queue[: config.batch_size], queue[config.batch_size :]
        place_P = torch.randperm(length, generator=generator)[: config.num_positions]
        yield chosen_B, place_P.sort().values


def _kl(
    source: PreTrainedModel,
    suffix: PreTrainedModel,
    cache: StateCache,
    chosen_B: Tensor,
    place_P: Tensor,
) -> Tensor:
    device = source.device
    states_BTD = run_span(suffix, cache.prefix_BTD[chosen_B].to(device))
    merged_ND = states_BTD[:, place_P.to(device)].flatten(0, 1)
    final_ND = cache.final_BTD[chosen_B][:, place_P].to(device).flatten(0, 1)
    head_VD = head_weight(source)
    if head_VD is not None:
        return head_kl(merged_ND, final_ND, head_VD)
    with torch.no_grad():
        source_NV = lm_logits(source, final_ND)
    return exact_kl(source_NV, lm_logits(source, merged_ND))


@torch.no_grad()
def held_kl(
    source: PreTrainedModel, suffix: PreTrainedModel, cache: StateCache, held_B: Tensor
) -> float:
    """Return KL(source || merged) in nats a token over 64 positions of each held-out block."""
    length = cache.prefix_BTD.shape[1]
    place_P = torch.linspace(0, length - 1, min(64, length)).long()
    blocks = held_B.nonzero().flatten().split(4)
    total = sum(float(_kl(source, suffix, cache, b, place_P)) * len(b) for b in blocks)
    return total / int(held_B.sum())
