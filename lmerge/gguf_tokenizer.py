"""Write a tokenizer into a GGUF file, as llama.cpp's own converter does."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, SpecialVocab, TokenType

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

BYTE = re.compile(r"<0x[0-9A-F]{2}>")
"""A token that stands for one byte of a text that no other token covers."""


def add_tokenizer(writer: GGUFWriter, folder: Path, vocab_size: int, pre: str | None) -> None:
    """Add a BPE tokenizer: tokens, merges or their scores, special tokens and chat template.

    Args:
        writer: Where to.
        folder: The checkpoint that the tokenizer lies in.
        vocab_size: Rows of the embedding; there may be more than the tokenizer has tokens.
        pre: llama.cpp's name of the pre-tokenizer, where it is known.

    Raises:
        ValueError: When it is of another kind.
    """
    path = folder / "tokenizer.json"
    data = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    model = data.get("model", {})
    if model.get("type") == "BPE" and _parts(data, "ByteLevel"):
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre or _pre_tokenizer(data))
    elif model.get("type") == "BPE" and model.get("byte_fallback"):
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_add_space_prefix(_adds_space(data))
        writer.add_token_scores(_scores(model, vocab_size))
    else:
        raise ValueError(
            f"`--gguf` knows byte-level BPE and SentencePiece BPE tokenizers alone. {BY_HAND}"
        )
    rows = _tokens(data, vocab_size)
    writer.add_token_list([token for token, _ in rows])
    writer.add_token_types([kind for _, kind in rows])
    ranked = bool(_parts(data, "ByteLevel"))
    SpecialVocab(folder, load_merges=ranked, n_vocab=vocab_size).add_to_gguf(writer, quiet=True)


def _tokens(data: Mapping[str, Any], vocab_size: int) -> list[tuple[str, TokenType]]:
    vocab, unknown = data["model"]["vocab"], data["model"].get("unk_token") or "<unk>"
    tokens = {i: (token, _kind(token, data)) for token, i in vocab.items()}
    for entry in data.get("added_tokens", []):
        kind = TokenType.CONTROL if entry["special"] else TokenType.USER_DEFINED
        is_unknown = entry["content"] == unknown
        tokens[entry["id"]] = (entry["content"], TokenType.UNKNOWN if is_unknown else kind)
    # An embedding may have more rows than the tokenizer has tokens.
    return [tokens.get(i, (f"[PAD{i}]", TokenType.UNUSED)) for i in range(vocab_size)]


def _kind(token: str, data: Mapping[str, Any]) -> TokenType:
    fallback = data["model"].get("byte_fallback") and BYTE.fullmatch(token)
    return TokenType.BYTE if fallback else TokenType.NORMAL


def _adds_space(data: Mapping[str, Any]) -> bool:
    """Return whether a space is put before a text, which both ways to write it down tell."""
    top = data.get("normalizer") or {}
    steps = [step.get("type") for step in top.get("normalizers", [top])]
    schemes = [part.get("prepend_scheme") for part in _parts(data, "Metaspace")]
    if steps not in (["Prepend", "Replace"], ["Replace"], [None]) or not (schemes or steps[-1]):
        raise ValueError(f"`--gguf` does not know how this tokenizer writes spaces. {BY_HAND}")
    return steps[0] == "Prepend" or (bool(schemes) and schemes[0] != "never")


def _scores(model: Mapping[str, Any], vocab_size: int) -> list[float]:
    """Return scores by which llama.cpp joins neighbours in the order of the merges.

    Raises:
        ValueError: When it would join a pair that the merges do not have.
    """
    pairs = [tuple(m.split(" ") if isinstance(m, str) else m) for m in model["merges"]]
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(pairs):
        ranks.setdefault("".join(pair), rank)
    vocab, known = model["vocab"], set(pairs)
    for token in vocab:
        cuts = ((token[:i], token[i:]) for i in range(1, len(token)))
        if any(a in vocab and b in vocab and (a, b) not in known for a, b in cuts):
            raise ValueError(
                f"`--gguf` cannot write this tokenizer, which joins {token!r} in one way though "
                f"there are others. {BY_HAND}"
            )
    scores = [-float(len(ranks))] * vocab_size
    for token, i in vocab.items():
        scores[i] = -float(ranks.get(token, len(ranks)))
    return scores


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
