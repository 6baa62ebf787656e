"""The anatomy of a supported decoder.

The only file that knows Hugging Face attribute names. A layer is handled as `LayerTensors`: a dict
from the short names below to tensors.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from inspect import signature
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from transformers import Cache, PretrainedConfig, PreTrainedModel

LayerTensors = dict[str, Tensor]

SUPPORTED: dict[str, str] = {
    "llama": "Llama 1 to 3, SmolLM2, TinyLlama and others of the class LlamaForCausalLM",
    "mistral": "Mistral 7B and others of the class MistralForCausalLM",
    "qwen2": "Qwen2 and Qwen2.5 (dense), with biases on q, k and v",
    "qwen3": "Qwen3 (dense), with norms on the queries and keys of a head",
}
"""Model types that lmerge handles; each runs the law tests."""

MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The seven matrices of a layer; an alpha exists for each of them."""

PATHS: dict[str, str] = {
    **{name: f"self_attn.{name}.weight" for name in MATRICES[:4]},
    **{name: f"mlp.{name}.weight" for name in MATRICES[4:]},
    **{f"{name}.bias": f"self_attn.{name}.bias" for name in MATRICES[:4]},
    **{f"{name}.bias": f"mlp.{name}.bias" for name in MATRICES[4:]},
    "q_norm": "self_attn.q_norm.weight",
    "k_norm": "self_attn.k_norm.weight",
    "input_layernorm": "input_layernorm.weight",
    "post_attention_layernorm": "post_attention_layernorm.weight",
}
"""Short name -> parameter name inside a decoder layer; those a layer lacks are left out."""

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """Return the decoder layers in order."""
    layers = model.model.layers
    assert isinstance(layers, nn.ModuleList)
    return layers


def num_layers(model: PreTrainedModel) -> int:
    """Return the number of decoder layers."""
    return len(decoder_layers(model))


def head_dim(config: PretrainedConfig) -> int:
    """Return the width of one attention head."""
    width: int = getattr(config, "head_dim", None) or (
        config.hidden_size // config.num_attention_heads
    )
    return width


class HeadSpec(NamedTuple):
    """How a layer's attention is cut into heads."""

    num_heads: int
    num_kv_heads: int
    head_dim: int


def head_spec(config: PretrainedConfig) -> HeadSpec:
    """Return the numbers of query and key/value heads, and their width."""
    num_heads: int = config.num_attention_heads
    num_kv_heads: int = getattr(config, "num_key_value_heads", None) or num_heads
    return HeadSpec(num_heads, num_kv_heads, head_dim(config))


def layer_tensors(layer: nn.Module) -> LayerTensors:
    """Return the tensors of a decoder layer by short name, sharing memory with it."""
    parameters = dict(layer.named_parameters())
    return {name: parameters[path].detach() for name, path in PATHS.items() if path in parameters}


def by_path(tensors: LayerTensors) -> dict[str, Tensor]:
    """Return the tensors under the parameter names of a decoder layer."""
    return {PATHS[name]: tensor for name, tensor in tensors.items()}


def shallow_copy(module: ModuleT) -> ModuleT:
    """Return a module that shares parameters and submodules with `module` but can swap them."""
    clone = copy.copy(module)
    # All dicts, the hooks' too: transformers hooks layers for good when asked for hidden states.
    for name, value in vars(module).items():
        if isinstance(value, dict):
            vars(clone)[name] = value.copy()
    return clone


def with_layer_index(layer: ModuleT, index: int) -> ModuleT:
    """Return the layer under another index (the slot of its key/value cache); memory is shared."""
    clone = shallow_copy(layer)
    attention = shallow_copy(layer.get_submodule("self_attn"))
    attention.layer_idx = index  # type: ignore[assignment]
    clone._modules["self_attn"] = attention
    return clone


def with_tensors(layer: ModuleT, tensors: LayerTensors) -> ModuleT:
    """Return a layer of the same class that holds other weights; the old layer is untouched."""
    clone = shallow_copy(layer)
    for path, tensor in by_path(tensors).items():
        *parents, leaf = path.split(".")
        module: nn.Module = clone
        for name in parents:
            child = shallow_copy(module.get_submodule(name))
            module._modules[name] = child
            module = child
        module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    return clone


def with_matrices(layer: ModuleT, wrap: Callable[[str, nn.Module], nn.Module]) -> ModuleT:
    """Return a layer whose seven matrices are other modules; the old layer is untouched.

    Args:
        layer: A decoder layer.
        wrap: From a matrix's short name and its module to the module in its place.
    """
    clone = shallow_copy(layer)
    for name in MATRICES:
        parent, leaf = PATHS[name].removesuffix(".weight").split(".")
        if clone._modules[parent] is layer._modules[parent]:
            clone._modules[parent] = shallow_copy(layer.get_submodule(parent))
        matrix = layer.get_submodule(f"{parent}.{leaf}")
        clone.get_submodule(parent)._modules[leaf] = wrap(name, matrix)
    return clone


def with_layers(
    model: PreTrainedModel,
    layers: Sequence[nn.Module],
    origins: Sequence[int],
    *,
    final_norm: bool = True,
) -> PreTrainedModel:
    """Return a model of the same class that runs `layers`; everything else is shared.

    Masks, rotary positions and the key/value cache stay those of the architecture's own code.

    Args:
        model: The model whose embedding, norm and head are used.
        layers: Decoder layers, each with the layer index of its new place.
        origins: For each layer, the layer of `model` whose settings (such as a sliding window)
            it has.
        final_norm: Whether the final norm runs after the last layer.
    """
    clone, decoder = shallow_copy(model), shallow_copy(model.model)
    decoder._modules["layers"] = nn.ModuleList(layers)
    if not final_norm:
        decoder._modules["norm"] = nn.Identity()
    clone._modules["model"] = decoder
    config = config_with_layers(model.config, origins)
    clone.config, decoder.config = config, config
    return clone


def config_with_layers(config: PretrainedConfig, origins: Sequence[int]) -> PretrainedConfig:
    """Return the config of a model made of the layers `origins` of the source."""
    config = copy.deepcopy(config)
    config.num_hidden_layers = len(origins)
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = [config.layer_types[i] for i in origins]
    # Qwen2 counts the full-attention layers from below in `max_window_layers`; `layer_types`
    # has already said which layers slide, and it is what the model code reads.
    return config


def span(
    model: PreTrainedModel, start: int, stop: int, *, final_norm: bool = False
) -> PreTrainedModel:
    """Return the part of the model from layer `start` up to, not including, layer `stop`."""
    # Without a key/value cache the layer index is not used, so the layers need no new one.
    layers = list(decoder_layers(model)[start:stop])
    return with_layers(model, layers, range(start, stop), final_norm=final_norm)


def run_span(part: PreTrainedModel, hidden_BTD: Tensor) -> Tensor:
    """Run a part of a model made by `span` over unpadded states; returns states of equal shape."""
    if not len(decoder_layers(part)):
        return part.model.norm(hidden_BTD)  # type: ignore[no-any-return]
    states: Tensor = part.model(inputs_embeds=hidden_BTD, use_cache=False).last_hidden_state
    return states


def cache_argument(model: nn.Module, cache: Cache) -> dict[str, Cache]:
    """Return a key/value cache under the name by which the model takes it.

    transformers calls it `cache` from 5.24 on, and warns of the older name.
    """
    new = "cache" in signature(model.forward).parameters
    return {"cache" if new else "past_key_values": cache}


def embed(model: PreTrainedModel, token_BT: Tensor) -> Tensor:
    """Return the input states of layer 0."""
    embedded: Tensor = model.get_input_embeddings()(token_BT)
    return embedded


def lm_logits(model: PreTrainedModel, normed_ND: Tensor) -> Tensor:
    """Return next-token logits (N, V) from states after the final norm."""
    logits: Tensor = model.get_output_embeddings()(normed_ND)
    return logits


def head_weight(model: PreTrainedModel) -> Tensor | None:
    """Return the head's matrix (V, D), where logits are the states times it and nothing else.

    None for a head with a bias, or one that a strategy has sharded: that is called as a module.
    """
    head = model.get_output_embeddings()
    plain = type(head.weight) in (Tensor, nn.Parameter) and getattr(head, "bias", None) is None
    return head.weight.detach() if plain else None


@contextmanager
def capture_outputs(model: PreTrainedModel, sink: list[Tensor]) -> Iterator[None]:
    """Yield once while hooks append every layer's output state to `sink`, in layer order."""

    def keep(_module: nn.Module, _inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
        sink.append(output if isinstance(output, Tensor) else output[0])

    handles = [layer.register_forward_hook(keep) for layer in decoder_layers(model)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def capture_input(layer: nn.Module, name: str) -> Iterator[list[Tensor]]:
    """Yield a list that collects a matrix's inputs (B, T, I), one for each forward pass.

    Args:
        layer: A decoder layer.
        name: Short name of one of its matrices, such as `down_proj`.
    """
    sink: list[Tensor] = []

    def keep(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        sink.append(inputs[0])

    matrix = layer.get_submodule(PATHS[name].removesuffix(".weight"))
    handle = matrix.register_forward_pre_hook(keep)
    try:
        yield sink
    finally:
        handle.remove()


def capture_down_input(layer: nn.Module) -> AbstractContextManager[list[Tensor]]:
    """Yield a list that collects the MLP's neuron activations (B, T, F) of each forward pass."""
    return capture_input(layer, "down_proj")


def count_parameters(model: PreTrainedModel) -> int:
    """Return the number of parameters, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
def stack_layers(layers: Sequence[LayerTensors]) -> LayerTensors:
    """Return each tensor of the layers stacked along a new first axis G."""
    return {name: torch.stack([layer[name] for layer in layers]) for name in layers[0]}
