"""The sentence and the table of a report: what was removed and what it cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lmerge.gate import Check, gate_rows
from lmerge.report_figures import Change
from lmerge.report_run import RunRecord
from lmerge.results import (
    COST_ROWS,
    SCORING_NAMES,
    Row,
    accuracy,
    bits,
    difference,
    loss,
    ppl,
    table_rows,
)
from lmerge.statistics import paired_bootstrap

Results = Mapping[str, Any]


class CostRow(NamedTuple):
    """A row of the table."""

    label: str
    source: str
    merged: str
    change: str
    """Merged against source, with its interval where that is known."""


def cost_groups(results: Results) -> dict[str, list[CostRow]]:
    """Return the rows of one evaluation under their titles."""
    checks = [Check(**check) for check in results.get("gate", ())]
    groups = {
        "Size and speed": _size_rows(results.get("cost", {})),
        "Text": [row for name, both in results["text"].items() for row in _text_rows(name, both)],
        "Questions": _question_rows(results),
        "Gate": [CostRow(label[6:], limit, value, "") for label, limit, value in gate_rows(checks)],
    }
    return {title: rows for title, rows in groups.items() if rows}


def _size_rows(cost: Results) -> list[CostRow]:
    rows = []
    for key, label, form in COST_ROWS if cost else ():
        if key in cost["source"]:
            before, after = cost["source"][key], cost["merged"][key]
            change = f"{after - before:+d}" if key == "layers" else f"{after / before - 1:+.1%}"
            rows.append(CostRow(label, form(before), form(after), change))
    return rows


def _text_rows(name: str, both: Results) -> list[CostRow]:
    source, merged = both["source"], both["merged"]
    ratio = merged["ppl"] / source["ppl"]
    rows = [
        CostRow(f"loss on {name} (nats/token)", loss(source), loss(merged), loss_change(both)),
        CostRow(f"perplexity on {name}", ppl(source), ppl(merged), f"x {ratio:.3f}"),
    ]
    if "bits_per_byte" in source:
        above = f"{merged['bits_per_byte'] - source['bits_per_byte']:+.3f}"
        rows.append(CostRow(f"bits per byte on {name}", bits(source), bits(merged), above))
    rows.append(CostRow(f"KL from the source on {name}", "0", f"{merged['kl']:.3f}", ""))
    if "agreement" in merged:
        share = f"{merged['agreement']:.1%}"
        rows.append(CostRow(f"same top token on {name}", "100%", share, ""))
    return rows


def loss_change(both: Results) -> str:
    """Return merged minus source in nats a token, with its interval over blocks of the text."""
    source, merged = both["source"], both["merged"]
    if "block_nats" not in source:  # written by an earlier version
        return f"{merged['loss'] - source['loss']:+.3f}"
    found = paired_bootstrap(
        merged["block_nats"], source["block_nats"], seed=0, weights=source["block_tokens"]
    )
    ends = "" if math.isnan(found.low) else f" [{found.low:+.3f}, {found.high:+.3f}]"
    return f"{found.value:+.3f}{ends}"


def _question_rows(results: Results) -> list[CostRow]:
    rows = []
    for scoring, both in results["choices"].items():
        before, after = (accuracy(both[model]["micro"]) for model in ("source", "merged"))
        label = f"accuracy, {SCORING_NAMES[scoring]}"
        rows.append(CostRow(label, before, after, difference(both)))
    for name, both in results.get("last_word", {}).items():
        before, after = (accuracy(both[model]) for model in ("source", "merged"))
        rows.append(CostRow(f"last word, {name}", before, after, difference(both)))
    return rows


def other_rows(results: Results) -> list[Row]:
    """Return what was measured besides: (what, source, merged)."""
    known = {row.label for rows in cost_groups(results).values() for row in rows}
    texts = {label.removesuffix(" text") for label in known}
    rows = table_rows({**results, "cost": {}, "text": {}})
    kept = [row for row in rows if row[0] not in known | texts]
    return [row for row in kept if not row[0].startswith("difference") and "..." not in row[0][-4:]]


def sentence(record: RunRecord, results: Results | None) -> str:
    """Return what was removed and what it cost."""
    plan = record.plan
    what = f"{plan.num_removed} of the {plan.num_layers} layers of {record.source} were removed"
    if plan.groups:
        spans = [f"layers {g.members[0]} to {g.members[-1]} became one" for g in plan.groups]
        what += f": {', '.join(spans)}"
    if results is None:
        return f"{what}; what it cost has not been measured."
    return f"{what}; {_join([*_size_parts(results), *_cost_parts(results)])}."


def _size_parts(results: Results) -> list[str]:
    cost = results.get("cost", {})
    if not cost:
        return []
    share = 1 - cost["merged"]["parameters"] / cost["source"]["parameters"]
    speed = cost["merged"]["prefill_tokens_per_s"] / cost["source"]["prefill_tokens_per_s"]
    return [f"the model lost {share:.1%} of its parameters", f"reads {speed:.2f} times as fast"]


def _cost_parts(results: Results) -> list[str]:
    parts = []
    for name, both in results["text"].items():
        before, after = (both[model]["loss"] for model in ("source", "merged"))
        parts.append(f"its loss on {name} text went from {before:.3f} to {after:.3f} nats a token")
    for scoring, both in results["choices"].items():
        before, after = (both[model]["micro"]["accuracy"] for model in ("source", "merged"))
        name = SCORING_NAMES[scoring]
        parts.append(f"its accuracy by {name} from {before:.1%} to {after:.1%}")
    return parts


def _join(parts: Sequence[str]) -> str:
    return ", ".join(parts[:-1]) + (" and " if len(parts) > 1 else "") + parts[-1]


def subject_changes(results: Results, scoring: str) -> list[Change]:
    """Return merged minus source accuracy in points: all questions, each language, each subject.

    Intervals are from the paired bootstrap over questions.
    """
    rows = [row for row in results["questions"] if f"{scoring}_merged" in row]
    groups: dict[str, list[Mapping[str, Any]]] = {"all": rows}
    languages = sorted({row["language"] for row in rows})
    for language in languages if len(languages) > 1 else ():
        groups[f"language {language}"] = [r for r in rows if r["language"] == language]
    for subject in sorted({row["subject"] for row in rows}):
        groups[subject] = [row for row in rows if row["subject"] == subject]
    return [_change(name, found, scoring) for name, found in groups.items() if found]


def _change(name: str, rows: Sequence[Mapping[str, Any]], scoring: str) -> Change:
    merged, source = (
        [float(row[f"{scoring}_{model}"] == row["answer"]) for row in rows]
        for model in ("merged", "source")
    )
    found = paired_bootstrap(merged, source, seed=0)
    label = f"{name} ({len(rows)})"
    return Change(label, *(100 * number for number in (found.value, found.low, found.high)))


def same_data(first: Results, other: Results) -> bool:
    """Return whether two evaluations had the same source, questions, texts and settings."""
    keys = ("source_fingerprint", "fingerprints", "settings")
    return all(first.get(key) == other.get(key) for key in keys)
