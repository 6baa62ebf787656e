"""Artefacts on disk: JSON that people can read, safetensors, whole folders.

A reader never sees half of one: everything is written beside its target under a temporary name
(`.NAME.TOKEN.tmp`), flushed to the disk and renamed into place. Nothing here pickles.
"""

from __future__ import annotations

import json
import math
import os
import platform
import secrets
import subprocess
import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lmerge import __version__

LINE_WIDTH = 100
"""A short value stays on one line up to this width; a list of numbers always does."""


def write_json(path: Path, data: Mapping[str, Any], *, schema: int) -> None:
    """Write a small artefact, its `schema` number first, the other keys in their order.

    Floats read back bit for bit. A ValueError names a number that is not finite.
    """
    assert "schema" not in data, "the schema number is an argument, not a key"
    _check_values(path, data, "")
    write_text(path, _pretty({"schema": schema, **data}, "") + "\n")


def read_json(path: Path, *, schema: int) -> dict[str, Any]:
    """Read what `write_json` wrote, perhaps edited by a person; the `schema` key is left out.

    Raises:
        ValueError: If the file is missing, malformed, or has another schema number.
    """
    try:
        # An editor may have added a byte order mark, hence -sig.
        text = path.read_text(encoding="utf-8-sig")
        data = json.loads(text, object_pairs_hook=_distinct, parse_constant=_refuse_constant)
    except OSError as error:
        raise ValueError(_unreadable(path, error)) from error
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} must be valid JSON, got: {error}. Correct it, or make the file again."
        ) from error
    if not isinstance(data, dict):
        raise ValueError(
            f"{path} must hold a JSON object, got {type(data).__name__}. Make the file again."
        )
    found = data.pop("schema", None)
    if found != schema:
        short = textwrap.shorten(repr(found), 80, placeholder=" ...")
        raise ValueError(
            f"{path} must have `schema` {schema}, got {short}. It was written by another version "
            "of lmerge, or is another kind of file; make it again."
        )
    return data


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file; its folder is made where missing."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write named tensors and their metadata as one safetensors file.

    Args:
        path: The file, usually `*.safetensors`.
        tensors: Any device and layout; tensors that share memory are stored separately.
        metadata: Strings only, as the format has it.
    """
    with replacing(path) as temporary:
        mode = temporary.stat().st_mode
        # Copies, since safetensors refuses tensors that share memory.
        copies = {
            name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
            for name, tensor in tensors.items()
        }
        save_file(copies, temporary, metadata=dict(metadata))
        temporary.chmod(mode)  # safetensors makes its files private


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors (on the CPU) and the metadata of a safetensors file.

    Raises:
        ValueError: If the file is missing, or not a whole safetensors file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except OSError as error:
        raise ValueError(_unreadable(path, error)) from error
    except SafetensorError as error:
        raise ValueError(
            f"{path} must be a whole safetensors file, got: {one_line(error)}. Make it again."
        ) from error


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what goes wrong while `path` is written into one line."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{path} must be writable, got: {one_line(error)}. Choose a path in a folder that you "
            "can write to and that has room."
        ) from error


def provenance() -> dict[str, Any]:
    """Return what made an artefact: versions, the git commit of the working folder, the time.

    Nothing in it names a machine, a user or a path.
    """
    status = _git("--no-optional-locks", "status", "--porcelain", "--untracked-files=no")
    return {
        "lmerge": __version__,
        "git_commit": _git("rev-parse", "HEAD"),
        "git_changed": None if status is None else bool(status),
        **{package: version(package) for package in ("torch", "transformers", "lightning")},
        "python": platform.python_version(),
        "time_utc": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def one_line(error: BaseException) -> str:
    """Return an error's text, with its type where that alone says little, as one short line."""
    text = (isinstance(error, OSError) and error.strerror) or str(error)
    text = " ".join(text.split()).rstrip(".:")
    if not text or isinstance(error, KeyError):
        text = f"{type(error).__name__} {text}".strip()
    return textwrap.shorten(text, 200, placeholder=" ...")


def _check_values(path: Path, value: object, where: str) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(
            f"{path} can hold finite numbers only, got {where} = {value}. Store None for a number "
            "that does not exist."
        )
    if isinstance(value, Mapping):
        for key, item in value.items():
            assert isinstance(key, str), f"JSON turns the key {key!r} of {where} into a string"
            _check_values(path, item, f"{where}.{key}" if where else key)
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            _check_values(path, item, f"{where}[{i}]")


def _pretty(value: object, indent: str) -> str:
    flat = json.dumps(value, ensure_ascii=False)
    if not isinstance(value, dict | list | tuple) or not value or _is_numbers(value):
        return flat
    if indent and len(indent) + len(flat) <= LINE_WIDTH:
        return flat
    inner = indent + "  "
    if isinstance(value, dict):
        items = [
            f"{json.dumps(k, ensure_ascii=False)}: {_pretty(v, inner)}" for k, v in value.items()
        ]
    else:
        items = [_pretty(item, inner) for item in value]
    return f"{flat[0]}\n{inner}" + f",\n{inner}".join(items) + f"\n{indent}{flat[-1]}"


def _is_numbers(value: object) -> bool:
    return isinstance(value, list | tuple) and all(
        isinstance(item, int | float | None) for item in value
    )


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    counts = Counter(name for name, _ in pairs)
    twice = [name for name, count in counts.items() if count > 1]
    if twice:
        raise ValueError(f"the key {twice[0]!r} appears twice in one object")
    return dict(pairs)


def _refuse_constant(name: str) -> float:
    raise ValueError(f"numbers must be finite, got {name}")


def _unreadable(path: Path, error: OSError) -> str:
    return (
        f"{path} must be a readable file, got: {one_line(error)}. Check the path, or run the stage "
        "that writes it."
    )


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield an empty temporary file that replaces `path` when the block ends without an error.

    Raises:
        ValueError: One line where `path` cannot be written.
    """
    temporary = sibling(path, "tmp")
    with writing(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.touch(exist_ok=False)
            yield temporary
            sync(temporary)
            os.replace(temporary, path)
        finally:
            if temporary.exists():
                temporary.unlink()


def sibling(path: Path, kind: str) -> Path:
    """Return a path beside `path` that nobody else uses."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.{kind}")


def sync(file_path: Path) -> None:
    """Wait until a file is on the disk."""
    with file_path.open("rb+") as file:
        os.fsync(file.fileno())


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
