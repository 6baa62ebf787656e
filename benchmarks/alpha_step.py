"""Time of one training step of alphas, with and without the caches, on SmolLM2-135M.

python benchmarks/alpha_step.py [--steps 5] [--granularity neuron]

Layers 20-26 become one. Every row ends in a backward pass. The uncached row runs the whole source
and the whole merged model, with the same loss. The bare row is what no method can do without: the
same layers above the cached states as plain frozen layers, logits at the same positions, torch's
own cross-entropy, and gradients down to the seven matrices of the layer in the merged one's place;
nothing is merged and nothing of the source is known. The last line holds the two ratios.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple, get_args

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lmerge.alphas import AlphaConfig, Granularity
from lmerge.cache import StateCache, cache_states
from lmerge.divergence import head_kl, source_targets
from lmerge.llama import (
    decoder_layers,
    embed,
    head_weight,
    layer_tensors,
    lm_logits,
    num_layers,
    run_span,
    span,
)
from lmerge.losses import LossConfig
from lmerge.merged import MergedLlama
from lmerge.objective import Objective
from lmerge.plan import Group, MergePlan
from lmerge.progress import track
from lmerge.source import load_model

BATCH, LENGTH = 4, 256
UNCACHED, CACHED, BARE, BARE_OWN, MERGING = (
    "uncached",
    "cached",
    "bare suffix, forward and backward",
    "bare suffix with lmerge's loss",
    "merging alone, forward and backward",
)


class Setting(NamedTuple):
    """What every row works on."""

    source: PreTrainedModel
    merged: MergedLlama
    cache: StateCache
    token_BT: Tensor
    head_VD: Tensor


def timed(functions: dict[str, Callable[[], object]], steps: int) -> dict[str, float]:
    """Return the median milliseconds of each function, the functions taking turns."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for step in track(range(steps + 1), "steps", total=steps + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if step:  # the first turn warms up
                times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def setting(granularity: Granularity) -> Setting:
    """Load the source, merge layers 20-26 and compute the cached states."""
    source = load_model("smollm2-135m", "float32").requires_grad_(False)
    plan = MergePlan(
        num_layers=num_layers(source), groups=(Group(members=tuple(range(20, 27)), anchor=20),)
    )
    merged = MergedLlama(source, plan, {}, AlphaConfig(granularity=granularity, start="uniform"))
    generator = torch.Generator().manual_seed(0)
    token_BT = torch.randint(1000, 40_000, (BATCH, LENGTH), generator=generator)
    cache = cache_states(source, token_BT, merged.first_merged)
    head_VD = head_weight(source)
    assert head_VD is not None
    return Setting(source, merged, cache, token_BT, head_VD)


def trained_rows(on: Setting) -> dict[str, Callable[[], float]]:
    """Return the steps that train alphas; each returns its loss."""
    source, merged = on.source, on.merged
    parameters = list(merged.alpha_parameters().values())
    whole = span(merged.causal_lm, 0, num_layers(merged.causal_lm), final_norm=True)

    def backward(loss: Tensor) -> float:
        for parameter in parameters:
            parameter.grad = None
        loss.backward()
        return loss.item()

    def cached(num_positions: int = 0, num_top: int = 0) -> Callable[[], float]:
        config = LossConfig(num_top=num_top)
        objective = Objective(source, merged, on.cache, config, num_positions=num_positions)
        return lambda: backward(objective(torch.arange(BATCH), 0)["loss"])

    def uncached() -> float:
        with torch.no_grad():
            target_BTD = source.model(on.token_BT, use_cache=False).last_hidden_state
        states_BTD = run_span(whole, embed(source, on.token_BT))
        return backward(head_kl(states_BTD.flatten(0, 1), target_BTD.flatten(0, 1), on.head_VD))

    return {
        UNCACHED: uncached,
        CACHED: cached(),
        "cached, 64 largest logits + remainder": cached(num_top=64),
        "cached, 64 of 256 positions": cached(num_positions=64),
    }


def compared_rows(on: Setting) -> dict[str, Callable[[], None]]:
    """Return the bare suffix with either loss, and the merging alone."""
    plain = on.merged.plain()
    suffix = span(plain, on.merged.first_merged, num_layers(plain), final_norm=True)
    layer = on.merged.merged_layers()[0]
    weights = [p for p in decoder_layers(suffix)[0].parameters() if p.ndim == 2]
    targets = source_targets(on.cache.final_BTD.flatten(0, 1), on.head_VD)
    grads = {name: torch.ones_like(w) for name, w in layer_tensors(layer.template).items()}

    def bare(loss: Callable[[Tensor], Tensor]) -> None:
        for weight in weights:
            weight.requires_grad_(True)
            weight.grad = None
        loss(run_span(suffix, on.cache.prefix_BTD).flatten(0, 1)).backward()

    def cross_entropy(state_ND: Tensor) -> Tensor:
        logits_NV = lm_logits(on.source, state_ND)
        return torch.nn.functional.cross_entropy(logits_NV, on.token_BT.flatten())

    def merging() -> None:
        formed = {name: w for name, w in layer.tensors().items() if w.requires_grad}
        torch.autograd.backward(list(formed.values()), [grads[name] for name in formed])

    return {
        BARE: lambda: bare(cross_entropy),
        BARE_OWN: lambda: bare(lambda state_ND: head_kl(state_ND, targets, on.head_VD)),
        MERGING: merging,
    }


def main() -> None:
    """Print the table and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--granularity", choices=get_args(Granularity), default="neuron")
    args = parser.parse_args()
    on = setting(args.granularity)
    trained = trained_rows(on)
    losses = {name: trained[name]() for name in (UNCACHED, CACHED)}
    assert abs(losses[CACHED] - losses[UNCACHED]) < 1e-5 * losses[UNCACHED], losses
    ms = timed({**trained, **compared_rows(on)}, args.steps)
    print(
        f"SmolLM2-135M, {args.granularity} alphas, {BATCH} x {LENGTH} tokens, "
        f"{torch.get_num_threads()} threads, float32; median of {args.steps}"
    )
    for name, value in ms.items():
        print(
            f"{value:9.1f} ms {value / ms[BARE]:6.2f} of bare {ms[UNCACHED] / value:7.2f}x  {name}"
        )
    print(f"loss uncached {losses[UNCACHED]:.6f}, cached {losses[CACHED]:.6f}")
    print(f"merging is {100 * ms[MERGING] / ms[CACHED]:.1f}% of a cached step")
    print(f"cached against the bare suffix with its own loss: {ms[CACHED] / ms[BARE_OWN]:.2f}")
    ratios = {
        "speedup_vs_uncached": round(ms[UNCACHED] / ms[CACHED], 3),
        "vs_bare_suffix": round(ms[CACHED] / ms[BARE], 3),
    }
    print(json.dumps(ratios))


if __name__ == "__main__":
    main()
