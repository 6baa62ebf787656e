"""Tables and figure of a comparison."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.figure import Figure

from lmerge.figures import save
from lmerge.files import write_json, write_text
from lmerge.statistics import mcnemar_exact, paired_bootstrap
from lmerge.tables import markdown_table, print_columns

SCHEMA = 1

MARKERS = "os^vD<>pP*X"
"""Markers of the figure's lines, in turn."""

Cell = Mapping[str, Any]
Row = dict[str, str | float | int | None]


def write_tables(run_dir: Path, cells: Sequence[Cell], order: Sequence[str]) -> list[Row]:
    """Write compare.md, compare.csv, compare.json and pareto.png; print and return the rows.

    Args:
        run_dir: Folder of the comparison.
        cells: Results of each method at each budget.
        order: Names of the methods in the order of the rows.
    """
    cells = sorted(cells, key=lambda cell: (cell["num_removed"], order.index(cell["method"])))
    rows = [row_of(cell, cells) for cell in cells]
    write_text(run_dir / "compare.csv", as_csv(rows))
    write_text(run_dir / "compare.md", as_markdown(rows))
    write_json(
        run_dir / "compare.json",
        {"rows": rows, "records": records(cells), "cells": list(cells)},
        schema=SCHEMA,
    )
    save(pareto_figure(cells), run_dir / "pareto.png")
    _print(rows)
    return rows


def row_of(cell: Cell, cells: Sequence[Cell]) -> Row:
    """Return the row of a cell: losses above the source's, accuracies, costs, paired tests.

    Paired tests compare with the best baseline of the same budget, by the bootstrap over blocks of
    all texts but the calibration blocks, and by McNemar's test on the first scoring's questions.
    """
    row: Row = {"removed": cell["num_removed"], "method": cell["method"]}
    for name, text in cell["texts"].items():
        row[f"{name}: loss above"] = text["loss"] - text["source_loss"]
        row[f"{name}: ppl"] = text["ppl"]
        row[f"{name}: KL"] = text["kl"]
    for scoring, rate in cell["choices"].items():
        row[f"{scoring} %"] = 100 * rate["accuracy"]
        row[f"{scoring} low"], row[f"{scoring} high"] = 100 * rate["low"], 100 * rate["high"]
        before = cell["source_choices"][scoring]["correct"]
        row[f"{scoring} p to source"] = mcnemar_exact(rate["correct"], before).p_value
    cost = cell["cost"]["model"]
    row["Mparameters"] = cost["parameters"] / 1e6
    row["speedup"] = cost["prefill_tokens_per_s"] / cell["cost"]["source"]["prefill_tokens_per_s"]
    row["minutes"] = cell["minutes"]
    return row | _against_best(cell, cells)


def records(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Return one flat record for each method, budget and text: what other programs read.

    Losses and KL are in nats a token; each accuracy comes with its 95% interval.
    """
    found = []
    for cell in cells:
        shared = {
            "method": cell["method"],
            "budget": cell["num_removed"],
            "minutes": cell["minutes"],
            "commit": cell["provenance"]["git_commit"],
        }
        for scoring, rate in cell["choices"].items():
            shared[f"accuracy_{scoring}"] = rate["accuracy"]
            shared[f"interval_{scoring}"] = [rate["low"], rate["high"]]
        for name, text in cell["texts"].items():
            losses = {key: text[key] for key in ("loss", "source_loss", "tokens", "kl")}
            found.append({**shared, "text": name, **losses})
    return found


def held_out_loss(cell: Cell) -> float:
    """Return the mean over texts, the calibration blocks aside, of the loss above the source."""
    texts = [text for name, text in cell["texts"].items() if name != "calibration"]
    return float(sum(text["loss"] - text["source_loss"] for text in texts) / len(texts))


def best_baseline(cells: Sequence[Cell], num_removed: int) -> Cell | None:
    """Return the published method of least held-out loss at a budget, if there is one."""
    found = [
        cell
        for cell in cells
        if cell["num_removed"] == num_removed and cell["config"]["baseline"] is not None
    ]
    return min(found, key=held_out_loss, default=None)


def _against_best(cell: Cell, cells: Sequence[Cell]) -> Row:
    best = best_baseline(cells, cell["num_removed"])
    empty: Row = {"against": None, "difference": None, "low": None, "high": None, "p": None}
    if best is None or best["method"] == cell["method"]:
        return empty
    ours, theirs, tokens = [], [], []
    for name, text in cell["texts"].items():
        if name != "calibration":
            ours += text["block_nats"]
            theirs += best["texts"][name]["block_nats"]
            tokens += text["block_tokens"]
    found = paired_bootstrap(ours, theirs, seed=0, weights=tokens)
    return {
        "against": best["method"],
        "difference": found.value,
        "low": found.low,
        "high": found.high,
        "p": found.p_value,
    }


def as_csv(rows: Sequence[Row]) -> str:
    """Return the rows as CSV, with the columns of the first."""
    sink = io.StringIO()
    writer = csv.DictWriter(sink, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return sink.getvalue()


def as_markdown(rows: Sequence[Row]) -> str:
    """Return one table a budget: losses above the source's on each text, accuracy, cost, test."""
    parts = []
    for num_removed in dict.fromkeys(row["removed"] for row in rows):
        chosen = [row for row in rows if row["removed"] == num_removed]
        parts.append(f"## {num_removed} layers removed\n\n" + markdown_table(*columns(chosen)))
    return "\n\n".join(parts) + "\n"


def columns(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Return heading and cells of the table for people."""
    texts = [key.removesuffix(": loss above") for key in rows[0] if key.endswith(": loss above")]
    scorings = [key.removesuffix(" p to source") for key in rows[0] if key.endswith("p to source")]
    heading = ["method", *(f"{name}" for name in texts), "KL", *(f"{s} %" for s in scorings)]
    heading += ["M parameters", "speed", "minutes", "minus best baseline"]
    lines = []
    for row in rows:
        losses = [f"{_number(row[f'{name}: loss above']):+.3f}" for name in texts]
        kls = [_number(row[f"{name}: KL"]) for name in texts if name != "calibration"]
        rates = [
            f"{_number(row[f'{s} %']):.0f} [{_number(row[f'{s} low']):.0f}, "
            f"{_number(row[f'{s} high']):.0f}]"
            for s in scorings
        ]
        lines.append(
            [
                str(row["method"]),
                *losses,
                f"{sum(kls) / len(kls):.3f}",
                *rates,
                f"{_number(row['Mparameters']):.1f}",
                f"{_number(row['speedup']):.2f}x",
                f"{_number(row['minutes']):.1f}",
                _test(row),
            ]
        )
    return heading, lines


def _number(value: str | float | None) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def _test(row: Row) -> str:
    if row["against"] is None:
        return ""
    difference, low, high = (_number(row[key]) for key in ("difference", "low", "high"))
    return f"{difference:+.3f} [{low:+.3f}, {high:+.3f}] to {row['against']}"


def _print(rows: Sequence[Row]) -> None:
    for num_removed in dict.fromkeys(row["removed"] for row in rows):
        title = f"{num_removed} layers removed: loss above the source (nats/token)"
        print_columns(title, *columns([row for row in rows if row["removed"] == num_removed]))


def pareto_figure(cells: Sequence[Cell]) -> Figure:
    """Return held-out loss above the source against layers removed, a line for each method."""
    figure = Figure(figsize=(8.4, 4.6), layout="constrained")
    axis = figure.subplots()
    for place, method in enumerate(dict.fromkeys(cell["method"] for cell in cells)):
        mine = [cell for cell in cells if cell["method"] == method]
        published = mine[0]["config"]["baseline"] is not None
        axis.plot(
            [cell["num_removed"] for cell in mine],
            [held_out_loss(cell) for cell in mine],
            MARKERS[place % len(MARKERS)] + ("--" if published else "-"),
            color=colormaps["tab20"](place % 20),
            linewidth=1 if published else 2.5,
            label=method,
        )
    axis.set(xlabel="layers removed", ylabel="loss above the source (nats/token)")
    axis.set_xticks(sorted({cell["num_removed"] for cell in cells}))
    if min(map(held_out_loss, cells)) > 0:
        axis.set_yscale("log")
    else:  # a method lowers the loss
        axis.set_yscale("symlog", linthresh=0.1)
    axis.grid(axis="y", alpha=0.3)
    figure.legend(fontsize=7, loc="outside right upper", title="mean over held-out texts")
    return figure
