"""Agreements of similarity matrices as a table: JSON records, CSV, Markdown."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from lmerge.agreement import Agreement
from lmerge.similarity import Measure
from lmerge.statistics import Interval
from lmerge.tables import markdown_table, print_columns

HEADING = [
    "measure",
    "a",
    "b",
    "Pearson, full",
    "Spearman, full",
    "Pearson, off-diagonal",
    "95%",
    "Spearman, off-diagonal",
    "halves",
    "halves, within",
    "undefined",
]
PRINTED = [*HEADING[:3], *HEADING[5:8], *HEADING[10:]]
"""What a terminal shows: not the published correlations, which include the constant diagonal."""


class Row(NamedTuple):
    """The agreement of two groups by one measure."""

    measure: Measure
    a: str
    b: str
    agreement: Agreement
    interval: Interval | None
    """Of Pearson's correlation off the diagonal, over prompts; None where it is unknown."""
    half: float | None
    """Mean correlation of a's matrix and b's from disjoint halves of the prompts."""
    half_within: float | None
    """The same for a with itself and b with itself, averaged: what agreement could reach."""


def as_record(row: Row) -> dict[str, Any]:
    """Return a row as JSON data; None for a number that does not exist."""
    numbers = {k: v if math.isfinite(v) else None for k, v in row.agreement._asdict().items()}
    interval = {"low": None, "high": None} if row.interval is None else row.interval._asdict()
    return {
        "measure": row.measure,
        "a": row.a,
        "b": row.b,
        **numbers,
        **interval,
        "half": row.half,
        "half_within": row.half_within,
    }


def table_csv(rows: Sequence[Row]) -> str:
    """Return the correlations as CSV; an empty cell is an undefined number."""
    records = [as_record(row) for row in rows]
    names = list(records[0]) if records else ["measure", "a", "b"]
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def columns(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Return heading and cells of the table for people."""
    lines = []
    for row in rows:
        found = row.agreement
        between = "-" if row.interval is None else "{:.3f} to {:.3f}".format(*row.interval)
        cells = [row.measure, row.a, row.b]
        cells += [_show(found.pearson_full), _show(found.spearman_full)]
        cells += [_show(found.pearson_upper), between, _show(found.spearman_upper)]
        cells += [_show(row.half), _show(row.half_within), str(found.num_undefined)]
        lines.append(cells)
    return HEADING, lines


def table_markdown(rows: Sequence[Row]) -> str:
    """Return the correlations as a Markdown table."""
    return markdown_table(*columns(rows)) + "\n"


def print_agreements(rows: Sequence[Row]) -> None:
    """Print the correlations off the diagonal, with their intervals; the files hold the rest."""
    heading, lines = columns(rows)
    shown = [heading.index(name) for name in PRINTED]
    print_columns(
        "Agreement of layer similarities",
        [heading[i] for i in shown],
        [[line[i] for i in shown] for line in lines],
        num_keys=3,
    )


def _show(value: float | None) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:.4f}"
