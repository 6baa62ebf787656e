from typing import Any

import pytest

from lmerge.diff import compare_runs


def run(chosen: list[int], nats: list[float]) -> dict[str, Any]:
    row = {"subject": "law", "language": "en", "answer": 0}
    scores = {"loss": sum(nats) / 20, "block_nats": nats, "block_tokens": [10, 10]}
    return {
        "choices": {"letter": {}},
        "questions": [{**row, "id": str(i), "letter_merged": c} for i, c in enumerate(chosen)],
        "text": {"en": {"merged": scores}},
    }


def test_a_run_does_not_differ_from_itself() -> None:
    rows = compare_runs(run([0, 1, 0], [20.0, 30.0]), run([0, 1, 0], [20.0, 30.0]))
    assert [row[4] for row in rows] == ["1", "1"]
    assert rows[1][3] == "+0.0000 [+0.0000, +0.0000]"


def test_mcnemar_counts_only_questions_that_one_run_gets_right() -> None:
    (row, _) = compare_runs(run([0] * 7 + [1], [20.0, 30.0]), run([1] * 6 + [0, 0], [20.0, 30.0]))
    assert "6 only A, 1 only B" in row[0]
    assert row[4] == "0.125"


def test_losses_are_paired_block_by_block() -> None:
    (_, row) = compare_runs(run([0, 0], [21.0, 31.0]), run([0, 0], [20.0, 30.0]))
    assert row[3] == "+0.1000 [+0.1000, +0.1000]"


def test_runs_on_other_questions_are_refused() -> None:
    with pytest.raises(ValueError, match="same questions"):
        compare_runs(run([0, 0], [1.0, 1.0]), run([0], [1.0, 1.0]))


def test_runs_on_other_blocks_are_refused() -> None:
    other = run([0], [1.0, 1.0])
    other["text"]["en"]["merged"]["block_tokens"] = [9, 11]
    with pytest.raises(ValueError, match="same blocks"):
        compare_runs(run([0], [1.0, 1.0]), other)
