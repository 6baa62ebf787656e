"""Time of one training step of alphas, with and without the caches, on SmolLM2-135M.

python benchmarks/alpha_step.py [--steps 5]
Layers 20-26 become one. The last line holds the two ratios that the issue asks for.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from lmerge.alphas import AlphaConfig
from lmerge.cache import cache_states
from lmerge.llama import embed, lm_logits, num_layers, run_span, span
from lmerge.losses import LossConfig, exact_kl
from lmerge.merged import MergedLlama
from lmerge.objective import Objective
from lmerge.plan import Group, MergePlan
from lmerge.source import load_model

BATCH, LENGTH = 4, 256


def timed(functions: dict[str, Callable[[], object]], steps: int) -> dict[str, float]:
    """Return the median milliseconds of each function, the functions taking turns."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for step in range(steps + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if step:  # the first turn warms up
                times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def report(rows: dict[str, Callable[[], object]], steps: int, exact: dict[str, float]) -> None:
    """Time the rows and print them, and the ratios in the last line."""
    ms = timed(rows, steps)
    print(f"SmolLM2-135M, {BATCH} x {LENGTH} tokens, {torch.get_num_threads()} threads, float32")
    for name, value in ms.items():
        print(f"{value:9.1f} ms  {name}")
    names = list(ms)
    print(f"loss uncached {exact['uncached']:.6f}, cached {exact['cached']:.6f}")
    print(f"merging is {100 * ms[names[5]] / ms[names[1]]:.1f}% of a cached step")
    print(f"sampled positions: {ms[names[0]] / ms[names[3]]:.2f} times faster than uncached")
    ratios = {
        "speedup_vs_uncached": round(ms[names[0]] / ms[names[1]], 3),
        "vs_bare_suffix": round(ms[names[1]] / ms[names[4]], 3),
    }
    print(json.dumps(ratios))


def main() -> None:
    """Print the table and the ratios."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=5)
    steps = parser.parse_args().steps
    source = load_model("smollm2-135m", "float32").requires_grad_(False)
    plan = MergePlan(
        num_layers=num_layers(source), groups=(Group(members=tuple(range(20, 27)), anchor=20),)
    )
    config = AlphaConfig(granularity="neuron", start="uniform")
    merged = MergedLlama(source, plan, {}, config)
    generator = torch.Generator().manual_seed(0)
    token_BT = torch.randint(1000, 40_000, (BATCH, LENGTH), generator=generator)
    cache = cache_states(source, token_BT, merged.first_merged)
    index_B = torch.arange(BATCH)
    parameters = list(merged.alpha_parameters().values())
    layer = merged.merged_layers()[0]
    plain = span(merged.plain(), 20, num_layers(merged.causal_lm), final_norm=True)
    whole = span(merged.causal_lm, 0, num_layers(merged.causal_lm), final_norm=True)

    def backward(loss: Tensor) -> float:
        for parameter in parameters:
            parameter.grad = None
        loss.backward()
        return loss.item()

    def objective(**options: int) -> Objective:
        num_positions = options.pop("num_positions", 0)
        return Objective(source, merged, cache, LossConfig(**options), num_positions=num_positions)

    full, top, sampled = objective(), objective(num_top=64), objective(num_positions=64)

    def uncached() -> float:
        with torch.no_grad():
            target = lm_logits(source, source.model(token_BT, use_cache=False).last_hidden_state)
        return backward(
            exact_kl(target, lm_logits(source, run_span(whole, embed(source, token_BT))))
        )

    def bare() -> None:
        """Run the same suffix as plain layers, down to the gradient of the merged matrices."""
        weights = [p for p in plain.model.layers[0].parameters() if p.ndim == 2]
        for weight in weights:
            weight.requires_grad_(True)
            weight.grad = None
        states = run_span(plain, cache.prefix_BTD)
        logits = lm_logits(source, states)
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), token_BT.flatten()).backward()

    def merging() -> None:
        backward(torch.stack([w.sum() for w in layer.tensors().values()]).sum())

    rows = {
        "uncached": uncached,
        "cached, logits from the cached final states": lambda: backward(full(index_B, 0)["loss"]),
        "cached, top 64 logits + remainder": lambda: backward(top(index_B, 0)["loss"]),
        "cached, 64 of 256 positions": lambda: backward(sampled(index_B, 0)["loss"]),
        "bare suffix, forward and backward": bare,
        "merging, forward and backward": merging,
    }
    report(rows, steps, {"uncached": uncached(), "cached": backward(full(index_B, 0)["loss"])})


if __name__ == "__main__":
    main()
