"""Tiny random models of every supported architecture, for the laws that all of them must hold."""

from collections.abc import Callable

import torch
from conftest import tiny_config
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

WINDOW = 5
"""Sliding window in tokens; below the prompts' length, so that it matters."""

SLIDING = {"use_sliding_window": True, "sliding_window": WINDOW}
TYPES = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
WIDE_HEADS = {"head_dim": 12}
"""Heads whose widths do not sum to the hidden width: 4 x 12 against 32."""


def _llama(**changes: object) -> LlamaConfig:
    return tiny_config(**changes)


def _like(config_class: type) -> Callable[..., object]:
    """Make configs of another class with the sizes of the tiny Llama."""

    def make(**changes: object) -> object:
        sizes = tiny_config().to_dict()
        kept = {key: sizes[key] for key in SIZES}
        return config_class(**{**kept, **changes})

    return make


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

VARIANTS: dict[str, Callable[[], object]] = {
    "llama": _llama,
    "llama-ungrouped-untied": lambda: _llama(num_key_value_heads=4, tie_word_embeddings=False),
    "llama-biases": lambda: _llama(attention_bias=True, mlp_bias=True),
    "llama-wide-heads": lambda: _llama(**WIDE_HEADS),
    "mistral": lambda: _like(MistralConfig)(sliding_window=WINDOW),
    "qwen2": lambda: _like(Qwen2Config)(**SLIDING, max_window_layers=2),
    "qwen3": lambda: _like(Qwen3Config)(**SLIDING, layer_types=TYPES, head_dim=8),
    "qwen3-untied": lambda: _like(Qwen3Config)(tie_word_embeddings=False, **WIDE_HEADS),
}
"""Name -> config of a tiny model; `tiny_variant` builds it."""


def tiny_variant(name: str, seed: int = 0) -> PreTrainedModel:
    """A row of `VARIANTS` with random weights, norms that are not 1, and biases that are not 0."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(VARIANTS[name](), attn_implementation="sdpa")
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" in key:
                parameter.copy_(1 + 0.3 * torch.randn_like(parameter))
            elif key.endswith(".bias"):
                parameter.copy_(0.2 * torch.randn_like(parameter))
    return model.eval()


def tokens(num_rows: int = 2, length: int = 12, *, seed: int = 7) -> Tensor:
    """Random token ids, none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (num_rows, length), generator=generator)


@torch.no_grad()
def logits(model: PreTrainedModel, token_BT: Tensor | None = None) -> Tensor:
    return model(tokens() if token_BT is None else token_BT, use_cache=False).logits
