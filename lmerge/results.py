"""The results of a run: the table that people read and metrics.json."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lmerge.files import provenance, read_json, write_json
from lmerge.units import size

SCHEMA = 1

Row = tuple[str, str, str]

SCORING_NAMES = {"letter": "letters", "cloze": "answer texts"}

SHOWN = 48
"""Characters of a continuation that the table shows."""


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
        if key in cost["source"]:
            rows.append((label, form(cost["source"][key]), form(cost["merged"][key])))
    for scoring, both in results["choices"].items():
        rows += _choice_rows(scoring, both)
    for name, both in results.get("last_word", {}).items():
        rows.append(_row(f"last word, {name}", both, accuracy))
        rows += _difference_rows(f"last word, {name}", both)
        rows.append(_row(f"perplexity of the last word, {name}", both, ppl))
    for name, both in results["text"].items():
        rows += _text_rows(name, both)
    generation = results.get("generation", {})
    if "texts" in generation.get("source", {}):  # earlier versions kept none
        rows += _generation_rows(generation)
    return rows


def _row(label: str, both: Mapping[str, Any], form: Callable[[Any], str]) -> Row:
    return label, form(both["source"]), form(both["merged"])


def _choice_rows(scoring: str, both: Mapping[str, Any]) -> list[Row]:
    name, num_subjects = SCORING_NAMES[scoring], len(both["source"]["by_subject"])
    rows = [_row(f"accuracy, {name}", both, lambda one: accuracy(one["micro"]))]
    if num_subjects > 1:
        label = f"mean over {num_subjects} subjects, {name}"
        rows.append(_row(label, both, lambda one: accuracy(one["macro"])))
    rows += [
        *_difference_rows(name, both),
        _row(f"calibration error, {name}", both, lambda one: f"{one['calibration_error']:.3f}"),
        _row(f"chosen A/B/C/D, {name}", both, lambda one: chosen(one["confusion"])),
    ]
    pairs = zip("ABCD", *(both[model]["confusion"] for model in ("source", "merged")), strict=True)
    for letter, counts, merged_counts in pairs if scoring == "letter" else ():
        rows.append((f"  where {letter} is right", chosen([counts]), chosen([merged_counts])))
    return rows


def _difference_rows(name: str, both: Mapping[str, Any]) -> list[Row]:
    return [(f"difference, {name}", "", difference(both))]


def _text_rows(name: str, both: Mapping[str, Any]) -> list[Row]:
    rows = [
        _row(f"loss on {name} text (nats/token)", both, loss),
        _row(f"perplexity on {name} text", both, ppl),
    ]
    if "bits_per_byte" in both["source"]:
        rows.append(_row(f"bits per byte on {name} text", both, bits))
    rows.append((f"KL from the source on {name} text", "0", f"{both['merged']['kl']:.3f}"))
    if "agreement" in both["merged"]:
        share = f"{100 * both['merged']['agreement']:.1f}%"
        rows.append((f"same top token on {name} text", "100%", share))
    return rows


def _generation_rows(both: Mapping[str, Any]) -> list[Row]:
    prompt = next(iter(both["source"]["texts"]))
    return [
        _row("distinct bigrams, written greedily", both, lambda one: f"{one['distinct']:.2f}"),
        _row("repeated 4-grams, written greedily", both, lambda one: f"{one['repetition']:.2f}"),
        _row(f"{prompt} ...", both, lambda one: shorten(one["texts"][prompt], SHOWN)),
    ]


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
    """Return a perplexity, with its 95% interval where that is known."""
    ends = [scores.get(f"ppl_{end}", math.nan) for end in ("low", "high")]
    value = _ppl(scores["ppl"])
    return value if math.isnan(sum(ends)) else f"{value} [{_ppl(ends[0])}, {_ppl(ends[1])}]"


def _ppl(value: float) -> str:
    return f"{value:,.2f}" if value < 1e4 else f"{value:.3g}"


def bits(scores: Mapping[str, float]) -> str:
    """Return bits per byte."""
    return f"{scores['bits_per_byte']:.3f}"


def shorten(text: str, width: int) -> str:
    """Return the start of a text on one line."""
    line = " ".join(text.split())
    return line if len(line) <= width else f"{line[: width - 3]}..."


COST_ROWS = (
    ("layers", "layers", str),
    ("parameters", "parameters", lambda n: f"{n / 1e6:.1f} M"),
    ("bytes", "size on disk", size),
    ("peak_memory", "peak memory", size),
    ("prefill_tokens_per_s", "prefill (tokens/s)", lambda n: f"{n:.0f}"),
    ("decode_tokens_per_s", "decode (tokens/s)", lambda n: f"{n:.1f}"),
)


def print_table(rows: list[Row], title: str, console: Console | None = None) -> None:
    """Print source against merged."""
    table = Table(title=escape(title), title_justify="left")
    for name in ("", "source", "merged"):
        table.add_column(name, justify="left" if name == "" else "right")
    for row in rows:
        table.add_row(*map(escape, row))
    (console or Console()).print(table)
