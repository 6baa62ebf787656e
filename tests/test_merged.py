from itertools import permutations
from pathlib import Path
from typing import get_args

import pytest
import torch
from conftest import tiny_model
from models import (
    NUM_LAYERS,
    VARIANTS,
    fresh_model,
    logits,
    plan_of,
    same,
    tiny_variant,
    tokens,
    weights,
)
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AutoModelForCausalLM, PreTrainedModel

from lmerge.align import Orders
from lmerge.alpha_files import read_alphas, write_alphas
from lmerge.alphas import AlphaConfig, Granularity
from lmerge.axes import FOLDS_INTO
from lmerge.frames import members_in_one_frame
from lmerge.groups import align_members
from lmerge.llama import (
    MATRICES,
    HeadSpec,
    by_path,
    decoder_layers,
    layer_tensors,
    num_layers,
    with_tensors,
)
from lmerge.merged import MergedLayer, MergedLlama
from lmerge.neurons import reorder_neurons
from lmerge.plan import Group, MergePlan
from lmerge.source import load_model

GRANULARITIES = get_args(Granularity)
PLANS = {
    "first": plan_of([1, 2]),
    "last": plan_of([1, 2], anchors=[2]),
    "middle": plan_of([0, 1, 2], anchors=[1]),
    "two": plan_of([0, 1], [2, 3], anchors=[1, 2]),
    "all": plan_of([0, 1, 2, 3]),
}
"""Plans by where the anchor is, or what is merged."""
SPEC = HeadSpec(4, 2, 8)
FREE, SIMPLEX = AlphaConfig(), AlphaConfig(start="uniform", simplex=True)


def merge(
    source: PreTrainedModel,
    plan: MergePlan = PLANS["first"],
    config: AlphaConfig = FREE,
    orders: Orders | None = None,
) -> MergedLlama:
    return MergedLlama(source, plan, orders or {}, config)


@torch.no_grad()
def shake(merged: MergedLlama) -> MergedLlama:
    """Give random values to the parameters of the alphas."""
    generator = torch.Generator().manual_seed(9)
    for parameter in merged.alpha_parameters().values():
        parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return merged


def gap(merged: MergedLlama) -> Tensor:
    """A loss: how far the merged model's logits are from 1."""
    loss: Tensor = (merged.causal_lm(tokens(), use_cache=False).logits - 1).square().mean()
    return loss


# What the merged model is.


@pytest.mark.parametrize("name", VARIANTS)
def test_merging_nothing_is_the_source_bit_for_bit(name: str) -> None:
    source = tiny_variant(name)
    merged = merge(source, plan_of())
    assert torch.equal(logits(merged.causal_lm), logits(source))
    assert torch.equal(logits(merged.plain()), logits(source))


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("name", VARIANTS)
def test_anchor_alphas_drop_the_other_layers_bit_for_bit(name: str, plan: MergePlan) -> None:
    source = tiny_variant(name)
    dropped = logits(fresh_model(source, plan.origins()))
    merged = merge(source, plan)
    assert torch.equal(logits(merged.causal_lm), dropped)
    assert torch.equal(logits(merged.plain()), dropped)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("name", VARIANTS)
def test_anchor_alphas_of_every_granularity_drop_the_others_bit_for_bit(
    name: str, granularity: Granularity
) -> None:
    source = tiny_variant(name)
    merged = merge(source, PLANS["middle"], AlphaConfig(granularity=granularity))
    assert torch.equal(logits(merged.causal_lm), logits(fresh_model(source, [1, 3])))


def test_anchor_alphas_drop_the_others_bit_for_bit_in_bfloat16_and_under_an_order() -> None:
    source = tiny_model().bfloat16()
    merged = merge(source, orders={2: torch.arange(48).flip(0)})
    assert torch.equal(logits(merged.causal_lm), logits(fresh_model(source, [0, 1, 3])))


@pytest.mark.parametrize("config", [FREE, SIMPLEX])
@pytest.mark.parametrize("name", VARIANTS)
def test_the_plain_model_is_the_merged_one_bit_for_bit(name: str, config: AlphaConfig) -> None:
    merged = shake(merge(tiny_variant(name), PLANS["two"], config))
    assert torch.equal(logits(merged.plain()), logits(merged.causal_lm))


@pytest.mark.parametrize("name", VARIANTS)
def test_the_plain_model_is_what_transformers_builds_from_its_config(name: str) -> None:
    plain = shake(merge(tiny_variant(name))).plain()
    rebuilt = AutoModelForCausalLM.from_config(plain.config, attn_implementation="sdpa").eval()
    rebuilt.load_state_dict(plain.state_dict(), strict=True)
    assert torch.equal(logits(rebuilt), logits(plain))


def test_the_plain_model_is_of_the_class_of_the_source() -> None:
    source = tiny_model()
    plain = shake(merge(source)).plain()
    assert type(plain) is type(source)
    assert {type(layer) for layer in decoder_layers(plain)} == {type(decoder_layers(source)[0])}


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("kind", ["causal_lm", "plain"])
def test_layers_are_numbered_anew(plan: MergePlan, kind: str) -> None:
    merged = merge(tiny_model(), plan)
    model = merged.causal_lm if kind == "causal_lm" else merged.plain()
    attention = [getattr(layer, "template", layer).self_attn for layer in decoder_layers(model)]
    assert [a.layer_idx for a in attention] == list(range(NUM_LAYERS - plan.num_removed))


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_layer_types_are_those_of_the_origins(name: str, plan: MergePlan) -> None:
    source = tiny_variant(name)
    merged = merge(source, plan)
    wanted = [source.config.layer_types[i] for i in plan.origins()]
    for model in (merged.causal_lm, merged.plain()):
        assert model.config.layer_types == model.model.config.layer_types == wanted


@pytest.mark.parametrize("kind", ["causal_lm", "plain"])
@pytest.mark.parametrize("name", VARIANTS)
def test_generating_with_a_cache_is_generating_without(name: str, kind: str) -> None:
    merged = shake(merge(tiny_variant(name), PLANS["two"]))
    model = merged.causal_lm if kind == "causal_lm" else merged.plain()
    options = {"max_new_tokens": 10, "do_sample": False, "attention_mask": torch.ones(2, 4).long()}
    options |= {"output_logits": True, "return_dict_in_generate": True, "eos_token_id": None}
    cached, uncached = (
        model.generate(tokens(2, 4), use_cache=use_cache, **options) for use_cache in (True, False)
    )
    assert torch.equal(cached.sequences, uncached.sequences)
    torch.testing.assert_close(cached.logits, uncached.logits, rtol=1e-4, atol=1e-4)


def test_hidden_states_are_those_of_the_model_that_is_asked_in_any_order() -> None:
    for order in permutations(("source", "merged", "plain")):
        source = tiny_model()
        merged = merge(source)
        models = {"source": source, "merged": merged.causal_lm, "plain": merged.plain()}
        for name in order:
            with torch.no_grad():
                states = models[name](tokens(), output_hidden_states=True).hidden_states
            assert len(states) == 1 + num_layers(models[name]), (name, order)


# The weights of a merged layer.


@pytest.mark.parametrize("name", VARIANTS)
def test_members_in_one_frame_have_one_norm(name: str) -> None:
    layers = [layer_tensors(layer) for layer in decoder_layers(tiny_variant(name))]
    framed = members_in_one_frame(layers, [None] * NUM_LAYERS, 2)
    assert all(torch.equal(layer[norm], layers[2][norm]) for layer in framed for norm in FOLDS_INTO)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("name", VARIANTS)
def test_the_uniform_start_is_the_plain_average_in_the_frame_of_the_anchor(
    name: str, granularity: Granularity
) -> None:
    source = tiny_variant(name)
    config = AlphaConfig(granularity=granularity, start="uniform")
    (layer,) = merge(source, PLANS["middle"], config).merged_layers()
    members = [layer_tensors(layer) for layer in decoder_layers(source)[:3]]
    framed = members_in_one_frame(members, [None] * 3, 1)
    for key, tensor in layer.tensors().items():
        torch.testing.assert_close(tensor, torch.stack([m[key] for m in framed]).mean(dim=0))


def test_members_are_merged_in_the_orders_that_are_given() -> None:
    source, order = tiny_model(), torch.randperm(48)
    (found,) = merge(source, config=SIMPLEX, orders={2: order}).merged_layers()
    moved = tiny_model()
    layer = decoder_layers(moved)[2]
    moved.model.layers[2] = with_tensors(layer, reorder_neurons(layer_tensors(layer), order))
    (wanted,) = merge(moved, config=SIMPLEX).merged_layers()
    assert same(found.tensors(), wanted.tensors())


def test_a_group_of_permuted_copies_that_are_aligned_is_the_layer_at_any_alphas() -> None:
    source = tiny_model()
    first = layer_tensors(decoder_layers(source)[1])
    for i in (2, 3):
        permuted = reorder_neurons(first, torch.randperm(48))
        source.model.layers[i] = with_tensors(decoder_layers(source)[i], permuted)
    plan = plan_of([1, 2, 3])
    layers = {i: layer_tensors(decoder_layers(source)[i]) for i in (1, 2, 3)}
    merged = merge(source, plan, SIMPLEX, align_members(1, layers, "weights", SPEC))
    dropped = logits(fresh_model(source, [0, 1]))
    torch.testing.assert_close(logits(shake(merged).causal_lm), dropped, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("config", [FREE, SIMPLEX])
def test_gradients_are_those_of_plain_sums(config: AlphaConfig) -> None:
    merged = shake(merge(tiny_model(), config=config))
    gap(merged).backward()
    (layer,) = merged.merged_layers()
    found = {name: parameter.grad for name, parameter in layer.free.items()}

    class Sums(nn.Module):
        def forward(self, states: Tensor, **kwargs: object) -> object:
            alphas, stacked = layer.alphas(), layer.stacked()
            formed = {
                name: (a[..., None] if name not in {"o_proj", "down_proj"} else a[:, None, :])
                for name, a in alphas.items()
            }
            made = {name: (a * stacked[name]).sum(dim=0) for name, a in formed.items()}
            made |= {norm: stacked[norm][0] for norm in FOLDS_INTO}
            return functional_call(layer.template, by_path(made), (states,), kwargs)

    layer.zero_grad()
    decoder_layers(merged.causal_lm)[1] = Sums()
    gap(merged).backward()
    for name, parameter in layer.free.items():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-6)


# Training.


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_only_alphas_are_trainable(granularity: Granularity) -> None:
    merged = merge(tiny_model(), PLANS["two"], AlphaConfig(granularity=granularity))
    free = {id(p) for layer in merged.merged_layers() for p in layer.free.values()}
    assert {id(p) for p in merged.parameters() if p.requires_grad} == free
    assert {id(p) for p in merged.alpha_parameters().values()} == free
    assert len(free) == 2 * (1 if granularity == "layer" else len(MATRICES))


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("simplex", [False, True])
def test_a_step_changes_every_alpha_and_nothing_else(
    granularity: Granularity, simplex: bool
) -> None:
    source = tiny_model()
    config = AlphaConfig(granularity=granularity, simplex=simplex, start="uniform")
    merged = merge(source, PLANS["two"], config)
    before = {name: p.detach().clone() for name, p in merged.named_parameters()}
    buffers = {name: b.clone() for name, b in merged.named_buffers()}
    optimizer = torch.optim.SGD([p for p in merged.parameters() if p.requires_grad], lr=0.1)
    gap(merged).backward()
    optimizer.step()
    changed = {n for n, p in merged.named_parameters() if not torch.equal(p, before[n])}
    assert changed == set(merged.alpha_parameters())
    assert same(dict(merged.named_buffers()), buffers)


def test_training_lowers_the_loss() -> None:
    merged = merge(tiny_model(), PLANS["two"])
    optimizer = torch.optim.Adam(merged.alpha_parameters().values(), lr=0.02)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = gap(merged)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]


@pytest.mark.parametrize("name", VARIANTS)
def test_the_source_stays_as_it_was(name: str) -> None:
    source = tiny_variant(name)
    before, expected, config = weights(source), logits(source), source.config.to_dict()
    merged = merge(source, PLANS["two"], SIMPLEX)
    gap(merged).backward()
    torch.optim.Adam(merged.alpha_parameters().values(), lr=0.1).step()
    for layer in merged.merged_layers():
        layer.refit("down_proj", torch.randn(32, 48))
    merged.set_alphas(merged.alphas())
    logits(merged.plain())
    logits(merged.causal_lm)
    assert same(weights(source), before)
    assert torch.equal(logits(source), expected)
    assert source.config.to_dict() == config


@pytest.mark.parametrize(
    "optimizer", ["Adam", "SGD", "AdamW-fused", "SGD-fused", "SGD-foreach", "Muon"]
)
def test_weights_are_formed_anew_after_a_step_of_any_optimizer(optimizer: str) -> None:
    name, _, kind = optimizer.partition("-")
    if not hasattr(torch.optim, name):
        pytest.skip("newer than this torch")
    merged = merge(tiny_model(), config=AlphaConfig(start="uniform"))
    old = logits(merged.causal_lm)
    parameters = list(merged.alpha_parameters().values())
    options = {kind: True} if kind else {}
    stepper = getattr(torch.optim, name)(parameters, lr=0.1, **options)
    gap(merged).backward()
    stepper.step()
    found = logits(merged.causal_lm)
    assert not torch.equal(found, old)
    with torch.enable_grad():
        assert torch.equal(found, merged.causal_lm(tokens(), use_cache=False).logits)


@torch.no_grad()
def test_weights_are_formed_once_while_alphas_stay() -> None:
    (layer,) = merge(tiny_model()).merged_layers()
    assert layer.tensors() is layer.tensors()


def test_a_plain_model_that_was_evaluated_in_inference_mode_can_be_trained() -> None:
    merged = merge(tiny_model())
    with torch.inference_mode():
        merged.causal_lm(tokens(), use_cache=False)
    plain = merged.plain().requires_grad_(True)
    plain(tokens(), use_cache=False).logits.square().mean().backward()
    assert all(p.grad is not None for p in decoder_layers(plain)[1].parameters())


def test_a_merged_model_can_change_its_dtype() -> None:
    merged = merge(tiny_model(), config=SIMPLEX)
    logits(merged.causal_lm)
    merged.to(torch.float64)
    assert logits(merged.causal_lm).dtype == torch.float64
    assert torch.equal(logits(merged.causal_lm), logits(merged.plain()))


# Alphas and refits from elsewhere.


@pytest.mark.parametrize("config", [FREE, SIMPLEX])
def test_alphas_carry_over_to_another_merged_model(config: AlphaConfig) -> None:
    first, second = shake(merge(tiny_model(), config=config)), merge(tiny_model(), config=config)
    logits(second.causal_lm)
    second.set_alphas(first.alphas())
    torch.testing.assert_close(
        logits(second.causal_lm), logits(first.causal_lm), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_simplex_alphas_come_back_from_alphas_json_to_the_bit(
    granularity: Granularity, tmp_path: Path
) -> None:
    config = AlphaConfig(granularity=granularity, simplex=True)
    first, second = shake(merge(tiny_model(), config=config)), merge(tiny_model(), config=config)
    write_alphas(tmp_path, first.plan, first.alphas())
    second.set_alphas(read_alphas(tmp_path / "alphas.json", second.plan))
    for left, right in zip(first.alphas(), second.alphas(), strict=True):
        assert all(torch.equal(left[name], right[name]) for name in left)
    assert same(weights(first.plain()), weights(second.plain()))
    assert torch.equal(logits(first.causal_lm), logits(second.causal_lm))


def test_alphas_that_are_trained_after_they_were_set_are_the_trained_ones() -> None:
    merged = merge(tiny_model(), config=AlphaConfig(granularity="layer", simplex=True))
    merged.set_alphas([{"layer": torch.tensor([0.7, 0.3])}])
    logits(merged.causal_lm)
    before = merged.alphas()[0]["layer"]
    shake(merged)
    (layer,) = merged.merged_layers()
    assert not torch.equal(merged.alphas()[0]["layer"], before)
    assert torch.equal(merged.alphas()[0]["layer"], layer.free["layer"].detach().softmax(dim=0))


def test_shares_below_the_floor_of_the_start_carry_over() -> None:
    merged = merge(tiny_model(), config=AlphaConfig(granularity="layer", simplex=True))
    merged.set_alphas([{"layer": torch.tensor([1 - 1e-6, 1e-6])}])
    torch.testing.assert_close(
        merged.alphas()[0]["layer"], torch.tensor([1 - 1e-6, 1e-6]), rtol=1e-4, atol=0
    )


def test_alphas_are_a_copy() -> None:
    merged = merge(tiny_model())
    for alpha in merged.alphas()[0].values():
        alpha.fill_(7)
    assert not any((alpha == 7).any() for alpha in merged.alphas()[0].values())


@pytest.mark.parametrize("granularity", [g for g in GRANULARITIES if g != "neuron"])
def test_alphas_of_another_granularity_are_refused(granularity: Granularity) -> None:
    other = merge(tiny_model(), config=AlphaConfig(granularity=granularity))
    with pytest.raises(ValueError, match=r"^[^\n]*`alpha\.granularity`[^\n]*\Z"):
        merge(tiny_model()).set_alphas(other.alphas())


def refit_randomly(merged: MergedLlama) -> MergedLlama:
    for layer in merged.merged_layers():
        layer.refit("down_proj", torch.randn(32, 48))
    return merged


def test_a_refit_takes_the_place_of_the_merged_matrix() -> None:
    merged = merge(tiny_model())
    logits(merged.causal_lm)
    (layer,) = refit_randomly(merged).merged_layers()
    down = layer_tensors(decoder_layers(merged.plain())[1])["down_proj"]
    assert torch.equal(down, layer.refits["down_proj"])
    assert torch.equal(logits(merged.plain()), logits(merged.causal_lm))


def test_refits_carry_over_to_another_merged_model() -> None:
    first = refit_randomly(merge(tiny_model(), PLANS["two"]))
    second = merge(tiny_model(), PLANS["two"])
    logits(second.causal_lm)
    second.set_refits(first.refits())
    assert torch.equal(logits(second.causal_lm), logits(first.causal_lm))


@pytest.mark.parametrize(("plan", "index"), [("first", 1), ("two", 0)])
def test_below_the_first_merged_layer_is_the_source(plan: str, index: int) -> None:
    source = tiny_model()
    merged = merge(source, PLANS[plan])
    assert merged.first_merged == index
    assert isinstance(decoder_layers(merged.causal_lm)[index], MergedLayer)


def test_with_nothing_merged_everything_is_the_source() -> None:
    assert merge(tiny_model(), plan_of()).first_merged == NUM_LAYERS


@pytest.mark.slow
def test_anchor_alphas_drop_layers_of_a_trained_model_bit_for_bit() -> None:
    source = load_model("smollm2-135m")  # some of its norm weights are near zero
    plan = MergePlan(num_layers=30, groups=(Group(members=(12, 13, 14, 15), anchor=12),))
    dropped = fresh_model(source, plan.origins())
    assert torch.equal(logits(merge(source, plan).causal_lm), logits(dropped))
