"""States of the source on the calibration blocks, computed once.

Nothing below the first merged layer depends on the alphas, and nothing of the source does.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lmerge.llama import embed, num_layers, run_span, span
from lmerge.progress import track


class StateCache(NamedTuple):
    """States of the source on the calibration blocks, on the CPU, in the source's dtype."""

    prefix_BTD: Tensor
    """Input of the first merged layer."""
    final_BTD: Tensor
    """Output of the final norm: what the head turns into next-token logits."""


@torch.no_grad()
def cache_states(
    source: PreTrainedModel, token_BT: Tensor, first_merged: int, *, batch_size: int = 4
) -> StateCache:
    """Return the states of the source that alphas and repairs need.

    Args:
        source: The source model.
        token_BT: Calibration blocks, unpadded.
        first_merged: Index of the first merged layer.
        batch_size: Blocks in one forward pass.
    """
    below = span(source, 0, first_merged)
    above = span(source, first_merged, num_layers(source), final_norm=True)
    batches = token_BT.split(batch_size)
    prefixes, finals = [], []
    for part_BT in track(batches, "calibration states", total=len(batches)):
        prefix_BTD = run_span(below, embed(source, part_BT.to(source.device)))
        prefixes.append(prefix_BTD.cpu())
        finals.append(run_span(above, prefix_BTD).cpu())
    return StateCache(torch.cat(prefixes), torch.cat(finals))
