"""Safetensors checkpoints read and written one tensor at a time, in one file or in shards."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import StateDictSplit, split_state_dict_into_shards_factory
from safetensors import safe_open
from torch import Tensor

from lmerge.big_files import BigFile, forget, pieces
from lmerge.checkpoint import INDEX, SINGLE, loading, read_index
from lmerge.files import write_text
from lmerge.progress import track

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""Names of the safetensors format -> dtypes of plain weights."""

SIZE = re.compile(r"(\d+(?:\.\d+)?) ?[KkMmGgTt]?[Bb]")


class Stored(NamedTuple):
    """A tensor on disk."""

    name: str
    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    """First byte in the file."""

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> Tensor:
        """Return the tensor, memory-mapped: its pages are in memory once they are used."""
        # The file is closed at once, so that its pages do not count after they were used.
        with safe_open(self.path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(self.name)
        return tensor

    def forget(self) -> None:
        """Drop the tensor from the page cache, unless it is still in use."""
        forget(self.path, self.start, self.num_bytes)


Shape = tuple[int, ...]
Content = Stored | Tensor


def weight_files(folder: Path) -> dict[str, Path]:
    """Return the file of each weight of a checkpoint folder.

    Raises:
        ValueError: When the folder has no safetensors, or an index that `read_index` refuses.
    """
    if (folder / INDEX).is_file():
        files = {name: folder / file for name, file in read_index(str(folder), folder).items()}
    elif (folder / SINGLE).is_file():
        path = folder / SINGLE
        with loading(str(folder), "its weights"), safe_open(path, framework="pt") as file:
            files = dict.fromkeys(file.keys(), path)
    else:
        raise ValueError(
            f"`source` must be a local folder with safetensors to be streamed, got {folder}. "
            "Download the checkpoint, or run without streaming."
        )
    return files


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Return where each weight of a checkpoint folder lies.

    Raises:
        ValueError: When a file is not a whole safetensors file, lacks a weight that the index has
            there, or holds a weight of a dtype that is not plain.
    """
    files = weight_files(folder)
    by_file = {path: _read_header(folder, path) for path in sorted(set(files.values()))}
    for name, path in files.items():
        if name not in by_file[path]:
            raise ValueError(
                f"`source` must hold the weights where its index says, got {path} without {name}. "
                "Get a fresh copy of its files."
            )
    return {name: by_file[path][name] for name, path in files.items()}


def _read_header(folder: Path, path: Path) -> dict[str, Stored]:
    with loading(str(folder), path.name):
        with safe_open(path, framework="pt"):
            pass  # checks the header against the size of the file
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
        header.pop("__metadata__", None)
        strange = sorted({entry["dtype"] for entry in header.values()} - set(DTYPES))
        if strange:
            raise ValueError(f"weights must be {', '.join(DTYPES)}, got {strange[0]}")
    return {
        name: Stored(
            name,
            path,
            DTYPES[entry["dtype"]],
            tuple(entry["shape"]),
            8 + size + entry["data_offsets"][0],
        )
        for name, entry in header.items()
    }


def write_checkpoint(
    folder: Path,
    shapes: Mapping[str, Shape],
    dtype: torch.dtype,
    content: Callable[[str], Content],
    max_shard_size: str = "5GB",
) -> None:
    """Write weights to a folder, one tensor in memory at a time.

    Args:
        folder: An empty folder.
        shapes: Shape of each weight, in the order in which they are written.
        dtype: Dtype of all of them.
        content: Returns a weight in that dtype; one that lies on disk is copied there.
        max_shard_size: Above this size weights are split into several files.

    Raises:
        ValueError: When the size is not one.
    """
    sizes = {name: math.prod(shape) * dtype.itemsize for name, shape in shapes.items()}
    split = _split(sizes, max_shard_size)
    bar = iter(track(sizes, "weights", total=len(sizes)))
    for file_name, names in split.filename_to_tensors.items():
        with BigFile(folder / file_name) as file:
            file.write(_header({name: shapes[name] for name in names}, dtype))
            for name in names:
                next(bar)
                _append(file, content(name), shapes[name], dtype)
    next(bar, None)  # ends it
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_text(folder / INDEX, json.dumps(index, indent=2, sort_keys=True) + "\n")


def _split(sizes: Mapping[str, int], max_shard_size: str) -> StateDictSplit:
    number = SIZE.fullmatch(max_shard_size)
    if number is None or not float(number[1]) > 0:
        raise ValueError(
            f"`max_shard_size` must be a size above 0, got {max_shard_size!r}. Write it as 5GB or "
            "500MB."
        )
    return split_state_dict_into_shards_factory(
        dict(sizes),
        get_storage_size=lambda size: size,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )


def _header(shapes: Mapping[str, Shape], dtype: torch.dtype) -> bytes:
    """Return the head of a safetensors file: length (8 bytes, little-endian), then JSON."""
    (code,) = (name for name, known in DTYPES.items() if known == dtype)
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, shape in shapes.items():
        stop = start + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": code, "shape": list(shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the data
    return len(text).to_bytes(8, "little") + text


def _append(file: BigFile, content: Content, shape: Shape, dtype: torch.dtype) -> None:
    assert (tuple(content.shape), content.dtype) == (shape, dtype)
    if isinstance(content, Stored):
        for piece in pieces(content.path, content.start, content.num_bytes):
            file.write(piece)
    elif content.numel():
        file.write(content.detach().contiguous().flatten().view(torch.uint8).numpy().data)
