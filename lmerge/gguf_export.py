"""Write the merged model as a GGUF file for llama.cpp, tensor by tensor.

Names, metadata and the order of the rotary rows are those of llama.cpp's own converter; the file is
written by the package `gguf`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from gguf import (
    MODEL_ARCH,
    MODEL_ARCH_NAMES,
    GGMLQuantizationType,
    GGUFReader,
    GGUFWriter,
    LlamaFileType,
    RopeScalingType,
    get_tensor_name_map,
)
from torch import Tensor
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from lmerge.big_files import check_room
from lmerge.checkpoint import loading
from lmerge.files import replacing
from lmerge.folders import held, remove_left
from lmerge.gguf_tokenizer import BY_HAND, add_tokenizer
from lmerge.llama import head_spec
from lmerge.progress import track
from lmerge.shards import Stored
from lmerge.streamed_export import check_fingerprint
from lmerge.streamed_merge import StreamedMerge

logger = logging.getLogger(__name__)

GgufDtype = Literal["auto", "F32", "F16", "BF16"]

FILE_TYPES: dict[str, tuple[torch.dtype, GGMLQuantizationType, LlamaFileType]] = {
    "F32": (torch.float32, GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "F16": (torch.float16, GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "BF16": (torch.bfloat16, GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
}
"""Name -> dtype of the matrices, its code for a tensor, its code for the file."""

ARCHITECTURES: dict[str, tuple[MODEL_ARCH, bool]] = {
    "llama": (MODEL_ARCH.LLAMA, True),
    "mistral": (MODEL_ARCH.LLAMA, True),
    "qwen2": (MODEL_ARCH.QWEN2, False),
    "qwen3": (MODEL_ARCH.QWEN3, False),
}
"""Model type -> llama.cpp's architecture, and whether its rotary pairs are neighbours there."""

ROPE_FREQS = "rope_freqs.weight"
"""Tensor by which llama.cpp divides the rotary frequencies."""


def export_gguf(
    source_dir: Path,
    merge: StreamedMerge,
    path: Path,
    *,
    dtype: GgufDtype = "auto",
    name: str = "merged",
    pre: str | None = None,
    fingerprint: str = "",
    overwrite: bool = False,
) -> None:
    """Write a GGUF file that llama.cpp and transformers load: all of it, or nothing.

    Args:
        source_dir: The source checkpoint, whose tokenizer is taken over.
        merge: The merged model.
        path: Where the file goes.
        dtype: Dtype of the matrices (vectors are always float32); `auto` is that of `merge`.
        name: What the model is called.
        pre: llama.cpp's name of the pre-tokenizer, where it is known.
        fingerprint: What the source's weights must have; empty is any.
        overwrite: Whether an older file there may be replaced.

    Raises:
        ValueError: If the model is one that a GGUF file cannot hold, or the file cannot be written.
    """
    if path.exists() and (path.is_dir() or not overwrite):
        raise ValueError(f"{path} already exists. Choose another path, or allow overwriting it.")
    names = {str(code).removeprefix("torch."): key for key, (code, _, _) in FILE_TYPES.items()}
    kind = names[str(merge.out_dtype).removeprefix("torch.")] if dtype == "auto" else dtype
    config = merge.config
    _check_config(config)
    if path.parent.is_dir():
        remove_left(path)
    with replacing(path) as temporary, held(temporary):
        writer = GGUFWriter(None, MODEL_ARCH_NAMES[ARCHITECTURES[config.model_type][0]])
        _add_config(writer, config, name)
        writer.add_file_type(FILE_TYPES[kind][2])
        with loading(str(source_dir), "its tokenizer"):
            add_tokenizer(writer, source_dir, config.vocab_size, pre)
        factors = rotary_factors(config)
        if factors is not None:
            writer.add_tensor_info(ROPE_FREQS, factors.shape, factors.dtype, factors.nbytes)
        kinds = _add_shapes(writer, merge, kind)
        check_room(path, sum(t.nbytes for part in writer.tensors for t in part.values()))
        writer.write_header_to_file(temporary)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if factors is not None:
            writer.write_tensor_data(factors)
        _write_weights(writer, merge, kinds)
        writer.close()
        check_fingerprint(merge, fingerprint)
    logger.info("wrote %s, %s matrices", path, kind)


def _write_weights(writer: GGUFWriter, merge: StreamedMerge, kinds: Mapping[str, str]) -> None:
    config = merge.config
    _, paired = ARCHITECTURES[config.model_type]
    for weight, code in track(kinds.items(), "weights", total=len(kinds)):
        content = merge.tensor(weight)
        tensor = content.read() if isinstance(content, Stored) else content
        tensor = tensor.to(FILE_TYPES[code][0])
        if paired:
            tensor = neighbour_pairs(tensor, weight, config)
        writer.write_tensor_data(_array(tensor))


def neighbour_pairs(tensor: Tensor, name: str, config: PretrainedConfig) -> Tensor:
    """Return q or k with the rows of each rotary pair side by side, others as they are.

    transformers pairs the rows i and i + C/2 of a head, llama.cpp 2i and 2i + 1.
    """
    spec = head_spec(config)
    heads = {"q_proj": spec.num_heads, "k_proj": spec.num_kv_heads}
    for part, num_heads in heads.items():
        if f".{part}." in name:
            halves_H2P = tensor.reshape(num_heads, 2, -1, *tensor.shape[1:])
            return halves_H2P.transpose(1, 2).reshape(tensor.shape)
    return tensor


def rotary_factors(config: PretrainedConfig) -> Any:
    """Return by what llama.cpp divides the rotary frequencies of Llama 3.1 and later, (C/2,)."""
    if _rope_type(config) != "llama3":
        return None
    scaled_P, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    width = head_spec(config).head_dim
    place_P = torch.arange(0, width, 2).float() / width
    plain_P = 1.0 / config.rope_parameters["rope_theta"] ** place_P
    return (plain_P / scaled_P).float().numpy()


def source_pre(path: Path) -> str | None:
    """Return the pre-tokenizer that a GGUF file names; transformers does not keep it."""
    field = GGUFReader(path).fields.get("tokenizer.ggml.pre")
    return None if field is None else str(field.contents())


def _rope_type(config: PretrainedConfig) -> str:
    return str((getattr(config, "rope_parameters", None) or {}).get("rope_type", "default"))


def _check_config(config: PretrainedConfig) -> None:
    rope, known = _rope_type(config), {"default", "linear"}
    if ARCHITECTURES[config.model_type][0] is MODEL_ARCH.LLAMA:
        known.add("llama3")
    partial = config.rope_parameters.get("partial_rotary_factor")
    types = set(getattr(config, "layer_types", None) or ())
    slides = "sliding_attention" in types or (
        config.model_type == "mistral" and config.sliding_window is not None
    )
    biases = [k for k in ("attention_bias", "mlp_bias") if getattr(config, k, False)]
    reasons = {
        f"rotary positions of {config.model_type} that are scaled by {rope!r}": rope not in known,
        "rotary positions in a part of each head": partial not in (None, 1),
        "a sliding window": slides,
        f"biases of {config.model_type} ({', '.join(biases)})": bool(biases),
    }
    for reason, holds in reasons.items():
        if holds:
            raise ValueError(
                "`--gguf` writes models whose logits stay the same, which it cannot promise for "
                f"{reason}. {BY_HAND}"
            )
    if rope != "default":
        logger.warning(
            "llama.cpp reads the scaling of rotary positions (%s) in a GGUF file, transformers "
            "does not and gives other logits: load the checkpoint there",
            rope,
        )


def _add_config(writer: GGUFWriter, config: PretrainedConfig, name: str) -> None:
    spec = head_spec(config)
    writer.add_type("model")
    writer.add_name(name)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(spec.num_heads)
    writer.add_head_count_kv(spec.num_kv_heads)
    writer.add_key_length(spec.head_dim)
    writer.add_value_length(spec.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if _rope_type(config) == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_parameters["factor"])
    writer.add_rope_dimension_count(spec.head_dim)
    writer.add_vocab_size(config.vocab_size)


def _add_shapes(writer: GGUFWriter, merge: StreamedMerge, kind: str) -> dict[str, str]:
    """Announce every tensor; return the dtype of each weight, in the order of the file."""
    architecture, _ = ARCHITECTURES[merge.config.model_type]
    table = get_tensor_name_map(architecture, merge.config.num_hidden_layers)
    kinds = {}
    for weight, shape in merge.shapes.items():
        kinds[weight] = kind if len(shape) > 1 else "F32"
        dtype, code, _ = FILE_TYPES[kinds[weight]]
        count = torch.Size(shape).numel() * dtype.itemsize
        empty = _array(torch.empty(0, dtype=dtype))
        name = table.get_name(weight, try_suffixes=(".weight", ".bias"))
        assert name is not None, weight
        writer.add_tensor_info(name, shape, empty.dtype, count, raw_dtype=code)
    return kinds


def _array(tensor: Tensor) -> Any:
    """Return the tensor for numpy, which has no bfloat16."""
    tensor = tensor.contiguous()
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
