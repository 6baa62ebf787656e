import math
from typing import Any

import pytest
from conftest import tiny_model
from models import tokens

from lmerge.gate import GateConfig, check_gate, gate_notes
from lmerge.generation import ends_in_loop, greedy


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
            "source": {"distinct": 0.8, "loops": 0.25},
            "merged": {"distinct": 0.7, "loops": 0.5},
        },
    }


def failed(found: dict[str, Any], config: GateConfig | None = None) -> list[str]:
    return [c.name for c in check_gate(found, config or GateConfig()) if not c.passed]


def test_a_model_close_to_its_source_passes() -> None:
    assert failed(results()) == []


def test_chance_level_letters_do_not_hide_a_destroyed_text_model() -> None:
    names = ["perplexity ratio on en text", "KL on en text"]
    assert failed(results(ppl=31_010.0, kl=7.0)) == names


@pytest.mark.parametrize("ppl", [math.inf, math.nan])
def test_a_perplexity_that_is_no_number_fails(ppl: float) -> None:
    assert failed(results(ppl=ppl)) == ["perplexity ratio on en text"]


def test_a_limit_of_null_switches_a_check_off() -> None:
    assert failed(results(kl=7.0), GateConfig(max_kl=None)) == []


def test_a_failed_gate_is_named_in_the_card() -> None:
    (note,) = gate_notes(check_gate(results(kl=7.0), GateConfig()))
    assert "FAILED" in note
    assert "KL on en text" in note


@pytest.mark.parametrize(("text", "loops"), [([1, 2, 3, 1, 2] * 3, True), (range(20), False)])
def test_endless_repetition_is_seen(text: list[int], loops: bool) -> None:
    assert ends_in_loop(list(text)) is loops


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
