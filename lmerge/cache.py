"""States of the source on the calibration blocks, computed once.

Nothing below the first merged layer depends on the alphas, and nothing of the source does.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from filelock import FileLock
from torch import Tensor
from transformers import PreTrainedModel

from lmerge.llama import embed, num_layers, run_span, span
from lmerge.progress import track
from lmerge.source import model_fingerprint

GIB = 2**30


class StateCache(NamedTuple):
    """States of the source on the calibration blocks, on the CPU, in the source's dtype."""

    prefix_BTD: Tensor
    """Input of the first merged layer."""
    final_BTD: Tensor
    """Output of the final norm: what the head turns into next-token logits."""

    def room(self, dtype: torch.dtype) -> Tensor:
        """Return an empty tensor of the states' shape, in memory or on disk as they are."""
        mapped_from = self.final_BTD.untyped_storage().filename
        if mapped_from is None:
            return torch.empty(self.final_BTD.shape, dtype=dtype)
        with tempfile.NamedTemporaryFile(dir=Path(mapped_from).parent) as file:
            return _mapped(Path(file.name), tuple(self.final_BTD.shape), dtype)  # outlives its name


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
    parts = _states(source, token_BT, first_merged, batch_size)
    prefixes, finals = zip(*((prefix.cpu(), final.cpu()) for prefix, final in parts), strict=True)
    return StateCache(torch.cat(prefixes), torch.cat(finals))


def _states(
    source: PreTrainedModel, token_BT: Tensor, first_merged: int, batch_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield both states (B, T, D) of one batch of blocks after another, on the source's device."""
    below = span(source, 0, first_merged)
    above = span(source, first_merged, num_layers(source), final_norm=True)
    batches = token_BT.split(batch_size)
    for part_BT in track(batches, "calibration states", total=len(batches)):
        prefix_BTD = run_span(below, embed(source, part_BT.to(source.device)))
        yield prefix_BTD, run_span(above, prefix_BTD)


def keep_states(
    source: PreTrainedModel, token_BT: Tensor, first_merged: int, *, folder: Path, memory: float
) -> StateCache:
    """Return the states of `cache_states`, in memory or mapped from files of raw numbers.

    Files of the same source, blocks and first merged layer are used again; one process computes
    while the others wait.

    Args:
        source: The source model.
        token_BT: Calibration blocks, unpadded.
        first_merged: Index of the first merged layer.
        folder: Where the files go.
        memory: States larger than this many GiB are mapped from disk.
    """
    shape = (*token_BT.shape, int(source.config.hidden_size))
    size = 2 * token_BT.numel() * shape[-1] * source.dtype.itemsize
    if size <= memory * GIB:
        return cache_states(source, token_BT, first_merged)
    digest = hashlib.sha256(token_BT.cpu().numpy().tobytes())
    digest.update(f"{model_fingerprint(source)} {source.dtype} {first_merged} {shape}".encode())
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{digest.hexdigest()[:16]}.{name}" for name in StateCache._fields]
    with FileLock(paths[0].with_suffix(".lock")):
        if not all(path.is_file() for path in paths):
            _write_states(source, token_BT, first_merged, paths, shape)
    return StateCache(*(_mapped(path, shape, source.dtype) for path in paths))


@torch.no_grad()
def _write_states(
    source: PreTrainedModel,
    token_BT: Tensor,
    first_merged: int,
    paths: list[Path],
    shape: tuple[int, ...],
) -> None:
    """Write the states batch by batch, so that no more than a batch is in memory.

    A process that was killed over it left its batches, and a file of one byte for each.
    """
    partial = [path.with_name(path.name + ".partial") for path in paths]
    done_path = paths[0].with_suffix(".done")
    done = done_path.stat().st_size if all(p.is_file() for p in (*partial, done_path)) else 0
    mapped = [_mapped(path, shape, source.dtype) for path in partial]
    size = 4
    with done_path.open("ab" if done else "wb", buffering=0) as counter:
        left_BT = token_BT[size * done :]
        for i, states in enumerate(_states(source, left_BT, first_merged, size), start=done):
            for file, state_BTD in zip(mapped, states, strict=True):
                file[size * i : size * (i + 1)].copy_(state_BTD)
            counter.write(b".")
    done_path.unlink()
    for path, wanted in zip(partial, paths, strict=True):
        path.rename(wanted)  # a file of this name is whole


def _mapped(path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    flat = torch.from_file(str(path), shared=True, size=torch.Size(shape).numel(), dtype=dtype)
    return flat.view(shape)
