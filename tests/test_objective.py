"""The training objective: equal values by every path, and exact gradients."""

from itertools import product
from typing import get_args

import pytest
import torch
from conftest import byte_tokenizer, tiny_model
from models import plan_of, tokens
from torch import Tensor, nn
from transformers import PreTrainedModel

from lmerge.alphas import AlphaConfig, Granularity
from lmerge.cache import StateCache, cache_states, keep_states
from lmerge.data.records import Question
from lmerge.divergence import exact_kl
from lmerge.llama import lm_logits
from lmerge.losses import LOSS_NAMES, LossConfig, LossName, letter_prompts
from lmerge.merged import MergedLlama
from lmerge.objective import Objective

PLAN = plan_of([1, 2, 3])
INDEX_B = torch.tensor([2, 0])
QUESTIONS = [
    Question(
        id=str(i), subject="anatomy", split="val", language="en", text="Where?" * (i + 1),
        choices=("a", "b", "c", "d"), answer=i,
    )
    for i in range(3)
]  # fmt: skip


def exact_model() -> PreTrainedModel:
    """A tiny model all of whose sums run in float64; transformers' own norms use float32."""
    model = tiny_model()
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__ == "LlamaRMSNorm":
                norm = nn.RMSNorm(child.weight.shape[0], eps=child.variance_epsilon)
                norm.weight = child.weight
                setattr(module, name, norm)
    return model.double()


def objective(model: PreTrainedModel, config: AlphaConfig, loss: LossConfig) -> Objective:
    merged = MergedLlama(model, PLAN, {}, config).to(model.dtype)
    cache = cache_states(model, tokens(3), merged.first_merged)
    letters = letter_prompts(QUESTIONS, byte_tokenizer())
    return Objective(model, merged, cache, loss, letters=letters)


def weight_of(name: LossName) -> LossConfig:
    return LossConfig(**{**dict.fromkeys(LOSS_NAMES, 0.0), name: 1.0})


@pytest.mark.parametrize(
    ("granularity", "loss", "simplex"),
    list(product(get_args(Granularity), LOSS_NAMES, (False, True))),
)
def test_gradients_agree_with_finite_differences(
    granularity: Granularity, loss: LossName, simplex: bool
) -> None:
    config = AlphaConfig(granularity=granularity, start="uniform", simplex=simplex)
    found = objective(exact_model(), config, weight_of(loss))
    found(INDEX_B, 0)["loss"].backward()
    generator = torch.Generator().manual_seed(3)
    for parameter in found.merged.alpha_parameters().values():
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        values = []
        for sign in (1, -1):
            parameter.data += sign * 1e-5 * direction
            values.append(float(found(INDEX_B, 0)["loss"].detach()))
            parameter.data -= sign * 1e-5 * direction
        slope = (values[0] - values[1]) / 2e-5
        assert float(parameter.grad.abs().sum()) > 1e-4
        assert float((parameter.grad * direction).sum()) == pytest.approx(slope, rel=1e-6, abs=1e-9)


def plain_kl(found: Objective, place_P: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The loss from whole logits of both models, without any cache, and its gradients."""
    token_BT = tokens(3)[INDEX_B]
    merged_BTV = found.merged.causal_lm(token_BT, use_cache=False).logits
    with torch.no_grad():
        source_BTV = found.source(token_BT, use_cache=False).logits
    loss = exact_kl(source_BTV[:, place_P].flatten(0, 1), merged_BTV[:, place_P].flatten(0, 1))
    return loss, list(torch.autograd.grad(loss, list(found.merged.alpha_parameters().values())))


@pytest.mark.parametrize("num_positions", [0, 5])
def test_the_cached_kl_and_its_gradient_are_those_of_whole_logits(num_positions: int) -> None:
    found = objective(tiny_model(), AlphaConfig(start="uniform"), LossConfig())
    found.num_positions = num_positions
    wanted, grads = plain_kl(found, found.positions(12, 4))
    for _visit in range(2):  # the second takes the targets that the first has kept
        loss = found(INDEX_B, 4)["loss"]
        torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-6)
        found_grads = torch.autograd.grad(loss, list(found.merged.alpha_parameters().values()))
        torch.testing.assert_close(list(found_grads), grads, rtol=1e-4, atol=1e-6)


def test_targets_are_kept_for_the_blocks_that_were_looked_at_whole() -> None:
    found = objective(tiny_model(), AlphaConfig(), LossConfig())
    found(INDEX_B, 0)
    assert found.is_kept_B.tolist() == [True, False, True]
    sampled = objective(tiny_model(), AlphaConfig(), LossConfig())
    sampled.num_positions = 5
    sampled(INDEX_B, 0)
    assert not sampled.is_kept_B.any()


def test_what_was_looked_at_before_changes_no_bit_of_a_loss() -> None:
    fresh, resumed = (objective(tiny_model(), AlphaConfig(), LossConfig()) for _ in range(2))
    fresh(INDEX_B, 0)
    wanted = fresh(torch.tensor([0, 1]), 1)["loss"]
    assert torch.equal(resumed(torch.tensor([0, 1]), 1)["loss"], wanted)


def test_a_model_in_16_bits_compares_logits() -> None:
    found = objective(tiny_model().bfloat16(), AlphaConfig(start="uniform"), LossConfig())
    loss = found(INDEX_B, 0)["loss"]
    assert found.kept is None
    wanted, _ = plain_kl(found, torch.arange(12))
    torch.testing.assert_close(loss, wanted, rtol=0.05, atol=0.01)


def test_a_head_that_is_no_plain_matrix_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    found = objective(tiny_model(), AlphaConfig(start="uniform"), LossConfig())
    wanted = found(INDEX_B, 0)["loss"]
    monkeypatch.setattr("lmerge.objective.head_weight", lambda model: None)
    torch.testing.assert_close(found(INDEX_B, 0)["loss"], wanted, rtol=1e-5, atol=1e-6)


def test_states_on_disk_give_the_same_loss_to_the_bit(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    losses = []
    for memory in (1.0, 0.0):
        model = tiny_model()
        merged = MergedLlama(model, PLAN, {}, AlphaConfig(start="uniform"))
        folder = tmp_path_factory.mktemp("states")
        cache: StateCache = keep_states(model, tokens(3), 1, folder=folder, memory=memory)
        losses.append(Objective(model, merged, cache, LossConfig())(INDEX_B, 0)["loss"])
    assert torch.equal(losses[0], losses[1])


def test_no_frozen_weight_and_nothing_below_the_merged_layer_gets_a_gradient() -> None:
    found = objective(tiny_model(), AlphaConfig(start="uniform"), LossConfig(kl=1.0, state=1.0))
    found(INDEX_B, 0)["loss"].backward()
    trained = {id(p) for p in found.merged.alpha_parameters().values()}
    others = [*found.source.parameters(), *found.merged.parameters()]
    assert all(p.grad is None for p in others if id(p) not in trained)
    assert lm_logits(found.source, found.cache.final_BTD).grad_fn is None
