"""The key/value states of a few-shot prefix, computed once and shared by all its questions."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from lmerge.llama import cache_argument


class PrefixCache:
    """Key/value states of the prefixes used last, for one or several models.

    An entry belongs to a model object, its weights and the token ids. Tensors that were replaced,
    or changed in place by an optimizer, `load_state_dict` or `copy_`, are noticed; an edit through
    `.data` is not, and needs `release`. Scoring never changes an entry.
    """

    def __init__(self, *, max_entries: int = 2) -> None:
        """Keep the `max_entries` prefixes used last.

        With 0 every batch encodes its prefix: slow, but each process then runs the same number of
        forward passes, which sharded strategies such as FSDP need.
        """
        if max_entries < 0:
            raise ValueError(f"`max_entries` must be at least 0, got {max_entries}. Use 2.")
        self._max_entries = max_entries
        self._entries: list[_Entry] = []

    def __len__(self) -> int:
        return len(self._entries)

    def encode(self, model: PreTrainedModel, prefix_P: Tensor) -> PrefixStates:
        """Return the states after `prefix_P`, ready for a batch of any size.

        Args:
            model: A causal language model in eval mode.
            prefix_P: Token ids of the prefix (int64), on any device.

        Returns:
            A cache whose layers join their states with those of the batch but keep neither.
        """
        prefix, weights = tuple(prefix_P.tolist()), list(_tensors(model))
        self._entries = [entry for entry in self._entries if not entry.is_stale(model, weights)]
        for place, entry in enumerate(self._entries):
            if entry.model() is model and entry.prefix == prefix:
                self._entries.append(self._entries.pop(place))
                return entry.states
        # Old states go before new ones come: those of a large model take gigabytes.
        self._entries = self._entries[max(0, len(self._entries) - self._max_entries + 1) :]
        states = _encode(model, prefix_P)
        marks = [_Mark(weakref.ref(x), _version(x), x.dtype) for x in weights]
        self._entries.append(_Entry(weakref.ref(model), marks, prefix, states))
        if self._max_entries == 0:
            self.release()
        return states

    def release(self) -> None:
        """Forget all states and free their memory."""
        self._entries = []


class _Mark(NamedTuple):
    """Tells whether a tensor is still the same, without a copy of it."""

    tensor: weakref.ref[Tensor]
    version: int
    dtype: torch.dtype

    def fits(self, tensor: Tensor) -> bool:
        same = self.tensor() is tensor
        return same and self.version == _version(tensor) and self.dtype == tensor.dtype


class _Entry(NamedTuple):
    model: weakref.ref[nn.Module]
    marks: list[_Mark]
    prefix: tuple[int, ...]
    states: PrefixStates

    def is_stale(self, model: nn.Module, weights: Sequence[Tensor]) -> bool:
        """Return whether the entry's model is gone, or is this one with other weights."""
        if self.model() is not model:
            return self.model() is None
        pairs = zip(self.marks, weights, strict=False)
        return len(self.marks) != len(weights) or not all(mark.fits(x) for mark, x in pairs)


class PrefixStates(Cache):
    """States of all layers after a prefix."""

    def __init__(self, layers: list[DynamicLayer]) -> None:
        shared, dtypes = [], []
        for layer in layers:
            assert layer.keys is not None
            assert layer.values is not None
            shared.append(_SharedLayer(layer.keys, layer.values))
            dtypes.append(layer.keys.dtype)
        super().__init__(layers=list(shared))
        self.dtype: torch.dtype = dtypes[0]
        """Of the keys, and so of the attention mask."""


class _SharedLayer(DynamicLayer):
    """States of one layer that are joined with those of a batch and stay as they are.

    The plain layer would keep the joined copy of every layer until the pass ends.
    """

    def __init__(self, keys_BKPC: Tensor, values_BKPC: Tensor) -> None:
        super().__init__()
        self.lazy_initialization(keys_BKPC, values_BKPC)
        self.keys, self.values = keys_BKPC, values_BKPC

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        assert self.keys is not None
        assert self.values is not None
        return _join(self.keys, key_states), _join(self.values, value_states)


def _join(prefix_BKPC: Tensor, row_BKTC: Tensor) -> Tensor:
    return torch.cat([prefix_BKPC.expand(len(row_BKTC), -1, -1, -1), row_BKTC], dim=2)


@torch.no_grad()
def _encode(model: PreTrainedModel, prefix_P: Tensor) -> PrefixStates:
    # Without a config every layer keeps all positions, sliding-window layers too.
    cache = DynamicCache()
    decoder = cast(nn.Module, model.model)
    decoder(
        input_ids=prefix_P.to(model.device)[None], use_cache=True, **cache_argument(decoder, cache)
    )
    return PrefixStates(cast(list[DynamicLayer], cache.layers))


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    """Yield parameters, buffers, and tensors that modules keep in other attributes and dicts."""
    for module in model.modules():
        for value in vars(module).values():
            items = value.values() if isinstance(value, dict) else (value,)
            yield from (item for item in items if isinstance(item, Tensor))


def _version(tensor: Tensor) -> int:
    # Tensors made in inference mode carry no version; they cannot be trained either.
    return -1 if tensor.is_inference() else tensor._version
