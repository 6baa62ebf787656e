"""What a model costs to store and to run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lmerge.llama import count_parameters, num_layers
from lmerge.progress import track


def model_bytes(model: PreTrainedModel) -> int:
    """Return the bytes of the weights, tied ones once."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


@torch.no_grad()
def measure_costs(
    models: Mapping[str, PreTrainedModel],
    *,
    num_sequences: int = 2,
    sequence_length: int = 256,
    num_rounds: int = 3,
) -> dict[str, dict[str, Any]]:
    """Return size and prefill speed of models, timed in alternation.

    Args:
        models: Models by name, on one device.
        num_sequences: Sequences in one prefill.
        sequence_length: Tokens in each; what they are does not matter to the speed.
        num_rounds: Timed passes of each model, after one that is not counted; the median counts.

    Returns:
        For each name: `layers`, `parameters`, `bytes` and `prefill_tokens_per_s`.
    """
    vocab_size = next(iter(models.values())).config.vocab_size
    token_BT = torch.arange(num_sequences * sequence_length).remainder(vocab_size)
    token_BT = token_BT.reshape(num_sequences, sequence_length)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in track(range(num_rounds + 1), "speed", total=num_rounds + 1):
        for name, model in models.items():
            seconds[name].append(_time_prefill(model, token_BT.to(model.device)))
    return {
        name: {
            "layers": num_layers(model),
            "parameters": count_parameters(model),
            "bytes": model_bytes(model),
            "prefill_tokens_per_s": token_BT.numel() / statistics.median(seconds[name][1:]),
        }
        for name, model in models.items()
    }


def _time_prefill(model: PreTrainedModel, token_BT: Tensor) -> float:
    start = time.perf_counter()
    logits = model(input_ids=token_BT, use_cache=False, logits_to_keep=1).logits
    float(logits.flatten()[0])  # waits for the device
    return time.perf_counter() - start
