"""How well plans travel: losses by question -> rows with intervals, a table, a figure's numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lmerge.statistics import Difference, Interval, paired_bootstrap, stratified_bootstrap
from lmerge.tables import markdown_table
from lmerge.transfer import MIXED, Groups, Rule

Refitted = Literal["own", "mixed"]
"""Text that a plan is refitted on: its own domain's, or as much of all domains in turn."""
Nats = Mapping[str, Sequence[float]]
"""Domain measured on -> nats of each question."""
Plans = Mapping[tuple[Rule, int, str], Groups]
"""Rule, layers removed and the text that the plan was made on -> its groups."""
Models = Mapping[tuple[Groups, str], Nats]
"""Groups and the text of its refit -> losses."""


class Row(NamedTuple):
    """A plan of one domain, measured on another."""

    rule: Rule
    num_removed: int
    refit: Refitted
    """`own`: the plan's domain was calibrated on too; `mixed`: all domains alike."""
    plan_from: str
    measured_on: str
    groups: str
    """First and last layer of each group, such as `12-15`."""
    increase: Difference
    """Loss above the source's, in nats a token."""
    regret: Difference | None
    """Loss above that of the plan that was made on the measured domain; None for that one."""


class Summary(NamedTuple):
    """A rule in one line."""

    rule: Rule
    num_removed: int
    refit: Refitted
    num_plans: int
    """Different blocks that the domains chose."""
    home: float
    """Mean increase on the domain that the plan was made on."""
    away: float
    """Mean increase on the other domains."""
    regret: float
    """Mean loss of a foreign plan above the home one."""
    interval: Interval
    """Of the regret, over questions."""


def show(groups: Groups) -> str:
    """Return the first and last layer of each group."""
    return " ".join(f"{group.start}-{group.stop - 1}" for group in groups)


def transfer_rows(
    plans: Plans,
    models: Models,
    source: Nats,
    tokens: Nats,
    *,
    refits: Sequence[Refitted],
    seed: int,
) -> list[Row]:
    """Return a row for each rule, number of layers, refit, plan and measured domain."""
    rows = []
    for (rule, num_removed, name), groups in plans.items():
        for refit in refits:
            if name == MIXED and refit == "own":
                continue
            nats = models[groups, name if refit == "own" else MIXED]
            for other in tokens:
                home = models[plans[rule, num_removed, other], other if refit == "own" else MIXED]
                rows.append(
                    Row(
                        rule,
                        num_removed,
                        refit,
                        name,
                        other,
                        show(groups),
                        _difference(nats[other], source[other], tokens[other], seed),
                        None
                        if other == name
                        else _difference(nats[other], home[other], tokens[other], seed),
                    )
                )
    return rows


def _difference(
    a: Sequence[float], b: Sequence[float], tokens: Sequence[float], seed: int
) -> Difference:
    return paired_bootstrap(a, b, seed=seed, weights=tokens)


def summaries(
    rows: Sequence[Row], plans: Plans, models: Models, tokens: Nats, *, seed: int
) -> list[Summary]:
    """Return a line for each rule, number of layers and refit."""
    found = []
    domains = list(dict.fromkeys(name.rpartition("/")[0] for name in tokens))
    seeds = [seed + domains.index(name.rpartition("/")[0]) for name in tokens]
    for rule, num_removed, refit in dict.fromkeys((r.rule, r.num_removed, r.refit) for r in rows):
        chosen = [
            row for row in rows if row[:3] == (rule, num_removed, refit) and row.plan_from != MIXED
        ]
        home = [row.increase.value for row in chosen if row.regret is None]
        away = [row.increase.value for row in chosen if row.regret is not None]
        regret = [row.regret.value for row in chosen if row.regret is not None]
        interval = stratified_bootstrap(
            [_mean_regret(plans, models, tokens, rule, num_removed, refit, b) for b in tokens],
            seeds=seeds,
            weights=[list(t) for t in tokens.values()],
        )
        blocks = {plans[rule, num_removed, name] for name in tokens}
        found.append(
            Summary(
                rule,
                num_removed,
                refit,
                len(blocks),
                _mean(home),
                _mean(away),
                _mean(regret),
                interval,
            )
        )
    return found


def _mean_regret(
    plans: Plans,
    models: Models,
    tokens: Nats,
    rule: Rule,
    num_removed: int,
    refit: Refitted,
    measured_on: str,
) -> Tensor:
    """Return, for each question, the mean over foreign plans of its nats above the home plan's."""

    def nats(name: str) -> Tensor:
        text = name if refit == "own" else MIXED
        found = models[plans[rule, num_removed, name], text][measured_on]
        return torch.tensor(found, dtype=torch.float64)

    home_N = nats(measured_on)
    return torch.stack([nats(n) - home_N for n in tokens if n != measured_on]).mean(dim=0)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def row_record(row: Row) -> dict[str, Any]:
    """Return a row as JSON data."""
    regret = None if row.regret is None else row.regret._asdict()
    return {**row._asdict(), "increase": row.increase._asdict(), "regret": regret}


def transfer_markdown(rows: Sequence[Row], lines: Sequence[Summary]) -> str:
    """Return the summary and one table for each rule, number of layers and refit."""
    parts = [markdown_table(*summary_columns(lines)) + "\n"]
    for rule, num_removed, refit in dict.fromkeys((r.rule, r.num_removed, r.refit) for r in rows):
        chosen = [row for row in rows if row[:3] == (rule, num_removed, refit)]
        text = "the plan's domain" if refit == "own" else "all domains alike"
        parts.append(f"### {rule}, {num_removed} layers removed, refitted on {text}\n")
        parts.append(_table(chosen))
    return "\n".join(parts)


def summary_columns(lines: Sequence[Summary]) -> tuple[list[str], list[list[str]]]:
    """Return heading and cells of a table with one line for each rule, number and refit."""
    heading = ["plan by", "removed", "refit on", "different plans", "increase at home", "elsewhere"]
    heading.append("a foreign plan costs (95%)")
    cells = [
        [
            *(x.rule, str(x.num_removed), x.refit, str(x.num_plans)),
            *(f"{x.home:.3f}", f"{x.away:.3f}"),
            f"{x.regret:+.3f} [{x.interval.low:+.3f}, {x.interval.high:+.3f}]",
        ]
        for x in lines
    ]
    return heading, cells


def _table(rows: Sequence[Row]) -> str:
    heading = ["plan made on", "block", *dict.fromkeys(row.measured_on for row in rows)]
    lines = []
    for name in dict.fromkeys(row.plan_from for row in rows):
        own = [row for row in rows if row.plan_from == name]
        lines.append([name, own[0].groups, *map(_cell, own)])
    return markdown_table(heading, lines) + "\n"


def _cell(row: Row) -> str:
    value = f"{row.increase.value:.3f} [{row.increase.low:.3f}, {row.increase.high:.3f}]"
    return value + mark(row)


def mark(row: Row) -> str:
    """Return what a cell says of the home plan: `*` surely worse than it, `+` surely better."""
    if row.regret is None:
        return ""
    return "*" if row.regret.low > 0 else "+" if row.regret.high < 0 else ""


Panel = tuple[list[str], list[str], Tensor, list[list[str]]]
"""Names of the plans, names of the measured domains, values, texts."""


def figure_panels(rows: Sequence[Row]) -> dict[str, Panel]:
    """Return a heatmap for each rule and number of layers, refitted on the mixed text if it is."""
    refit = MIXED if any(row.refit == MIXED for row in rows) else "own"
    panels = {}
    for rule, num_removed in dict.fromkeys((row.rule, row.num_removed) for row in rows):
        chosen = [row for row in rows if row[:3] == (rule, num_removed, refit)]
        plans = list(dict.fromkeys(row.plan_from for row in chosen))
        lines = [[row for row in chosen if row.plan_from == name] for name in plans]
        panels[f"{rule}, {num_removed} layers removed, refitted on {refit}"] = (
            [f"{line[0].plan_from} ({line[0].groups})" for line in lines],
            list(dict.fromkeys(row.measured_on for row in chosen)),
            torch.tensor([[row.increase.value for row in line] for line in lines]),
            [[f"{row.increase.value:.2f}{mark(row)}" for row in line] for line in lines],
        )
    return panels
