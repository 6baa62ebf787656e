import json
import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from cli_run import fit, run
from conftest import tiny_model
from models import tokens

from lmerge.gate import GateConfig, check_gate, gate_notes
from lmerge.generation import generation_sanity, greedy, repeated_share


def results(ppl: float = 31.0, kl: float = 0.1, accuracy: float = 0.25) -> dict[str, Any]:
    return {
        "text": {"en": {"source": {"ppl": 30.0}, "merged": {"ppl": ppl, "kl": kl}}},
        "choices": {
            "letter": {
                "source": {"micro": {"accuracy": 0.25}},
                "merged": {"micro": {"accuracy": accuracy, "high": accuracy}},
            }
        },
        "generation": {
            "source": {"distinct": 0.8, "repetition": 0.25},
            "merged": {"distinct": 0.7, "repetition": 0.4},
        },
    }


def failed(found: dict[str, Any], config: GateConfig | None = None) -> list[str]:
    return [c.name for c in check_gate(found, config or GateConfig()) if not c.passed]


def test_a_model_close_to_its_source_passes() -> None:
    assert failed(results()) == []


def test_chance_level_letters_do_not_hide_a_destroyed_text_model() -> None:
    names = ["perplexity ratio on en text", "KL on en text"]
    assert failed(results(ppl=31_010.0, kl=7.0)) == names


def test_a_value_at_its_limit_passes() -> None:
    exact = GateConfig(max_kl=0.5, min_accuracy_ratio=0.5, max_ppl_ratio=2.0, min_distinct=0.7)
    assert failed(results(ppl=60.0, kl=0.5, accuracy=0.125), exact) == []


@pytest.mark.parametrize("ppl", [math.inf, math.nan])
def test_a_perplexity_that_is_no_number_fails(ppl: float) -> None:
    assert failed(results(ppl=ppl)) == ["perplexity ratio on en text"]


def test_a_limit_of_null_switches_a_check_off() -> None:
    assert failed(results(kl=7.0), GateConfig(max_kl=None)) == []


def test_a_failed_gate_is_named_in_the_card() -> None:
    (note,) = gate_notes(check_gate(results(kl=7.0), GateConfig()))
    assert "FAILED" in note
    assert "KL on en text" in note


def test_a_model_that_repeats_itself_fails() -> None:
    broken = results()
    broken["generation"]["merged"] = generation_sanity([[7] * 48, [1, 2, 3] * 16])
    names = ["distinct bigrams", "repetition beyond the source's"]
    assert failed(broken) == names


def test_a_source_that_repeats_itself_too_is_no_worse() -> None:
    found = results()
    found["generation"]["source"]["repetition"] = 0.45
    found["generation"]["merged"]["repetition"] = 0.9
    assert failed(found) == []


@pytest.mark.parametrize(
    ("text", "share"),
    [
        (range(20), 0.0),
        ([5] * 20, 16 / 17),
        ([1, 2, 3] * 6, 12 / 15),
        ([1, 2, 3, 4, 5, 1, 2, 3, 4], 1 / 6),
    ],
)
def test_repetition_is_the_share_of_four_grams_that_were_there_before(
    text: list[int], share: float
) -> None:
    slow = sum(
        any(text[j : j + 4] == text[i : i + 4] for j in range(i)) for i in range(len(text) - 3)
    )
    assert repeated_share(list(text)) == pytest.approx(share)
    assert slow / (len(text) - 3) == pytest.approx(share)


def test_distinct_bigrams_are_counted_over_all_texts() -> None:
    assert generation_sanity([[1, 2, 3, 1, 2], [1, 2, 9, 9, 9]])["distinct"] == 5 / 8


def test_last_words_count_as_answers() -> None:
    found = results()
    found["last_word"] = {"mine": {"source": {"accuracy": 0.5}, "merged": {"high": 0.3}}}
    assert failed(found) == ["accuracy ratio (upper end), last word, mine"]


def test_greedy_with_a_cache_and_padding_is_greedy_without() -> None:
    model, token_BT = tiny_model(), tokens(num_rows=2)
    prompts = [token_BT[0], token_BT[1, :5]]
    for prompt_T, found in zip(prompts, greedy(model, prompts, 8), strict=True):
        slow = model.generate(prompt_T[None], max_new_tokens=8, do_sample=False, eos_token_id=None)
        assert found == slow[0, len(prompt_T) :].tolist()


def test_an_impossible_limit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"gate\.max_ppl_ratio"):
        GateConfig(max_ppl_ratio=0.5)


def test_a_loss_within_the_interval_may_be_chance() -> None:
    scores = results(accuracy=0.1)
    scores["choices"]["letter"]["merged"]["micro"]["high"] = 0.3
    assert all(check.passed for check in check_gate(scores, GateConfig()))


# The program.


def test_a_failed_gate_ends_in_exit_code_3_and_marks_table_metrics_and_card(
    tiny_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    with pytest.raises(SystemExit) as stop:
        fit(tiny_dir, run_dir, "--gate.max_kl=1e-6")
    assert stop.value.code == 3
    shown = capsys.readouterr()
    assert "failed its gate" in shown.err
    assert "FAILED" in shown.out
    gate = json.loads((run_dir / "metrics.json").read_text())["validate"]["gate"]
    assert not next(check for check in gate if check["name"] == "KL on en text")["passed"]
    card = run_dir / "model" / "README.md"
    assert "FAILED its quality gate: KL on en text" in card.read_text()
    none = [f"--gate.{f.name}=null" for f in fields(GateConfig) if f.name != "enforce"]
    run("validate", "--config", run_dir / "config.yaml", *none)
    assert "FAILED" not in card.read_text()
