"""Greedy continuations, and whether they repeat themselves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice, pairwise

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, PreTrainedModel

from lmerge.llama import cache_argument

PROMPTS = (
    "The history of the city begins",
    "Water boils at",
    "She opened the door and",
    "The main purpose of a contract is",
    "In the morning the old man",
    "To make a good soup, you need",
    "The first computer was built",
    "Children learn to speak by",
)
"""Starts of the greedy continuations; nothing is chosen on them."""

NUM_TOKENS = 48
"""Tokens of each continuation; an end-of-text token does not stop it."""


@torch.no_grad()
def decode(
    model: PreTrainedModel, token_BT: Tensor, mask_BT: Tensor | None = None
) -> Iterator[Tensor]:
    """Yield the most probable next token of each row (B, 1) without end, with a key/value cache.

    Args:
        model: A causal language model in eval mode.
        token_BT: Token ids, padded on the left.
        mask_BT: 1 for tokens and 0 for padding (int64); None where nothing is padded.
    """
    cache = cache_argument(model, DynamicCache(config=model.config))
    token_BT = token_BT.to(model.device)
    mask_BT = torch.ones_like(token_BT) if mask_BT is None else mask_BT.to(model.device)
    while True:
        out = model(
            input_ids=token_BT,
            attention_mask=mask_BT,
            **cache,
            use_cache=True,
            logits_to_keep=1,
        )
        token_BT = out.logits[:, -1].argmax(dim=-1, keepdim=True)
        mask_BT = torch.cat([mask_BT, torch.ones_like(token_BT)], dim=1)
        yield token_BT


def greedy(model: PreTrainedModel, prompts: Sequence[Tensor], num_tokens: int) -> list[list[int]]:
    """Return the most probable continuation of each prompt (T,), all in one batch."""
    token_BT = pad_sequence(list(prompts), batch_first=True, padding_side="left")
    mask_BT = pad_sequence(
        [torch.ones_like(prompt_T) for prompt_T in prompts], batch_first=True, padding_side="left"
    )
    tokens = list(islice(decode(model, token_BT, mask_BT), num_tokens))
    texts: list[list[int]] = torch.cat(tokens, dim=1).tolist()
    return texts


def generation_sanity(texts: Sequence[Sequence[int]]) -> dict[str, float]:
    """Return what shows that a model repeats itself.

    Args:
        texts: Token ids of greedy continuations, at least five tokens each.

    Returns:
        `distinct`, the share of distinct bigrams in all texts together (distinct-2,
        arXiv:1510.03055), and `repetition`, the mean share of a text's 4-grams that stand earlier
        in it (seq-rep-4, arXiv:1908.04319, eq. 7).
    """
    bigrams = [pair for text in texts for pair in pairwise(text)]
    repetition = sum(repeated_share(text) for text in texts) / len(texts)
    return {"distinct": len(set(bigrams)) / len(bigrams), "repetition": repetition}


def repeated_share(text: Sequence[int], *, size: int = 4) -> float:
    """Return the share of a text's n-grams that stand earlier in it; 0 to almost 1."""
    grams = list(zip(*(text[i:] for i in range(size)), strict=False))
    return 1 - len(set(grams)) / len(grams)
