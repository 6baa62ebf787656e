"""Layer states of models larger than memory: each layer runs over all prompts before the next.

The weights stay on disk, memory-mapped from safetensors; one layer's worth is in memory at a time.
Layers, masks and rotary positions are the architecture's own code, as in the resident mode.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lmerge.activations import Pooling, batch_by_length, check_prompts, pool
from lmerge.checkpoint import loading
from lmerge.llama import decoder_layers, num_layers, span
from lmerge.progress import track
from lmerge.shards import weight_files

EMBEDDING = "model.embed_tokens.weight"


@torch.no_grad()
def streamed_states(
    folder: Path,
    prompts: Sequence[Tensor],
    *,
    pooling: Pooling = "last",
    tokens_per_batch: int = 2048,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return what `layer_states` returns, with one layer's weights in memory at a time.

    Peak memory is one layer in `dtype`, the same layer's pages of the file, and the states of all
    tokens of all prompts.

    Args:
        folder: Local checkpoint: config.json and safetensors, in one file or in shards.
        prompts: Token ids (T,), of any lengths.
        pooling: `last` takes the last token of a prompt, `mean` averages its tokens.
        tokens_per_batch: Bound on the padded tokens that run through a layer at once.
        dtype: Dtype that the layers run in; weights of another dtype are converted.

    Returns:
        (L, N, D) float32 on the CPU, prompts in the given order.

    Raises:
        ValueError: When there is no prompt, an empty one, or a weight is missing.
    """
    check_prompts(prompts)
    files = weight_files(folder)
    with loading(str(folder), "its config.json"):
        model = skeleton(folder, dtype)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    chunks = batch_by_length(order, [len(p) for p in prompts], tokens_per_batch)
    tokens = [pad_sequence([prompts[i] for i in chunk], batch_first=True) for chunk in chunks]
    real = [
        torch.arange(token_BT.shape[1]) < torch.tensor([len(prompts[i]) for i in chunk])[:, None]
        for token_BT, chunk in zip(tokens, chunks, strict=True)
    ]
    hidden = _embedded(files, tokens, dtype)
    states = []
    for i in track(range(num_layers(model)), "layers", total=num_layers(model)):
        _load_layer(model, i, files, dtype)
        part = span(model, i, i + 1).model
        for j, real_BT in enumerate(real):
            hidden[j] = part(
                inputs_embeds=hidden[j], attention_mask=real_BT.long(), use_cache=False
            ).last_hidden_state
        decoder_layers(model)[i].to("meta")
        del part
        pooled = [pool(h_BTD, r_BT, pooling) for h_BTD, r_BT in zip(hidden, real, strict=True)]
        states.append(torch.cat(pooled))
    return torch.stack(states)[:, torch.argsort(torch.tensor(order))]


def skeleton(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Return the model without weights; only the rotary frequencies are real."""
    auto: Any = AutoModelForCausalLM
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    with torch.device("meta"):
        model: PreTrainedModel = auto.from_config(config, attn_implementation="sdpa", dtype=dtype)
    model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config)
    model.eval().requires_grad_(False)
    return model


def _embedded(
    files: Mapping[str, Path], tokens: Sequence[Tensor], dtype: torch.dtype
) -> list[Tensor]:
    """Return the input states of layer 0; only the rows in use are read."""
    with safe_open(_file(files, EMBEDDING), framework="pt") as file:
        used_V, place_N = torch.cat([t.flatten() for t in tokens]).unique(return_inverse=True)
        table = file.get_slice(EMBEDDING)
        row_VD = torch.cat([table[int(i) : int(i) + 1].to(dtype).clone() for i in used_V])
    embedded_ND = row_VD[place_N].split([t.numel() for t in tokens])
    return [x_ND.unflatten(0, t.shape) for x_ND, t in zip(embedded_ND, tokens, strict=True)]


def _load_layer(
    model: PreTrainedModel, index: int, files: Mapping[str, Path], dtype: torch.dtype
) -> None:
    layer = decoder_layers(model)[index]
    tensors = {}
    for name in layer.state_dict():
        full_name = f"model.layers.{index}.{name}"
        # The file is closed at once, so that its pages do not count after they were used.
        with safe_open(_file(files, full_name), framework="pt") as file:
            tensors[name] = file.get_tensor(full_name).to(dtype)
    layer.load_state_dict(tensors, assign=True)


def _file(files: Mapping[str, Path], name: str) -> Path:
    if name not in files:
        raise ValueError(
            f"`source` must hold all of its weights, got a checkpoint without {name}. Get a fresh "
            "copy of its files."
        )
    return files[name]
