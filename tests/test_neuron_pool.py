import pytest
import torch
from models import VARIANTS, plan_of, tiny_variant, tokens, weights
from torch import Tensor
from transformers import PreTrainedModel

from lmerge import neuron_pool
from lmerge.alphas import AlphaConfig
from lmerge.cache import cache_states
from lmerge.llama import decoder_layers, run_span, span, with_layers, with_tensors
from lmerge.merged import MergedLlama
from lmerge.neuron_pool import RIDGE, pool_neurons, select_neurons
from lmerge.normal_equations import NormalEquations
from lmerge.refine import refine_layers
from lmerge.repair import RepairConfig

HELD = torch.arange(96) % 4 == 3


def sums_of(a_NF: Tensor, target_ND: Tensor) -> NormalEquations:
    zeros = NormalEquations.zeros(a_NF.shape[1], target_ND.shape[1], torch.device("cpu"))
    return zeros.update(a_NF, target_ND, torch.ones(len(a_NF)))


def damped_error(sums: NormalEquations, kept_F: Tensor, damping: float) -> float:
    """The least of |a d - t|^2 + damping |d|^2 with some of the neurons alone."""
    gram_FF = sums.gram_FF[kept_F][:, kept_F] + damping * torch.eye(len(kept_F)).double()
    cross_FD = sums.cross_DF[:, kept_F].T
    return float(sums.energy - (cross_FD * torch.linalg.solve(gram_FF, cross_FD)).sum())


@pytest.mark.parametrize("seed", range(4))
def test_the_neuron_that_goes_is_the_one_that_the_others_replace_best(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    a_NF = torch.randn(80, 9, generator=generator).double() @ torch.randn(9, 9).double()
    sums = sums_of(a_NF, torch.randn(80, 3, generator=generator).double())
    damping = RIDGE * float(sums.gram_FF.diagonal().mean())
    every = torch.arange(9)
    errors = [damped_error(sums, every[every != gone], damping) for gone in range(9)]
    gone = int(torch.tensor(errors).argmin())
    assert select_neurons(sums, 8).tolist() == every[every != gone].tolist()


def test_neurons_that_make_up_the_target_are_found_among_others() -> None:
    generator = torch.Generator().manual_seed(0)
    a_NF = torch.randn(400, 40, generator=generator).double()
    planted = torch.tensor([3, 8, 11, 12, 25, 39])
    target_ND = a_NF[:, planted] @ torch.randn(6, 5, generator=generator).double()
    assert select_neurons(sums_of(a_NF, target_ND), 6).tolist() == planted.tolist()


def test_of_two_equal_neurons_one_goes() -> None:
    a_NF = torch.randn(50, 3, generator=torch.Generator().manual_seed(0)).double()
    twice = torch.cat([a_NF, a_NF[:, :1]], dim=1)
    assert {1, 2} < set(select_neurons(sums_of(twice, a_NF), 3).tolist())


def test_silent_neurons_are_no_error() -> None:
    assert len(select_neurons(sums_of(torch.zeros(5, 4), torch.ones(5, 2)), 2)) == 2


def prepared(name: str = "llama") -> tuple[PreTrainedModel, MergedLlama, Tensor, Tensor]:
    source = tiny_variant(name)
    merged = MergedLlama(source, plan_of([1, 2]), {}, AlphaConfig(granularity="tensor"))
    currents = cache_states(source, tokens(96, 32), 1).prefix_BTD
    return source, merged, currents, run_span(span(source, 1, 3), currents)


def held_error(merged: MergedLlama, currents: Tensor, targets: Tensor) -> float:
    missing = run_span(span(merged.causal_lm, 1, 2), currents[HELD]) - targets[HELD]
    return float((missing.square().sum(-1) / targets[HELD].square().sum(-1)).mean())


@torch.no_grad()
@pytest.mark.parametrize("name", VARIANTS)
def test_a_layer_made_of_its_members_neurons_is_found_again(name: str) -> None:
    _, merged, currents, _ = prepared(name)
    (layer,) = merged.merged_layers()
    both = layer.stacked()
    half = both["gate_proj"].shape[1] // 2
    mixed = dict(layer.tensors())
    for tensor_name in neuron_pool.NEURON_AXIS:
        if tensor_name in both:
            axis = neuron_pool.NEURON_AXIS[tensor_name]
            first, second = both[tensor_name]
            parts = (first.narrow(axis, 0, half), second.narrow(axis, half, half))
            mixed[tensor_name] = torch.cat(parts, dim=axis)
    planted = with_layers(
        merged.causal_lm, [with_tensors(layer.template, mixed)], [1], final_norm=False
    )
    targets = run_span(planted, currents)
    share = pool_neurons(merged, 1, currents, targets, HELD)
    assert share < 0.2
    torch.testing.assert_close(layer.tensors()["gate_proj"], mixed["gate_proj"])
    torch.testing.assert_close(layer.tensors()["up_proj"], mixed["up_proj"])


@torch.no_grad()
@pytest.mark.parametrize("name", VARIANTS)
def test_pooled_neurons_come_closer_to_the_group_after_its_refit(name: str) -> None:
    errors = []
    for neurons in ("own", "pooled"):
        source, merged, currents, targets = prepared(name)
        config = RepairConfig(method="deep", num_after=0, neurons=neurons)
        refine_layers(source, merged, currents, HELD, config)
        errors.append(held_error(merged, currents, targets))
    assert errors[1] < errors[0]


def test_pooling_leaves_the_source_as_it_was() -> None:
    source, merged, currents, targets = prepared()
    before = weights(source)
    pool_neurons(merged, 1, currents, targets, HELD)
    assert all(torch.equal(before[name], now) for name, now in weights(source).items())


def test_a_pool_with_no_better_neuron_changes_nothing() -> None:
    source, merged, currents, _ = prepared()
    own = run_span(span(source, 1, 2), currents)  # the anchor alone reaches this
    before = weights(merged.plain())
    assert pool_neurons(merged, 1, currents, own, HELD) == 1.0
    assert all(torch.equal(before[name], now) for name, now in weights(merged.plain()).items())


def test_a_large_pool_is_cut_to_the_neurons_that_write_most(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, merged, currents, targets = prepared()
    (layer,) = merged.merged_layers()
    with torch.no_grad():
        silent = layer.stacked()["down_proj"]
        silent[1].zero_()  # the second member writes nothing
    monkeypatch.setattr(neuron_pool, "room_of", lambda num_neurons: num_neurons)
    assert pool_neurons(merged, 1, currents, targets, HELD) == 1.0
    assert len(decoder_layers(merged.plain())) == 3
