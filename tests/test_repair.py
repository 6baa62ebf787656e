from collections.abc import Iterator
from typing import get_args

import numpy as np
import pytest
import torch
from conftest import tiny_model
from models import VARIANTS, logits, plan_of, same, tiny_variant, tokens, weights
from torch import Tensor
from torch.nn.functional import linear
from transformers import PreTrainedModel

from lmerge.alphas import AlphaConfig
from lmerge.cache import cache_states
from lmerge.compose import REPAIRS, repair
from lmerge.llama import decoder_layers
from lmerge.merged import MergedLlama
from lmerge.normal_equations import NormalEquations, Positions, position_weights
from lmerge.repair import (
    RIDGES,
    Refit,
    RepairConfig,
    RepairMethod,
    refit,
    refit_groups,
)

N, F, D = 200, 12, 5
TWO = plan_of([0, 1], [2, 3])


def problem(seed: int = 0, num_positions: int = N) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, residuals and weights of a least-squares problem, float64."""
    generator = torch.Generator().manual_seed(seed)
    a, r = (torch.randn(num_positions, k, generator=generator).double() for k in (F, D))
    return a, r, torch.rand(num_positions, generator=generator).double() + 0.1


def equations(a: Tensor, r: Tensor, w: Tensor) -> NormalEquations:
    return NormalEquations.zeros(F, D, torch.device("cpu")).update(a, r, w)


def lstsq(a: Tensor, r: Tensor, w: Tensor, ridge: float) -> Tensor:
    """The ridge problem as one tall least-squares problem, solved by numpy without squaring."""
    root = w.sqrt()[:, None]
    penalty = (ridge * float((w[:, None] * a.square()).sum() / F)) ** 0.5
    tall = np.vstack([(root * a).numpy(), penalty * np.eye(F)])
    right = np.vstack([(root * r).numpy(), np.zeros((F, D))])
    return torch.from_numpy(np.linalg.lstsq(tall, right, rcond=None)[0].T)


# The normal equations.


@pytest.mark.parametrize("ridge", RIDGES)
def test_the_solution_is_that_of_the_straight_ridge_problem(ridge: float) -> None:
    torch.testing.assert_close(equations(*problem()).solve(ridge), lstsq(*problem(), ridge))


def test_a_planted_linear_change_is_recovered() -> None:
    a, _, w = problem()
    change = torch.randn(D, F).double()
    found = equations(a, a @ change.T, w).solve(1e-12)
    torch.testing.assert_close(found, change)


@pytest.mark.parametrize("size", [1, 7, 64, 199])
def test_sums_over_batches_are_the_sums_over_all(size: int) -> None:
    streamed = NormalEquations.zeros(F, D, torch.device("cpu"))
    for batch in zip(*(x.split(size) for x in problem()), strict=True):
        streamed = streamed.update(*batch)
    for found, wanted in zip(streamed, equations(*problem()), strict=True):
        torch.testing.assert_close(found, wanted)


def test_the_sum_of_two_parts_is_the_sum_over_both() -> None:
    left, right = ([x[:50] for x in problem()], [x[50:] for x in problem()])
    both = equations(*left) + equations(*right)
    for found, wanted in zip(both, equations(*problem()), strict=True):
        torch.testing.assert_close(found, wanted)


def test_updating_leaves_the_old_sums_alone() -> None:
    old = equations(*problem())
    before = [x.clone() for x in old]
    old.update(*problem(seed=1))
    assert all(torch.equal(x, y) for x, y in zip(old, before, strict=True))


def test_sums_of_bfloat16_positions_are_float64() -> None:
    a, r, w = (x.bfloat16() for x in problem())
    assert {x.dtype for x in equations(a, r, w)} == {torch.float64}


def test_error_is_the_share_of_the_weighted_squares_that_remains() -> None:
    a, r, w = problem()
    change = 0.1 * torch.randn(D, F).double()
    wanted = (w[:, None] * (r - a @ change.T).square()).sum() / (w[:, None] * r.square()).sum()
    assert equations(a, r, w).error(change) == pytest.approx(float(wanted))


def test_error_of_no_change_is_1() -> None:
    assert equations(*problem()).error(torch.zeros(D, F).double()) == 1


@pytest.mark.parametrize("change", [0.0, 1.0])
def test_error_where_there_was_none_is_1_and_not_nan(change: float) -> None:
    a, r, w = problem()
    assert equations(a, 0 * r, w).error(torch.full((D, F), change).double()) == 1


def test_silent_neurons_get_no_change() -> None:
    a, r, w = problem()
    assert torch.equal(equations(0 * a, r, w).solve(1e-4), torch.zeros(D, F).double())


def test_a_position_counts_as_the_inverse_square_of_its_target() -> None:
    target = torch.tensor([[3.0, 4.0], [30.0, 40.0]])
    torch.testing.assert_close(position_weights(target), torch.tensor([1 / 25, 1 / 2500]).double())


def test_a_target_of_zero_has_a_finite_weight() -> None:
    assert position_weights(torch.zeros(1, 4)).isfinite().all()


# One refit.


def two_parts(residuals: tuple[Tensor, Tensor]) -> Iterator[tuple[Positions, bool]]:
    """Positions to fit on and positions that are held out, all of one weight."""
    for seed, residual, held in zip((0, 1), residuals, (False, True), strict=True):
        a = problem(seed)[0]
        yield (a, residual, torch.ones(N, 1)), held


def planted(noise: float) -> tuple[Refit, Tensor]:
    """The refit of a planted change of the matrix under noise."""
    change = torch.randn(D, F, generator=torch.Generator().manual_seed(5)).double()
    made = tuple(problem(s)[0] @ change.T + noise * problem(s + 2)[1] for s in (0, 1))
    return refit(two_parts((made[0], made[1]))), change


def test_a_refit_recovers_a_planted_change() -> None:
    found, change = planted(noise=0.0)
    assert found.holdout_error < 1e-6
    torch.testing.assert_close(found.change_DF, change, rtol=1e-3, atol=1e-3)


def test_more_noise_asks_for_no_less_regularisation() -> None:
    ridges = [planted(noise)[0].ridge for noise in (0.0, 3.0, 30.0)]
    assert ridges == sorted(ridges)


def test_the_ridge_is_the_best_on_the_held_out_positions() -> None:
    a, held = problem(0), problem(1)
    residuals = (a[1], held[1] + 0.3 * held[0] @ torch.ones(F, D).double())
    residuals = (a[1] + 0.3 * a[0] @ torch.ones(F, D).double(), residuals[1])
    found = refit(two_parts(residuals))
    ones = torch.ones(N).double()
    fits = {r: lstsq(a[0], residuals[0], ones, r) for r in RIDGES}
    errors = {
        r: float((residuals[1] - held[0] @ fit.T).square().sum() / residuals[1].square().sum())
        for r, fit in fits.items()
    }
    assert errors[found.ridge] == min(errors.values())
    assert found.holdout_error == pytest.approx(min(errors.values()))


def test_all_positions_are_used_once_the_ridge_is_chosen() -> None:
    change = torch.ones(D, F).double()
    residuals = [problem(s)[0] @ change.T + 0.1 * problem(s + 2)[1] for s in (0, 1)]
    found = refit(two_parts((residuals[0], residuals[1])))
    a = torch.cat([problem(0)[0], problem(1)[0]])
    wanted = lstsq(a, torch.cat(residuals), torch.ones(2 * N).double(), found.ridge)
    torch.testing.assert_close(found.change_DF, wanted)


def test_a_refit_that_would_harm_held_out_positions_changes_nothing() -> None:
    change = torch.ones(D, F).double()
    residuals = (problem(0)[0] @ change.T, -problem(1)[0] @ change.T)
    found = refit(two_parts(residuals))
    assert torch.equal(found.change_DF, torch.zeros(D, F).double())
    assert found.holdout_error == 1


def test_with_nothing_to_repair_nothing_changes() -> None:
    nothing = torch.zeros(N, D).double()
    found = refit(two_parts((nothing, nothing)))
    assert torch.equal(found.change_DF, nothing[:D, :1].expand(D, F))
    assert found.holdout_error == 1


@pytest.mark.parametrize("kept", [False, True])
def test_a_refit_without_one_of_its_parts_is_refused(kept: bool) -> None:
    both = list(two_parts((problem(0)[1], problem(1)[1])))
    with pytest.raises(ValueError, match=r"^a refit needs [^\n]*`num_calibration_tokens`\.$"):
        refit([part for part in both if part[1] == kept])


# Refits of a model.


def prepared(
    name: str = "llama", *, num_blocks: int = 12, start: str = "uniform"
) -> tuple[PreTrainedModel, MergedLlama, Tensor, Tensor]:
    """Source, merged model with two groups, its input states, and which blocks are held out."""
    source = tiny_variant(name)
    merged = MergedLlama(source, TWO, {}, AlphaConfig(start=start))
    prefix = cache_states(source, tokens(num_blocks, 32), merged.first_merged).prefix_BTD
    return source, merged, prefix, torch.arange(num_blocks) % 4 == 3


@torch.no_grad()
def state_errors(source: PreTrainedModel, model: PreTrainedModel, token_BT: Tensor) -> list[float]:
    """The weighted squared error of the state after each of the two merged layers."""
    wanted = source(token_BT, output_hidden_states=True, use_cache=False).hidden_states
    outputs = []
    hooks = [
        layer.register_forward_hook(lambda _m, _i, out: outputs.append(out))
        for layer in decoder_layers(model)
    ]
    last = []
    hooks.append(decoder_layers(source)[3].register_forward_hook(lambda *x: last.append(x[2])))
    source(token_BT, use_cache=False)
    model(token_BT, use_cache=False)
    for hook in hooks:
        hook.remove()
    pairs = zip(outputs, (wanted[2], last[0]), strict=True)
    return [float(((o - t).square().sum(-1) / t.square().sum(-1)).sum()) for o, t in pairs]


@torch.no_grad()
def straight_refits(source: PreTrainedModel, plain: PreTrainedModel, held_B: Tensor) -> list[Refit]:
    """The same by hand: run everything from the tokens, one refit after the other."""
    token_BT, found = tokens(len(held_B), 32), []
    for i, target in ((0, 1), (1, 3)):
        seen: dict[str, Tensor] = {}
        layer = decoder_layers(plain)[i]
        hooks = [
            decoder_layers(source)[target].register_forward_hook(
                lambda _m, _i, out, seen=seen: seen.update(target=out)
            ),
            layer.register_forward_hook(lambda _m, _i, out, seen=seen: seen.update(output=out)),
            layer.mlp.down_proj.register_forward_pre_hook(
                lambda _m, inputs, seen=seen: seen.update(a=inputs[0])
            ),
        ]
        source(token_BT, use_cache=False)
        plain(token_BT, use_cache=False)
        for hook in hooks:
            hook.remove()
        parts = [
            (
                tuple(
                    x[chosen].flatten(0, 1)
                    for x in (seen["a"], seen["target"] - seen["output"], seen["target"])
                ),
                held,
            )
            for chosen, held in ((~held_B, False), (held_B, True))
        ]
        found.append(refit(parts))
        down = layer.mlp.down_proj
        # A new parameter: the plain model shares its memory with the merged one.
        down.weight = torch.nn.Parameter((down.weight.double() + found[-1].change_DF).float())
    return found


@pytest.mark.parametrize("name", VARIANTS)
def test_refits_equal_a_straight_loop_over_the_whole_model(name: str) -> None:
    source, merged, prefix, held = prepared(name)
    wanted = straight_refits(source, merged.plain(), held)
    found = refit_groups(source, merged, prefix, held, RepairConfig())
    for one, other in zip(found, wanted, strict=True):
        assert one.ridge == other.ridge
        assert one.holdout_error == pytest.approx(other.holdout_error, rel=1e-3)
        torch.testing.assert_close(one.change_DF, other.change_DF, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_refit_lowers_the_error_on_blocks_it_never_saw(name: str) -> None:
    source, merged, prefix, held = prepared(name, num_blocks=40)
    fresh = tokens(8, 32, seed=99)
    before = state_errors(source, merged.causal_lm, fresh)
    refit_groups(source, merged, prefix, held, RepairConfig())
    after = state_errors(source, merged.causal_lm, fresh)
    assert after[0] < before[0]
    assert after[1] < before[1]


def test_a_refit_adds_its_change_to_the_merged_matrix() -> None:
    source, merged, prefix, held = prepared()
    with torch.no_grad():
        before = [layer.tensors()["down_proj"] for layer in merged.merged_layers()]
    refits = refit_groups(source, merged, prefix, held, RepairConfig())
    for layer, old, one in zip(merged.merged_layers(), before, refits, strict=True):
        wanted = (old.double() + one.change_DF).float()
        assert torch.equal(layer.refits["down_proj"], wanted)


def test_the_held_out_blocks_are_those_that_are_named() -> None:
    source, merged, prefix, held = prepared()
    found = refit_groups(source, merged, prefix, held, RepairConfig())[0]
    source, merged, prefix, _ = prepared()
    order = held.long().argsort(stable=True)
    other = refit_groups(source, merged, prefix[order], held[order], RepairConfig())[0]
    assert found.holdout_error == pytest.approx(other.holdout_error, rel=1e-4)


@pytest.mark.parametrize("batch_size", [1, 3, 5, 12, 50])
def test_the_batch_size_does_not_matter(batch_size: int) -> None:
    found, wanted = (
        refit_groups(*prepared(), RepairConfig(), batch_size=size) for size in (batch_size, 4)
    )
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.change_DF, other.change_DF, rtol=1e-2, atol=1e-4)


def test_a_source_layer_that_is_merged_with_its_copies_of_nothing_needs_no_repair() -> None:
    source = tiny_model()
    for i in (1, 3):  # layers that add nothing to the state
        for matrix in (
            source.model.layers[i].self_attn.o_proj,
            source.model.layers[i].mlp.down_proj,
        ):
            torch.nn.init.zeros_(matrix.weight)
    merged = MergedLlama(source, TWO, {}, AlphaConfig())
    prefix = cache_states(source, tokens(8), 0).prefix_BTD
    refits = refit_groups(source, merged, prefix, torch.arange(8) > 5, RepairConfig())
    assert [r.holdout_error for r in refits] == [1, 1]
    assert torch.equal(logits(merged.causal_lm), logits(source))


def test_the_source_stays_as_it_was() -> None:
    source, merged, prefix, held = prepared()
    before, expected = weights(source), logits(source)
    refit_groups(source, merged, prefix, held, RepairConfig())
    assert same(weights(source), before)
    assert torch.equal(logits(source), expected)


def test_hooks_are_gone_afterwards() -> None:
    source, merged, prefix, held = prepared()
    refit_groups(source, merged, prefix, held, RepairConfig())
    modules = [*source.modules(), *merged.modules()]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in modules)


def test_without_a_method_nothing_is_refitted() -> None:
    source, merged, _, held = prepared()
    cache = cache_states(source, tokens(8), merged.first_merged)
    repair(source, merged, cache, held, RepairConfig(method="none"))
    assert not any(merged.refits())
    assert merged.refits() == [{}, {}]


def test_with_nothing_merged_nothing_is_refitted() -> None:
    source = tiny_model()
    merged = MergedLlama(source, plan_of(), {}, AlphaConfig())
    prefix = cache_states(source, tokens(8), merged.first_merged).prefix_BTD
    assert refit_groups(source, merged, prefix, torch.arange(8) > 5, RepairConfig()) == []


def test_bias_and_input_of_the_down_projection_explain_its_output() -> None:
    source, merged, prefix, held = prepared("llama-biases")
    refit_groups(source, merged, prefix, held, RepairConfig())
    mlp = decoder_layers(merged.plain())[0].mlp
    states = torch.randn(3, 32)
    inner = torch.nn.functional.silu(mlp.gate_proj(states)) * mlp.up_proj(states)
    wanted = linear(inner, merged.refits()[0]["down_proj"], mlp.down_proj.bias)
    torch.testing.assert_close(mlp(states), wanted)


def test_every_repair_has_a_row() -> None:
    assert set(REPAIRS) == set(get_args(RepairMethod))


@pytest.mark.parametrize("method", get_args(RepairMethod))
def test_every_method_runs_on_bfloat16(method: RepairMethod) -> None:
    source = tiny_model().bfloat16()
    merged = MergedLlama(source, TWO, {}, AlphaConfig())
    cache = cache_states(source, tokens(8), 0)
    repair(source, merged, cache, torch.arange(8) > 5, RepairConfig(method=method))
    assert logits(merged.causal_lm).isfinite().all()
