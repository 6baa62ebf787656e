"""The journal of an evaluation: batches that are scored stay scored when the process is killed.

One line of JSON for each batch, appended to `journal/STAGE-KEY.RANK.jsonl` in the run folder. The
key stands for all that decides a score, so a line is never used for another model or other data.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lmerge import __version__
from lmerge.data.records import ChoiceBatch, TextBatch
from lmerge.files import writing
from lmerge.merged import MergedLlama
from lmerge.source import model_fingerprint

VERSION = 1
"""Raised when scores change although model, batches and versions of packages do not."""

Rows = list[list[float]]
"""Rows of one metric; a float read back from JSON has the same bits."""


class Entry(NamedTuple):
    """What one batch added to the metrics."""

    name: str
    """The metric, such as `text/en`."""
    rows: list[Rows]
    """Rows of the source, then those of the merged model."""

    @property
    def indices(self) -> tuple[int, ...]:
        """Places of the batch's samples."""
        return tuple(int(row[0]) for row in self.rows[0])


class Journal:
    """Appends entries to the file of one process, and reads those of all processes.

    Args:
        folder: Folder of journals, made where missing.
        name: Start of the files' names, which holds the key.
        rank: Number of this process.
    """

    def __init__(self, folder: Path, name: str, rank: int = 0) -> None:
        self.folder = folder
        self.name = name
        self.path = folder / f"{name}.{rank}.jsonl"

    def read(self) -> Iterator[Entry]:
        """Yield what any process finished; a line that a kill cut off is skipped."""
        for path in sorted(self.folder.glob(f"{self.name}.*.jsonl")):
            for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
                entry = _entry(line)
                if entry is not None:
                    yield entry

    def append(self, entry: Entry) -> None:
        """Write an entry through to the operating system, so that a killed process keeps it."""
        line = json.dumps(entry._asdict(), separators=(",", ":"))
        with writing(self.path):
            self.folder.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                # The line break comes first, so that a line which was cut off ends here.
                file.write(f"\n{line}".encode())

    def remove(self) -> None:
        """Delete the files of all processes."""
        for path in self.folder.glob(f"{self.name}.*.jsonl"):
            path.unlink(missing_ok=True)
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()


def _entry(line: str) -> Entry | None:
    try:
        return Entry(**json.loads(line))
    except (ValueError, TypeError):
        return None


def evaluation_key(
    source: PreTrainedModel, merged: MergedLlama, batches: Sequence[ChoiceBatch | TextBatch]
) -> str:
    """Return 16 hex digits of all that decides the scores of an evaluation.

    That is the source (its config and a sample of its weights), the plan, every weight of the
    merged layers, every token of every batch, dtype and kind of device, and the versions of lmerge,
    torch and transformers.
    """
    versions = [VERSION, __version__, *(version(name) for name in ("torch", "transformers"))]
    groups = [(group.members, group.anchor) for group in merged.plan.groups]
    settings = [*versions, str(source.dtype), source.device.type, groups]
    digest = hashlib.sha256(f"{settings!r} {model_fingerprint(source)}".encode())
    with torch.no_grad():
        for layer in merged.merged_layers():
            _add(digest, layer.tensors())
    for batch in batches:
        _add(digest, {field.name: getattr(batch, field.name) for field in fields(batch)})
    return digest.hexdigest()[:16]


def _add(digest: Any, values: Mapping[str, object]) -> None:
    for name, value in sorted(values.items()):
        if isinstance(value, Tensor):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            flat = value.detach().cpu().contiguous().flatten()
            digest.update(flat.view(torch.uint8).numpy().tobytes())
        else:
            digest.update(f"{name} {value!r}".encode())
