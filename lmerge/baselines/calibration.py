"""What a baseline sees of the source: calibration blocks, and the source's states on them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lmerge.block_refits import layer_inputs
from lmerge.llama import decoder_layers, num_layers, with_layer_index, with_layers


class Shallow(NamedTuple):
    """A model with fewer layers, and what became of the source's."""

    model: PreTrainedModel
    """The model; it shares unchanged weights with the source."""
    kept: tuple[int, ...]
    """For each layer, the source layer that it comes from."""


class Calibration:
    """Calibration blocks and the source's states on them, computed once for all baselines.

    Args:
        source: The source model.
        token_BT: Calibration blocks, unpadded.
        seed: Seed of whatever a baseline draws.
    """

    def __init__(self, source: PreTrainedModel, token_BT: Tensor, *, seed: int = 0) -> None:
        self.source = source
        self.token_BT = token_BT
        self.seed = seed
        self.sleb_removed: list[int] = []
        """Layers in the order in which SLEB removes them, as far as it is known."""

    @property
    def depth(self) -> int:
        """Layers of the source."""
        return num_layers(self.source)

    @cached_property
    @torch.no_grad()
    def states(self) -> list[Tensor]:
        """The input of every layer and the output of the last, (B, T, D) each, on the CPU."""
        return layer_inputs(self.source, self.token_BT)


def spread_blocks(token_BT: Tensor, num_tokens: int) -> Tensor:
    """Return blocks of about `num_tokens` tokens, at least one block, spread over all of them."""
    num_blocks = max(1, num_tokens // token_BT.shape[1])
    return token_BT[:: max(1, len(token_BT) // num_blocks)][:num_blocks]


def keep_layers(source: PreTrainedModel, kept: Sequence[int]) -> Shallow:
    """Return the source with the layers `kept` alone, in that order."""
    layers = [with_layer_index(decoder_layers(source)[i], place) for place, i in enumerate(kept)]
    return Shallow(with_layers(source, layers, list(kept)), tuple(kept))


def without(depth: int, removed: Sequence[int]) -> list[int]:
    """Return the layers 0 to `depth` - 1 that are not `removed`."""
    return [i for i in range(depth) if i not in set(removed)]
