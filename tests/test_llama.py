import copy
from itertools import pairwise

import pytest
import torch
from conftest import tiny_model
from models import (
    NUM_LAYERS,
    VARIANTS,
    fresh_model,
    logits,
    same,
    tiny_variant,
    tokens,
    weights,
)
from torch.nn.functional import linear
from transformers import DynamicCache

from lmerge.axes import ALPHA_AXIS, COMPANION, FOLDS_INTO
from lmerge.llama import (
    MATRICES,
    PATHS,
    SUPPORTED,
    by_path,
    cache_argument,
    capture_down_input,
    capture_outputs,
    count_parameters,
    decoder_layers,
    embed,
    head_dim,
    layer_tensors,
    lm_logits,
    num_layers,
    run_span,
    span,
    stack_layers,
    with_layer_index,
    with_layers,
    with_tensors,
)

KEPT = (0, 2, 3)


def test_variants_cover_every_supported_model_type() -> None:
    assert {make().model_type for make in VARIANTS.values()} == set(SUPPORTED)


def test_variants_cover_every_named_tensor() -> None:
    names = [set(layer_tensors(decoder_layers(tiny_variant(name))[0])) for name in VARIANTS]
    assert set.union(*names) == set(PATHS)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_parameter_of_a_layer_has_a_short_name(name: str) -> None:
    layer = decoder_layers(tiny_variant(name))[1]
    assert set(by_path(layer_tensors(layer))) == {key for key, _ in layer.named_parameters()}


def test_every_named_tensor_is_merged_in_exactly_one_way() -> None:
    assert sorted([*MATRICES, *COMPANION, *FOLDS_INTO]) == sorted(PATHS)
    assert set(ALPHA_AXIS) == set(MATRICES)


@pytest.mark.parametrize("name", VARIANTS)
def test_head_width_divides_the_rows_of_the_queries(name: str) -> None:
    model = tiny_variant(name)
    rows = len(layer_tensors(decoder_layers(model)[0])["q_proj"])
    assert rows == model.config.num_attention_heads * head_dim(model.config)


def test_tied_weights_count_once() -> None:
    tied = count_parameters(tiny_model())
    untied = count_parameters(tiny_model(tie_word_embeddings=False))
    assert untied - tied == 260 * 32


@pytest.mark.parametrize("name", VARIANTS)
def test_a_model_with_fewer_layers_equals_one_built_by_transformers(name: str) -> None:
    model = tiny_variant(name)
    layers = [with_layer_index(decoder_layers(model)[i], place) for place, i in enumerate(KEPT)]
    assert torch.equal(logits(with_layers(model, layers, KEPT)), logits(fresh_model(model, KEPT)))


@pytest.mark.parametrize("name", VARIANTS)
def test_a_model_with_fewer_layers_has_the_config_of_its_layers(name: str) -> None:
    model = tiny_variant(name)
    config = with_layers(model, [decoder_layers(model)[i] for i in KEPT], KEPT).config
    types = getattr(model.config, "layer_types", None)
    assert config.num_hidden_layers == len(KEPT)
    assert getattr(config, "layer_types", None) == (types and [types[i] for i in KEPT])


@pytest.mark.parametrize("name", VARIANTS)
def test_taking_layers_leaves_the_model_as_it_was(name: str) -> None:
    model = tiny_variant(name)
    before, config, expected = weights(model), copy.deepcopy(model.config), logits(model)
    layers = [with_layer_index(decoder_layers(model)[i], place) for place, i in enumerate(KEPT)]
    logits(with_layers(model, layers, KEPT))
    assert same(weights(model), before)
    assert model.config.to_dict() == config.to_dict()
    assert torch.equal(logits(model), expected)


def test_another_layer_index_is_another_slot_of_the_cache() -> None:
    model = tiny_model()
    layer = with_layer_index(decoder_layers(model)[3], 0)
    cache = DynamicCache()
    with torch.no_grad():
        part = with_layers(model, [layer], [3]).model
        part(tokens(), use_cache=True, **cache_argument(part, cache))
    assert cache.get_seq_length(0) == tokens().shape[1]


def test_another_layer_index_leaves_the_old_layer_alone() -> None:
    layer = decoder_layers(tiny_model())[3]
    with_layer_index(layer, 0)
    assert layer.self_attn.layer_idx == 3


def test_a_layer_with_another_index_shares_its_memory() -> None:
    layer = decoder_layers(tiny_model())[3]
    new = with_layer_index(layer, 0)
    assert all(a is b for a, b in zip(layer.parameters(), new.parameters(), strict=True))


def test_a_hook_on_a_copied_layer_does_not_run_on_the_old_one() -> None:
    model, calls = tiny_model(), []
    new = with_layer_index(decoder_layers(model)[1], 0)
    new.register_forward_hook(lambda *_: calls.append(1))
    new.self_attn.register_forward_hook(lambda *_: calls.append(1))
    logits(model)
    assert not calls


@pytest.mark.parametrize("name", VARIANTS)
def test_other_tensors_make_the_layer_that_has_them(name: str) -> None:
    model = tiny_variant(name)
    first, last = decoder_layers(model)[0], decoder_layers(model)[2]  # of one layer type
    states = torch.randn(2, 6, 32)
    new = with_tensors(first, layer_tensors(last))
    made = run_span(with_layers(model, [new], [0], final_norm=False), states)
    assert torch.equal(made, run_span(with_layers(model, [last], [0], final_norm=False), states))


def test_other_tensors_leave_the_old_layer_alone() -> None:
    model = tiny_model()
    before = weights(model)
    with_tensors(decoder_layers(model)[0], layer_tensors(decoder_layers(model)[2]))
    assert same(weights(model), before)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("cuts", [(0, 4), (0, 1, 4), (0, 2, 3, 4), (0, 0, 4)])
@torch.no_grad()
def test_parts_of_a_model_in_a_row_equal_the_model(name: str, cuts: tuple[int, ...]) -> None:
    model = tiny_variant(name)
    states = embed(model, tokens())
    for start, stop in pairwise(cuts):
        states = run_span(span(model, start, stop, final_norm=stop == NUM_LAYERS), states)
    assert torch.equal(lm_logits(model, states), logits(model))


@torch.no_grad()
def test_an_empty_part_without_norm_changes_nothing() -> None:
    states = torch.randn(2, 5, 32)
    assert torch.equal(run_span(span(tiny_model(), 2, 2), states), states)


@torch.no_grad()
def test_an_empty_part_can_have_the_final_norm() -> None:
    model, states = tiny_model(), torch.randn(2, 5, 32)
    part = span(model, 4, 4, final_norm=True)
    assert torch.equal(run_span(part, states), model.model.norm(states))


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_captured_outputs_are_the_hidden_states_of_transformers(name: str) -> None:
    model, found = tiny_variant(name), []
    with capture_outputs(model, found):
        expected = model(tokens(), output_hidden_states=True).hidden_states
    assert len(found) == NUM_LAYERS
    for state, wanted in zip(found, expected[1:-1], strict=False):
        assert torch.equal(state, wanted)
    assert torch.equal(model.model.norm(found[-1]), expected[-1])


@torch.no_grad()
def test_hooks_are_gone_after_an_error() -> None:
    model, found = tiny_model(), []
    with pytest.raises(KeyError), capture_outputs(model, found):
        raise KeyError
    logits(model)
    assert not found


@torch.no_grad()
def test_captured_neurons_give_the_mlp_output() -> None:
    model = tiny_variant("llama-biases")
    mlp, outputs = decoder_layers(model)[1].mlp, []
    mlp.register_forward_hook(lambda _m, _i, output: outputs.append(output))
    with capture_down_input(decoder_layers(model)[1]) as neurons:
        logits(model)
    made = linear(neurons[0], mlp.down_proj.weight, mlp.down_proj.bias)
    assert torch.equal(made, outputs[0])


def test_stacked_layers_come_apart_again() -> None:
    layers = [layer_tensors(layer) for layer in decoder_layers(tiny_variant("llama-biases"))]
    stacked = stack_layers(layers)
    assert all(torch.equal(stacked[n][i], layers[i][n]) for n in stacked for i in range(4))


def test_number_of_layers_is_that_of_the_config() -> None:
    assert num_layers(tiny_model(num_hidden_layers=3)) == 3
