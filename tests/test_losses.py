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
    exact_kl,
    group_states,
    letter_prompts,
    relative_error,
    top_logits,
    truncated_kl,
)
from lmerge.merged import MergedLlama

GENERATOR = torch.Generator().manual_seed(5)
SOURCE_NV = 3 * torch.randn(20, 50, generator=GENERATOR)
MERGED_NV = SOURCE_NV + torch.randn(20, 50, generator=GENERATOR)


def test_kl_agrees_with_the_slow_sum() -> None:
    p, q = SOURCE_NV.double().softmax(-1), MERGED_NV.double().softmax(-1)
    slow = sum(float(a * (a / b).log()) for a, b in zip(p.flatten(), q.flatten(), strict=True)) / 20
    assert float(exact_kl(SOURCE_NV, MERGED_NV)) == pytest.approx(slow, rel=1e-5)


def test_the_truncated_kl_rises_to_the_exact_one() -> None:
    exact = float(exact_kl(SOURCE_NV, MERGED_NV))
    found = [float(truncated_kl(top_logits(SOURCE_NV, k), MERGED_NV)) for k in (1, 4, 16, 49, 50)]
    assert found == sorted(found) or found[:-1] == sorted(found[:-1])
    assert all(value <= exact + 1e-5 for value in found)
    assert found[2] > 0.8 * exact
    assert found[-2:] == pytest.approx([exact, exact], rel=1e-4)


def test_the_truncated_kl_of_equal_logits_is_zero_with_zero_gradient() -> None:
    merged_NV = SOURCE_NV.clone().requires_grad_()
    loss = truncated_kl(top_logits(SOURCE_NV, 8), merged_NV)
    loss.backward()
    assert abs(loss.item()) < 1e-5
    assert float(merged_NV.grad.abs().max()) < 1e-5


def test_the_truncated_kl_is_finite_where_the_source_is_certain() -> None:
    certain_NV = torch.zeros(2, 50)
    certain_NV[:, 3] = 200
    merged_NV = (-certain_NV).requires_grad_()
    loss = truncated_kl(top_logits(certain_NV, 4), merged_NV)
    loss.backward()
    assert loss.isfinite()
    assert merged_NV.grad.isfinite().all()


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
