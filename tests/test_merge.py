import pytest
import torch
from conftest import tiny_model
from models import VARIANTS, tiny_variant
from torch import Tensor
from transformers import PreTrainedModel

from lmerge.alphas import AlphaConfig, Granularity, start_alphas
from lmerge.axes import ALPHA_AXIS, COMPANION, FOLDS_INTO
from lmerge.llama import (
    MATRICES,
    LayerTensors,
    decoder_layers,
    head_dim,
    layer_tensors,
    run_span,
    stack_layers,
    with_layers,
    with_tensors,
)
from lmerge.merge import blend, expand_alpha, fold_norms, merge_group, reference_norms
from lmerge.plan import Group

EQUATIONS = {0: ("g,goi->oi", "go,goi->oi"), 1: ("g,goi->oi", "gi,goi->oi")}
NEURON, HEAD = AlphaConfig(granularity="neuron"), AlphaConfig(granularity="head")


@torch.no_grad()
def run_layer(model: PreTrainedModel, index: int, tensors: LayerTensors) -> Tensor:
    """What a layer with these tensors makes of random states."""
    states = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(3))
    layer = with_tensors(decoder_layers(model)[index], tensors)
    return run_span(with_layers(model, [layer], [index], final_norm=False), states)


def relative_error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def tensors_of(model: PreTrainedModel, *indices: int) -> list[LayerTensors]:
    return [layer_tensors(decoder_layers(model)[i]) for i in indices]


# Folding of norms.


@pytest.mark.parametrize("name", VARIANTS)
def test_folding_into_the_norms_of_another_layer_keeps_the_function(name: str) -> None:
    model = tiny_variant(name)
    anchor, member = tensors_of(model, 0, 2)
    folded = fold_norms(member, reference_norms(anchor))
    assert relative_error(run_layer(model, 2, folded), run_layer(model, 2, member)) < 1e-5


@pytest.mark.parametrize("tiny", [0.0, 1e-30, 1e-7, 1e-4, -1e-4])
def test_folding_keeps_the_function_where_the_anchor_has_a_norm_weight_near_zero(
    tiny: float,
) -> None:
    model = tiny_model()
    anchor, member = tensors_of(model, 0, 2)
    for norm in FOLDS_INTO:
        anchor[norm] = anchor[norm].clone()
        anchor[norm][:3] = tiny
    norms = reference_norms(anchor)
    for layer in (anchor, member):
        expected = run_layer(model, 2, layer)
        assert relative_error(run_layer(model, 2, fold_norms(layer, norms)), expected) < 1e-5


def test_folding_keeps_the_function_where_the_anchor_has_no_norm_weight_but_zeros() -> None:
    model = tiny_model()
    anchor, member = tensors_of(model, 0, 2)
    anchor |= {norm: torch.zeros(32) for norm in FOLDS_INTO}
    folded = fold_norms(member, reference_norms(anchor))
    assert relative_error(run_layer(model, 2, folded), run_layer(model, 2, member)) < 1e-5


def test_folding_half_precision_weights_never_overflows() -> None:
    model = tiny_model().half()
    anchor, member = tensors_of(model, 0, 2)
    for norm in FOLDS_INTO:
        anchor[norm] = torch.logspace(0, -7, 32).half()
    folded = fold_norms(member, reference_norms(anchor))
    assert all(tensor.isfinite().all() for tensor in folded.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("smallest", [1.0, 1e-4])
def test_folding_does_not_touch_the_anchor(dtype: torch.dtype, smallest: float) -> None:
    (anchor,) = tensors_of(tiny_model().to(dtype), 1)
    for norm in FOLDS_INTO:
        anchor[norm] = anchor[norm].clone()
        anchor[norm][5] *= smallest
    folded = fold_norms(anchor, reference_norms(anchor))
    assert all(torch.equal(folded[name], anchor[name]) for name in anchor)


def test_folding_leaves_its_input_alone() -> None:
    anchor, member = tensors_of(tiny_model(), 0, 2)
    before = {name: tensor.clone() for name, tensor in member.items()}
    fold_norms(member, reference_norms(anchor))
    assert all(torch.equal(member[name], before[name]) for name in before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_folding_keeps_the_dtype(dtype: torch.dtype) -> None:
    anchor, member = tensors_of(tiny_model().to(dtype), 0, 2)
    folded = fold_norms(member, reference_norms(anchor))
    assert {tensor.dtype for tensor in folded.values()} == {dtype}


# Blending of matrices.


def random_blend(
    axis: int, shape: str, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Three matrices (8, 6), or (6, 8) for axis 1, and their alphas."""
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(3, *((8, 6) if axis == 0 else (6, 8)), generator=generator).to(dtype)
    size = {"member": (3,), "head": (3, 4), "slot": (3, 8)}[shape]
    return weight, torch.randn(size, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("shape", ["member", "head", "slot"])
def test_blend_equals_einsum(axis: int, shape: str) -> None:
    weight, alpha = random_blend(axis, shape)
    full = alpha if shape == "member" else alpha.repeat_interleave(8 // alpha.shape[1], dim=1)
    wanted = torch.einsum(EQUATIONS[axis][full.ndim - 1], full, weight)
    torch.testing.assert_close(blend(weight, alpha, axis), wanted)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("shape", ["member", "head", "slot"])
def test_gradient_of_blend_is_the_numerical_one(axis: int, shape: str) -> None:
    weight, alpha = random_blend(axis, shape)
    assert torch.autograd.gradcheck(lambda a: blend(weight, a, axis), alpha.requires_grad_())


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("shape", ["member", "head", "slot"])
def test_gradient_of_blend_in_bfloat16_accumulates_in_float32(axis: int, shape: str) -> None:
    weight, alpha = random_blend(axis, shape, torch.bfloat16)
    grads = []
    for dtype in (torch.bfloat16, torch.float64):
        leaf = alpha.float().requires_grad_()
        blend(weight.to(dtype), leaf, axis).sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("shape", ["member", "slot"])
def test_blend_of_bfloat16_weights_is_rounded_once(axis: int, shape: str) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(31, *((8, 300) if axis == 0 else (300, 8)), generator=generator).bfloat16()
    alpha = torch.randn((31,) if shape == "member" else (31, 8), generator=generator)
    exact = torch.einsum(EQUATIONS[axis][alpha.ndim - 1], alpha.double(), weight.double())
    error = (blend(weight, alpha, axis).double() - exact).abs()
    half_place = 2.0 ** (exact.frexp().exponent - 9)  # bfloat16 has 8 binary places
    assert (error <= half_place + 1e-5).all()  # and the errors of 31 terms in float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_blend_keeps_the_dtype_of_the_weights(dtype: torch.dtype) -> None:
    weight, alpha = random_blend(0, "slot", dtype)
    assert blend(weight, alpha.float(), 0).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_blend_of_one_member_alone_is_that_member_bit_for_bit(dtype: torch.dtype) -> None:
    weight, _ = random_blend(0, "slot", dtype)
    assert torch.equal(blend(weight, torch.tensor([0.0, 1.0, 0.0]), 0), weight[1])


def test_alpha_of_a_head_holds_for_all_its_rows() -> None:
    alpha = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    wanted = torch.tensor([[1.0, 1, 1, 2, 2, 2], [3, 3, 3, 4, 4, 4]])
    assert torch.equal(expand_alpha(alpha, 6), wanted)


# Merging of layers.


def alphas_of(
    config: AlphaConfig, stacked: LayerTensors, model: PreTrainedModel
) -> dict[str, Tensor]:
    group = Group(members=tuple(range(len(stacked["q_proj"]))), anchor=0)
    alphas = start_alphas(config, stacked, group, head_dim=head_dim(model.config))
    return dict.fromkeys(MATRICES, alphas["layer"]) if "layer" in alphas else alphas


@pytest.mark.parametrize("granularity", ["layer", "tensor", "head", "neuron"])
@pytest.mark.parametrize("name", VARIANTS)
def test_anchor_alphas_give_the_anchor_bit_for_bit(name: str, granularity: Granularity) -> None:
    model = tiny_variant(name)
    anchor, member = tensors_of(model, 1, 2)
    stacked = stack_layers([anchor, fold_norms(member, reference_norms(anchor))])
    config = AlphaConfig(granularity=granularity)
    merged = merge_group(stacked, alphas_of(config, stacked, model), 0)
    assert merged.keys() == anchor.keys()
    assert all(torch.equal(merged[name], anchor[name]) for name in anchor)


@pytest.mark.parametrize("granularity", ["layer", "tensor", "head", "neuron"])
@pytest.mark.parametrize("name", VARIANTS)
def test_uniform_alphas_give_the_plain_average(name: str, granularity: Granularity) -> None:
    model = tiny_variant(name)
    stacked = stack_layers(tensors_of(model, 0, 1, 2))
    config = AlphaConfig(granularity=granularity, start="uniform")
    merged = merge_group(stacked, alphas_of(config, stacked, model), 0)
    for key in [*MATRICES, *(set(COMPANION) & set(stacked))]:
        torch.testing.assert_close(merged[key], stacked[key].mean(dim=0))


def test_norms_are_those_of_the_anchor() -> None:
    stacked = stack_layers(tensors_of(tiny_model(), 0, 1, 2))
    merged = merge_group(stacked, dict.fromkeys(MATRICES, torch.full((3,), 1 / 3)), 1)
    assert all(torch.equal(merged[norm], stacked[norm][1]) for norm in FOLDS_INTO)


@pytest.mark.parametrize("config", [HEAD, NEURON])
@pytest.mark.parametrize("bias", [name for name in COMPANION if name.endswith(".bias")])
def test_a_bias_is_merged_like_a_column_of_its_matrix(bias: str, config: AlphaConfig) -> None:
    model = tiny_variant("llama-biases")
    stacked = stack_layers(tensors_of(model, 0, 1))
    alphas = {n: torch.randn_like(a) for n, a in alphas_of(config, stacked, model).items()}
    matrix = COMPANION[bias]
    merged = merge_group(stacked, alphas, 0)
    if ALPHA_AXIS[matrix] == 0:
        wanted = blend(stacked[bias][:, :, None], alphas[matrix], 0)[:, 0]
    else:  # its slots are residual channels, which have no alphas
        share = (
            alphas[matrix].flatten(1).mean(dim=1) if alphas[matrix].ndim == 2 else alphas[matrix]
        )
        wanted = torch.einsum("g,go->o", share, stacked[bias])
    torch.testing.assert_close(merged[bias], wanted)


@pytest.mark.parametrize("config", [HEAD, NEURON])
@pytest.mark.parametrize("norm", ["q_norm", "k_norm"])
def test_a_norm_that_all_heads_share_is_merged_by_the_mean_of_their_alphas(
    norm: str, config: AlphaConfig
) -> None:
    model = tiny_variant("qwen3")  # heads of width 8: 4 and 2 heads divide it
    stacked = stack_layers(tensors_of(model, 0, 1))
    alphas = {n: torch.randn_like(a) for n, a in alphas_of(config, stacked, model).items()}
    share = alphas[COMPANION[norm]].mean(dim=1)
    wanted = torch.einsum("g,gc->c", share, stacked[norm])
    torch.testing.assert_close(merge_group(stacked, alphas, 0)[norm], wanted)
