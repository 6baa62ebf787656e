"""Studies of similarity and of transfer in W&B: one run each, with tables, figures, a summary."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from lmerge import agreement_table, transfer_table
from lmerge.agreement_table import as_record
from lmerge.similarity import Measure


def log_agreements(
    run: Any, rows: Sequence[agreement_table.Row], figures: Mapping[Measure, Figure]
) -> None:
    """Log how alike the layer similarities of domains and languages are.

    Args:
        run: The W&B run.
        rows: Rows of the table, as in correlations.csv.
        figures: The heatmaps of each measure.
    """
    import wandb

    records = [as_record(row) for row in rows]
    if records:
        names: list[str | int] = list(records[0])
        data = [list(record.values()) for record in records]
        run.log({"similarity/agreement": wandb.Table(columns=names, data=data)})
    run.log({f"similarity/{name}": wandb.Image(figure) for name, figure in figures.items()})
    for measure in dict.fromkeys(row.measure for row in rows):
        found = [row.agreement.pearson_upper for row in rows if row.measure == measure]
        defined = [value for value in found if math.isfinite(value)]
        if defined:
            run.summary[f"agreement/{measure}/mean"] = sum(defined) / len(defined)
            run.summary[f"agreement/{measure}/least"] = min(defined)


def log_transfer(
    run: Any,
    rows: Sequence[transfer_table.Row],
    lines: Sequence[transfer_table.Summary],
    figure: Figure,
) -> None:
    """Log what plans of one domain cost on another.

    Args:
        run: The W&B run.
        rows: A plan on a measured domain each.
        lines: A rule, number of layers and refit each.
        figure: The heatmaps of transfer.png.
    """
    import wandb

    head: list[str | int] = [*transfer_table.Row._fields[:6], "increase", "low", "high", "regret"]
    data = [
        [*row[:6], *row.increase[:3], None if row.regret is None else row.regret.value]
        for row in rows
    ]
    costs = wandb.Table(
        columns=["plan", "foreign plan costs", "low", "high"],
        data=[[_name(x), x.regret, x.interval.low, x.interval.high] for x in lines],
    )
    title = "Loss of a plan made on another domain above the domain's own (nats/token)"
    run.log(
        {
            "transfer/rows": wandb.Table(columns=head, data=data),
            "transfer/costs": wandb.plot.bar(costs, "plan", "foreign plan costs", title=title),
            "transfer/losses": wandb.Image(figure),
        }
    )
    for line in lines:
        for key in ("home", "away", "regret", "num_plans"):
            run.summary[f"{_name(line)}/{key}"] = getattr(line, key)


def _name(line: transfer_table.Summary) -> str:
    return f"{line.rule} -{line.num_removed} {line.refit}"
