from typing import get_args

import pytest
import torch
from conftest import tiny_model
from models import VARIANTS, tiny_variant
from torch.nn.functional import kl_div

from lmerge.alphas import AlphaConfig
from lmerge.llama import decoder_layers, layer_tensors, num_layers
from lmerge.merged import MergedLlama
from lmerge.plan import MergePlan
from lmerge.search import SEARCHES, SearchMethod, repaired_blocks, search_plan

TOKENS = torch.randint(0, 256, (12, 32), generator=torch.Generator().manual_seed(0))
HELD = torch.arange(12) % 4 == 3


def test_every_search_has_a_row() -> None:
    assert set(SEARCHES) == set(get_args(SearchMethod))


def test_candidates_are_all_blocks_best_first() -> None:
    candidates = repaired_blocks(tiny_model(), TOKENS, HELD, 2)
    assert sorted(c.group.members for c in candidates) == [(0, 1, 2), (1, 2, 3)]
    assert [c.kl for c in candidates] == sorted(c.kl for c in candidates)


def test_search_leaves_the_source_untouched() -> None:
    model = tiny_model()
    before = {name: p.clone() for name, p in model.named_parameters()}
    repaired_blocks(model, TOKENS, HELD, 1)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_layers_that_do_nothing_are_found_and_cost_nothing() -> None:
    model = tiny_model()
    for layer in (2, 3):
        tensors = layer_tensors(decoder_layers(model)[layer])
        tensors["o_proj"].zero_()
        tensors["down_proj"].zero_()
    best = repaired_blocks(model, TOKENS, HELD, 2)[0]
    assert best.group.members == (1, 2, 3)
    assert best.kl < 1e-6


def test_cost_is_the_kl_of_the_merged_model_with_that_refit() -> None:
    model = tiny_model()
    candidate = repaired_blocks(model, TOKENS, HELD, 1)[0]
    plan = MergePlan(num_layers=num_layers(model), groups=(candidate.group,))
    merged = MergedLlama(model, plan, {}, AlphaConfig(granularity="tensor"))
    from lmerge.search import _layer_inputs, _refitted_layer

    states = _layer_inputs(model, TOKENS[~HELD])
    group = candidate.group
    layer = _refitted_layer(model, group.start, states[group.start], states[group.stop])
    merged.merged_layers()[0].refit("down_proj", layer_tensors(layer)["down_proj"])
    with torch.no_grad():
        logp, logq = (
            m(TOKENS[HELD]).logits.log_softmax(dim=-1).flatten(0, 1)
            for m in (model, merged.causal_lm)
        )
    expected = kl_div(logq, logp, log_target=True, reduction="batchmean")
    assert candidate.kl == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("name", VARIANTS)
def test_search_runs_on_every_architecture(name: str) -> None:
    candidates = search_plan(
        tiny_variant(name), TOKENS, HELD, 1, "block_repaired", num_fit_tokens=128
    )
    assert all(candidate.kl >= 0 for candidate in candidates)


def test_equal_calls_give_equal_candidates() -> None:
    first, second = (search_plan(tiny_model(), TOKENS, HELD, 1, "block_repaired") for _ in "ab")
    assert first == second
