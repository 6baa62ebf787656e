import math
from typing import get_args

import pytest
import torch
from conftest import tiny_model
from models import VARIANTS, tiny_variant
from torch.nn.functional import kl_div

from lmerge import search
from lmerge.alphas import AlphaConfig
from lmerge.block_refits import BlockRefits, layer_inputs
from lmerge.llama import decoder_layers, layer_tensors, num_layers
from lmerge.merged import MergedLlama
from lmerge.plan import MergePlan
from lmerge.search import (
    SEARCHES,
    SearchMethod,
    cheapest_plans,
    repaired_blocks,
    repaired_groups,
    search_plan,
)

TOKENS = torch.randint(0, 256, (12, 32), generator=torch.Generator().manual_seed(0))
HELD = torch.arange(12) % 4 == 3


def test_every_search_has_a_row() -> None:
    assert set(SEARCHES) == set(get_args(SearchMethod))


def test_candidates_are_all_blocks_best_first() -> None:
    candidates = repaired_blocks(tiny_model(), TOKENS, HELD, 2)
    assert sorted(c.groups[0].members for c in candidates) == [(0, 1, 2), (1, 2, 3)]
    assert [c.kl for c in candidates] == sorted(c.kl for c in candidates)


def test_a_candidate_without_a_number_is_never_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    costs = iter([math.nan, 1.0, 0.5])
    monkeypatch.setattr(search, "kl_of", lambda *_: next(costs))
    found = repaired_blocks(tiny_model(), TOKENS, HELD, 1)
    assert [c.kl for c in found[:2]] == [0.5, 1.0]


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
    assert best.groups[0].members == (1, 2, 3)
    assert best.kl < 1e-6


def test_cost_is_the_kl_of_the_merged_model_with_that_refit() -> None:
    model = tiny_model()
    candidate = repaired_blocks(model, TOKENS, HELD, 1)[0]
    plan = MergePlan(num_layers=num_layers(model), groups=candidate.groups)
    merged = MergedLlama(model, plan, {}, AlphaConfig(granularity="tensor"))
    (group,) = candidate.groups
    with torch.no_grad():
        states = layer_inputs(model, TOKENS[~HELD])
        refits = BlockRefits(model, group.start, states[group.start])
        layer = refits.toward(states[group.stop])
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


# Several groups.


def every_plan(depth: int, num_removed: int) -> list[tuple[tuple[int, int], ...]]:
    """All ways to lose layers in disjoint groups, by brute force."""
    plans: list[tuple[tuple[int, int], ...]] = [()]
    done = []
    while plans:
        plan = plans.pop()
        lost = sum(stop - start - 1 for start, stop in plan)
        if lost == num_removed:
            done.append(plan)
            continue
        for start in range(plan[-1][1] if plan else 0, depth):
            plans += [(*plan, (start, s)) for s in range(start + 2, depth + 1)]
            plans = [p for p in plans if sum(b - a - 1 for a, b in p) <= num_removed]
    return done


@pytest.mark.parametrize("num_removed", [1, 2, 3, 4])
def test_cheapest_plans_are_those_of_brute_force(num_removed: int) -> None:
    generator = torch.Generator().manual_seed(num_removed)
    costs = {
        (a, b): float(torch.rand((), generator=generator)) * (b - a)
        for a in range(7)
        for b in range(a + 2, 8)
    }
    totals = sorted(sum(costs[g] for g in plan) for plan in every_plan(7, num_removed))
    found = cheapest_plans(costs, 7, num_removed, 4)
    assert [sum(costs[g.start, g.stop] for g in plan) for plan in found] == pytest.approx(
        totals[: len(found)]
    )
    assert len(found) == min(4, len(totals))


def test_a_plan_without_a_finite_cost_is_refused() -> None:
    with pytest.raises(ValueError, match="no plan of the groups tried loses 2 of 4 layers"):
        cheapest_plans({(0, 2): 1.0}, 4, 2, 1)


def test_groups_lose_the_layers_that_do_nothing_wherever_they_are() -> None:
    model = tiny_model(num_hidden_layers=6)
    for layer in (1, 4):
        tensors = layer_tensors(decoder_layers(model)[layer])
        tensors["o_proj"].zero_()
        tensors["down_proj"].zero_()
    best = repaired_groups(model, TOKENS, HELD, 2)[0]
    lost = {i for group in best.groups for i in group.members[1:]}
    assert lost == {1, 4}
    assert best.kl < 1e-6


def test_the_cost_of_several_groups_is_that_of_the_plan_refitted_from_below() -> None:
    model = tiny_model(num_hidden_layers=6)
    candidate = next(c for c in repaired_groups(model, TOKENS, HELD, 2) if len(c.groups) == 2)
    merged = MergedLlama(model, MergePlan(num_layers=6, groups=candidate.groups), {}, AlphaConfig())
    with torch.no_grad():
        states = layer_inputs(model, TOKENS[~HELD])
        for group, layer in zip(candidate.groups, merged.merged_layers(), strict=True):
            inputs = layer_inputs(merged.causal_lm, TOKENS[~HELD])[merged.plan.position(group)]
            refitted = BlockRefits(model, group.start, inputs).toward(states[group.stop])
            layer.refit("down_proj", layer_tensors(refitted)["down_proj"])
        logp, logq = (
            m(TOKENS[HELD]).logits.log_softmax(dim=-1).flatten(0, 1)
            for m in (model, merged.causal_lm)
        )
    expected = kl_div(logq, logp, log_target=True, reduction="batchmean")
    assert candidate.kl == pytest.approx(float(expected), rel=1e-3)
