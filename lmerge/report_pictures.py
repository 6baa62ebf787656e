"""The sections of a report that show figures, with their numbers beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from markupsafe import Markup
from matplotlib.figure import Figure

from lmerge.alpha_spread import spread_by_layer
from lmerge.diff import Stage
from lmerge.figures import matrices_figure, search_figure
from lmerge.progress import track
from lmerge.report_figures import (
    WIDTH,
    alpha_curves_figure,
    alphas_figure,
    differences_figure,
    heatmap_figure,
    loss_figure,
    plan_figure,
)
from lmerge.report_run import RunRecord
from lmerge.report_table import subject_changes
from lmerge.results import SCORING_NAMES
from lmerge.svg import inline_svg

Item = dict[str, Any]

EVERY = "*"
"""Fits every choice of a switch."""


class Figures:
    """Turns figures into elements of the page, each with ids of its own."""

    def __init__(self) -> None:
        self.count = 0

    def item(self, figure: Figure, caption: str, **more: Any) -> Item:
        """Return what the template needs to show a figure."""
        self.count += 1
        svg = Markup(inline_svg(figure, f"f{self.count}", caption))
        return {"svg": svg, "caption": caption, **more}


def plan_items(records: Sequence[RunRecord], figures: Figures) -> list[Item]:
    """Return the picture and the table of each plan, its alphas and its search."""
    items = []
    for record in records:
        plan, alphas = record.plan, record.alphas
        shown = [figures.item(plan_figure(plan, alphas), f"The plan, by {plan.method}")]
        for group, found in zip(plan.groups, alphas or (), strict=bool(alphas)):
            span = f"layers {group.start} to {group.members[-1]}"
            caption = f"Alphas of {span}: means, and where 90% of them lie"
            shown.append(figures.item(alphas_figure(group, found), caption))
        if record.candidates:
            caption = "What the candidate plans cost after a refit"
            figure = search_figure(record.candidates)
            figure.set_size_inches(WIDTH, 3.0)
            shown.append(figures.item(figure, caption))
        items.append({"run": record.name, "figures": shown, "rows": _plan_rows(record)})
    return items


def _plan_rows(record: RunRecord) -> list[list[str]]:
    plan = record.plan
    shares = spread_by_layer(plan, record.alphas) if record.alphas else {}
    rows = []
    for i in range(plan.num_layers):
        group = next((g for g in plan.groups if i in g.members), None)
        place = plan.origins().index(i) if group is None else plan.position(group)
        role = "kept" if group is None else "anchor" if i == group.anchor else "merged"
        numbers = [f"{number:.3f}" for number in shares[i]] if i in shares else [""] * 3
        rows.append([str(i), str(place), role, *numbers])
    return rows


def heatmap_section(records: Sequence[RunRecord], figures: Figures) -> Item | None:
    """Return the heatmaps and the switches between them; equal matrices of runs appear once."""
    limits = _limits(records)
    shown: dict[tuple[str, str, bytes], Item] = {}
    found = [(r, m, n, x) for r in records for m, s in r.similarity.items() for n, x in s.items()]
    for record, measure, name, matrix_LL in track(found, "heatmaps", total=len(found)):
        key = (measure, name, matrix_LL.numpy().tobytes() + repr(record.plan.groups).encode())
        if key in shown:
            shown[key]["run"] = EVERY
            continue
        domain, _, language = name.partition("/")
        figure = heatmap_figure(matrix_LL, limits[measure], f"{measure} similarity", record.plan)
        undefined = int((~matrix_LL.isfinite()).sum())
        caption = f"{measure}: {name}" + (f" ({undefined} undefined)" if undefined else "")
        where = {"measure": measure, "domain": domain, "language": language or EVERY}
        shown[key] = figures.item(figure, caption, run=record.name, **where)
    items = list(shown.values())
    for item in items if len(records) > 1 else ():
        item["caption"] += "" if item["run"] == EVERY else f" ({item['run']})"
    labels = {"run": "Run", "measure": "Measure", "domain": "Domain", "language": "Language"}
    selects = []
    for name, label in labels.items():
        options = [o for o in dict.fromkeys(item[name] for item in items) if o != EVERY]
        if len(options) > 1 or (options and name in ("domain", "language")):
            selects.append({"name": name, "label": label, "options": options})
    return {"figures": items, "selects": selects} if items else None


def _limits(records: Sequence[RunRecord]) -> dict[str, tuple[float, float]]:
    values: dict[str, list[torch.Tensor]] = {}
    for record in records:
        for measure, matrices in record.similarity.items():
            values.setdefault(measure, []).extend(m[m.isfinite()] for m in matrices.values())
    limits = {}
    for measure, parts in values.items():
        joined = torch.cat(parts)
        low_high = (float(joined.min()), float(joined.max())) if len(joined) else (0.0, 1.0)
        limits[measure] = low_high
    return limits


def alignment_items(records: Sequence[RunRecord], figures: Figures) -> list[Item]:
    """Return how alike the matrices of the members are to the anchor's, before and after."""
    items = []
    for record in records:
        before, after = (record.alignment.get(when) for when in ("before", "after"))
        if not before or not after:
            continue
        figure = matrices_figure(before, after)
        figure.set_size_inches(WIDTH, 3.3)
        caption = f"Method {record.alignment['method']}"
        caption += f" ({record.name})" if len(records) > 1 else ""
        means = [[_mean(found, name) for found in (before, after)] for name in _names(before)]
        rows = [[name, *map(_cell, pair)] for name, pair in zip(_names(before), means, strict=True)]
        neurons = record.alignment.get("neurons")
        if neurons:
            rows.insert(0, ["neurons", *(_cell(neurons[when]) for when in ("before", "after"))])
        items.append(figures.item(figure, caption, rows=rows))
    return items


def _names(layers: Mapping[str, Mapping[str, float]]) -> list[str]:
    return list(next(iter(layers.values())))


def _mean(layers: Mapping[str, Mapping[str, float]], name: str) -> float:
    return sum(layer[name] for layer in layers.values()) / len(layers)


def _cell(value: float) -> str:
    return f"{value:.3f}"


def training_items(records: Sequence[RunRecord], figures: Figures) -> list[Item]:
    """Return the curves of the losses of all runs, and of the alphas of each."""
    losses = {r.name: r.series for r in records if "train/loss" in r.series}
    items = [figures.item(loss_figure(losses), "Loss against the source")] if losses else []
    for record in records:
        if any(name.startswith("alpha/mean/") for name in record.series):
            caption = "Alphas: means, and where 90% of them lie"
            caption += f" ({record.name})" if len(records) > 1 else ""
            items.append(figures.item(alpha_curves_figure(record.series), caption))
    return items


def subject_items(records: Sequence[RunRecord], stage: Stage, figures: Figures) -> list[Item]:
    """Return the differences by subject for each scoring."""
    found = {r.name: r.stages[stage] for r in records if stage in r.stages}
    items = []
    for scoring in dict.fromkeys(s for results in found.values() for s in results["choices"]):
        changes = {
            name: subject_changes(results, scoring)
            for name, results in found.items()
            if scoring in results["choices"]
        }
        caption = f"Scored by {SCORING_NAMES[scoring]}"
        figure = differences_figure(changes, "percentage points")
        rows = [
            [change.name, *([run] if len(changes) > 1 else []), *_signed(change[1:])]
            for run, found_changes in changes.items()
            for change in found_changes
        ]
        head = ["", *(["run"] if len(changes) > 1 else []), "points", "low", "high"]
        items.append(figures.item(figure, caption, rows=rows, head=head))
    return items


def _signed(numbers: Sequence[float]) -> list[str]:
    return [f"{number:+.1f}" if number == number else "" for number in numbers]
