import pytest
import torch
from conftest import tiny_model
from test_merge import tensors_of

from lmerge.align import match_neurons, neuron_similarity, reorder_neurons
from lmerge.soft import blend_neurons, soft_plan


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_a_temperature_is_above_0(temperature: float) -> None:
    with pytest.raises(ValueError, match="must be above 0"):
        soft_plan(torch.eye(3), temperature)


def test_a_hard_plan_reorders_the_neurons() -> None:
    (layer,) = tensors_of(tiny_model(), 1)
    order_F = torch.randperm(48, generator=torch.Generator().manual_seed(0))
    blended = blend_neurons(layer, torch.eye(48, dtype=torch.float64)[order_F])
    wanted = reorder_neurons(layer, order_F)
    assert all(torch.equal(blended[name], wanted[name]) for name in layer)


@pytest.mark.filterwarnings("ignore")  # of POT's own optional imports
@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_rows_and_columns_of_a_plan_sum_to_1(temperature: float) -> None:
    pytest.importorskip("ot")
    plan_FF = soft_plan(neuron_similarity(*tensors_of(tiny_model(), 0, 1)), temperature)
    for axis in (0, 1):
        torch.testing.assert_close(
            plan_FF.sum(dim=axis), torch.ones(48).double(), atol=1e-4, rtol=0
        )


@pytest.mark.filterwarnings("ignore")
def test_a_cold_plan_is_the_optimal_order_and_a_hot_one_is_even() -> None:
    pytest.importorskip("ot")
    anchor, member = tensors_of(tiny_model(), 0, 1)
    similarity_FF = neuron_similarity(anchor, member)
    cold_FF, hot_FF = soft_plan(similarity_FF, 1e-3), soft_plan(similarity_FF, 1e3)
    assert torch.equal(cold_FF.argmax(dim=1), match_neurons(anchor, member))
    torch.testing.assert_close(hot_FF, torch.full_like(hot_FF, 1 / 48), atol=1e-3, rtol=0)
