"""Comparison of two runs on the same questions and the same blocks of text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.markup import escape

from lmerge.files import read_json
from lmerge.results import SCHEMA
from lmerge.statistics import mcnemar_exact, paired_bootstrap
from lmerge.tables import print_columns

Stage = Literal["validate", "test"]

HEAD = ("", "A", "B", "A - B [95%]", "p, McNemar", "p, bootstrap")
DiffRow = tuple[str, str, str, str, str, str]


def diff(run_a: Path, run_b: Path, stage: Stage | None = None) -> None:
    """Compare the merged models of two runs question by question and block by block.

    Args:
        run_a: Run folder of the first model.
        run_b: Run folder of the second model, evaluated on the same data.
        stage: Stage whose results are compared; null for `test` where both runs have it, else
            `validate`.
    """
    read = [read_json(run / "metrics.json", schema=SCHEMA) for run in (run_a, run_b)]
    stage = stage or ("test" if all("test" in data for data in read) else "validate")
    a, b = (stage_results(data, run, stage) for data, run in zip(read, (run_a, run_b), strict=True))
    print_columns(f"{stage}: {run_a} (A) minus {run_b} (B)", HEAD, compare_runs(a, b))
    for line in [*left_out(a, b), *other_settings(a, b)]:
        Console().print(escape(line))


def stage_results(data: Mapping[str, Any], run_dir: Path, stage: Stage) -> dict[str, Any]:
    """Return what the metrics.json of a run holds of a stage.

    Raises:
        ValueError: If the run was not evaluated in this stage.
    """
    if stage not in data:
        raise ValueError(
            f"{run_dir / 'metrics.json'} must hold results of `{stage}`, got {sorted(data)}. "
            f"Run `lmerge {stage}` on that run, or choose another `--stage`."
        )
    found: dict[str, Any] = data[stage]
    return found


def compare_runs(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[DiffRow]:
    """Return the rows of the table: A, B, the difference and its p-values of two merged models.

    The p-values are those of McNemar's exact test, for right and wrong answers, and of the paired
    bootstrap over questions or blocks, from which the interval is too.

    Args:
        a: Results of one stage of the first run, as in metrics.json.
        b: The same stage of the second run.

    Raises:
        ValueError: If the runs share nothing, or were not measured on the same data.
    """
    rows = [_choice_row(a, b, s) for s in a["choices"] if s in b["choices"]]
    words_a, words_b = (run.get("last_word", {}) for run in (a, b))
    rows += [_word_row(a, b, name) for name in words_a if name in words_b]
    rows += [_text_row(a, b, name) for name in a["text"] if name in b["text"]]
    if not rows:
        raise ValueError(
            "two runs must share a scoring or a text, got none. Evaluate both with the same "
            "`--data.scorings` and `--data.eval_text`."
        )
    return rows


def left_out(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Return a line for what only one of the runs was measured on."""
    lines = []
    for kind in ("choices", "last_word", "text"):
        names_a, names_b = (run.get(kind, {}) for run in (a, b))
        for run, mine, other in (("A", names_a, names_b), ("B", names_b, names_a)):
            names = [name for name in mine if name not in other]
            if names:
                lines.append(f"Not compared, since only {run} has it: {kind} {', '.join(names)}.")
    return lines


def other_settings(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Return a line for each option of the evaluation that differs, such as `num_shots`."""
    before, after = (run.get("settings", {}) for run in (a, b))
    return [
        f"Not the same `data.{name}`: {before[name]} in A, {after[name]} in B."
        for name in before
        if name in after and before[name] != after[name]
    ]


def _check_same(a: Mapping[str, Any], b: Mapping[str, Any], key: str, what: str) -> None:
    marks = [run.get("fingerprints", {}).get(key) for run in (a, b)]
    if marks[0] != marks[1]:
        raise ValueError(
            f"two runs must read the same {what}, got the fingerprints {marks[0]} and {marks[1]}. "
            "Evaluate both with the same `--data` options."
        )


def _choice_row(a: Mapping[str, Any], b: Mapping[str, Any], scoring: str) -> DiffRow:
    right_a, right_b = (_right(run["questions"], scoring) for run in (a, b))
    if right_a.keys() != right_b.keys():
        raise ValueError(
            f"two runs must answer the same questions, got {len(right_a.keys() ^ right_b.keys())} "
            f"that only one of them has ({scoring}). Evaluate both with the same `--data` options."
        )
    for split in ("val", "test"):
        _check_same(a, b, split, f"questions ({split})")
    pairs = [(right_a[key], right_b[key]) for key in right_a]
    return _paired_row(f"accuracy, {scoring}", [x for x, _ in pairs], [y for _, y in pairs])


def _word_row(a: Mapping[str, Any], b: Mapping[str, Any], name: str) -> DiffRow:
    _check_same(a, b, f"last_word/{name}", f"texts of {name} for the last word")
    hits = [run["last_word"][name]["merged"]["item_correct"] for run in (a, b)]
    return _paired_row(f"last word, {name}", *hits)


def _paired_row(what: str, a: Sequence[bool], b: Sequence[bool]) -> DiffRow:
    test, found = mcnemar_exact(a, b), paired_bootstrap(a, b, seed=0)
    return (
        f"{what} ({test.only_a} only A, {test.only_b} only B)",
        f"{100 * sum(a) / len(a):.1f}%",
        f"{100 * sum(b) / len(b):.1f}%",
        _interval([100 * x for x in found[:3]], ".1f"),
        f"{test.p_value:.3g}",
        f"{found.p_value:.3g}",
    )


def _interval(numbers: Sequence[float], form: str) -> str:
    value, low, high = (format(x, f"+{form}") for x in numbers)
    # One unit says nothing of the spread.
    return value if math.isnan(numbers[1]) else f"{value} [{low}, {high}]"


def _right(questions: Sequence[Mapping[str, Any]], scoring: str) -> dict[tuple[str, ...], bool]:
    """Return whether the merged model is right, by everything that names a question."""
    return {
        (row["subject"], row["language"], row["id"], str(row["answer"])): (
            row[f"{scoring}_merged"] == row["answer"]
        )
        for row in questions
    }


def _text_row(a: Mapping[str, Any], b: Mapping[str, Any], name: str) -> DiffRow:
    first, second = a["text"][name]["merged"], b["text"][name]["merged"]
    for run in (first, second):
        if "block_nats" not in run:
            raise ValueError(
                f"metrics.json must hold `block_nats` of text {name}, got none. It was written by "
                "an earlier version; evaluate the run again."
            )
    _check_same(a, b, f"eval/{name}", f"text {name}")
    tokens = first["block_tokens"]
    if tokens != second["block_tokens"]:
        raise ValueError(
            f"two runs must read the same blocks of text {name}, got {sum(tokens)} and "
            f"{sum(second['block_tokens'])} tokens in other blocks. Evaluate both with the same "
            "`--data` options and tokenizer."
        )
    found = paired_bootstrap(first["block_nats"], second["block_nats"], seed=0, weights=tokens)
    return (
        f"loss on {name} text (nats/token)",
        f"{first['loss']:.3f}",
        f"{second['loss']:.3f}",
        _interval(found[:3], ".4f"),
        "",
        f"{found.p_value:.3g}",
    )
