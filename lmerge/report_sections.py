"""The sections of a report that are tables and texts, as plain data for the template."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

from lmerge.diff import HEAD, Stage, compare_runs, left_out, other_settings
from lmerge.gate import Check
from lmerge.report_run import RunRecord
from lmerge.report_table import cost_groups, other_rows, same_data, sentence

Results = Mapping[str, Any]
Item = dict[str, Any]


def run_items(records: Sequence[RunRecord], stage: Stage) -> list[Item]:
    """Return the sentence and the verdict of each run."""
    items = []
    for record in records:
        results = record.stages.get(stage)
        checks = [Check(**check) for check in (results or {}).get("gate", ())]
        failed = [check.name for check in checks if not check.passed]
        verdict = None
        if checks and not failed:
            verdict = {"kind": "passed", "text": f"✓ passed all {len(checks)} checks of the gate"}
        elif failed:
            verdict = {"kind": "failed", "text": f"✗ failed its gate: {', '.join(failed)}"}
        items.append(
            {"name": record.name, "sentence": sentence(record, results), "verdict": verdict}
        )
    return items


def cost_section(records: Sequence[RunRecord], stage: Stage) -> Item | None:
    """Return the table of what the runs cost, None where none was evaluated."""
    found = {r.name: r.stages[stage] for r in records if stage in r.stages}
    if not found:
        return None
    first = next(iter(found.values()))
    shared = all(same_data(first, results) for results in found.values())
    columns = [{"short": "source", "full": "source"}] if shared else []
    for name in found:
        full = f"{name}: " if len(found) > 1 else ""
        kinds = ("merged", "change") if shared else ("source", "merged", "change")
        columns += [{"short": kind, "full": full + kind} for kind in kinds]
    split = "the test questions" if stage == "test" else "validation questions"
    note = f"Measured by lmerge {stage}, on {split}; in brackets 95% intervals."
    if not shared:
        note += " The runs were measured on different data: compare each with its own source alone."
    return {
        "note": note,
        "runs": list(found),
        "shared": shared,
        "columns": columns,
        "groups": _cost_rows(list(found.values()), shared=shared),
        "others": [{"run": name, "rows": other_rows(r)} for name, r in found.items()],
    }


def _cost_rows(found: Sequence[Results], *, shared: bool) -> list[Item]:
    by_run = [cost_groups(results) for results in found]
    groups = []
    for title in dict.fromkeys(title for groups in by_run for title in groups):
        tables = [{row.label: row for row in groups.get(title, ())} for groups in by_run]
        rows = []
        for label in dict.fromkeys(label for table in tables for label in table):
            here = [table.get(label) for table in tables]
            sources = list(dict.fromkeys(row.source for row in here if row))
            # The source is timed anew in each run: all its values stand in the one column.
            cells = [" / ".join(sources)] if shared else []
            for row in here:
                cells += ([] if shared else [row.source if row else ""]) + (
                    [row.merged, row.change] if row else ["", ""]
                )
            rows.append({"label": label, "cells": cells})
        groups.append({"title": title, "rows": rows})
    return groups


def pair_items(records: Sequence[RunRecord], stage: Stage) -> list[Item]:
    """Return the paired tests of every other run against the first."""
    found = [record for record in records if stage in record.stages]
    items = []
    for other in found[1:]:
        a, b = other.stages[stage], found[0].stages[stage]
        item: Item = {"a": other.name, "b": found[0].name, "head": HEAD}
        try:
            rows, notes = compare_runs(a, b), [*left_out(a, b), *other_settings(a, b)]
        except (ValueError, KeyError) as error:  # KeyError: written by an earlier version
            rows, notes = [], [f"Not comparable: {error}"]
        items.append({**item, "rows": rows, "notes": notes})
    return items


def text_items(records: Sequence[RunRecord], stage: Stage) -> list[Item]:
    """Return what the source and each merged model write after each prompt."""
    found = {r.name: r.stages[stage]["generation"] for r in records if _has_texts(r, stage)}
    items: dict[str, list[Item]] = {}
    for name, both in found.items():
        label = f"merged: {name}" if len(found) > 1 else "merged"
        for prompt, text in both["source"]["texts"].items():
            text, merged = (t.lstrip(" ") for t in (text, both["merged"]["texts"].get(prompt, "")))
            written = items.setdefault(prompt, [{"model": "source", "same": "", "rest": text}])
            same = len(
                list(takewhile(lambda pair: pair[0] == pair[1], zip(text, merged, strict=False)))
            )
            written.append({"model": label, "same": merged[:same], "rest": merged[same:]})
    return [{"prompt": prompt, "written": written} for prompt, written in items.items()]


def _has_texts(record: RunRecord, stage: Stage) -> bool:
    return "texts" in record.stages.get(stage, {}).get("generation", {}).get("source", {})


def reproduce_items(records: Sequence[RunRecord], stage: Stage) -> list[Item]:
    """Return the commands that make each run again, and what they were run with."""
    items = []
    for record in records:
        run_dir = str(record.config.get("run_dir", record.run_dir))
        config = shlex.quote(f"{run_dir}/config.yaml")
        lines = ["# The same run in another folder; its options are in config.yaml below."]
        lines += [f"lmerge fit --config {config} --run_dir {shlex.quote(run_dir + '-again')}"]
        lines += ["", "# Measured again, and on the test questions; this page again."]
        lines += [f"lmerge {name} --config {config}" for name in ("validate", "test")]
        lines += [f"lmerge report {shlex.quote(run_dir)}"]
        item: Item = {"run": record.name, "commands": "\n".join(lines)}
        facts = _facts(record.stages.get(stage, {}))
        items.append({**item, "facts": facts, "config": record.config_text})
    return items


def _facts(results: Results) -> list[list[str]]:
    seeds = {f"seed of {name}": value for name, value in results.get("seeds", {}).items()}
    marks = {f"fingerprint of {k}": v for k, v in results.get("fingerprints", {}).items()}
    if results.get("source_fingerprint"):
        marks["fingerprint of the source"] = results["source_fingerprint"]
    known = {**results.get("provenance", {}), **seeds, **marks}
    return [[name, str(value)] for name, value in known.items() if value is not None]


def missing_items(records: Sequence[RunRecord], stage: Stage) -> list[Item]:
    """Return a line for each section that lacks a run, and the command that makes its data."""
    config = "RUN/config.yaml"
    rows: tuple[tuple[str, list[RunRecord], str], ...] = (
        (
            "what it cost, subjects, and what the models write",
            [r for r in records if stage not in r.stages],
            f"lmerge {stage} --config {config}",
        ),
        (
            "what the models write",
            [r for r in records if stage in r.stages and not _has_texts(r, stage)],
            f"lmerge {stage} --config {config}",
        ),
        (
            "how alike the layers are, by domain and language",
            [r for r in records if not r.similarity],
            "lmerge similarity --out_dir DIR, then lmerge report RUN --similarity DIR",
        ),
        (
            "matched neurons",
            [r for r in records if not r.alignment],
            f"lmerge fit --config {config} --alignment.method weights",
        ),
        (
            "curves of the loss",
            [r for r in records if "train/loss" not in r.series],
            f"lmerge fit --config {config} --trainer.max_steps 30",
        ),
        (
            "curves of the alphas",
            [r for r in records if not any(n.startswith("alpha/") for n in r.series)],
            f"lmerge fit --config {config} --trainer.max_steps 30",
        ),
    )
    several = len(records) > 1
    return [
        {"what": what, "runs": ", ".join(r.name for r in lacking if several), "command": command}
        for what, lacking, command in rows
        if lacking
    ]
