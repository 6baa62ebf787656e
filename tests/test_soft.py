import pytest
import torch
from conftest import tiny_model
from models import VARIANTS, tiny_variant
from test_align import scaled, scales
from test_merge import tensors_of
from torch import Tensor

from lmerge.align import Pair, align, match_neurons, motion_of, motion_parts, move
from lmerge.llama import head_spec
from lmerge.neurons import neuron_similarity, reorder_neurons
from lmerge.soft import Blend, blend_neurons, soft_plan


def hard_blend(order_F: Tensor) -> Blend:
    size = len(order_F)
    return Blend(
        signed_FF=torch.eye(size)[order_F], row_F=torch.ones(size), column_F=torch.ones(size)
    )


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_a_temperature_is_a_number_above_0(temperature: float) -> None:
    with pytest.raises(ValueError, match="must be above 0"):
        soft_plan(torch.eye(3), temperature)


def test_a_hard_blend_reorders_the_neurons() -> None:
    (layer,) = tensors_of(tiny_model(), 1)
    order_F = torch.randperm(48, generator=torch.Generator().manual_seed(0))
    blended = blend_neurons(layer, hard_blend(order_F))
    wanted = reorder_neurons(layer, order_F)
    assert all(torch.equal(blended[name], wanted[name]) for name in layer)


@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_rows_and_columns_of_a_plan_sum_to_1(temperature: float) -> None:
    pytest.importorskip("ot")
    plan_FF = soft_plan(neuron_similarity(*tensors_of(tiny_model(), 0, 1)), temperature)
    for axis in (0, 1):
        torch.testing.assert_close(plan_FF.sum(dim=axis), torch.ones(48), atol=1e-3, rtol=0)


def test_a_cold_plan_is_the_optimal_order_and_a_hot_one_is_even() -> None:
    pytest.importorskip("ot")
    anchor, member = tensors_of(tiny_model(), 0, 1)
    similarity_FF = neuron_similarity(anchor, member)
    cold_FF = soft_plan(similarity_FF.double(), 1e-3, max_iterations=10_000)
    hot_FF = soft_plan(similarity_FF, 1e3)
    assert torch.equal(cold_FF.argmax(dim=1), match_neurons(anchor, member))
    torch.testing.assert_close(hot_FF, torch.full_like(hot_FF, 1 / 48), atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", VARIANTS)
def test_cold_soft_alignment_is_hard_alignment_with_signs_and_scales(name: str) -> None:
    pytest.importorskip("ot")
    model = tiny_variant(name)
    anchor, member = tensors_of(model, 1, 1)
    member = scaled(member, scales())
    pair = Pair(anchor, member, head_spec(model.config), temperature=1e-2)
    soft, hard = (move(member, align(pair, aligner)) for aligner in ("soft", "weights"))
    for key in anchor:
        torch.testing.assert_close(soft[key], hard[key], rtol=1e-3, atol=1e-4)


def test_a_blend_survives_its_tensors() -> None:
    pytest.importorskip("ot")
    anchor, member = tensors_of(tiny_model(), 0, 1)
    blend = align(Pair(anchor, member, head_spec(tiny_model().config)), "soft")
    found = motion_of(motion_parts(blend))
    assert isinstance(blend, Blend)
    assert isinstance(found, Blend)
    assert torch.equal(found.signed_FF, blend.signed_FF)


@pytest.mark.parametrize(
    ("name", "value"),
    [("signed_FF", torch.eye(3) * 2), ("row_F", torch.zeros(3)), ("column_F", torch.ones(2))],
)
def test_shares_that_do_not_sum_to_1_are_no_blend(name: str, value: Tensor) -> None:
    parts = motion_parts(hard_blend(torch.arange(3)))
    assert isinstance(parts, dict)
    with pytest.raises(ValueError, match="shares that sum to 1"):
        motion_of({**parts, name: value})
