"""Planted symmetries are found again in layers of many shapes."""

from collections.abc import Callable

import pytest
import torch
from test_merge import relative_error, tensors_of
from test_symmetry import random_transform
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from lmerge.align import Pair, align, move
from lmerge.frames import members_in_one_frame
from lmerge.llama import (
    LayerTensors,
    decoder_layers,
    head_spec,
    run_span,
    with_layers,
    with_tensors,
)
from lmerge.merge import fold_norms
from lmerge.symmetry import Transform, apply_transform, compose, identity

Maker = Callable[..., PretrainedConfig]


def heads(num_heads: int, num_kv_heads: int) -> tuple[Maker, dict[str, object]]:
    sizes = {"num_attention_heads": num_heads, "num_key_value_heads": num_kv_heads}
    return LlamaConfig, {**sizes, "hidden_size": 12 * num_heads, "head_dim": 12}


SHAPES: dict[str, tuple[Maker, dict[str, object]]] = {
    **{
        f"{h} heads in {k} groups": heads(h, k) for h, k in ((8, 8), (8, 4), (9, 3), (8, 2), (8, 1))
    },
    "wide heads": (LlamaConfig, {"head_dim": 20}),
    "heads of one rotary pair": (LlamaConfig, {"head_dim": 2}),
    "biases": (LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "tied": (LlamaConfig, {"tie_word_embeddings": True}),
    "few neurons": (LlamaConfig, {"intermediate_size": 7}),
    "many neurons": (LlamaConfig, {"intermediate_size": 1001, "hidden_size": 64}),
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {"head_dim": 16, "attention_bias": True, "num_key_value_heads": 1}),
}


def model_of(shape: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    maker, changes = SHAPES[shape]
    sizes = {
        "vocab_size": 64,
        "hidden_size": 96,
        "intermediate_size": 173,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 256,
        "initializer_range": 0.05,
    }
    torch.manual_seed(0)
    config = maker(**{**sizes, **changes})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(1 + 0.3 * torch.randn_like(parameter))
            elif name.endswith(".bias"):
                parameter.copy_(0.3 * torch.randn_like(parameter))
    return model.to(dtype).eval()


@torch.no_grad()
def update_of(model: PreTrainedModel, tensors: LayerTensors) -> Tensor:
    """What a layer adds to random states: the part that its weights decide."""
    g = torch.Generator().manual_seed(3)
    states = torch.randn(2, 6, model.config.hidden_size, generator=g)
    layer = with_tensors(decoder_layers(model)[1], tensors)
    return run_span(with_layers(model, [layer], [1], final_norm=False), states) - states


def planted(shape: str, dtype: torch.dtype) -> tuple[PreTrainedModel, LayerTensors, Transform]:
    model = model_of(shape, dtype)
    (anchor,) = tensors_of(model, 1)
    num_neurons, spec = len(anchor["gate_proj"]), head_spec(model.config)
    return model, anchor, random_transform(num_neurons, spec, seed=3, normed="q_norm" in anchor)


def assert_orders_undone(model: PreTrainedModel, done: Transform, found: object) -> None:
    assert isinstance(found, Transform)
    both = compose(done, found)
    nothing = identity(len(both.neuron_F), head_spec(model.config))
    assert (both.neuron_F == nothing.neuron_F).float().mean() >= 0.99
    assert torch.equal(both.group_K, nothing.group_K)
    assert torch.equal(both.head_KR, nothing.head_KR)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_planted_symmetry_is_undone_and_the_function_kept(shape: str) -> None:
    model, anchor, done = planted(shape, torch.float32)
    member = apply_transform(anchor, done)
    found = align(Pair(anchor, member, head_spec(model.config)), "full")
    assert_orders_undone(model, done, found)
    moved = move(member, found)
    assert relative_error(update_of(model, moved), update_of(model, member)) < 1e-4
    assert all(relative_error(moved[name], anchor[name]) < 1e-4 for name in anchor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_planted_symmetry_is_found_under_noise(shape: str, dtype: torch.dtype) -> None:
    model, anchor, done = planted(shape, dtype)
    g = torch.Generator().manual_seed(1)
    noisy = {
        name: (w.float() + 0.1 * w.float().std() * torch.randn(w.shape, generator=g)).to(dtype)
        if "_proj" in name
        else w
        for name, w in anchor.items()
    }
    member = apply_transform(noisy, done)
    found = align(Pair(anchor, member, head_spec(model.config)), "full")
    assert_orders_undone(model, done, found)


@pytest.mark.parametrize("shape", ["8 heads in 2 groups", "biases", "qwen3"])
def test_a_symmetry_planted_under_other_norms_is_undone(shape: str) -> None:
    model, anchor, done = planted(shape, torch.float32)
    g = torch.Generator().manual_seed(5)
    norms = {
        name: anchor[name] * (0.5 + torch.rand(anchor[name].shape, generator=g))
        for name in ("input_layernorm", "post_attention_layernorm")
    }
    member = apply_transform(fold_norms(anchor, norms), done)
    framed = members_in_one_frame([anchor, member], [None, None], 0)
    found = align(Pair(*framed, head_spec(model.config)), "full")
    moved = move(framed[1], found)
    assert all(relative_error(moved[name], anchor[name]) < 1e-4 for name in anchor)
