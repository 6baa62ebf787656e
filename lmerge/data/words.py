"""Texts whose last word is to be guessed, as in LAMBADA (Paperno et al. 2016, arXiv:1606.06031)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from lmerge.data.prompts import cut_rows
from lmerge.data.records import IGNORE, WordBatch
from lmerge.data.rows import show
from lmerge.data.text import documents, file_names
from lmerge.data.tokens import encode, shared_length

logger = logging.getLogger(__name__)


def read_last_words(source: str | Sequence[str] | None) -> dict[str, list[str]]:
    """Return the texts of each file, by the file's stem.

    Args:
        source: `.jsonl` files with `text` on each line, or None.

    Raises:
        ValueError: One line that names the file, the line, the rule and the remedy.
    """
    return {Path(path).stem: _read(Path(path)) for path in file_names(source)}


def _read(path: Path) -> list[str]:
    if path.suffix != ".jsonl" or not path.is_file():
        raise ValueError(
            f"{path}: `last_word` must be an existing .jsonl file with `text` on each line; check "
            "the path."
        )
    texts = []
    for where, text in documents(path):
        if len(text.split()) < 2:
            raise ValueError(
                f"{where}: `text` must have a word before its last one, got {show(text)}; write "
                "at least two words with a space between them, or remove the line."
            )
        texts.append(text.strip())
    if not texts:
        raise ValueError(f"{path}: a file must hold at least one text, got none; fill it.")
    return texts


def word_batches(
    name: str,
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_tokens: int,
    max_length: int,
) -> list[WordBatch]:
    """Return batches in which the tokens of each text's last word are the only targets.

    The last word is what follows the last white space, with that white space, punctuation
    included. The text is tokenised as a whole, as in lm-eval's `lambada` tasks.

    Args:
        name: What the file is called in logs.
        texts: At least two words each.
        tokenizer: Tokenizer of the model.
        max_tokens: Bound on the padded tokens in a batch; a longer text is alone.
        max_length: Tokens that the model can see; of a longer text the start is cut off.
    """
    heads = [text.rsplit(maxsplit=1)[0] for text in texts]
    encoded = encode(tokenizer, [*heads, *texts])
    rows = [
        _row(head, whole, max_length)
        for head, whole in zip(encoded[: len(texts)], encoded[len(texts) :], strict=True)
    ]
    num_cut = sum(len(ids) > max_length + 1 for ids in encoded[len(texts) :])
    if num_cut:
        logger.info("%s: %d texts were cut to their last %d tokens", name, num_cut, max_length)
    batches = []
    for part in cut_rows([len(token_T) for token_T, _ in rows], max_tokens):
        token_BT = pad_sequence([rows[i][0] for i in part], batch_first=True)
        target_BT = pad_sequence([rows[i][1] for i in part], batch_first=True, padding_value=IGNORE)
        index_B = torch.tensor(part)
        batches.append(
            WordBatch(name=name, index_B=index_B, token_BT=token_BT, target_BT=target_BT)
        )
    return batches


def _row(head: list[int], whole: list[int], max_length: int) -> tuple[Tensor, Tensor]:
    """Return tokens and targets of a text that starts with `head`."""
    # At least one token stands before the word, and the word has at least one.
    start = max(1, min(shared_length(whole, head), len(whole) - 1))
    token_T = torch.tensor(whole[:-1])
    target_T = torch.tensor(whole[1:])
    target_T[: start - 1] = IGNORE
    return token_T[-max_length:], target_T[-max_length:]
