"""Layer states of the groups of a similarity study: from memory, streamed, or kept in a file."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from lmerge.activations import Pooling, layer_states
from lmerge.files import read_tensors, write_tensors
from lmerge.source import Dtype, load_model, model_fingerprint, resolve_source
from lmerge.streamed import streamed_states


def group_states(
    source: str,
    prompts: Mapping[str, list[Tensor]],
    pooling: Pooling,
    dtype: Dtype,
    *,
    streamed: bool,
    path: Path | None,
) -> tuple[dict[str, Tensor], str]:
    """Return the states (L, N, D) of each group, from one pass over all prompts, and the model.

    Args:
        source: The model's name.
        prompts: Token ids of each group's prompts.
        pooling: Which token's state stands for a prompt.
        dtype: Dtype of the weights.
        streamed: Whether each layer is read from the disk in turn.
        path: File that keeps the states: read where it is there, else written; None for no file.

    Raises:
        ValueError: When the file holds the states of something else.
    """
    if path is None:
        return _states(source, prompts, pooling, dtype, streamed=streamed)
    digest = hashlib.sha256(repr((source, pooling, dtype)).encode())
    for name, group in prompts.items():
        digest.update(repr((name, [prompt.tolist() for prompt in group])).encode())
    if path.is_file():
        states, metadata = read_tensors(path)
        if metadata.get("key") != digest.hexdigest() or set(states) != set(prompts):
            raise ValueError(
                f"`states_path` must hold the states of the same source, prompts and pooling, got "
                f"{path} with others. Delete it, or name another file."
            )
        return {name: states[name] for name in prompts}, metadata["model"]
    states, model = _states(source, prompts, pooling, dtype, streamed=streamed)
    write_tensors(path, states, {"key": digest.hexdigest(), "model": model})
    return states, model


def _states(
    source: str,
    prompts: Mapping[str, list[Tensor]],
    pooling: Pooling,
    dtype: Dtype,
    *,
    streamed: bool,
) -> tuple[dict[str, Tensor], str]:
    everything = [prompt for group in prompts.values() for prompt in group]
    if streamed:
        folder = resolve_source(source)
        if not isinstance(folder, Path) or not folder.is_dir():
            raise ValueError(
                f"`streamed` needs a local folder as `source`, got {source!r}. Download it first."
            )
        kind = torch.float32 if dtype == "auto" else getattr(torch, dtype)
        states_LND = streamed_states(folder, everything, pooling=pooling, dtype=kind)
        name = folder.name
    else:
        model = load_model(source, dtype)
        states_LND = layer_states(model, everything, pooling=pooling)
        name = model_fingerprint(model)
    parts = states_LND.split([len(group) for group in prompts.values()], dim=1)
    return dict(zip(prompts, parts, strict=True)), name
