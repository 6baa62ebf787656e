"""Figures of a sweep: best so far, parallel coordinates, importance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from scipy.stats import rankdata

from lmerge.trials import Trial, short_names


def best_so_far_figure(trials: Sequence[Trial], metric: str, *, minimise: bool) -> Figure:
    """Return each trial's metric and the best up to it."""
    values = np.array([trial.metric for trial in trials], dtype=float)
    best = (np.minimum if minimise else np.maximum).accumulate(values)
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axis = figure.subplots()
    index = [trial.index for trial in trials]
    axis.plot(index, values, "o", color="grey", label="trial")
    axis.step(index, best, where="post", color="steelblue", label="best so far")
    axis.set(xlabel="trial", ylabel=metric)
    axis.legend()
    return figure


def parallel_figure(trials: Sequence[Trial], metric: str) -> Figure:
    """Return one line a trial over all options, coloured by the metric's rank."""
    short = short_names(trials[0].params)
    values = {short[name]: [trial.params[name] for trial in trials] for name in short}
    columns = [_heights(codes(trials, name), values[short[name]]) for name in short]
    values[metric] = [trial.metric for trial in trials]
    columns.append(np.array(values[metric], dtype=float))
    scaled = np.stack([_to_unit(column) for column in columns])
    colour = _to_unit(rankdata(columns[-1]))
    figure = Figure(figsize=(1.6 * len(columns) + 2, 3.8), layout="constrained")
    axis = figure.subplots()
    for i in range(len(trials)):
        axis.plot(scaled[:, i], color=colormaps["viridis"](colour[i]), alpha=0.7)
    for place, (named, column) in enumerate(zip(values.values(), scaled, strict=True)):
        axis.axvline(place, color="lightgrey", linewidth=0.8, zorder=0)
        for height, text in _ticks(named, column).items():
            axis.annotate(text, (place, height), (3, 3), textcoords="offset points", fontsize=7)
    axis.set_xticks(range(len(columns)), list(values), rotation=20, ha="right")
    axis.set(yticks=[], ylim=(-0.05, 1.1), title="dark lines: small metric")
    return figure


def _heights(codes_N: np.ndarray[Any, Any], values: Sequence[Any]) -> np.ndarray[Any, Any]:
    """Return an option's place on its axis: logarithmic over a wide range, one for each name."""
    if not _are_numbers(values):
        order = sorted(set(zip(codes_N.tolist(), map(str, values), strict=True)))
        names = [name for _, name in order]
        return np.array([names.index(str(value)) for value in values], dtype=float)
    is_wide = codes_N.min() > 0 and codes_N.max() > 50 * codes_N.min()
    return np.log(codes_N) if is_wide else codes_N


def _ticks(values: Sequence[Any], scaled_N: np.ndarray[Any, Any]) -> dict[float, str]:
    """Return what to write at which height: both ends, or each value that is no number."""
    if _are_numbers(values):
        ends = (int(scaled_N.argmin()), int(scaled_N.argmax()))
        return {float(scaled_N[i]): f"{values[i]:.3g}" for i in ends}
    return {float(height): str(v) for height, v in zip(scaled_N, values, strict=True)}


def _are_numbers(values: Sequence[Any]) -> bool:
    return all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)


def importance_figure(trials: Sequence[Trial], metric: str) -> Figure:
    """Return how strongly each option goes with the metric, see `importance`."""
    shares = importance(trials)
    figure = Figure(figsize=(6, 0.5 * len(shares) + 1.5), layout="constrained")
    axis = figure.subplots()
    short = short_names(trials[0].params)
    axis.barh([short[name] for name in shares], list(shares.values()), color="steelblue")
    axis.set(xlim=(0, 1), xlabel=f"|rank correlation| with {metric}, {len(trials)} trials")
    return figure


def importance(trials: Sequence[Trial]) -> dict[str, float]:
    """Return the absolute Spearman correlation of each option with the metric, in [0, 1].

    Values that are not numbers are ranked by their mean metric. An option with an effect that
    rises and falls again looks unimportant here.
    """
    target = rankdata([trial.metric for trial in trials])
    found = {}
    for name in trials[0].params:
        ranks = rankdata(codes(trials, name))
        varies = len(trials) > 1 and np.ptp(ranks) > 0 and np.ptp(target) > 0
        found[name] = float(abs(np.corrcoef(ranks, target)[0, 1])) if varies else 0.0
    return dict(sorted(found.items(), key=lambda item: item[1]))


def codes(trials: Sequence[Trial], name: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return an option's values as numbers; other values by the mean metric of each."""
    values = [trial.params[name] for trial in trials]
    if _are_numbers(values):
        return np.array(values, dtype=float)
    keys = [str(value) for value in values]
    metric = np.array([trial.metric for trial in trials], dtype=float)
    means = {key: metric[[k == key for k in keys]].mean() for key in keys}
    return np.array([means[key] for key in keys])


def _to_unit(column: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    span = np.ptp(column)
    return (column - column.min()) / span if span else np.full(len(column), 0.5)
