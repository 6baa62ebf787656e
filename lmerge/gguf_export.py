"""Write the merged model as a GGUF file for llama.cpp, tensor by tensor.

Names, metadata and the order of the rotary rows are those of llama.cpp's own converter; the file is
written by the package `gguf`.
"""

from __future__ import annotations

import json
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
    SpecialVocab,
    TensorNameMap,
    TokenType,
    get_tensor_name_map,
)
from torch import Tensor
from transformers import PretrainedConfig

from lmerge.big_files import check_room
from lmerge.checkpoint import loading
from lmerge.files import replacing
from lmerge.llama import head_spec
from lmerge.progress import track
from lmerge.shards import Stored
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

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS: dict[str, str] = {
    LLAMA3_SPLIT: "llama-bpe",
    LLAMA3_SPLIT.replace("{1,3}", ""): "qwen2",
}
"""Regular expression of a tokenizer that splits by one -> llama.cpp's name of it."""

BY_HAND = "Export a checkpoint (`--out`) and convert it with llama.cpp's convert_hf_to_gguf.py."


def export_gguf(
    source_dir: Path,
    merge: StreamedMerge,
    path: Path,
    *,
    dtype: GgufDtype = "auto",
    name: str = "merged",
    pre: str | None = None,
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
    architecture, paired = ARCHITECTURES[config.model_type]
    with replacing(path) as temporary:
        writer = GGUFWriter(None, MODEL_ARCH_NAMES[architecture])
        _add_config(writer, config, name)
        writer.add_file_type(FILE_TYPES[kind][2])
        with loading(str(source_dir), "its tokenizer"):
            add_tokenizer(writer, source_dir, config.vocab_size, pre)
        table = get_tensor_name_map(architecture, config.num_hidden_layers)
        kinds = _add_shapes(writer, merge, table, kind)
        check_room(path, sum(t.nbytes for part in writer.tensors for t in part.values()))
        writer.write_header_to_file(temporary)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for weight, code in track(kinds.items(), "weights", total=len(kinds)):
            content = merge.tensor(weight)
            tensor = content.read() if isinstance(content, Stored) else content
            tensor = tensor.to(FILE_TYPES[code][0])
            if paired:
                tensor = neighbour_pairs(tensor, weight, config)
            writer.write_tensor_data(_array(tensor))
        writer.close()
    logger.info("wrote %s, %s matrices", path, kind)


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


def source_pre(path: Path) -> str | None:
    """Return the pre-tokenizer that a GGUF file names; transformers does not keep it."""
    field = GGUFReader(path).fields.get("tokenizer.ggml.pre")
    return None if field is None else str(field.contents())


def _check_config(config: PretrainedConfig) -> None:
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    types = set(getattr(config, "layer_types", None) or ())
    slides = "sliding_attention" in types or (
        config.model_type == "mistral" and config.sliding_window is not None
    )
    biases = [k for k in ("attention_bias", "mlp_bias") if getattr(config, k, False)]
    reasons = {
        f"scaled rotary positions ({rope})": rope != "default",
        "a sliding window": slides,
        f"biases of {config.model_type} ({', '.join(biases)})": bool(biases),
    }
    for reason, holds in reasons.items():
        if holds:
            raise ValueError(
                "`--gguf` writes models that transformers reads back with the same logits, which "
                f"it cannot for {reason}. {BY_HAND}"
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
    writer.add_rope_dimension_count(spec.head_dim)
    writer.add_vocab_size(config.vocab_size)


def _add_shapes(
    writer: GGUFWriter, merge: StreamedMerge, table: TensorNameMap, kind: str
) -> dict[str, str]:
    """Announce every tensor; return the dtype of each weight, in the order of the file."""
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


def add_tokenizer(writer: GGUFWriter, folder: Path, vocab_size: int, pre: str | None) -> None:
    """Add a byte-level BPE tokenizer: tokens, merges, special tokens and chat template.

    Raises:
        ValueError: When it is of another kind.
    """
    path = folder / "tokenizer.json"
    data = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if data.get("model", {}).get("type") != "BPE" or not _parts(data, "ByteLevel"):
        raise ValueError(f"`--gguf` knows byte-level BPE tokenizers alone. {BY_HAND}")
    vocab: dict[str, int] = data["model"]["vocab"]
    tokens = {i: (token, TokenType.NORMAL) for token, i in vocab.items()}
    for entry in data.get("added_tokens", []):
        kind = TokenType.CONTROL if entry["special"] else TokenType.USER_DEFINED
        tokens[entry["id"]] = (entry["content"], kind)
    # An embedding may have more rows than the tokenizer has tokens.
    rows = [tokens.get(i, (f"[PAD{i}]", TokenType.UNUSED)) for i in range(vocab_size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre or _pre_tokenizer(data))
    writer.add_token_list([token for token, _ in rows])
    writer.add_token_types([kind for _, kind in rows])
    SpecialVocab(folder, load_merges=True, n_vocab=vocab_size).add_to_gguf(writer, quiet=True)


def _pre_tokenizer(data: Mapping[str, Any]) -> str:
    """Return llama.cpp's name of the way in which text is cut before the merges."""
    if _parts(data, "Digits"):
        return "smollm"
    splits = [part["pattern"].get("Regex") for part in _parts(data, "Split")]
    if not splits:
        return "gpt-2"
    if len(splits) == 1 and splits[0] in SPLITS:
        return SPLITS[splits[0]]
    raise ValueError(f"`--gguf` does not know how this tokenizer splits text. {BY_HAND}")


def _parts(data: Mapping[str, Any], kind: str) -> list[dict[str, Any]]:
    """Return the parts of a tokenizer's pre-tokenizer that are of a kind."""
    top = data.get("pre_tokenizer") or {}
    return [part for part in top.get("pretokenizers", [top]) if part.get("type") == kind]
