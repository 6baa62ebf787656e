"""The results of a run: the table that people read and metrics.json."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lmerge.files import provenance, read_json, write_json

SCHEMA = 1

Row = tuple[str, str, str]

SCORING_NAMES = {"letter": "letters", "cloze": "answer texts"}


def write_metrics(run_dir: Path, stage: str, results: Mapping[str, Any]) -> None:
    """Put the results of a stage into metrics.json; other stages' results stay.

    Args:
        run_dir: The run folder.
        stage: `validate` or `test`.
        results: JSON data; numbers that are not finite become null.
    """
    path = run_dir / "metrics.json"
    data = read_json(path, schema=SCHEMA) if path.is_file() else {}
    data[stage] = {**_finite(results), "provenance": provenance()}
    write_json(path, data, schema=SCHEMA)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def restored(value: Any) -> Any:
    """Return results read from metrics.json with NaN where a number did not exist."""
    if isinstance(value, Mapping):
        return {key: restored(item) for key, item in value.items()}
    if isinstance(value, list):
        return [restored(item) for item in value]
    return math.nan if value is None else value


def table_rows(results: Mapping[str, Any]) -> list[Row]:
    """Return (what, source, merged) for the table of one evaluation."""
    rows: list[Row] = []
    cost = results.get("cost", {})
    for key, label, form in COST_ROWS if cost else ():
        rows.append((label, form(cost["source"][key]), form(cost["merged"][key])))
    for scoring, both in results["choices"].items():
        rows += _choice_rows(SCORING_NAMES[scoring], both)
    for name, both in results["text"].items():
        rows.append(
            (f"loss on {name} text (nats/token)", loss(both["source"]), loss(both["merged"]))
        )
        rows.append((f"perplexity on {name} text", ppl(both["source"]), ppl(both["merged"])))
        rows.append((f"KL from the source on {name} text", "0", f"{both['merged']['kl']:.3f}"))
    return rows


def group_tables(results: Mapping[str, Any]) -> dict[str, list[Row]]:
    """Return, by title, the accuracies of domains, languages and subjects where there are several.

    Args:
        results: Results of one evaluation.
    """
    tables = {}
    for scoring, both in results["choices"].items():
        rows: list[Row] = []
        for kind in ("domain", "language", "subject"):
            before, after = (both[model][f"by_{kind}"] for model in ("source", "merged"))
            for name in before if len(before) > 1 else ():
                label = f"{kind} {name} ({before[name]['num_questions']})"
                rows.append((label, accuracy(before[name]), accuracy(after[name])))
        if rows:
            tables[f"accuracy by group (questions), {SCORING_NAMES[scoring]}"] = rows
    return tables


def _choice_rows(name: str, both: Mapping[str, Any]) -> list[Row]:
    source, merged, num_subjects = both["source"], both["merged"], len(both["source"]["by_subject"])
    rows = [(f"accuracy, {name}", accuracy(source["micro"]), accuracy(merged["micro"]))]
    if num_subjects > 1:
        label = f"mean over {num_subjects} subjects, {name}"
        rows.append((label, accuracy(source["macro"]), accuracy(merged["macro"])))
    errors = [f"{x['calibration_error']:.3f}" for x in (source, merged)]
    return [
        *rows,
        (f"difference, {name}", "", difference(both)),
        (f"calibration error, {name}", errors[0], errors[1]),
        (f"chosen A/B/C/D, {name}", chosen(source["confusion"]), chosen(merged["confusion"])),
    ]


def difference(both: Mapping[str, Any]) -> str:
    """Return merged minus source in percentage points, and McNemar's p-value."""
    value, low, high = (100 * both["difference"][key] for key in ("value", "low", "high"))
    p_value = both["mcnemar"]["p_value"]
    # The interval of a single question does not exist.
    ends = "" if math.isnan(low) else f" [{low:+.1f}, {high:+.1f}]"
    return f"{value:+.1f}{ends}, p = {p_value:.2g}"


def accuracy(rate: Mapping[str, float]) -> str:
    """Return an accuracy with its 95% interval in percent."""
    value, low, high = (100 * rate[key] for key in ("accuracy", "low", "high"))
    return f"{value:.1f}% [{low:.1f}, {high:.1f}]"


def chosen(confusion: Sequence[Sequence[int]]) -> str:
    """Return how often each choice was taken, so that a model that always says A is visible."""
    return "/".join(str(sum(column)) for column in zip(*confusion, strict=True))


def loss(scores: Mapping[str, float]) -> str:
    """Return a loss with its 95% interval, which a text of one block does not have."""
    if math.isnan(scores["loss_low"]):
        return f"{scores['loss']:.3f}"
    return f"{scores['loss']:.3f} [{scores['loss_low']:.3f}, {scores['loss_high']:.3f}]"


def ppl(scores: Mapping[str, float]) -> str:
    """Return a perplexity."""
    return f"{scores['ppl']:,.2f}" if scores["ppl"] < 1e4 else f"{scores['ppl']:.3g}"


def size(num_bytes: float) -> str:
    """Return a number of bytes for people, in units of 1024."""
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.2f} GiB"


COST_ROWS = (
    ("layers", "layers", str),
    ("parameters", "parameters", lambda n: f"{n / 1e6:.1f} M"),
    ("bytes", "size of the weights", size),
    ("prefill_tokens_per_s", "prefill (tokens/s)", lambda n: f"{n:.0f}"),
)


def print_table(rows: list[Row], title: str, console: Console | None = None) -> None:
    """Print source against merged."""
    table = Table(title=escape(title), title_justify="left")
    for name in ("", "source", "merged"):
        table.add_column(name, justify="left" if name == "" else "right")
    for row in rows:
        table.add_row(*map(escape, row))
    (console or Console()).print(table)
