"""Sweeps and comparisons in W&B: one run each, with a table, charts, figures and a summary."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lmerge.compare_table import Cell, Row, held_out_loss, pareto_figure
from lmerge.files import one_line
from lmerge.sweep_figures import best_so_far_figure, importance_figure, parallel_figure
from lmerge.trials import SweepConfig, Trial, metric_name, sign
from lmerge.wandb_log import PROJECT, WandbMode


@contextmanager
def wandb_run(mode: WandbMode, folder: Path, name: str, kind: str, group: str) -> Iterator[Any]:
    """Yield a W&B run of a command without a Trainer; None where W&B is disabled.

    Args:
        mode: `offline` writes files in the folder, `online` sends them.
        folder: Folder of the command's results.
        name: Name of the run.
        kind: Its job type.
        group: Group of the run.

    Raises:
        ValueError: When W&B refuses the run.
    """
    if mode == "disabled" or os.environ.get("WANDB_MODE") == "disabled":
        yield None
        return
    import wandb

    try:
        run = wandb.init(
            project=PROJECT, name=name, job_type=kind, group=group, dir=folder, mode=mode
        )
    except wandb.Error as error:
        raise ValueError(
            f"W&B must be reachable for `--wandb {mode}`, got: {one_line(error)}. The results are "
            f"in {folder}; run `wandb login`, or use `--wandb offline`."
        ) from error
    try:
        yield run
    finally:
        run.finish()


def log_cells(run: Any, rows: Sequence[Row], cells: Sequence[Cell]) -> None:
    """Log a comparison: its table, loss against parameters, the figure, each budget's best.

    Args:
        run: The W&B run.
        rows: Rows of the table, as in compare.csv.
        cells: Results of each method at each budget.
    """
    import wandb

    names: list[str | int] = list(dict.fromkeys(name for row in rows for name in row))
    data = [[row.get(str(name)) for name in names] for row in rows]
    table = wandb.Table(columns=names, data=data)
    head: list[str | int] = ["method", "removed", "loss above the source", "M parameters"]
    points = wandb.Table(columns=head, data=[_point(cell) for cell in cells])
    title = "Loss above the source on held-out texts (nats/token)"
    run.log(
        {
            "compare/cells": table,
            "compare/loss": wandb.plot.scatter(points, str(head[3]), str(head[2]), title=title),
            "compare/pareto": wandb.Image(pareto_figure(cells)),
        }
    )
    for num_removed in sorted({cell["num_removed"] for cell in cells}):
        here = [cell for cell in cells if cell["num_removed"] == num_removed]
        best = min(here, key=held_out_loss)
        run.summary[f"best/-{num_removed}/method"] = best["method"]
        run.summary[f"best/-{num_removed}/loss_increase"] = held_out_loss(best)


def _point(cell: Cell) -> list[Any]:
    parameters = cell["cost"]["model"]["parameters"] / 1e6
    return [cell["method"], cell["num_removed"], held_out_loss(cell), parameters]


def log_trials(run: Any, config: SweepConfig, trials: Sequence[Trial]) -> None:
    """Log a sweep: each trial as a step, the table, figures, and the best trial as summary.

    Args:
        run: The W&B run.
        config: The sweep file.
        trials: The trials that have a metric.
    """
    import wandb

    name, minimise = metric_name(config), sign(config) > 0
    run.config.update({"sweep": dict(config)})
    run.define_metric("trial")
    for key in ("metric", "best"):
        goal = "min" if minimise else "max"
        run.define_metric(f"sweep/{key}", step_metric="trial", summary=f"{goal},last")
    options = sorted({key for trial in trials for key in trial.params})
    best = min(trials, key=lambda trial: sign(config) * _metric(trial))
    so_far = _metric(trials[0])
    for trial in trials:
        so_far = (min if minimise else max)(so_far, _metric(trial))
        run.log({"trial": trial.index, "sweep/metric": _metric(trial), "sweep/best": so_far})
    rows = [
        [t.index, t.state, t.seconds, t.metric, *(str(t.params.get(k)) for k in options)]
        for t in trials
    ]
    run.log(
        {
            "sweep/trials": wandb.Table(["trial", "state", "seconds", name, *options], rows),
            "sweep/best_so_far": wandb.Image(best_so_far_figure(trials, name, minimise=minimise)),
            "sweep/parallel": wandb.Image(parallel_figure(trials, name)),
            "sweep/importance": wandb.Image(importance_figure(trials, name)),
        }
    )
    run.summary.update({"best/trial": best.index, f"best/{name}": best.metric})
    run.summary.update({f"best/{key}": value for key, value in best.params.items()})


def _metric(trial: Trial) -> float:
    assert trial.metric is not None, "trials without a metric are left out"
    return trial.metric


def sweep_title(config: Mapping[str, Any], path: Path) -> str:
    """Return a sweep's name: that in the file, else the file's own."""
    return str(config.get("name") or path.stem)
