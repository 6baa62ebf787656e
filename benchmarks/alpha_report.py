"""Tables and figures of alpha_experiment.py."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.stats import pearsonr

from lmerge.figures import save
from lmerge.metrics import micro_accuracy
from lmerge.statistics import bootstrap_interval, mcnemar_exact, paired_bootstrap

TOKENS = 255.0
"""Predicted tokens of a block."""
FIGURES = Path("docs/figures")

Cell = dict[str, Any]
Cells = dict[tuple[str, int, str, bool], Cell]


def report(path: Path, folder: Path) -> None:
    """Print Markdown tables and write the figures into docs/figures."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    cells = {(c["kind"], c["removed"], c["method"], c["refit"]): c for c in lines}
    for removed in sorted({c["removed"] for c in lines} - {0}):
        plan = json.loads((folder / str(removed) / "plan.json").read_text())
        members = plan["groups"][0]["members"]
        print(f"\n### {removed} layers removed: {members[0]} to {members[-1]} become one\n")
        print_texts(cells, removed)
        print_questions(cells, removed)
    save(kl_figure(cells), FIGURES / "alphas_kl.png")
    save(similarity_figure(cells, folder), FIGURES / "alphas_similarity.png")


def mean(values: list[float]) -> float:
    """Return the mean over tokens of sums over blocks."""
    return math.fsum(values) / (TOKENS * len(values))


def interval(values: list[float]) -> str:
    """Return the mean with its bootstrap interval over blocks."""
    low, high = bootstrap_interval(values, seed=0, weights=[TOKENS] * len(values))
    return f"{mean(values):.3f} [{low:.3f}, {high:.3f}]"


def against(a: list[float], b: list[float]) -> str:
    """Return the paired difference with its interval and p-value."""
    found = paired_bootstrap(a, b, seed=0, weights=[TOKENS] * len(a))
    return f"{found.value:+.3f} [{found.low:+.3f}, {found.high:+.3f}] p {found.p_value:.2g}"


def print_texts(cells: Cells, removed: int) -> None:
    """Print loss and KL of all methods, with paired tests of the KL."""
    print("| alphas | refit | loss | KL | KL minus anchor | KL minus rule mka | seconds |")
    print("|---|---|---|---|---|---|---|")
    if ("text", 0, "source", False) in cells:
        print(f"| source | | {interval(cells['text', 0, 'source', False]['nats'])} | 0 | | | |")
    for refit in (False, True):
        chosen = [k for k in cells if k[0] == "text" and k[1] == removed and k[3] == refit]
        for key in chosen:
            cell = cells[key]
            tests = [
                against(cell["kl"], cells["text", removed, other, refit]["kl"])
                if ("text", removed, other, refit) in cells and other != key[2]
                else ""
                for other in ("anchor", "mka")
            ]
            print(
                f"| {key[2]} | {'yes' if refit else ''} | {interval(cell['nats'])} | "
                f"{interval(cell['kl'])} | {tests[0]} | {tests[1]} | {cell['seconds']:.1f} |"
            )


def print_questions(cells: Cells, removed: int) -> None:
    """Print MMLU accuracies, with McNemar's test against the anchor."""
    keys = [k for k in cells if k[0] == "mmlu" and k[1] == removed]
    if not keys:
        return
    print("\n| alphas | refit | cloze | against anchor | letter | against anchor |")
    print("|---|---|---|---|---|---|")
    for key in [("mmlu", 0, "source", False), *sorted(keys, key=lambda k: k[3])]:
        if key not in cells:
            continue
        row = f"| {key[2]} | {'yes' if key[3] else ''} |"
        for scoring in ("cloze", "letter"):
            right = cells[key][scoring]
            rate = micro_accuracy(torch.tensor(right, dtype=torch.bool))
            row += f" {100 * rate.value:.1f}% [{100 * rate.low:.0f}, {100 * rate.high:.0f}] |"
            base = cells.get(("mmlu", removed, "anchor", key[3]))
            if base is None or key[2] == "anchor":
                row += " |"
                continue
            test = mcnemar_exact(right, base[scoring])
            row += f" +{test.only_a} -{test.only_b}, p {test.p_value:.2g} |"
        print(row)


def kl_figure(cells: Cells) -> Figure:
    """Return the KL of each method and budget, without and with the refit."""
    budgets = sorted({k[1] for k in cells if k[0] == "text"} - {0})
    figure = Figure(figsize=(4 * len(budgets), 4.2), layout="constrained")
    for axis, removed in zip(
        figure.subplots(1, len(budgets), squeeze=False)[0], budgets, strict=True
    ):
        names = [k[2] for k in cells if k[0] == "text" and k[1] == removed and not k[3]]
        for shift, refit, colour in ((-0.15, False, "grey"), (0.15, True, "steelblue")):
            for place, name in enumerate(names):
                if ("text", removed, name, refit) not in cells:
                    continue
                values = cells["text", removed, name, refit]["kl"]
                low, high = bootstrap_interval(values, seed=0, weights=[TOKENS] * len(values))
                label = ("refitted" if refit else "alphas alone") if place == 0 else None
                axis.plot([low, high], [place + shift] * 2, color=colour)
                axis.plot([mean(values)], [place + shift], "o", color=colour, label=label)
        axis.set_yticks(range(len(names)), names)
        axis.set(xlim=(0, None), xlabel="KL from the source (nats/token)")
        axis.set(title=f"{removed} layers removed")
        axis.invert_yaxis()
    axis.legend()
    return figure


def similarity_figure(cells: Cells, folder: Path) -> Figure:
    """Return learned alphas against the similarity of layers, with correlations."""
    similarity = np.array(json.loads((folder / "similarity.json").read_text()))
    learned: list[tuple[int, float, float]] = []
    searched: list[tuple[int, float, float]] = []
    for removed in sorted({k[1] for k in cells if k[0] == "text"} - {0}):
        run = folder / str(removed)
        members = json.loads((run / "plan.json").read_text())["groups"][0]["members"]
        path = run / "gradient layer" / "alphas.json"
        if path.is_file():
            shares = json.loads(path.read_text())["groups"][0]["alphas"]["layer"]
            learned += [
                (removed, similarity[members[0], m], a)
                for m, a in zip(members[1:], shares[1:], strict=True)
            ]
        steps = cells.get(("text", removed, "bayes layer", False), {}).get("steps", {})
        lower = {str(i): members[-2 - i] for i in range(removed)}
        searched += [(removed, similarity[lower[s], lower[s] + 1], a) for s, a in steps.items()]
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    for axis, points, labels in zip(
        figure.subplots(1, 2),
        (learned, searched),
        (
            ("similarity to the anchor", "share of the layer, by gradient"),
            ("similarity of the pair", "share kept of the lower layer, Bayesian"),
        ),
        strict=True,
    ):
        for removed in sorted({p[0] for p in points}):
            axis.scatter(
                [p[1] for p in points if p[0] == removed],
                [p[2] for p in points if p[0] == removed],
                s=20,
                label=f"{removed} removed",
            )
        axis.set(xlabel=labels[0], ylabel=labels[1])
        if len(points) > 3:
            found = pearsonr([p[1] for p in points], [p[2] for p in points])
            low, high = found.confidence_interval()
            text = f"r = {found.statistic:.3f} [{low:.3f}, {high:.3f}], {len(points)} points"
            axis.set_title(text, fontsize=9)
            print(f"\n{labels[1]}: {text}, p {found.pvalue:.2g}")
        axis.legend()
    return figure
