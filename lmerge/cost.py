"""What a model costs to store and to run."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel

from lmerge.generation import decode
from lmerge.llama import count_parameters, num_layers
from lmerge.progress import track


def model_bytes(model: PreTrainedModel) -> int:
    """Return the bytes of the weights, tied ones once: the size of a safetensors file of them."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


@torch.no_grad()
def measure_costs(
    models: Mapping[str, PreTrainedModel],
    *,
    num_sequences: int = 2,
    sequence_length: int = 256,
    num_new_tokens: int = 16,
    num_rounds: int = 3,
) -> dict[str, dict[str, Any]]:
    """Return size, speed and memory of models, timed in alternation.

    Args:
        models: Models by name, on one device.
        num_sequences: Sequences in one prefill.
        sequence_length: Tokens in each; what they are does not matter to the speed.
        num_new_tokens: Tokens that are decoded greedily after the first of the sequences.
        num_rounds: Timed passes of each model, after one that is not counted; the median counts.

    Returns:
        For each name: `layers`, `parameters`, `bytes`, `peak_memory` (see there; left out where it
        is not known), `prefill_tokens_per_s`, and `decode_tokens_per_s` of a single sequence.
    """
    vocab_size = next(iter(models.values())).config.vocab_size
    token_BT = torch.arange(num_sequences * sequence_length).remainder(vocab_size)
    token_BT = token_BT.reshape(num_sequences, sequence_length)
    tasks: dict[str, Callable[[PreTrainedModel], float]] = {
        "prefill": lambda model: _time_prefill(model, token_BT),
        "decode": lambda model: _time_decode(model, token_BT[:1], num_new_tokens),
    }
    seconds: dict[tuple[str, str], list[float]] = {(t, n): [] for t in tasks for n in models}
    for _ in track(range(num_rounds + 1), "speed", total=num_rounds + 1):
        for task, run in tasks.items():
            for name, model in models.items():
                seconds[task, name].append(run(model))
    median = {key: statistics.median(values[1:]) for key, values in seconds.items()}
    return {
        name: {
            "layers": num_layers(model),
            "parameters": count_parameters(model),
            "bytes": model_bytes(model),
            **_peak(model, partial(_time_prefill, model, token_BT)),
            "prefill_tokens_per_s": token_BT.numel() / median["prefill", name],
            "decode_tokens_per_s": num_new_tokens / median["decode", name],
        }
        for name, model in models.items()
    }


def _time_prefill(model: PreTrainedModel, token_BT: Tensor) -> float:
    token_BT = token_BT.to(model.device)
    start = time.perf_counter()
    logits = model(input_ids=token_BT, use_cache=True, logits_to_keep=1).logits
    float(logits.flatten()[0])  # waits for the device
    return time.perf_counter() - start


def _time_decode(model: PreTrainedModel, token_BT: Tensor, num_new_tokens: int) -> float:
    tokens = decode(model, token_BT)
    int(next(tokens))  # the prefill
    start = time.perf_counter()
    for token_BT in islice(tokens, num_new_tokens):
        int(token_BT)
    return time.perf_counter() - start


def _peak(model: PreTrainedModel, run: Callable[[], object]) -> dict[str, int]:
    peak = peak_memory(model, run)
    return {} if peak is None else {"peak_memory": peak}


def peak_memory(model: PreTrainedModel, run: Callable[[], object]) -> int | None:
    """Return the bytes of the weights and of the most that PyTorch holds beside them in a run.

    Counted by PyTorch's allocator on CUDA and by its profiler on the CPU: tensors alone, exact to
    the byte. The program around them, some 500 MB, is not in it; nor is the other model, so that
    the number is that of a process which serves this one. None on other devices, or while another
    profiler runs.
    """
    if model.device.type == "cuda":
        before = torch.cuda.memory_allocated(model.device)
        torch.cuda.reset_peak_memory_stats(model.device)
        run()
        return model_bytes(model) + torch.cuda.max_memory_allocated(model.device) - before
    if model.device.type != "cpu" or torch._C._autograd._profiler_enabled():
        return None
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else it announces itself on stderr
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    with TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    held = [e["args"]["Total Allocated"] for e in events if e.get("name") == "[memory]"]
    return model_bytes(model) + max(held, default=0)
