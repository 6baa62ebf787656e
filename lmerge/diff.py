"""Comparison of two runs on the same questions and the same blocks of text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lmerge.files import read_json
from lmerge.results import SCHEMA
from lmerge.statistics import mcnemar_exact, paired_bootstrap

Stage = Literal["validate", "test"]
DiffRow = tuple[str, str, str, str, str]


def diff(run_a: Path, run_b: Path, stage: Stage = "test") -> None:
    """Compare the merged models of two runs question by question and block by block.

    Args:
        run_a: Run folder of the first model.
        run_b: Run folder of the second model, evaluated on the same data.
        stage: Stage whose results are compared.
    """
    rows = compare_runs(read_stage_results(run_a, stage), read_stage_results(run_b, stage))
    table = Table(title=escape(f"{stage}: {run_a} (A) minus {run_b} (B)"), title_justify="left")
    for name in ("", "A", "B", "A - B [95%]", "p"):
        table.add_column(name, justify="left" if name == "" else "right")
    for row in rows:
        table.add_row(*map(escape, row))
    Console().print(table)


def read_stage_results(run_dir: Path, stage: Stage) -> dict[str, Any]:
    """Return what metrics.json of a run holds of a stage.

    Raises:
        ValueError: If the run was not evaluated in this stage.
    """
    data = read_json(run_dir / "metrics.json", schema=SCHEMA)
    if stage not in data:
        raise ValueError(
            f"{run_dir / 'metrics.json'} must hold results of `{stage}`, got {sorted(data)}. "
            f"Run `lmerge {stage}` on that run, or choose another `--stage`."
        )
    found: dict[str, Any] = data[stage]
    return found


def compare_runs(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[DiffRow]:
    """Return (what, A, B, difference with its 95% interval, p-value) of two merged models.

    Accuracies: p-value of McNemar's exact test; losses: of the paired bootstrap over blocks.

    Args:
        a: Results of one stage of the first run, as in metrics.json.
        b: The same stage of the second run.

    Raises:
        ValueError: If the runs share nothing, or were not measured on the same data.
    """
    rows = [_choice_row(a, b, s) for s in a["choices"] if s in b["choices"]]
    rows += [_text_row(a, b, name) for name in a["text"] if name in b["text"]]
    if not rows:
        raise ValueError(
            "two runs must share a scoring or a text, got none. Evaluate both with the same "
            "`--data.scorings` and `--data.eval_text`."
        )
    return rows


def _choice_row(a: Mapping[str, Any], b: Mapping[str, Any], scoring: str) -> DiffRow:
    right_a, right_b = (_right(run["questions"], scoring) for run in (a, b))
    if right_a.keys() != right_b.keys():
        raise ValueError(
            f"two runs must answer the same questions, got {len(right_a.keys() ^ right_b.keys())} "
            f"that only one of them has ({scoring}). Evaluate both with the same `--data` options."
        )
    values_a, values_b = [right_a[key] for key in right_a], [right_b[key] for key in right_a]
    difference = paired_bootstrap(values_a, values_b, seed=0)
    test = mcnemar_exact(values_a, values_b)
    return (
        f"accuracy, {scoring} ({test.only_a} only A, {test.only_b} only B)",
        f"{100 * sum(values_a) / len(values_a):.1f}%",
        f"{100 * sum(values_b) / len(values_b):.1f}%",
        "{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100 * x for x in difference[:3])),
        f"{test.p_value:.3g}",
    )


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
        f"{found.value:+.4f} [{found.low:+.4f}, {found.high:+.4f}]",
        f"{found.p_value:.3g}",
    )
