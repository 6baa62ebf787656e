import pytest
import torch
from test_align import scaled
from torch import Tensor

from lmerge import sketch
from lmerge.assignment import Sketch, assign
from lmerge.llama import LayerTensors
from lmerge.neurons import neuron_similarity, reorder_neurons
from lmerge.sketch import best_similarity, neuron_sketch

SIZE = 72
"""A multiple of 8, as the integer products ask for."""


def layer(seed: int, dtype: torch.dtype = torch.bfloat16, size: int = SIZE) -> LayerTensors:
    g = torch.Generator().manual_seed(seed)
    gate, up, down = (torch.randn(size, 64, generator=g).to(dtype) for _ in range(3))
    return {"gate_proj": gate, "up_proj": up, "down_proj": down.T}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rough_values_are_near_and_exact_ones_equal(dtype: torch.dtype) -> None:
    anchor, member = layer(0, dtype), layer(1, dtype)
    wanted_FF, found = neuron_similarity(anchor, member), neuron_sketch(anchor, member)
    assert (found.rough_FF.float() - wanted_FF).abs().max() < 0.1 * wanted_FF.std()
    row_E, col_E = (torch.randint(SIZE, (300,)) for _ in range(2))
    exact_E = found.exact(row_E, col_E)
    torch.testing.assert_close(exact_E.float(), wanted_FF[row_E, col_E], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_sketch_leaves_the_weights_alone(dtype: torch.dtype) -> None:
    anchor, member = layer(0, dtype), layer(1, dtype)
    assign(neuron_sketch(anchor, member))
    for found, wanted in ((anchor, layer(0, dtype)), (member, layer(1, dtype))):
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_sketch_leads_to_the_same_order() -> None:
    for seed in range(3):
        anchor, member = layer(seed), layer(seed + 10)
        wanted = assign(neuron_similarity(anchor, member))
        found = assign(neuron_sketch(anchor, member))
        assert torch.equal(found.order_F, wanted.order_F)
        assert found.total == pytest.approx(wanted.total, abs=1e-4)
        assert found.gap < 1e-6


def test_a_planted_order_is_found_in_one_pass() -> None:
    anchor = layer(0)
    planted = torch.randperm(SIZE, generator=torch.Generator().manual_seed(0))
    found = assign(neuron_sketch(anchor, reorder_neurons(anchor, planted)), max_rounds=1)
    assert torch.equal(planted[found.order_F], torch.arange(SIZE))
    assert found.gap < 1e-6


def test_silent_neurons_are_like_nothing() -> None:
    anchor, member = layer(0), layer(1)
    member["gate_proj"][3] = 0
    member["up_proj"][3] = 0
    found = neuron_sketch(anchor, member).rough_FF
    assert found.isfinite().all()
    assert (found[:, 3] == 0).all()


@pytest.mark.parametrize("noise", [1e-3, 1e-1, 1.0])
def test_a_sketch_of_any_noise_is_solved_to_the_best_total(noise: float) -> None:
    g = torch.Generator().manual_seed(0)
    exact_FF = torch.randn(60, 60, generator=g)
    rough_FF = exact_FF + noise * torch.randn(60, 60, generator=g)
    found = assign(Sketch(rough_FF, lambda row_E, col_E: exact_FF[row_E, col_E]))
    assert found.total == pytest.approx(assign(exact_FF).total, abs=1e-5)


def test_scales_and_signs_between_up_and_down_do_not_matter() -> None:
    anchor, member = layer(0, torch.float32), layer(1, torch.float32)
    scale_F = 10 ** torch.linspace(-2, 2, SIZE) * (torch.arange(SIZE) % 2 * 2 - 1)
    found, wanted = (neuron_sketch(anchor, m).rough_FF for m in (scaled(member, scale_F), member))
    torch.testing.assert_close(found, wanted, rtol=1e-2, atol=2e-3)


@pytest.mark.parametrize(("smallest", "kind"), [(SIZE, Sketch), (SIZE + 1, Tensor)])
def test_layers_from_a_size_on_are_sketched(
    monkeypatch: pytest.MonkeyPatch, smallest: int, kind: type
) -> None:
    monkeypatch.setattr(sketch, "SMALLEST", smallest)
    monkeypatch.setattr(sketch, "_has_fast_integers", lambda: True)
    assert isinstance(best_similarity(layer(0), layer(1)), kind)


@pytest.mark.parametrize("odd", [1, 3, 7])
def test_every_number_of_neurons_can_be_sketched(odd: int) -> None:
    anchor, member = layer(0, size=SIZE + odd), layer(1, size=SIZE + odd)
    wanted_FF = neuron_similarity(anchor, member)
    found_FF = neuron_sketch(anchor, member).rough_FF
    assert (found_FF.float() - wanted_FF).abs().max() < 0.1 * wanted_FF.std()
