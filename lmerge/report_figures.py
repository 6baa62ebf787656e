"""Figures that only a report shows: plan, alphas, curves, differences, one heatmap at a time.

They are narrow, so that a phone shows them at nearly full size, and leave text in the theme's
colour; other colours are legible on light and dark.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle
from torch import Tensor

from lmerge.alpha_spread import Spread, spread, spread_by_layer
from lmerge.alphas import Alphas
from lmerge.history import Series
from lmerge.plan import Group, MergePlan

WIDTH = 4.4
"""Inches; 422 CSS pixels."""
ROW = 0.27
"""Inches of a row of text."""
BLUE, ORANGE, GREY = "#3d8bd4", "#e07b24", "#8a8f98"
COLOURS = (BLUE, ORANGE, "#2ba36f", "#c05fc9", "#b59a17", "#d9534f")
"""Of several runs or layers, in order; the first two are the merged model and the second run."""

BOX = "round,pad=0.02,rounding_size=0.08"
LEFT, RIGHT, BOX_WIDTH = 0.0, 3.2, 1.15


class Change(NamedTuple):
    """A difference between source and merged model, with its interval."""

    name: str
    value: float
    low: float
    high: float


def plan_figure(plan: MergePlan, alphas: Sequence[Alphas] | None = None) -> Figure:
    """Return which source layers (left) became which merged layers (right), with their alphas.

    Neighbours that stay as they are share a box. A link is as wide as the member's mean alpha.
    """
    rows = _plan_rows(plan)
    heights = {member: -i for i, members in enumerate(rows) for member in members}
    figure = Figure(figsize=(WIDTH, ROW * 1.25 * (len(rows) + 1.2)), layout="constrained")
    axis = figure.subplots()
    shares = spread_by_layer(plan, alphas) if alphas else {}
    grouped = {i for group in plan.groups for i in group.members}
    origins = plan.origins()
    for members in rows:
        if members[0] not in grouped:
            places = [origins.index(i) for i in members]
            _link(axis, heights[members[0]], heights[members[0]], 1.0, GREY)
            _box(axis, LEFT, heights[members[0]], _span(members), GREY)
            _box(axis, RIGHT, heights[members[0]], _span(places), GREY)
    for group in plan.groups:
        _draw_group(axis, group, plan.position(group), heights, shares)
    titles = {LEFT: "source layer", RIGHT: "merged layer"}
    titles |= {(LEFT + RIGHT) / 2: "alpha (90%)"} if shares else {}
    for x, title in titles.items():
        axis.text(x + BOX_WIDTH / 2, 0.95, title, ha="center", va="center", fontweight="bold")
    axis.set(xlim=(-0.1, RIGHT + BOX_WIDTH + 0.1), ylim=(-len(rows) + 0.4, 1.3))
    axis.axis("off")
    return figure


def _plan_rows(plan: MergePlan) -> list[list[int]]:
    """Return the source layers of each row: one of a group, or neighbours that stay."""
    grouped = {i for group in plan.groups for i in group.members}
    rows: list[list[int]] = []
    for i in range(plan.num_layers):
        if i in grouped or not rows or rows[-1][-1] in grouped:
            rows.append([i])
        else:
            rows[-1].append(i)
    return rows


def _span(layers: Sequence[int]) -> str:
    return str(layers[0]) if len(layers) == 1 else f"{layers[0]} to {layers[-1]}"


def _draw_group(
    axis: Axes,
    group: Group,
    position: int,
    heights: Mapping[int, float],
    shares: Mapping[int, Spread],
) -> None:
    middle = (heights[group.members[0]] + heights[group.members[-1]]) / 2
    for i in group.members:
        share, colour = shares.get(i), BLUE if i == group.anchor else ORANGE
        width = 1.5 if share is None else max(0.6, min(5.0, 5.0 * abs(share.mean)))
        _link(axis, heights[i], middle, width, colour)
        _box(axis, LEFT, heights[i], f"{i} anchor" if i == group.anchor else str(i), colour)
        if share is not None:
            axis.text(LEFT + BOX_WIDTH + 0.1, heights[i] + 0.2, _share(share), fontsize=9)
    _box(axis, RIGHT, middle, str(position), BLUE)


def _share(share: Spread) -> str:
    """Return a mean alpha, and where 90% of the alphas lie if they differ."""
    mean, low, high = (f"{round(value, 2) + 0.0:.2f}" for value in share)  # no -0.00
    return mean if low == high else f"{mean} ({low} to {high})"


def _link(axis: Axes, start: float, stop: float, width: float, colour: str) -> None:
    x = [LEFT + BOX_WIDTH, LEFT + BOX_WIDTH + 1.55, RIGHT]
    axis.plot(x, [start, start, stop], color=colour, linewidth=width, zorder=0, alpha=0.8)


def _box(axis: Axes, x: float, height: float, text: str, colour: str) -> None:
    patch = FancyBboxPatch(
        (x, height - 0.33), BOX_WIDTH, 0.66, ec=colour, fc=colour + "40", boxstyle=BOX
    )
    axis.add_patch(patch)
    axis.text(x + BOX_WIDTH / 2, height, text, ha="center", va="center")


def alphas_figure(group: Group, alphas: Alphas) -> Figure:
    """Return each member's mean alpha in each matrix, with the middle 90% of heads or neurons."""
    figure = Figure(figsize=(WIDTH, 0.36 * len(alphas) + 1.3), layout="constrained")
    axis = figure.subplots()
    shift = 0.7 / len(group.members)
    for row, alpha in enumerate(alphas.values()):
        for i, found in enumerate(spread({"": alpha})):
            y = row + (i - (len(group.members) - 1) / 2) * shift
            colour = COLOURS[i % len(COLOURS)]
            axis.plot([found.low, found.high], [y, y], color=colour, linewidth=2)
            label = f"layer {group.members[i]}" if row == 0 else None
            axis.plot([found.mean], [y], "o", color=colour, markersize=4, label=label)
    axis.axvline(0, color=GREY, linewidth=0.8, zorder=0)
    axis.axvline(1, color=GREY, linewidth=0.8, zorder=0)
    axis.set_yticks(range(len(alphas)), list(alphas))
    axis.set(xlabel="alpha")
    axis.invert_yaxis()
    figure.legend(loc="outside upper center", ncols=min(4, len(group.members)), fontsize=9)
    return figure


def loss_figure(runs: Mapping[str, Mapping[str, Series]]) -> Figure:
    """Return the loss of each step, and what was measured on held-out blocks as dots."""
    figure = Figure(figsize=(WIDTH, 3.0), layout="constrained")
    axis = figure.subplots()
    for (name, series), colour in zip(runs.items(), _cycle(len(runs)), strict=True):
        steps = series.get("train/loss", [])
        prefix = f"{name}: " if len(runs) > 1 else ""
        axis.plot(*_xy(steps), color=colour, label=f"{prefix}training")
        held = [s for metric, s in series.items() if metric.startswith("val/kl/")]
        if held:
            axis.plot(*_xy(held[0]), "o", color=colour, mec="none", label=f"{prefix}held-out KL")
    axis.set(xlabel="step", ylabel="loss (nats/token)")
    axis.legend(fontsize=9)
    return figure


def alpha_curves_figure(series: Mapping[str, Series]) -> Figure:
    """Return the mean alpha of each merged layer over the steps, in the band of the middle 90%."""
    figure = Figure(figsize=(WIDTH, 3.0), layout="constrained")
    axis = figure.subplots()
    means = {name: s for name, s in series.items() if name.startswith("alpha/mean/")}
    for (name, points), colour in zip(means.items(), _cycle(len(means)), strict=True):
        layer = name.rpartition("/")[2]
        steps, _ = _xy(points)
        low, high = (_xy(series[f"alpha/{end}/{layer}"])[1] for end in ("low", "high"))
        axis.fill_between(steps, low, high, color=colour, alpha=0.25, linewidth=0)
        axis.plot(*_xy(points), color=colour, label=f"layer {layer}")
    axis.set(xlabel="step", ylabel="alpha")
    axis.legend(fontsize=9)
    return figure


def differences_figure(runs: Mapping[str, Sequence[Change]], unit: str) -> Figure:
    """Return differences with their intervals, a row for each name, a colour for each run."""
    names = list(dict.fromkeys(c.name for changes in runs.values() for c in changes))
    figure = Figure(figsize=(WIDTH, ROW * max(1, len(runs) * 0.6) * len(names) + 1.1))
    figure.set_layout_engine("constrained")
    axis = figure.subplots()
    step = 0.6 / len(runs)
    for i, (run, changes) in enumerate(runs.items()):
        colour = COLOURS[i % len(COLOURS)]
        for change in changes:
            y = names.index(change.name) + (i - (len(runs) - 1) / 2) * step
            axis.plot([change.low, change.high], [y, y], color=colour, linewidth=2)
            axis.plot([change.value], [y], "o", color=colour, markersize=5)
        axis.plot([], [], "o-", color=colour, label=run)
    axis.axvline(0, color=GREY, linewidth=1, zorder=0)
    axis.set_yticks(range(len(names)), names)
    axis.set(xlabel=unit)
    axis.invert_yaxis()
    if len(runs) > 1:
        figure.legend(loc="outside upper center", fontsize=9)
    return figure


def heatmap_figure(
    matrix_LL: Tensor, limits: tuple[float, float], label: str, plan: MergePlan
) -> Figure:
    """Return one similarity matrix with the plan's groups framed; undefined cells are empty."""
    # Places that fit, not a layout engine: a page may hold a hundred of these.
    figure = Figure(figsize=(WIDTH, 3.7))
    axis, bar = figure.add_axes((0.12, 0.13, 0.7, 0.84)), figure.add_axes((0.84, 0.16, 0.03, 0.78))
    low, high = limits
    image = axis.imshow(
        matrix_LL.numpy(), vmin=low, vmax=high, cmap="viridis", origin="lower", interpolation="none"
    )
    for group in plan.groups if len(matrix_LL) == plan.num_layers else ():
        corner, width = (group.start - 0.5, group.start - 0.5), len(group.members)
        axis.add_patch(Rectangle(corner, width, width, fill=False, ec="#ff4d4d", lw=1.5))
    axis.set(xlabel="layer", ylabel="layer")
    figure.colorbar(image, cax=bar, label=label)
    return figure


def _cycle(count: int) -> list[str]:
    """Return a colour for each of several curves; of many, shades in their order."""
    if count <= len(COLOURS):
        return list(COLOURS[:count])
    shades = colormaps["turbo"].resampled(count + 2)
    return ["#{:02x}{:02x}{:02x}".format(*shades(i + 1, bytes=True)[:3]) for i in range(count)]


def _xy(points: Series) -> tuple[list[int], list[float]]:
    return [step for step, _ in points], [value for _, value in points]
