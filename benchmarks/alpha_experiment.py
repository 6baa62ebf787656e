"""Do learned alphas help? SmolLM2-135M with 3, 6 and 10 layers removed, every way to choose alphas.

    python benchmarks/alpha_experiment.py --questions ../shared/data/mmlu --minutes 8   (repeat)
    python benchmarks/alpha_experiment.py --report

All methods of a budget share one plan (`--plan`), neurons aligned by weights, and calibration
blocks (MMLU val questions and bundled prose, split val). Gradients train on them; plan and Bayesian
search look at those that are held out too, and nothing is chosen by what is reported: loss and KL
on bundled prose of split test, and MMLU test questions, zero-shot. Alphas are measured as they are,
and most of them after the closed-form refit of the down projection too. Each finished cell is a
line of cells.jsonl; a second call goes on.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from alpha_budget import Budget, Shared
from alpha_report import report
from transformers import PreTrainedModel

from lmerge.alpha_files import read_alphas, write_alphas
from lmerge.alphas import AlphaConfig, Granularity
from lmerge.losses import LossConfig
from lmerge.merged import MergedLlama
from lmerge.objective import Objective
from lmerge.progress import track
from lmerge.repair import RepairConfig, refit_groups
from lmerge.score import PrefixCache, normalise_cloze, score_choices
from lmerge.trials import Trial, propose_wandb

BUDGETS = (3, 6, 10)
FIXED = (0.4, 0.5, 0.6, 0.7)
GRADIENT: tuple[Granularity, ...] = ("layer", "tensor", "head", "neuron")
RATE, STEPS, POSITIONS, TRIALS = 0.03, 20, 64, 15
"""Adam's learning rate (not tuned), its steps of one block, the positions of it that the loss looks
at, and the trials of the search."""
METHODS = (
    *("anchor", "mka", "gradient neuron", "gradient layer", "bayes layer", "similarity"),
    *(f"fixed {value}" for value in FIXED),
    *("gradient tensor", "gradient head"),
)
"""In the order in which they run: what matters most first."""
REFITTED = ("anchor", "mka", "fixed 0.5", *(f"gradient {g}" for g in GRADIENT), "bayes layer")
"""Methods that are measured after a refit too."""
ASKED = {"anchor": True, "mka": False, "gradient neuron": True, "bayes layer": False}
"""Methods whose models answer MMLU questions, which takes longest; some after a refit too."""


class Chosen(NamedTuple):
    """Alphas that a method chose."""

    merged: MergedLlama
    seconds: float
    notes: dict[str, Any]


def choose(budget: Budget, method: str) -> Chosen:
    """Return the alphas of a method."""
    start = time.perf_counter()
    kind, _, value = method.partition(" ")
    if kind == "gradient":
        return learn(budget, value)  # type: ignore[arg-type]
    if kind == "bayes":
        return search(budget, start)
    number = float(value) if value else 0.5
    config = AlphaConfig(granularity="layer", start=kind, value=number)  # type: ignore[arg-type]
    merged = budget.model(config)
    return Chosen(merged, time.perf_counter() - start, {})


def learn(budget: Budget, granularity: Granularity) -> Chosen:
    """Train alphas from the anchor with Adam."""
    start = time.perf_counter()
    trained = (~budget.shared.data.held_out()).nonzero().flatten()
    merged = budget.model(AlphaConfig(granularity=granularity, start="anchor"))
    objective = Objective(
        budget.shared.source, merged, budget.calibration, LossConfig(), num_positions=POSITIONS
    )
    optimizer = torch.optim.Adam(merged.alpha_parameters().values(), lr=RATE)
    order = torch.randperm(len(trained), generator=torch.Generator().manual_seed(0))
    for step in track(range(STEPS), granularity, total=STEPS):
        optimizer.zero_grad()
        objective(trained[order[step % len(order)]][None], step)["loss"].backward()
        optimizer.step()
    return Chosen(merged, time.perf_counter() - start, {})


def search(budget: Budget, start: float) -> Chosen:
    """Search the merges' alphas with W&B's Bayesian engine, by KL on held-out blocks."""
    names = [str(i) for i in range(budget.removed)]
    config = {
        "method": "bayes",
        "metric": {"name": "kl", "goal": "minimize"},
        "parameters": {name: {"min": 0.0, "max": 1.0} for name in names},
    }
    trials: list[Trial] = []
    best: tuple[float, MergedLlama] | None = None
    for index in track(range(TRIALS), "bayes", total=TRIALS):
        params = propose_wandb(config, trials, 0)
        assert params is not None
        merged = budget.model(AlphaConfig(granularity="layer", start="fixed", steps=params))
        kl = budget.held_kl(merged)
        trials.append(
            Trial(index=index, params=params, folder="", state="finished", metric=kl, history=[kl])
        )
        best = (kl, merged) if best is None or kl < best[0] else best
    assert best is not None
    notes = {"held_kl": best[0], "trials": [t.metric for t in trials]}
    notes["steps"] = min(trials, key=lambda t: float(t.metric or 0)).params
    return Chosen(best[1], time.perf_counter() - start, notes)


def measure(budget: Budget, method: str, chosen: Chosen) -> list[dict[str, Any]]:
    """Return the cells of a method without and with the refit."""
    cells = []
    for refit in (False, True)[: 1 + (method in REFITTED)]:
        start = time.perf_counter()
        if refit:
            repair(budget, chosen.merged)
        seconds = time.perf_counter() - start if refit else chosen.seconds
        nats, kls = budget.scores(chosen.merged, held=False)
        cell = {"kind": "text", "removed": budget.removed, "method": method, "refit": refit}
        cells.append({**cell, "seconds": seconds, "nats": nats, "kl": kls, **chosen.notes})
    return cells


def repair(budget: Budget, merged: MergedLlama) -> None:
    """Refit the merged layer's down projection, as `fit` does when it ends."""
    data = budget.shared.data
    prefix_BTD = budget.calibration.prefix_BTD
    refit_groups(budget.shared.source, merged, prefix_BTD, data.held_out(), RepairConfig())


def answers(shared: Shared, model: PreTrainedModel) -> dict[str, list[int]]:
    """Return whether each question is answered right, 0 or 1, for each scoring."""
    right: dict[str, dict[int, int]] = {"letter": {}, "cloze": {}}
    prefixes = PrefixCache()
    for batch in track(shared.choices, "questions", total=len(shared.choices)):
        logp_B4 = score_choices(model, batch, prefixes)
        if batch.scoring == "cloze":
            logp_B4 = normalise_cloze(logp_B4, batch.choice_length_B4)
        correct_B = logp_B4.argmax(dim=1) == batch.answer_B
        for i, is_right in zip(batch.index_B.tolist(), correct_B.tolist(), strict=True):
            right[batch.scoring][i] = int(is_right)
    return {scoring: [found[i] for i in sorted(found)] for scoring, found in right.items()}


def saved_model(budget: Budget, method: str) -> MergedLlama:
    """Return the merged model of alphas that were chosen before."""
    kind, _, value = method.partition(" ")
    grain = value if kind == "gradient" else "layer"
    merged = budget.model(AlphaConfig(granularity=grain))  # type: ignore[arg-type]
    merged.set_alphas(read_alphas(budget.folder / method / "alphas.json", budget.plan))
    return merged


def cell_names(removals: list[int]) -> list[tuple[str, int, str]]:
    """Return all cells: text first, since the questions take longest."""
    texts = [("text", n, method) for method in METHODS for n in removals]
    asked = [("mmlu", n, method) for n in removals for method in ASKED]
    return [("text", 0, "source"), *texts, ("mmlu", 0, "source"), *asked]


def run_cell(
    shared: Shared, budgets: dict[int, Budget], name: tuple[str, int, str]
) -> list[dict[str, Any]]:
    """Return the lines of one cell."""
    kind, removed, method = name
    if removed not in budgets:
        # The states of the source do not depend on the plan; any merged layer will do.
        budgets[removed] = Budget(shared, removed or min(budgets, default=1))
    budget = budgets[removed]
    cell = {"kind": kind, "removed": removed, "method": method, "refit": False}
    if method == "source":
        if kind == "mmlu":
            return [{**cell, **answers(shared, shared.source)}]
        return [{**cell, "nats": budget.source_nats()}]
    if kind == "text":
        chosen = choose(budget, method)
        (budget.folder / method).mkdir(exist_ok=True)
        write_alphas(budget.folder / method, budget.plan, chosen.merged.alphas())
        return measure(budget, method, chosen)
    merged = saved_model(budget, method)
    lines = [{**cell, **answers(shared, merged.causal_lm)}]
    if not ASKED[method]:
        return lines
    repair(budget, merged)
    return [*lines, {**cell, "refit": True, **answers(shared, merged.causal_lm)}]


def main() -> None:
    """Run the cells that are not done yet, or write the report."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--questions", default="bank", help="as `data.questions` of a fit")
    parser.add_argument("--source", default="smollm2-135m", help="as `model.source` of a fit")
    parser.add_argument("--plan", choices=("block_repaired", "block"), default="block_repaired")
    parser.add_argument("--budgets", type=int, nargs="+", default=list(BUDGETS))
    parser.add_argument("--folder", type=Path, default=Path("runs/alpha_experiment"))
    parser.add_argument("--minutes", type=float, default=1e9, help="start no cell after these")
    parser.add_argument("--report", action="store_true", help="tables and figures of what is done")
    args = parser.parse_args()
    path = args.folder / "cells.jsonl"
    if args.report:
        report(path, args.folder)
        return
    args.folder.mkdir(parents=True, exist_ok=True)
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    done = {(line["kind"], line["removed"], line["method"]) for line in lines}
    todo = [name for name in cell_names(args.budgets) if name not in done]
    shared, start = Shared(args.folder, args.source, args.questions, args.plan), time.perf_counter()
    budgets = {n: Budget(shared, n) for n in args.budgets}
    shared.prepare(sorted({b.plan.groups[0].start for b in budgets.values()}))
    for number, name in enumerate(todo):
        passed = (time.perf_counter() - start) / 60
        if passed > args.minutes:
            break
        left = f"{passed / number * (len(todo) - number):.0f} min" if number else "unknown"
        print(f"{len(todo) - number} cells left, {left}: {name}", flush=True)
        found = run_cell(shared, budgets, name)
        with path.open("a") as file:
            file.write("".join(json.dumps(line) + "\n" for line in found))


if __name__ == "__main__":
    main()
