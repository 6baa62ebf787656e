import json
from pathlib import Path
from typing import Any

import pytest

from lmerge.cli import main
from lmerge.diff import compare_runs, left_out, other_settings
from lmerge.statistics import mcnemar_exact


def run(chosen: list[int], nats: list[float]) -> dict[str, Any]:
    row = {"subject": "law", "language": "en", "answer": 0}
    scores = {"loss": sum(nats) / 20, "block_nats": nats, "block_tokens": [10, 10]}
    return {
        "choices": {"letter": {}},
        "questions": [{**row, "id": str(i), "letter_merged": c} for i, c in enumerate(chosen)],
        "text": {"en": {"merged": scores}},
        "last_word": {"mine": {"merged": {"item_correct": [int(c == 0) for c in chosen]}}},
        "fingerprints": {"test": "q", "eval/en": "e", "last_word/mine": "w"},
    }


def test_a_run_does_not_differ_from_itself() -> None:
    rows = compare_runs(run([0, 1, 0], [20.0, 30.0]), run([0, 1, 0], [20.0, 30.0]))
    assert [row[4:] for row in rows] == [("1", "1"), ("1", "1"), ("", "1")]
    assert rows[2][3] == "+0.0000 [+0.0000, +0.0000]"


def test_mcnemar_counts_only_questions_that_one_run_gets_right() -> None:
    (row, *_) = compare_runs(run([0] * 7 + [1], [20.0, 30.0]), run([1] * 6 + [0, 0], [20.0, 30.0]))
    assert "6 only A, 1 only B" in row[0]
    assert row[4] == "0.125"


def test_losses_are_paired_block_by_block() -> None:
    (*_, row) = compare_runs(run([0, 0], [21.0, 31.0]), run([0, 0], [20.0, 30.0]))
    assert row[3] == "+0.1000 [+0.1000, +0.1000]"


def test_runs_on_other_questions_are_refused() -> None:
    with pytest.raises(ValueError, match="same questions"):
        compare_runs(run([0, 0], [1.0, 1.0]), run([0], [1.0, 1.0]))


def test_runs_on_other_blocks_are_refused() -> None:
    other = run([0], [1.0, 1.0])
    other["text"]["en"]["merged"]["block_tokens"] = [9, 11]
    with pytest.raises(ValueError, match="same blocks"):
        compare_runs(run([0], [1.0, 1.0]), other)


def test_last_words_are_paired_text_by_text() -> None:
    (_, row, _) = compare_runs(run([0, 0, 1], [1.0, 1.0]), run([0, 1, 1], [1.0, 1.0]))
    assert row[0] == "last word, mine (1 only A, 0 only B)"
    assert row[4] == mcnemar_exact([1, 1, 0], [1, 0, 0]).p_value.__format__(".3g")


@pytest.mark.parametrize("key", ["test", "eval/en", "last_word/mine"])
def test_runs_on_other_data_of_the_same_shape_are_refused(key: str) -> None:
    other = run([0, 0], [1.0, 1.0])
    other["fingerprints"][key] = "x"
    with pytest.raises(ValueError, match=r"fingerprints . and x"):
        compare_runs(run([0, 0], [1.0, 1.0]), other)


def test_what_only_one_run_has_is_named() -> None:
    more = run([0], [1.0, 1.0])
    more["text"]["es"] = more["text"]["en"]
    assert left_out(more, run([0], [1.0, 1.0])) == ["Not compared, since only A has it: text es."]


def test_other_options_of_the_evaluation_are_named() -> None:
    a, b = ({"settings": {"num_shots": n, "stride": None}} for n in (0, 5))
    assert other_settings(a, b) == ["Not the same `data.num_shots`: 0 in A, 5 in B."]


def write(folder: Path, **stages: dict[str, Any]) -> Path:
    folder.mkdir()
    (folder / "metrics.json").write_text(json.dumps({"schema": 1, **stages}))
    return folder


def test_the_stage_is_test_where_both_runs_have_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = run([0, 0], [1.0, 1.0])
    both = write(tmp_path / "both", validate=results, test=results)
    one = write(tmp_path / "one", validate=results)
    main(["diff", str(both), str(both)])
    assert "test:" in capsys.readouterr().out
    main(["diff", str(both), str(one)])
    assert "validate:" in capsys.readouterr().out


def test_a_run_that_was_not_evaluated_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = write(tmp_path / "one", validate=run([0, 0], [1.0, 1.0]))
    with pytest.raises(SystemExit) as stop:
        main(["diff", str(one), str(one), "--stage=test"])
    assert stop.value.code == 2
    assert "lmerge test" in capsys.readouterr().err
