"""Attention of grouped queries without a copy of keys and values for each query head."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

NAME = "lmerge_grouped"


@contextmanager
def grouped_attention(model: PreTrainedModel) -> Iterator[int]:
    """Let the query heads of a key/value head attend as further positions of one head.

    transformers copies the keys and values for each query head wherever there is a mask; here none
    is copied. No sum is formed in another order.

    Yields:
        How often the mask must be repeated along the queries, for a call inside the context: query
        heads to a key/value head; 1 where nothing changes, as in eager attention.
    """
    decoder = cast(nn.Module, model.model)
    found = [getattr(module, "config", None) for module in decoder.modules()]
    configs: list[Any] = list(
        {id(c): c for c in found if hasattr(c, "_attn_implementation")}.values()
    )
    num_groups = int(model.config.num_attention_heads // model.config.num_key_value_heads)
    if num_groups == 1 or any(c._attn_implementation != "sdpa" for c in configs):
        yield 1
        return
    try:
        for config in configs:
            config._attn_implementation = NAME
        yield num_groups
    finally:
        for config in configs:
            config._attn_implementation = "sdpa"


def _attend(
    module: nn.Module,
    query_BHTC: Tensor,
    keys_BKSC: Tensor,
    values_BKSC: Tensor,
    attention_mask: Tensor,
    scaling: float,
    **kwargs: object,
) -> tuple[Tensor, None]:
    num_rows, num_heads, length, width = query_BHTC.shape
    folded_BKQC = query_BHTC.reshape(num_rows, keys_BKSC.shape[1], -1, width)
    out_BKQC = F.scaled_dot_product_attention(
        folded_BKQC, keys_BKSC, values_BKSC, attn_mask=attention_mask, scale=scaling
    )
    out_BHTC = out_BKQC.reshape(num_rows, num_heads, length, width)
    return out_BHTC.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, _attend)
