from itertools import pairwise
from typing import get_args

import pytest
import torch
from conftest import tiny_model
from models import NUM_LAYERS, VARIANTS, tiny_variant
from torch import Tensor
from transformers import PreTrainedModel

from lmerge.activations import Pooling, layer_states
from lmerge.llama import decoder_layers

POOLINGS = get_args(Pooling)
LENGTHS = (9, 3, 14, 1, 9, 6, 2, 11)


def random_prompts(lengths: tuple[int, ...] = LENGTHS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(256, (length,), generator=generator) for length in lengths]


@torch.no_grad()
def unpadded_states(model: PreTrainedModel, prompt: Tensor, pooling: Pooling) -> Tensor:
    """The states (L, D) of one prompt alone, as transformers gives them."""
    outputs: list[Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda _m, _i, out: outputs.append(out))
        for layer in decoder_layers(model)
    ]
    model(prompt[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    states = torch.cat(outputs)
    return states[:, -1] if pooling == "last" else states.mean(dim=1)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("name", VARIANTS)
def test_states_are_those_of_every_prompt_alone_in_the_given_order(
    name: str, pooling: Pooling
) -> None:
    model, prompts = tiny_variant(name), random_prompts()
    found = layer_states(model, prompts, pooling=pooling, tokens_per_batch=30)
    wanted = torch.stack([unpadded_states(model, p, pooling) for p in prompts], dim=1)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("tokens_per_batch", [1, 20, 10_000])
def test_the_size_of_batches_does_not_matter(pooling: Pooling, tokens_per_batch: int) -> None:
    model, prompts = tiny_model(), random_prompts()
    found = layer_states(model, prompts, pooling=pooling, tokens_per_batch=tokens_per_batch)
    wanted = layer_states(model, prompts, pooling=pooling)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_states_of_every_layer_come_from_one_pass_a_batch() -> None:
    model, calls = tiny_model(), []
    model.model.register_forward_hook(lambda *_: calls.append(1))
    for layer in decoder_layers(model):
        layer.register_forward_hook(lambda *_: calls.append(1))
    layer_states(model, random_prompts())  # 55 tokens: one batch
    assert len(calls) == 1 + NUM_LAYERS


def batch_shapes(tokens_per_batch: int) -> list[tuple[int, int]]:
    """The shape of each forward pass."""
    model, shapes = tiny_model(), []
    model.model.embed_tokens.register_forward_hook(
        lambda _module, inputs, _output: shapes.append(tuple(inputs[0].shape))
    )
    layer_states(model, random_prompts(), tokens_per_batch=tokens_per_batch)
    return shapes


@pytest.mark.parametrize("tokens_per_batch", [14, 20, 40])
def test_a_batch_with_its_padding_keeps_to_the_bound(tokens_per_batch: int) -> None:
    assert all(rows * length <= tokens_per_batch for rows, length in batch_shapes(tokens_per_batch))


@pytest.mark.parametrize("tokens_per_batch", [14, 20, 40])
def test_batches_hold_prompts_of_like_length(tokens_per_batch: int) -> None:
    lengths = [length for _, length in batch_shapes(tokens_per_batch)]
    assert all(shorter <= longer for shorter, longer in pairwise(lengths))


def test_a_prompt_beyond_the_bound_is_a_batch_of_its_own() -> None:
    assert max(batch_shapes(10)) == (3, 3)
    assert (1, 14) in batch_shapes(10)


def test_states_of_a_bfloat16_model_are_float32() -> None:
    states = layer_states(tiny_model().bfloat16(), random_prompts())
    assert states.dtype == torch.float32
    assert states.shape == (NUM_LAYERS, len(LENGTHS), 32)


def test_hooks_are_gone_afterwards() -> None:
    model = tiny_model()
    layer_states(model, random_prompts())
    assert not any(layer._forward_hooks for layer in decoder_layers(model))


@pytest.mark.parametrize(
    ("lengths", "found"), [((), "got none"), ((3, 0, 2), "got an empty one at place 1")]
)
def test_missing_and_empty_prompts_are_refused(lengths: tuple[int, ...], found: str) -> None:
    with pytest.raises(ValueError, match=rf"^`prompts` must hold [^\n]*{found}[^\n]*$"):
        layer_states(tiny_model(), random_prompts(lengths))
