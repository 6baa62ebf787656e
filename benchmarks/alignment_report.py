"""Tables and the figure of `alignment_experiment.py`, from its lines of JSON.

Run `python benchmarks/alignment_report.py RUNS.jsonl --figure docs/figures/alignment_depth.png`.
Differences are to `folded` (one frame of norms, no alignment) on the same blocks or questions, with
95% intervals from the paired bootstrap over blocks, exact McNemar tests for the questions.
"""

from __future__ import annotations

import argparse
import json
from itertools import product
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from lmerge.figures import save
from lmerge.statistics import mcnemar_exact, paired_bootstrap, wilson_interval

COLOURS = {
    "drop": "black",
    "naive": "tab:red",
    "folded": "grey",
    "rowwise": "tab:brown",
    "weights": "tab:blue",
    "activations": "tab:cyan",
    "full": "tab:green",
    "soft": "tab:purple",
}

Key = tuple[str, str, str, bool]
"""Plan, method, alphas, repair."""
Rows = dict[Key, dict[str, Any]]


def read_rows(path: Path) -> Rows:
    """Return the lines by key; a later line replaces an earlier one."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {(r["plan"], r["method"], r["alphas"], r["repair"]): r for r in rows}


def mean(values: list[float]) -> float:
    """Return the mean of equally long blocks."""
    return sum(values) / len(values)


def cell_text(rows: Rows, key: Key, measure: str) -> str:
    """Return a mean and, in brackets, its difference to the folded average where that is sure."""
    if key not in rows:
        return ""
    values, base = rows[key][measure], rows.get((key[0], "folded", *key[2:]))
    text = f"{mean(values):.3f}"
    if base is None or key[1] == "folded":
        return text
    found = paired_bootstrap(values, base[measure], seed=0)
    sign = "+" if found.low > 0 else "-" if found.high < 0 else "="
    return f"{text} {sign}"


def depth_table(rows: Rows, measure: str, *, repair: bool) -> list[str]:
    """Return a table of pairs along the depth: a row a method."""
    plans = [p for p in dict.fromkeys(key[0] for key in rows) if p.replace(",", "").isdigit()]
    plans.sort(key=lambda plan: int(plan.split(",")[0]))
    lines = ["| method | " + " | ".join(plans) + " |", "|---" * (len(plans) + 1) + "|"]
    for alphas in ("average", "learned"):
        for method in COLOURS:
            cells = [cell_text(rows, (plan, method, alphas, repair), measure) for plan in plans]
            if any(cells):
                lines.append(
                    f"| {method}{', learned' * (alphas == 'learned')} | " + " | ".join(cells) + " |"
                )
    return lines


def removal_table(rows: Rows, plan: str) -> list[str]:
    """Return a table of one removal plan: loss and KL without and with repair, and accuracy."""
    head = "| method | alphas | loss | KL | loss, repaired | KL, repaired | right, repaired |"
    lines = [head, "|---" * 7 + "|"]
    for alphas in ("average", "learned"):
        for method in COLOURS:
            cells = []
            for repair in (False, True):
                key = (plan, method, alphas, repair)
                cells += [cell_text(rows, key, name) for name in ("loss", "kl")]
            cells.append(right_text(rows, (plan, method, alphas, True)))
            if any(cells):
                lines.append(f"| {method} | {alphas} | " + " | ".join(cells) + " |")
    return lines


def right_text(rows: Rows, key: Key) -> str:
    """Return the share of right answers with its interval, and McNemar's p against folded."""
    if key not in rows or "correct" not in rows[key]:
        return ""
    right = rows[key]["correct"]
    low, high = wilson_interval(sum(right), len(right))
    text = f"{sum(right) / len(right):.3f} [{low:.3f}, {high:.3f}]"
    base = rows.get((key[0], "folded", *key[2:]))
    if base is None or key[1] == "folded":
        return text
    return (
        f"{text}, p {mcnemar_exact(torch.tensor(right), torch.tensor(base['correct'])).p_value:.2f}"
    )


def differences(rows: Rows) -> list[str]:
    """Return a table of the loss minus that of the folded average, pairs along the depth."""
    lines = ["| pair | method | not repaired | repaired |", "|---|---|---|---|"]
    plans = [p for p in dict.fromkeys(key[0] for key in rows) if p.replace(",", "").isdigit()]
    for plan in sorted(plans, key=lambda plan: int(plan.split(",")[0])):
        for method in ("drop", "weights", "activations", "full", "soft", "rowwise"):
            cells = []
            for repair in (False, True):
                keys = [(plan, name, "average", repair) for name in (method, "folded")]
                if all(key in rows for key in keys):
                    found = paired_bootstrap(*(rows[key]["loss"] for key in keys), seed=0)
                    cells.append(f"{found.value:+.3f} [{found.low:+.3f}, {found.high:+.3f}]")
            if cells:
                lines.append(f"| {plan} | {method} | " + " | ".join(cells) + " |")
    return lines


def depth_figure(rows: Rows) -> Figure:
    """Return the loss above the source's for pairs along the depth, without and with repair."""
    source = mean(rows["source", "source", "", True]["loss"])
    figure = Figure(figsize=(9.0, 3.8), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, repair in zip(axes, (False, True), strict=True):
        for method, colour in COLOURS.items():
            points = sorted(
                (int(key[0].split(",")[0]), mean(row["loss"]) - source)
                for key, row in rows.items()
                if key[0].replace(",", "").isdigit() and key[1:] == (method, "average", repair)
            )
            if points:
                axis.plot(*zip(*points, strict=True), "o-", ms=3, lw=1, color=colour, label=method)
        axis.set(xlabel="lower layer of the pair", yscale="log")
        axis.set_title("repaired" if repair else "as merged")
    axes[0].set_ylabel("loss above the source's (nats/token)")
    axes[1].legend(fontsize=7)
    return figure


def main() -> None:
    """Print the tables as Markdown, and draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("rows", type=Path, help="lines that alignment_experiment.py wrote")
    parser.add_argument("--figure", type=Path, help="PNG to write")
    args = parser.parse_args()
    rows = read_rows(args.rows)
    source = rows["source", "source", "", True]
    print(f"Source: loss {mean(source['loss']):.3f} on {len(source['loss'])} blocks, "
          f"{right_text(rows, ('source', 'source', '', True))} right\n")  # fmt: skip
    pairs = [key for key in rows if key[0].replace(",", "").isdigit()]
    for measure, repair in product(("loss", "kl"), (False, True)) if pairs else ():
        print(f"### Pairs, {measure}, {'repaired' if repair else 'as merged'}\n")
        print("\n".join(depth_table(rows, measure, repair=repair)), "\n")
    if pairs:
        print("### Loss minus that of the folded average\n")
        print("\n".join(differences(rows)), "\n")
    for plan in dict.fromkeys(key[0] for key in rows):
        if " " in plan:
            print(f"### {plan}\n")
            print("\n".join(removal_table(rows, plan)), "\n")
    if args.figure:
        save(depth_figure(rows), args.figure)


if __name__ == "__main__":
    main()
