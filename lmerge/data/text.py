"""Prose to token blocks."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lmerge.data.records import IGNORE, TextBatch
from lmerge.data.rows import parse_object, read_utf8, show
from lmerge.data.tokens import encode

SLICE = re.compile(r"(?P<path>.+)\[(?P<start>\d+%)?:(?P<stop>\d+%)?\]", re.DOTALL)
"""A file and the part of it that is meant, as in `datasets`: `wiki.txt[:80%]`."""


def read_texts(
    source: str | Sequence[str] | None, languages: Sequence[str], *, split: Literal["val", "test"]
) -> dict[str, str]:
    """Return texts by name: one per language from the bank, and the user's files under their stems.

    Args:
        source: `bank`, a `.txt` or `.jsonl` file or a part of one, several of these, or None for no
            text.
        languages: ISO 639-1 codes; a user's file is read once, whatever they are.
        split: Which of the bundled texts: `val` to calibrate on, `test` to measure on.
    """
    texts: dict[str, str] = {}
    for path in file_names(source):
        if path == "bank":
            texts |= {language: read_text(path, language, split=split) for language in languages}
        else:
            texts[Path(split_slice(path)[0]).stem] = read_text(path)
    return texts


def file_names(source: str | Sequence[str] | None) -> list[str]:
    """Return the files of an option that takes none, one or several; results go by their stems.

    Raises:
        ValueError: If two files have the same stem.
    """
    paths = [source] if isinstance(source, str) else list(source or ())
    stems = [Path(split_slice(path)[0]).stem for path in paths]
    twice = [stem for stem in stems if stems.count(stem) > 1]
    if twice:
        raise ValueError(
            f"files must differ in their names without the ending, got {twice[0]!r} twice; rename "
            "one of them."
        )
    return paths


def split_slice(source: str) -> tuple[str, int, int]:
    """Return the file that is meant, and the percentages where the part of it starts and ends.

    Raises:
        ValueError: When the part is empty or reaches beyond the file.
    """
    found = SLICE.fullmatch(source)
    if not found:
        return source, 0, 100
    start = int((found["start"] or "0%").rstrip("%"))
    stop = int((found["stop"] or "100%").rstrip("%"))
    if not start < stop <= 100:
        raise ValueError(
            f"{source}: the part of a file must end after its start and at most at 100%, got "
            f"[{start}%:{stop}%]; write for example {found['path']}[:80%]."
        )
    return found["path"], start, stop


def read_text(source: str, language: str = "en", *, split: Literal["val", "test"] = "test") -> str:
    """Return the bundled prose of a language, or the text of the user's file.

    Args:
        source: `bank`, a UTF-8 `.txt` file, or a `.jsonl` file with `text` on each line, which are
            joined with an empty line in between. A part of a file is named in per cent of its
            characters, `wiki.txt[:80%]`; it is cut where the next line starts.
        language: ISO 639-1 code; matters for `bank` alone.
        split: `val` to calibrate on, `test` to measure on; matters for `bank` alone.

    Raises:
        ValueError: One line that names the file, the rule and the remedy.
    """
    if source == "bank":
        return _bundled_text(language, split)
    file, start, stop = split_slice(source)
    path = Path(file)
    if path.suffix not in {".txt", ".jsonl"} or not path.is_file():
        raise ValueError(
            f"{source}: a text must be bank, an existing .txt file or an existing .jsonl file; "
            "check the path."
        )
    if path.suffix == ".txt":
        text = read_utf8(path)
    else:
        text = "\n\n".join(document for _, document in documents(path))
    text = text[_cut(text, start) : _cut(text, stop)]
    if not text.strip():
        raise ValueError(f"{source}: a text must not be empty, got {show(text)}; fill it.")
    return text


def _cut(text: str, percent: int) -> int:
    """Return where the first line starts that begins at or after a percentage of the characters."""
    place = len(text) * percent // 100
    if place in (0, len(text)) or text[place - 1] == "\n":
        return place
    newline = text.find("\n", place)
    return len(text) if newline < 0 else newline + 1


def documents(path: Path) -> Iterator[tuple[str, str]]:
    """Yield where it stands (file and line) and the `text` of each line of a JSONL file."""
    for number, line in enumerate(read_utf8(path).split("\n"), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            text = parse_object(line, where).get("text")
            if not isinstance(text, str):
                raise ValueError(
                    f"{where}: `text` must be a text, got {show(text)}; correct the line."
                )
            yield where, text


def text_fingerprint(text: str) -> str:
    """Return 16 hex digits of SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def token_blocks(token_ids: Sequence[int], block_size: int) -> Tensor:
    """Return the full blocks of a token sequence, without the remainder.

    Args:
        token_ids: Token ids of a text.
        block_size: Tokens in a block; at least 1.

    Returns:
        Blocks (B, T), int64.

    Raises:
        ValueError: If there are fewer tokens than a block holds.
    """
    num_blocks = len(token_ids) // block_size
    if num_blocks == 0:
        raise ValueError(
            f"`block_size` must be at most the {len(token_ids)} tokens of the text, got "
            f"{block_size}; lower it or give more text."
        )
    return torch.tensor(token_ids[: num_blocks * block_size]).reshape(num_blocks, block_size)


def text_batches(
    name: str,
    text: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    block_size: int,
    stride: int,
    batch_size: int,
) -> list[TextBatch]:
    """Return blocks in which every token but the very first is predicted exactly once.

    The text is tokenised as a whole; what the tokenizer itself puts before a text stands before
    the first block alone.

    Args:
        name: What the text is called in logs.
        text: At least two tokens.
        tokenizer: Tokenizer of the model.
        block_size: Tokens in a block; at least 1.
        stride: Tokens from one block's start to the next; 1 to `block_size`. Below `block_size`,
            blocks overlap and a token is predicted in the first block that reaches it, after at
            least `block_size - stride` tokens of context.
        batch_size: Blocks in a batch; the last batch may be smaller. Every block is padded to
            `block_size`.
    """
    if not 1 <= stride <= block_size:
        raise ValueError(
            f"`stride` must be between 1 and the block size {block_size}, got {stride}; lower it."
        )
    (token_ids,) = encode(tokenizer, [text])
    if len(token_ids) < 2:
        raise ValueError(
            f"text {name!r} must have at least 2 tokens, got {len(token_ids)}; give more text."
        )
    blocks = list(_blocks(token_ids, block_size, stride))
    batches = []
    for start in range(0, len(blocks), batch_size):
        part = blocks[start : start + batch_size]
        batch = TextBatch(
            name=name,
            index_B=torch.arange(start, start + len(part)),
            token_BT=torch.stack([token_T for token_T, _ in part]),
            target_BT=torch.stack([target_T for _, target_T in part]),
        )
        batches.append(batch)
    return batches


def block_batches(name: str, token_BT: Tensor, batch_size: int) -> list[TextBatch]:
    """Return full blocks as batches in which every token but a block's first is predicted."""
    target_BT = torch.full_like(token_BT, IGNORE)
    target_BT[:, :-1] = token_BT[:, 1:]
    index_B = torch.arange(len(token_BT))
    return [
        TextBatch(name=name, index_B=i_B, token_BT=t_BT, target_BT=y_BT)
        for i_B, t_BT, y_BT in zip(
            *(x.split(batch_size) for x in (index_B, token_BT, target_BT)), strict=True
        )
    ]


def _bundled_text(language: str, split: Literal["val", "test"]) -> str:
    folder = resources.files("lmerge.data") / "bank" / "text"
    file = folder / f"{language}_{split}.txt"
    if not file.is_file():
        suffix = f"_{split}.txt"
        found = sorted(f.name.removesuffix(suffix) for f in folder.iterdir() if suffix in f.name)
        raise ValueError(
            f"the bundled {split} texts must be in one of {', '.join(found)}, got {language!r}; "
            "give a .txt file, or null for none."
        )
    return read_utf8(file)


def _blocks(
    token_ids: Sequence[int], block_size: int, stride: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the tokens and targets of each block."""
    token_N = torch.tensor(token_ids)
    start = predicted = 0
    while predicted < len(token_N) - 1:
        token_T = token_N[start : start + block_size]
        target_T = token_N[start + 1 : start + block_size + 1].clone()
        # Targets are the tokens start + 1 onwards; those up to `predicted` were targets before.
        target_T[: predicted - start] = IGNORE
        predicted = start + len(target_T)
        yield _fill(token_T, block_size, 0), _fill(target_T, block_size, IGNORE)
        start += stride


def _fill(token_T: Tensor, block_size: int, value: int) -> Tensor:
    return torch.nn.functional.pad(token_T, (0, block_size - len(token_T)), value=value)
