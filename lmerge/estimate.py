"""How long a fit will take, from the speed of one forward pass."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from lmerge.heal import HealConfig
from lmerge.llama import decoder_layers, lm_logits, num_layers
from lmerge.neuron_pool import TOKENS, room_of
from lmerge.repair import RepairConfig

BACKWARD = 3.0
"""Time of a forward and backward pass in forward passes."""

SEARCH_TOKENS = (6144, 1024)
"""Tokens that a plan search fits to and compares on (`search.search_plan`)."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a fit is to do."""

    num_tokens: int
    """Calibration tokens."""
    num_removed: int
    """Layers to remove."""
    search: str = ""
    """Plan method where it runs the model, else empty."""
    num_steps: int = 0
    """Steps that train alphas."""
    step_tokens: int = 1024
    """Tokens in each."""
    repair: RepairConfig = RepairConfig()  # noqa: RUF009 - frozen
    """The repair."""
    heal: HealConfig = HealConfig()  # noqa: RUF009 - frozen
    """The healing."""
    block_size: int = 256
    """Tokens in a calibration block."""


@torch.no_grad()
def measure_speed(model: PreTrainedModel, num_tokens: int = 512) -> tuple[float, float]:
    """Return seconds a token for one layer, and for the logits."""
    token_BT = torch.arange(num_tokens, device=model.device).remainder(model.config.vocab_size)
    token_BT = token_BT[None]
    times = []
    for _ in range(2):  # the first pass warms up
        start = time.perf_counter()
        states_BTD = model.model(input_ids=token_BT, use_cache=False).last_hidden_state
        float(states_BTD.sum())
        middle = time.perf_counter()
        float(lm_logits(model, states_BTD).sum())
        times = [middle - start, time.perf_counter() - middle]
    return times[0] / num_tokens / num_layers(model), times[1] / num_tokens


def estimate_seconds(model: PreTrainedModel, work: Work, speed: tuple[float, float]) -> float:
    """Return roughly how long a fit takes, without the evaluation that follows.

    Args:
        model: The source.
        work: What the fit is to do.
        speed: Seconds a token for a layer and for the logits, from `measure_speed`.
    """
    per_layer, per_logits = speed
    depth = num_layers(model)
    above = depth * 0.6 - work.num_removed  # merged layers tend to lie in the middle
    passes = work.num_tokens * depth * per_layer  # the source's states
    passes += _search_seconds(depth, work, per_layer, per_logits)
    step = BACKWARD * work.step_tokens * (max(above, 1) * per_layer + 0.25 * per_logits)
    passes += work.num_steps * step
    passes += _repair_seconds(model, work, per_layer)
    if work.heal.method != "none":
        tokens = work.heal.batch_size * work.block_size
        looked_at = work.heal.batch_size * min(work.heal.num_positions, work.block_size)
        one = BACKWARD * (tokens * max(above, 1) * per_layer + looked_at * per_logits)
        passes += work.heal.num_steps * one
    return passes


def _search_seconds(depth: int, work: Work, per_layer: float, per_logits: float) -> float:
    if not work.search or not work.num_removed:
        return 0.0
    num_fit, num_held = SEARCH_TOKENS
    groups = depth * (work.num_removed if work.search == "groups_repaired" else 1)
    one = num_held * 0.5 * depth * per_layer + num_held * 0.25 * per_logits
    return (num_fit + num_held) * depth * per_layer + groups * (one + num_fit * per_layer)


def _repair_seconds(model: PreTrainedModel, work: Work, per_layer: float) -> float:
    if work.repair.method == "none" or not work.num_removed:
        return 0.0
    layer = decoder_layers(model)[0]
    weights = sum(parameter.numel() for parameter in layer.parameters())
    config = model.config
    features = config.intermediate_size + config.hidden_size
    gram = features * (features + config.hidden_size) / weights  # products, in layer passes
    if work.repair.method == "deep":
        num_layers_refitted, cost = 1 + work.repair.num_after, 4 + 2 * gram
    else:
        num_layers_refitted, cost = 1, 2 + gram
    if work.repair.method == "deep":
        cost += BACKWARD * work.repair.num_epochs
    tokens = work.num_tokens * num_layers_refitted * cost
    if work.repair.pools:
        neurons = config.intermediate_size
        pool = min((work.num_removed + 1) * neurons, room_of(neurons))
        tokens += (TOKENS * pool**2 + 3 * pool**3) / weights  # products, and factors in float64
    return float(tokens * per_layer)
