"""Figures of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from lmerge.plan import MergePlan
from lmerge.search import Candidate


def similarity_figure(
    matrices: Mapping[str, Tensor], measure: str, plan: MergePlan | None = None
) -> Figure:
    """Return heatmaps of layer similarity on one colour scale, the plan's groups framed.

    Undefined cells (NaN) are grey and hatched, and the title counts them.
    """
    columns = min(3, len(matrices))
    rows = -(-len(matrices) // columns)
    figure = Figure(figsize=(4 * columns + 1, 3.6 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    defined = torch.cat([m[m.isfinite()] for m in matrices.values()])
    low, high = (float(defined.min()), float(defined.max())) if len(defined) else (0.0, 1.0)
    for axis, (name, matrix_LL) in zip(axes, matrices.items(), strict=False):
        image = axis.imshow(matrix_LL.numpy(), vmin=low, vmax=high, cmap="viridis", origin="lower")
        axis.set(title=name, xlabel="layer", ylabel="layer")
        _mark_undefined(axis, matrix_LL)
        for group in plan.groups if plan is not None else ():
            edge, width = group.start - 0.5, len(group.members)
            axis.add_patch(
                Rectangle((edge, edge), width, width, fill=False, edgecolor="red", linewidth=1.5)
            )
    for axis in axes[len(matrices) :]:
        axis.remove()
    figure.colorbar(image, ax=list(axes[: len(matrices)]), label=f"{measure} similarity")
    return figure


def _mark_undefined(axis: Axes, matrix_LL: Tensor) -> None:
    undefined_LL = ~matrix_LL.isfinite()
    for row, column in undefined_LL.nonzero().tolist():
        corner = (column - 0.5, row - 0.5)
        axis.add_patch(
            Rectangle(corner, 1, 1, facecolor="lightgrey", edgecolor="grey", hatch="////", lw=0)
        )
    if undefined_LL.any():
        axis.set_title(f"{axis.get_title()} ({int(undefined_LL.sum())} undefined)")


def matching_figure(before: Mapping[int, Tensor], after: Mapping[int, Tensor]) -> Figure:
    """Return, for each aligned layer, how alike matched neurons are before and after."""
    figure = Figure(figsize=(max(4.0, 1.2 * len(before) + 2), 3.6), layout="constrained")
    axis = figure.subplots()
    places = list(range(len(before)))
    for shift, (label, values) in zip(
        (-0.18, 0.18), {"before": before, "after": after}.items(), strict=True
    ):
        parts = [v.cpu().numpy() for v in values.values()]
        boxes = axis.boxplot(
            parts,
            positions=[p + shift for p in places],
            widths=0.3,
            showfliers=False,
            patch_artist=True,
        )
        colour = {"before": "lightgrey", "after": "steelblue"}[label]
        for box in boxes["boxes"]:
            box.set(facecolor=colour)
        boxes["boxes"][0].set_label(label)
    axis.set_xticks(places, [str(layer) for layer in before])
    axis.set(xlabel="source layer", ylabel="similarity to the anchor's neuron")
    axis.legend()
    return figure


def search_figure(candidates: Sequence[Candidate]) -> Figure:
    """Return what each candidate plan costs after its refits, by its first merged layer."""
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axis = figure.subplots()
    best, *others = sorted(candidates, key=lambda candidate: candidate.kl)
    axis.bar([c.groups[0].start for c in others], [c.kl for c in others], color="lightgrey")
    axis.bar([best.groups[0].start], [best.kl], color="steelblue", label="chosen")
    removed = sum(len(group.members) - 1 for group in best.groups)
    axis.set(
        xlabel=f"first merged layer of a plan that removes {removed}",
        ylabel="KL from the source (nats/token)",
        yscale="log",
    )
    axis.legend()
    return figure


def transfer_figure(
    panels: Mapping[str, tuple[Sequence[str], Sequence[str], Tensor, Sequence[Sequence[str]]]],
) -> Figure:
    """Return annotated heatmaps of the loss increase on one colour scale.

    Args:
        panels: Title -> row names (plan made on), column names (measured on), values and texts of
            the cells.
    """
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(5.6 * columns + 1, 3.6 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    low = min(float(values.min()) for _, _, values, _ in panels.values())
    high = max(float(values.max()) for _, _, values, _ in panels.values())
    # One ruined model must not make all others look alike.
    norm = LogNorm(low, high) if low > 0 and high > 5 * low else Normalize(low, high)
    for axis, (title, (plans, domains, value_PB, texts)) in zip(axes, panels.items(), strict=False):
        image = axis.imshow(value_PB.numpy(), norm=norm, cmap="viridis", aspect="auto")
        axis.set(title=title, xlabel="measured on", ylabel="plan made on (block)")
        axis.set_xticks(range(len(domains)), domains, rotation=20)
        axis.set_yticks(range(len(plans)), plans)
        for i, line in enumerate(texts):
            for j, text in enumerate(line):
                colour = "white" if norm(float(value_PB[i, j])) < 0.5 else "black"
                axis.text(j, i, text, ha="center", va="center", color=colour, fontsize=8)
    for axis in axes[len(panels) :]:
        axis.remove()
    label = "loss above the source's (nats/token)"
    figure.colorbar(image, ax=list(axes[: len(panels)]), label=label)
    return figure


def matrices_figure(
    before: Mapping[int, Mapping[str, float]], after: Mapping[int, Mapping[str, float]]
) -> Figure:
    """Return, for each matrix, its cosine with the anchor's before and after: a dot a layer."""
    figure = Figure(figsize=(7.0, 3.6), layout="constrained")
    axis = figure.subplots()
    names = list(next(iter(before.values())))
    for shift, label, colour, found in (
        (-0.12, "before", "grey", before),
        (0.12, "after", "steelblue", after),
    ):
        places = [i + shift for _layer in found for i in range(len(names))]
        values = [cosines[name] for cosines in found.values() for name in names]
        axis.scatter(places, values, s=18, color=colour, label=label)
    axis.axhline(0, color="lightgrey", linewidth=0.8, zorder=0)
    axis.set_xticks(range(len(names)), names, rotation=30, ha="right", rotation_mode="anchor")
    axis.set(ylabel="cosine with the anchor's matrix")
    axis.legend()
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG; its folder is made where missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
