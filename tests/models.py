"""Tiny random models of every supported architecture, for the laws that all of them must hold."""

from collections.abc import Callable, Sequence

import torch
from conftest import tiny_config
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from lmerge.plan import Group, MergePlan

NUM_LAYERS = 4

WINDOW = 5
"""Sliding window in tokens; shorter than the prompts, so that it matters."""

SLIDING = {"use_sliding_window": True, "sliding_window": WINDOW}
MIXED = {**SLIDING, "layer_types": ["full_attention", "sliding_attention"] * 2}
WIDE_HEADS = {"head_dim": 12}
"""Four heads of width 12 in a model of width 32."""

SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "initializer_range",
)


def like_tiny(config_class: Callable[..., PretrainedConfig], **changes: object) -> PretrainedConfig:
    """A config of another class with the sizes of the tiny Llama."""
    tiny = tiny_config().to_dict()
    return config_class(**{**{name: tiny[name] for name in SIZES}, **changes})


VARIANTS: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": tiny_config,
    "llama-ungrouped-untied": lambda: tiny_config(num_key_value_heads=4, tie_word_embeddings=False),
    "llama-biases": lambda: tiny_config(attention_bias=True, mlp_bias=True),
    "llama-wide-heads": lambda: tiny_config(**WIDE_HEADS),
    "mistral": lambda: like_tiny(MistralConfig, sliding_window=WINDOW),
    "qwen2": lambda: like_tiny(Qwen2Config, **SLIDING, max_window_layers=2),
    "qwen3": lambda: like_tiny(Qwen3Config, **MIXED, head_dim=8),
    "qwen3-untied": lambda: like_tiny(Qwen3Config, tie_word_embeddings=False, **WIDE_HEADS),
}
"""Name -> config of a tiny model; `tiny_variant` builds it."""


def tiny_variant(name: str, seed: int = 0) -> PreTrainedModel:
    """A row of `VARIANTS`: random weights, norms that are not 1, biases that are not 0."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(VARIANTS[name](), attn_implementation="sdpa")
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" in key:
                parameter.copy_(1 + 0.3 * torch.randn_like(parameter))
            elif key.endswith(".bias"):
                parameter.copy_(0.2 * torch.randn_like(parameter))
    return model.eval()


def fresh_model(model: PreTrainedModel, kept: Sequence[int]) -> PreTrainedModel:
    """The layers `kept` of a model in a new one, built by transformers alone: a slow reference."""
    config = type(model.config).from_dict(model.config.to_dict())
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = [config.layer_types[i] for i in kept]
    config.num_hidden_layers = len(kept)
    fresh = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    fresh.to(model.dtype).eval()
    state = model.state_dict()

    def old_name(name: str) -> str:
        if not name.startswith("model.layers."):
            return name
        index, rest = name.removeprefix("model.layers.").split(".", 1)
        return f"model.layers.{kept[int(index)]}.{rest}"

    fresh.load_state_dict({name: state[old_name(name)] for name in fresh.state_dict()})
    return fresh


def plan_of(*groups: Sequence[int], anchors: Sequence[int] | None = None) -> MergePlan:
    """A plan for a tiny model; the anchors are the first members unless given."""
    anchors = anchors or [members[0] for members in groups]
    made = [Group(members=tuple(g), anchor=a) for g, a in zip(groups, anchors, strict=True)]
    return MergePlan(num_layers=NUM_LAYERS, groups=tuple(made))


def tokens(num_rows: int = 2, length: int = 12, *, seed: int = 7) -> Tensor:
    """Random token ids, none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (num_rows, length), generator=generator)


@torch.no_grad()
def logits(model: PreTrainedModel, token_BT: Tensor | None = None) -> Tensor:
    found: Tensor = model(tokens() if token_BT is None else token_BT, use_cache=False).logits
    return found


def weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """A copy of a model's parameters and buffers."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """Whether two sets of tensors are equal bit for bit."""
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)
