import pytest
import torch
from conftest import byte_tokenizer, tiny_model
from models import plan_of, tokens

from lmerge.alphas import AlphaConfig
from lmerge.cache import cache_states
from lmerge.data.records import Question
from lmerge.llama import capture_outputs, run_span, span
from lmerge.losses import (
    LossConfig,
    answer_loss,
    group_states,
    letter_prompts,
    relative_error,
)
from lmerge.merged import MergedLlama


def test_the_relative_error_is_1_for_an_output_of_zeros() -> None:
    target_BTD = torch.randn(2, 3, 8)
    assert float(relative_error(torch.zeros_like(target_BTD), target_BTD)) == pytest.approx(1)


def test_group_states_are_those_that_hooks_see() -> None:
    model, plan, seen = tiny_model(), plan_of([0, 1], [2, 3]), []
    with torch.no_grad(), capture_outputs(model, seen):
        model(tokens(3), use_cache=False)
    prefix_BTD = cache_states(model, tokens(3), 0).prefix_BTD
    first, second = group_states(model, prefix_BTD, plan)
    torch.testing.assert_close(first.output_BTD, seen[1])
    torch.testing.assert_close(second.input_BTD, seen[1])
    torch.testing.assert_close(second.output_BTD, seen[3])


def test_the_answer_loss_is_the_letters_cross_entropy_and_trains_the_alphas() -> None:
    questions = [
        Question(
            id=str(i),
            subject="anatomy",
            split="val",
            language="en",
            text="What is it?" * (i + 1),
            choices=("a", "b", "c", "d"),
            answer=i,
        )
        for i in range(3)
    ]
    model = tiny_model()
    letters = letter_prompts(questions, byte_tokenizer())
    merged = MergedLlama(model, plan_of([1, 2]), {}, AlphaConfig())
    loss = answer_loss(merged.causal_lm, letters, [0, 2])
    slow = [
        -merged.causal_lm(letters.prompts[i][None], use_cache=False)
        .logits[0, -1]
        .log_softmax(-1)[letters.letter_4[i]]
        for i in (0, 2)
    ]
    torch.testing.assert_close(loss, torch.stack(slow).mean())
    loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in merged.alpha_parameters().values())


@pytest.mark.parametrize(
    "options",
    [{"kl": 0.0}, {"kl": -1.0}, {"state": float("nan")}, {"num_top": -1}, {"num_questions": 0}],
)
def test_weights_without_a_loss_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]*`loss\.[^\n]*$"):
        LossConfig(**options)


def test_the_local_loss_is_zero_for_a_layer_that_is_the_group() -> None:
    model = tiny_model()
    prefix_BTD = cache_states(model, tokens(3), 1).prefix_BTD
    (states,) = group_states(model, prefix_BTD, plan_of([1, 2]))
    output = run_span(span(model, 1, 3), states.input_BTD)
    assert relative_error(output, states.output_BTD).item() < 1e-10
