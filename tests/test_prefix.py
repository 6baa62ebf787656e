import pytest
import torch
from conftest import tiny_model
from test_score import PREFIX, choice_batch, tokens
from transformers import LlamaForCausalLM, PreTrainedModel

from lmerge.data.records import Scoring
from lmerge.prefix import PrefixCache
from lmerge.score import score_choices


def count_passes(model: PreTrainedModel) -> list[int]:
    """Return a list that grows by the length of each input the decoder sees."""
    lengths: list[int] = []
    model.model.register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    return lengths


def test_a_prefix_is_encoded_once_for_its_batches(tiny_llama: LlamaForCausalLM) -> None:
    lengths, prefixes = count_passes(tiny_llama), PrefixCache()
    for scoring in ("letter", "letter", "cloze"):
        score_choices(tiny_llama, choice_batch(scoring), prefixes)
    assert lengths.count(len(tokens(PREFIX))) == 1


def test_scoring_leaves_the_cached_states_as_they_were(tiny_llama: LlamaForCausalLM) -> None:
    prefixes, batch = PrefixCache(), choice_batch("cloze")
    layers = prefixes.encode(tiny_llama, batch.prefix_P).layers
    before = [layer.keys.clone() for layer in layers]
    score_choices(tiny_llama, batch, prefixes)
    assert all(torch.equal(layer.keys, k) for layer, k in zip(layers, before, strict=True))


@pytest.mark.parametrize("scoring", ["letter", "cloze"])
def test_scoring_twice_gives_the_same_bits(tiny_llama: LlamaForCausalLM, scoring: Scoring) -> None:
    prefixes = PrefixCache()
    first = score_choices(tiny_llama, choice_batch(scoring), prefixes)
    assert torch.equal(score_choices(tiny_llama, choice_batch(scoring), prefixes), first)


def test_another_prefix_gives_its_own_scores(tiny_llama: LlamaForCausalLM) -> None:
    prefixes, other = PrefixCache(), choice_batch("letter", prefix="Something else: ")
    score_choices(tiny_llama, choice_batch("letter"), prefixes)
    scores = score_choices(tiny_llama, other, prefixes)
    assert torch.equal(scores, score_choices(tiny_llama, other, PrefixCache()))


def test_two_models_share_a_cache_without_mixing(tiny_llama: LlamaForCausalLM) -> None:
    prefixes, batch, other = PrefixCache(), choice_batch("letter"), tiny_model(seed=1)
    score_choices(tiny_llama, batch, prefixes)
    scores = score_choices(other, batch, prefixes)
    assert torch.equal(scores, score_choices(other, batch, PrefixCache()))


def test_a_training_step_makes_the_cached_states_stale(tiny_llama: LlamaForCausalLM) -> None:
    prefixes, batch = PrefixCache(), choice_batch("letter")
    score_choices(tiny_llama, batch, prefixes)
    optimizer = torch.optim.SGD(tiny_llama.parameters(), lr=1.0)
    tiny_llama(batch.token_BT).logits.square().mean().backward()
    optimizer.step()
    scores = score_choices(tiny_llama, batch, prefixes)
    assert torch.equal(scores, score_choices(tiny_llama, batch, PrefixCache()))


def test_a_tensor_that_is_no_parameter_counts_as_a_weight(tiny_llama: LlamaForCausalLM) -> None:
    prefixes, prefix_P = PrefixCache(), torch.tensor([1, 2])
    tiny_llama.refits = {"down_proj": torch.ones(2)}
    before = prefixes.encode(tiny_llama, prefix_P)
    tiny_llama.refits["down_proj"] = torch.ones(2)
    assert prefixes.encode(tiny_llama, prefix_P) is not before


def test_stale_states_are_dropped(tiny_llama: LlamaForCausalLM) -> None:
    prefixes, prefix_P = PrefixCache(max_entries=5), torch.tensor([1, 2])
    prefixes.encode(tiny_llama, prefix_P)
    with torch.no_grad():
        tiny_llama.lm_head.weight.mul_(2)
    prefixes.encode(tiny_llama, prefix_P)
    assert len(prefixes) == 1


def test_the_cache_keeps_the_prefixes_used_last(tiny_llama: LlamaForCausalLM) -> None:
    prefixes = PrefixCache(max_entries=2)
    first, second, third = (torch.tensor([i, i + 1]) for i in (1, 2, 3))
    kept = prefixes.encode(tiny_llama, first)
    for prefix_P in (second, first, third):
        prefixes.encode(tiny_llama, prefix_P)
    assert prefixes.encode(tiny_llama, first) is kept


def test_the_cache_never_exceeds_its_size(tiny_llama: LlamaForCausalLM) -> None:
    prefixes = PrefixCache(max_entries=2)
    for i in range(4):
        prefixes.encode(tiny_llama, torch.tensor([i, i + 1]))
    assert len(prefixes) == 2


@pytest.mark.parametrize("scoring", ["letter", "cloze"])
def test_a_cache_of_size_zero_scores_the_same(
    tiny_llama: LlamaForCausalLM, scoring: Scoring
) -> None:
    scores = score_choices(tiny_llama, choice_batch(scoring), PrefixCache(max_entries=0))
    assert torch.equal(scores, score_choices(tiny_llama, choice_batch(scoring), PrefixCache()))


def test_a_cache_of_size_zero_keeps_nothing(tiny_llama: LlamaForCausalLM) -> None:
    prefixes = PrefixCache(max_entries=0)
    prefixes.encode(tiny_llama, torch.tensor([1, 2]))
    assert len(prefixes) == 0


def test_release_forgets_all_states(tiny_llama: LlamaForCausalLM) -> None:
    prefixes = PrefixCache()
    prefixes.encode(tiny_llama, torch.tensor([1, 2]))
    prefixes.release()
    assert len(prefixes) == 0


def test_a_negative_cache_size_is_refused() -> None:
    with pytest.raises(ValueError, match="`max_entries` must be at least 0, got -1"):
        PrefixCache(max_entries=-1)


def test_the_cache_does_not_keep_a_model_alive() -> None:
    prefixes = PrefixCache()
    prefixes.encode(tiny_model(), torch.tensor([1, 2]))
    other = tiny_model(seed=1)
    prefixes.encode(other, torch.tensor([1, 2]))
    assert len(prefixes) == 1


def test_states_made_in_inference_mode_serve_outside_of_it(tiny_llama: LlamaForCausalLM) -> None:
    prefixes, batch = PrefixCache(), choice_batch("cloze")
    with torch.inference_mode():
        inside = score_choices(tiny_llama, batch, prefixes)
    assert torch.equal(score_choices(tiny_llama, batch, prefixes), inside)
