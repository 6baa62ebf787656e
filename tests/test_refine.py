import math

import pytest
import torch
from conftest import tiny_model
from models import VARIANTS, plan_of, same, tiny_variant, tokens, weights
from torch import Tensor
from transformers import PreTrainedModel

from lmerge.alphas import AlphaConfig
from lmerge.cache import cache_states
from lmerge.llama import decoder_layers, run_span, span
from lmerge.merged import MergedLlama
from lmerge.normal_equations import NormalEquations
from lmerge.refine import refine_layers
from lmerge.repair import RepairConfig
from lmerge.row_refits import ROW_RIDGES, RowRefit, solve_rows
from lmerge.state_training import train_layer

FIRST = plan_of([0, 1])
HELD = torch.arange(24) % 4 == 3


def deep(num_after: int, num_epochs: int = 0) -> RepairConfig:
    return RepairConfig(method="deep", num_after=num_after, num_epochs=num_epochs)


def equations(a: Tensor, r: Tensor) -> NormalEquations:
    zeros = NormalEquations.zeros(a.shape[1], r.shape[1], torch.device("cpu"))
    return zeros.update(a, r, torch.ones(len(a)))


def problem(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Features, and residuals of which the first is planted, the second noise."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(60, 12, generator=generator).double()
    noise = torch.randn(60, generator=generator).double()
    return a, torch.stack([a @ torch.arange(12.0).double(), noise], dim=1)


def solved(fit_seed: int = 0, held_seed: int = 1) -> RowRefit:
    return solve_rows(equations(*problem(fit_seed)), equations(*problem(held_seed)))


def test_each_output_gets_the_ridge_that_is_best_for_it() -> None:
    fit, held = equations(*problem(0)), equations(*problem(1))
    a, r = problem(1)
    errors = [(r - a @ fit.solve(ridge).T).square().sum(dim=0) for ridge in ROW_RIDGES]
    wanted = torch.stack([*errors, r.square().sum(dim=0)]).argmin(dim=0)
    ridges = torch.tensor([*ROW_RIDGES, math.inf], dtype=torch.float64)
    torch.testing.assert_close(solve_rows(fit, held).ridge_D, ridges[wanted])


def test_what_is_noise_is_shrunk_and_what_is_planted_is_found() -> None:
    found = solved()
    assert found.ridge_D[0] == min(ROW_RIDGES)
    assert found.ridge_D[1] > 1
    torch.testing.assert_close(found.change_DF[0], torch.arange(12.0).double(), rtol=0, atol=0.1)
    assert found.change_DF[1].norm() < 0.1


def test_all_positions_are_fitted_once_the_ridges_are_chosen() -> None:
    both = equations(*(torch.cat(pair) for pair in zip(problem(0), problem(1), strict=True)))
    found = solved()
    wanted = both.solve(float(found.ridge_D[0]))[0]
    torch.testing.assert_close(found.change_DF[0], wanted)


def test_the_held_out_error_is_that_of_the_fit_alone() -> None:
    fit, (a, r), found = equations(*problem(0)), problem(1), solved()
    rows = [
        fit.solve(float(v))[i] if v < math.inf else 0 * a[0] for i, v in enumerate(found.ridge_D)
    ]
    error = (r - a @ torch.stack(rows).T).square().sum() / r.square().sum()
    assert found.holdout_error == pytest.approx(float(error))


def prepared(name: str = "llama") -> tuple[PreTrainedModel, MergedLlama, Tensor]:
    source = tiny_variant(name)
    merged = MergedLlama(source, FIRST, {}, AlphaConfig(granularity="tensor"))
    return source, merged, cache_states(source, tokens(24, 32), 0).prefix_BTD


@torch.no_grad()
def states_after(model: PreTrainedModel, layer: int, token_BT: Tensor) -> Tensor:
    seen: list[Tensor] = []
    hook = decoder_layers(model)[layer].register_forward_hook(lambda _m, _i, out: seen.append(out))
    model(token_BT, use_cache=False)
    hook.remove()
    return seen[0]


def error(source: PreTrainedModel, model: PreTrainedModel, layer: int, target: int) -> float:
    fresh = tokens(8, 32, seed=99)
    wanted = states_after(source, target, fresh)
    missing = states_after(model, layer, fresh) - wanted
    return float((missing.square().sum(-1) / wanted.square().sum(-1)).mean())


@pytest.mark.parametrize("name", VARIANTS)
def test_deep_repair_lowers_the_error_on_blocks_it_never_saw(name: str) -> None:
    source, merged, prefix = prepared(name)
    before = [error(source, merged.causal_lm, i, i + 1) for i in (0, 1)]
    refine_layers(source, merged, prefix, HELD, deep(num_after=1))
    after = [error(source, merged.causal_lm, i, i + 1) for i in (0, 1)]
    assert after[0] < before[0]
    assert after[1] < before[1]


@pytest.mark.parametrize(("num_after", "positions"), [(0, [0]), (1, [0, 1]), (9, [0, 1, 2])])
def test_that_many_layers_above_are_refitted(num_after: int, positions: list[int]) -> None:
    source, merged, prefix = prepared()
    before = merged.plain()
    old = [weights(layer) for layer in decoder_layers(before)]
    assert list(refine_layers(source, merged, prefix, HELD, deep(num_after=num_after))) == positions
    new = [weights(layer) for layer in decoder_layers(merged.plain())]
    for i, (was, now) in enumerate(zip(old, new, strict=True)):
        changed = {name for name in was if not torch.equal(was[name], now[name])}
        assert changed <= {"self_attn.o_proj.weight", "mlp.down_proj.weight"}
        assert ("mlp.down_proj.weight" in changed) == (i in positions)


def test_the_source_stays_as_it_was() -> None:
    source, merged, prefix = prepared()
    before = weights(source)
    refine_layers(source, merged, prefix, HELD, deep(num_after=9))
    assert same(before, weights(source))


@pytest.mark.parametrize("batch_size", [1, 5, 24])
def test_the_batch_size_does_not_matter(batch_size: int) -> None:
    outputs = []
    for size in (batch_size, 4):
        source, merged, prefix = prepared()
        refine_layers(source, merged, prefix, HELD, deep(num_after=1), batch_size=size)
        outputs.append(states_after(merged.causal_lm, 2, tokens()))
    torch.testing.assert_close(*outputs, rtol=1e-2, atol=1e-3)


def test_with_nothing_merged_nothing_is_refitted() -> None:
    source = tiny_model()
    merged = MergedLlama(source, plan_of(), {}, AlphaConfig())
    prefix = cache_states(source, tokens(24), merged.first_merged).prefix_BTD
    assert refine_layers(source, merged, prefix, HELD, deep(num_after=2)) == {}


def test_training_on_states_lowers_the_error_further_on_blocks_it_never_saw() -> None:
    errors = []
    for num_epochs in (0, 6):
        source, merged, prefix = prepared()
        found = refine_layers(
            source,
            merged,
            prefix,
            HELD,
            deep(num_after=1, num_epochs=num_epochs),
        )
        errors.append((error(source, merged.causal_lm, 0, 1), found[0].holdout_error))
    assert errors[1][0] < errors[0][0]
    assert errors[1][1] < errors[0][1]


def test_training_on_states_moves_every_matrix_of_the_refitted_layers_alone() -> None:
    source, merged, prefix = prepared()
    old = [weights(layer) for layer in decoder_layers(merged.plain())]
    before = weights(source)
    refine_layers(source, merged, prefix, HELD, deep(num_after=0, num_epochs=2))
    new = [weights(layer) for layer in decoder_layers(merged.plain())]
    changed = {n for n in old[0] if not torch.equal(old[0][n], new[0][n])}
    assert changed == {n for n in old[0] if "proj" in n}
    assert all(same(was, now) for was, now in zip(old[1:], new[1:], strict=True))
    assert same(before, weights(source))


def test_training_that_helps_no_held_out_block_changes_nothing() -> None:
    source, merged, prefix = prepared()
    refine_layers(source, merged, prefix, HELD, deep(num_after=0))
    old = weights(decoder_layers(merged.plain())[0])
    with torch.no_grad():
        targets = run_span(span(merged.causal_lm, 0, 1), prefix)
    assert train_layer(merged, 0, prefix, targets, HELD, num_epochs=1) == 1.0
    assert same(old, weights(decoder_layers(merged.plain())[0]))
