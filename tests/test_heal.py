from typing import Literal, get_args

import pytest
import torch
from conftest import tiny_model
from models import logits, plan_of, same, tiny_variant, tokens, weights
from torch.nn.functional import kl_div
from transformers import PreTrainedModel

from lmerge.alphas import AlphaConfig
from lmerge.cache import StateCache, cache_states
from lmerge.heal import HealConfig, HealMethod, heal, held_kl
from lmerge.llama import decoder_layers, num_layers, span, with_layers, with_tensors
from lmerge.merged import MergedLlama
from lmerge.trained_layers import ScaledLayer

PLAN = plan_of([1, 2])
HELD = torch.arange(24) % 4 == 3
Trained = Literal["scales", "merged", "all"]
TRAINED = get_args(Trained)
RATES = {"scales": 0.02, "merged": 0.003, "all": 0.003}


def prepared(name: str = "llama") -> tuple[PreTrainedModel, MergedLlama, StateCache]:
    source = tiny_variant(name)
    merged = MergedLlama(source, PLAN, {}, AlphaConfig(granularity="tensor"))
    return source, merged, cache_states(source, tokens(24, 32), merged.first_merged)


def config(method: HealMethod, **changes: object) -> HealConfig:
    fields = {"method": method, "num_steps": 20, "lr": RATES.get(method, 0.01), **changes}
    return HealConfig(**fields)


def test_the_methods_are_tested() -> None:
    assert set(get_args(HealMethod)) == {"none", *TRAINED}


@pytest.mark.parametrize("name", ["llama-biases", "qwen3"])
@pytest.mark.parametrize("method", TRAINED)
def test_healing_lowers_the_kl_on_blocks_it_never_saw(method: Trained, name: str) -> None:
    source, merged, cache = prepared(name)
    fresh = tokens(8, 32, seed=99)

    def kl() -> float:
        logp, logq = (
            logits(m, fresh).log_softmax(-1).flatten(0, 1) for m in (source, merged.causal_lm)
        )
        return float(kl_div(logq, logp, log_target=True, reduction="batchmean"))

    before = kl()
    healed = heal(source, merged, cache, HELD, config(method))
    assert healed is not None
    assert healed.kept
    assert healed.kl_after < healed.kl_before
    assert kl() < before


@pytest.mark.parametrize("method", TRAINED)
def test_only_the_named_layers_change(method: Trained) -> None:
    source, merged, cache = prepared()
    old = [weights(layer) for layer in decoder_layers(merged.plain())]
    before = weights(source)
    heal(source, merged, cache, HELD, config(method, num_steps=2))
    new = [weights(layer) for layer in decoder_layers(merged.plain())]
    changed = [not same(was, now) for was, now in zip(old, new, strict=True)]
    assert changed == [False, True, method != "merged"]
    assert same(before, weights(source))


def test_the_held_out_kl_is_that_of_the_whole_model() -> None:
    source, merged, cache = prepared()
    suffix = span(merged.causal_lm, 1, num_layers(merged.causal_lm), final_norm=True)
    held = tokens(24, 32)[HELD]
    logp, logq = (logits(m, held).log_softmax(-1).flatten(0, 1) for m in (source, merged.causal_lm))
    wanted = kl_div(logq, logp, log_target=True, reduction="batchmean")
    assert held_kl(source, suffix, cache, HELD) == pytest.approx(float(wanted), rel=1e-4)


def test_a_training_that_does_not_help_is_dropped() -> None:
    source, merged, cache = prepared()
    before = logits(merged.causal_lm)
    healed = heal(source, merged, cache, HELD, config("all", lr=10.0, num_steps=3))
    assert healed is not None
    assert not healed.kept
    assert torch.equal(logits(merged.causal_lm), before)


def test_the_weights_of_the_least_held_out_kl_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {}
    for check in (1, 30):
        monkeypatch.setattr("lmerge.heal.CHECK", check)
        source, merged, cache = prepared()
        healed = heal(source, merged, cache, HELD, config("all", lr=0.02, num_steps=30))
        assert healed is not None
        suffix = span(merged.plain(), merged.first_merged, 3, final_norm=True)
        kept = min(healed.kl_before, healed.kl_after)
        assert held_kl(source, suffix, cache, HELD) == pytest.approx(kept, rel=1e-4)
        found[check] = kept
    assert found[1] < found[30]


@pytest.mark.parametrize("method", TRAINED)
def test_equal_seeds_give_equal_models(method: Trained) -> None:
    found = []
    for seed in (0, 0, 1):
        source, merged, cache = prepared()
        heal(source, merged, cache, HELD, config(method, num_steps=3), seed=seed)
        found.append(logits(merged.causal_lm))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_without_a_method_or_a_merge_nothing_is_healed() -> None:
    source, merged, cache = prepared()
    assert heal(source, merged, cache, HELD, config("none")) is None
    source = tiny_model()
    merged = MergedLlama(source, plan_of(), {}, AlphaConfig())
    cache = cache_states(source, tokens(24), merged.first_merged)
    assert heal(source, merged, cache, HELD, config("all")) is None


def test_healing_runs_in_bfloat16() -> None:
    source = tiny_model().bfloat16()
    merged = MergedLlama(source, PLAN, {}, AlphaConfig())
    cache = cache_states(source, tokens(24, 32), 1)
    assert heal(source, merged, cache, HELD, config("scales", num_steps=2)) is not None
    assert logits(merged.causal_lm).isfinite().all()


@pytest.mark.parametrize("changes", [{"lr": 0.0}, {"num_steps": 0}, {"batch_size": 0}])
def test_impossible_options_are_refused(changes: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be"):
        config("scales", **changes)


@pytest.mark.parametrize("name", ["llama", "llama-biases", "qwen3"])
def test_scaled_activations_are_a_scaled_matrix(name: str) -> None:
    source = tiny_variant(name).requires_grad_(False)
    scaled = ScaledLayer(decoder_layers(source)[1])
    before = weights(source)
    with torch.no_grad():
        for parameter in scaled.parameters():
            if parameter.requires_grad:
                parameter.uniform_(-0.3, 0.3)
        layers = list(decoder_layers(source))
        by_activations = with_layers(source, [layers[0], scaled, *layers[2:]], range(4))
        formed = with_tensors(layers[1], scaled.tensors())
        by_weights = with_layers(source, [layers[0], formed, *layers[2:]], range(4))
        torch.testing.assert_close(logits(by_activations), logits(by_weights), rtol=1e-4, atol=1e-4)
    assert not torch.equal(logits(by_weights), logits(source))
    assert same(before, weights(source))


def test_merged_trains_as_many_layers_above_as_it_is_told() -> None:
    source, merged, cache = prepared()
    old = [weights(layer) for layer in decoder_layers(merged.plain())]
    heal(source, merged, cache, HELD, config("merged", num_steps=2, num_after=1))
    new = [weights(layer) for layer in decoder_layers(merged.plain())]
    assert [not same(was, now) for was, now in zip(old, new, strict=True)] == [False, True, True]
