from typing import get_args

import pytest
import torch
from conftest import tiny_model
from models import VARIANTS, tiny_variant
from scipy.optimize import linear_sum_assignment
from test_merge import relative_error, run_layer, tensors_of
from torch import Tensor

from lmerge.align import (
    ALIGNERS,
    Aligner,
    align_group,
    identity_order,
    match_neurons,
    matched_similarity,
    neuron_similarity,
    reorder_neurons,
)
from lmerge.llama import MATRICES, NEURON_AXIS, LayerTensors, stack_layers
from lmerge.merge import merge_group
from lmerge.plan import Group

NUM_NEURONS = 48


def random_order(seed: int = 0) -> Tensor:
    return torch.randperm(NUM_NEURONS, generator=torch.Generator().manual_seed(seed))


def scaled(layer: LayerTensors, scale_F: Tensor) -> LayerTensors:
    """The same layer with up rows scaled by c and down columns by 1 / c."""
    up, down = layer["up_proj"] * scale_F[:, None], layer["down_proj"] / scale_F
    new = {**layer, "up_proj": up, "down_proj": down}
    if "up_proj.bias" in layer:
        new["up_proj.bias"] = layer["up_proj.bias"] * scale_F
    return new


def scales() -> Tensor:
    """Scales of either sign between 0.1 and 10."""
    generator = torch.Generator().manual_seed(2)
    sign_F = torch.randint(2, (NUM_NEURONS,), generator=generator) * 2 - 1
    return sign_F * 10 ** (2 * torch.rand(NUM_NEURONS, generator=generator) - 1)


def test_table_has_every_aligner() -> None:
    assert set(ALIGNERS) == set(get_args(Aligner))


@pytest.mark.parametrize("name", VARIANTS)
def test_reordering_neurons_keeps_the_function(name: str) -> None:
    model = tiny_variant(name)
    (layer,) = tensors_of(model, 1)
    found = run_layer(model, 1, reorder_neurons(layer, random_order()))
    assert relative_error(found, run_layer(model, 1, layer)) < 1e-5


def test_reordering_moves_neurons_and_nothing_else() -> None:
    (layer,) = tensors_of(tiny_variant("llama-biases"), 1)
    moved = reorder_neurons(layer, random_order())
    assert {n for n in layer if not torch.equal(layer[n], moved[n])} == set(NEURON_AXIS)


def test_reordering_by_an_order_and_its_inverse_is_nothing() -> None:
    (layer,) = tensors_of(tiny_model(), 1)
    back = reorder_neurons(reorder_neurons(layer, random_order()), random_order().argsort())
    assert all(torch.equal(layer[name], back[name]) for name in layer)


@pytest.mark.parametrize("name", ["llama", "llama-biases"])
def test_scaling_up_against_down_keeps_the_function(name: str) -> None:
    model = tiny_variant(name)
    (layer,) = tensors_of(model, 1)
    found = run_layer(model, 1, scaled(layer, scales()))
    assert relative_error(found, run_layer(model, 1, layer)) < 1e-5


def test_similarity_does_not_depend_on_the_scale_or_sign_between_up_and_down() -> None:
    anchor, member = tensors_of(tiny_model(), 0, 1)
    found = neuron_similarity(anchor, scaled(member, scales()))
    torch.testing.assert_close(found, neuron_similarity(anchor, member), rtol=1e-5, atol=1e-6)


def test_similarity_of_a_layer_with_itself_is_2_on_the_diagonal() -> None:
    (layer,) = tensors_of(tiny_model(), 0)
    similarity = neuron_similarity(layer, layer)
    torch.testing.assert_close(similarity.diagonal(), torch.full((NUM_NEURONS,), 2.0))


def test_similarity_of_swapped_layers_is_transposed() -> None:
    anchor, member = tensors_of(tiny_model(), 0, 1)
    torch.testing.assert_close(
        neuron_similarity(anchor, member).T, neuron_similarity(member, anchor)
    )


def test_similarity_lies_between_minus_2_and_2() -> None:
    anchor, member = tensors_of(tiny_model(), 0, 1)
    assert neuron_similarity(anchor, member).abs().max() <= 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_planted_permutation_is_recovered(dtype: torch.dtype) -> None:
    (anchor,) = tensors_of(tiny_model().to(dtype), 0)
    planted = random_order()
    found = match_neurons(anchor, reorder_neurons(anchor, planted))
    assert torch.equal(planted[found], torch.arange(NUM_NEURONS))


def test_a_planted_permutation_is_recovered_under_noise_scale_and_sign() -> None:
    (anchor,) = tensors_of(tiny_model(), 0)
    generator = torch.Generator().manual_seed(4)
    noisy = {
        name: tensor + 0.3 * tensor.std() * torch.randn(tensor.shape, generator=generator)
        for name, tensor in anchor.items()
    }
    planted = random_order()
    found = match_neurons(anchor, reorder_neurons(scaled(noisy, scales()), planted))
    assert torch.equal(planted[found], torch.arange(NUM_NEURONS))


def test_matched_neurons_take_the_place_of_the_anchors() -> None:
    (anchor,) = tensors_of(tiny_model(), 0)
    member = reorder_neurons(anchor, random_order())
    aligned = reorder_neurons(member, match_neurons(anchor, member))
    assert all(torch.equal(aligned[name], anchor[name]) for name in anchor)


def test_no_order_has_a_higher_similarity_than_the_matched_one() -> None:
    anchor, member = tensors_of(tiny_model(), 0, 1)
    similarity = neuron_similarity(anchor, member).numpy()
    rows, columns = linear_sum_assignment(-similarity)
    best = float(similarity[rows, columns].sum())
    found = float(matched_similarity(anchor, member, match_neurons(anchor, member)).sum())
    assert found == pytest.approx(best, abs=1e-4)


@pytest.mark.parametrize("aligner", ALIGNERS)
def test_an_order_is_a_permutation(aligner: Aligner) -> None:
    anchor, member = tensors_of(tiny_model(), 0, 1)
    order = ALIGNERS[aligner](anchor, member)
    assert order.dtype == torch.int64
    assert torch.equal(order.sort().values, torch.arange(NUM_NEURONS))


@pytest.mark.parametrize("order", [torch.arange(NUM_NEURONS), random_order()])
def test_matched_similarity_is_the_similarity_of_the_pairs(order: Tensor) -> None:
    anchor, member = tensors_of(tiny_model(), 0, 1)
    wanted = neuron_similarity(anchor, member)[torch.arange(NUM_NEURONS), order]
    torch.testing.assert_close(matched_similarity(anchor, member, order), wanted)


@pytest.mark.parametrize("aligner", ALIGNERS)
def test_the_anchor_of_a_group_keeps_its_order(aligner: Aligner) -> None:
    layers = dict(enumerate(tensors_of(tiny_model(), 0, 1, 2, 3)))
    orders = align_group(Group(members=(1, 2, 3), anchor=2), layers, aligner)
    assert orders.keys() == {1, 2, 3}
    assert torch.equal(orders[2], torch.arange(NUM_NEURONS))


def test_without_alignment_every_layer_keeps_its_order() -> None:
    anchor, member = tensors_of(tiny_model(), 0, 1)
    assert torch.equal(identity_order(anchor, member), torch.arange(NUM_NEURONS))


def test_the_average_of_permuted_copies_is_the_layer_once_they_are_aligned() -> None:
    (anchor,) = tensors_of(tiny_model(), 0)
    copies = [reorder_neurons(anchor, random_order(seed)) for seed in (1, 2)]
    aligned = [reorder_neurons(copy, match_neurons(anchor, copy)) for copy in copies]
    stacked = stack_layers([anchor, *aligned])
    merged = merge_group(stacked, dict.fromkeys(MATRICES, torch.full((3,), 1 / 3)), 0)
    assert all(torch.allclose(merged[name], anchor[name]) for name in anchor)
