import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lmerge.results import (
    accuracy,
    group_tables,
    loss,
    ppl,
    print_table,
    table_rows,
    write_metrics,
)

RATE = {"accuracy": 0.25, "low": 0.2, "high": 0.305, "num_questions": 40}
SCORES = {"loss": 3.4412, "loss_low": 3.3, "loss_high": 3.5999, "ppl": 31.22, "kl": 0.0456}
BY_NAME = {"law": RATE, "math": {**RATE, "num_questions": 41}}
ANSWERED = {
    "micro": RATE,
    "macro": {**RATE, "accuracy": 0.26},
    "by_subject": BY_NAME,
    "by_domain": {"all": RATE},
    "by_language": BY_NAME,
    "calibration_error": 0.1234,
    "confusion": [[10, 0, 0, 0], [9, 1, 0, 0], [10, 0, 0, 0], [8, 0, 2, 0]],
}
CHOICES = {
    "source": ANSWERED,
    "merged": {**ANSWERED, "micro": {**RATE, "accuracy": 0.3}},
    "difference": {"value": 0.05, "low": -0.021, "high": 0.1, "p_value": 0.2},
    "mcnemar": {"only_a": 3, "only_b": 5, "p_value": 0.7265625},
}
COST = {"layers": 30, "parameters": 134_515_008, "bytes": 2**29, "prefill_tokens_per_s": 1234.5}


def results() -> dict[str, Any]:
    return {
        "cost": {"source": COST, "merged": {**COST, "layers": 27}},
        "choices": dict.fromkeys(("letter", "cloze"), CHOICES),
        "text": {"en": {"source": SCORES, "merged": {**SCORES, "ppl": 1e5}}},
    }


def read(folder: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((folder / "metrics.json").read_text())
    return data


# metrics.json.


def test_stages_do_not_overwrite_each_other(tmp_path: Path) -> None:
    write_metrics(tmp_path, "validate", {"a": 1})
    write_metrics(tmp_path, "test", {"b": 2})
    assert read(tmp_path)["validate"]["a"] == 1
    assert read(tmp_path)["test"]["b"] == 2


def test_a_stage_overwrites_itself(tmp_path: Path) -> None:
    write_metrics(tmp_path, "test", {"a": 1})
    write_metrics(tmp_path, "test", {"b": 2})
    assert read(tmp_path)["test"].keys() == {"b", "provenance"}


def test_metrics_say_their_schema_and_where_they_are_from(tmp_path: Path) -> None:
    write_metrics(tmp_path, "test", results())
    assert read(tmp_path)["schema"] == 1
    assert "lmerge" in read(tmp_path)["test"]["provenance"]


def test_numbers_that_do_not_exist_become_null(tmp_path: Path) -> None:
    found = {"a": math.nan, "b": [1.5, math.inf, {"c": (-math.inf, 2)}], "d": "nan", "e": True}
    write_metrics(tmp_path, "test", found)
    stored = read(tmp_path)["test"]
    del stored["provenance"]
    assert stored == {"a": None, "b": [1.5, None, {"c": [None, 2]}], "d": "nan", "e": True}


def test_metrics_of_another_schema_are_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_text('{"schema": 7}')
    with pytest.raises(ValueError, match=r"^[^\n]*metrics\.json[^\n]*`schema`[^\n]*\Z"):
        write_metrics(tmp_path, "test", {})


# The table.


def test_a_table_has_costs_then_choices_then_texts() -> None:
    assert [row[0] for row in table_rows(results())] == [
        "layers",
        "parameters",
        "size on disk",
        "prefill (tokens/s)",
        "accuracy, letters",
        "mean over 2 subjects, letters",
        "difference, letters",
        "calibration error, letters",
        "chosen A/B/C/D, letters",
        *(f"  where {letter} is right" for letter in "ABCD"),
        "accuracy, answer texts",
        "mean over 2 subjects, answer texts",
        "difference, answer texts",
        "calibration error, answer texts",
        "chosen A/B/C/D, answer texts",
        "loss on en text (nats/token)",
        "perplexity on en text",
        "KL from the source on en text",
    ]


def measured() -> dict[str, Any]:
    """Results with all that an evaluation measures."""
    paired = {key: CHOICES[key] for key in ("difference", "mcnemar")}
    words = {**RATE, "ppl": 20.0, "ppl_low": 10.0, "ppl_high": 40.0}
    scores = {**SCORES, "ppl_low": 27.0, "ppl_high": 36.0, "bits_per_byte": 1.2345}
    return {
        "choices": {"letter": CHOICES},
        "last_word": {"mine": {"source": words, "merged": words, **paired}},
        "text": {"en": {"source": scores, "merged": {**scores, "agreement": 0.5}}},
        "generation": {
            "source": {"distinct": 0.9, "repetition": 0.1, "texts": {"Water": " boils\nat"}},
            "merged": {"distinct": 0.1, "repetition": 0.9, "texts": {"Water": " water" * 9}},
        },
    }


@pytest.mark.parametrize(
    ("name", "cells"),
    [
        ("  where D is right", ("8/0/2/0",) * 2),
        ("last word, mine", ("25.0% [20.0, 30.5]",) * 2),
        ("difference, last word, mine", ("", "+5.0 [-2.1, +10.0], p = 0.73")),
        ("perplexity of the last word, mine", ("20.00 [10.00, 40.00]",) * 2),
        ("perplexity on en text", ("31.22 [27.00, 36.00]",) * 2),
        ("bits per byte on en text", ("1.234", "1.234")),
        ("same top token on en text", ("100%", "50.0%")),
        ("distinct bigrams, written greedily", ("0.90", "0.10")),
        ("repeated 4-grams, written greedily", ("0.10", "0.90")),
        ("Water ...", ("boils at", "water water water water water water water wat...")),
    ],
)
def test_a_table_shows_what_was_measured(name: str, cells: tuple[str, str]) -> None:
    assert (name, *cells) in table_rows(measured())


def test_results_of_a_version_that_kept_no_texts_are_shown() -> None:
    old = {"source": {"distinct": 0.9, "loops": 0.1}, "merged": {"distinct": 0.1, "loops": 0.9}}
    names = [row[0] for row in table_rows({**measured(), "generation": old})]
    assert "same top token on en text" in names
    assert not any("greedily" in name for name in names)


def test_a_table_has_source_before_merged() -> None:
    rows = {row[0]: row[1:] for row in table_rows(results())}
    assert rows["layers"] == ("30", "27")
    assert rows["parameters"] == ("134.5 M", "134.5 M")
    assert rows["accuracy, letters"] == ("25.0% [20.0, 30.5]", "30.0% [20.0, 30.5]")
    assert rows["perplexity on en text"] == ("31.22", "1e+05")
    assert rows["KL from the source on en text"] == ("0", "0.046")


def test_a_table_says_how_often_each_letter_was_chosen() -> None:
    rows = {row[0]: row[1:] for row in table_rows(results())}
    assert rows["chosen A/B/C/D, letters"] == ("37/1/2/0", "37/1/2/0")


def test_a_difference_has_its_interval_and_p_value() -> None:
    rows = {row[0]: row[1:] for row in table_rows(results())}
    assert rows["difference, letters"] == ("", "+5.0 [-2.1, +10.0], p = 0.73")


def test_groups_are_listed_where_there_are_several() -> None:
    tables = group_tables(results())
    assert [row[0] for row in tables["accuracy by group (questions), letters"]] == [
        "language law (40)",
        "language math (41)",
        "subject law (40)",
        "subject math (41)",
    ]


def test_every_accuracy_of_a_group_has_its_interval() -> None:
    for rows in group_tables(results()).values():
        assert {cell for row in rows for cell in row[1:]} == {accuracy(RATE)}


def test_a_table_without_costs_has_no_costs() -> None:
    rows = table_rows({**results(), "cost": {}})
    assert rows[0][0] == "accuracy, letters"


def test_an_accuracy_is_shown_with_its_interval() -> None:
    assert accuracy(RATE) == "25.0% [20.0, 30.5]"


def test_a_loss_is_shown_with_its_interval() -> None:
    assert loss(SCORES) == "3.441 [3.300, 3.600]"


def test_a_loss_without_an_interval_is_shown_alone() -> None:
    assert loss({**SCORES, "loss_low": math.nan, "loss_high": math.nan}) == "3.441"


@pytest.mark.parametrize(
    ("value", "text"),
    [(1.0, "1.00"), (9999.9, "9,999.90"), (123456.0, "1.23e+05"), (math.inf, "inf")],
)
def test_a_perplexity_is_short_however_large(value: float, text: str) -> None:
    assert ppl({"ppl": value}) == text


def printed(rows: list[tuple[str, str, str]], title: str) -> str:
    stream = io.StringIO()
    print_table(rows, title, Console(file=stream, width=200))
    return stream.getvalue()


def test_a_printed_table_has_every_cell() -> None:
    text = printed(table_rows(results()), "results")
    assert all(cell in text for row in table_rows(results()) for cell in row)


def test_brackets_are_printed_as_they_are() -> None:
    text = printed([("loss on [red] text", "[nan, nan]", "[/]")], "runs/[bold]x: test")
    assert all(part in text for part in ("[red]", "[nan, nan]", "[/]", "runs/[bold]x"))
