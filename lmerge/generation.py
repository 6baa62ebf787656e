"""Greedy continuations, and whether they repeat themselves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice, pairwise

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

PROMPTS = (
    "The history of the city begins",
    "Water boils at",
    "She opened the door and",
    "The main purpose of a contract is",
)
"""Starts of the greedy continuations; nothing is chosen on them."""


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
    cache = None
    token_BT = token_BT.to(model.device)
    mask_BT = torch.ones_like(token_BT) if mask_BT is None else mask_BT.to(model.device)
    while True:
        out = model(
            input_ids=token_BT,
            attention_mask=mask_BT,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache, token_BT = out.past_key_values, out.logits[:, -1].argmax(dim=-1, keepdim=True)
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


def generation_sanity(
    model: PreTrainedModel, prompts: Sequence[Tensor], *, num_tokens: int = 48
) -> dict[str, float]:
    """Return `distinct` (distinct-2) and `loops` of greedy continuations.

    Args:
        model: A causal language model in eval mode.
        prompts: Token ids (T,) of each prompt.
        num_tokens: Tokens to generate for each; an end-of-text token does not stop it.
    """
    texts = greedy(model, prompts, num_tokens)
    bigrams = [pair for text in texts for pair in pairwise(text)]
    loops = sum(ends_in_loop(text) for text in texts) / len(texts)
    return {"distinct": len(set(bigrams)) / len(bigrams), "loops": loops}


def ends_in_loop(text: Sequence[int], *, max_period: int = 8, num_repeats: int = 3) -> bool:
    """Return whether a text ends in a phrase of at most `max_period` tokens, said over and over."""
    for period in range(1, min(max_period, len(text) // num_repeats) + 1):
        tail = list(text[-period * num_repeats :])
        if tail == tail[:period] * num_repeats:
            return True
    return False
