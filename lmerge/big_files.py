"""Files larger than memory, read and written from front to back.

What was flushed or is no longer needed leaves the page cache: a copy of a large checkpoint would
push out all else, and on many machines a new page of it costs more than the disk.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

from lmerge.units import size

PIECE = 4 * 2**20
"""Bytes read or written at once."""

FLUSH = 64 * 2**20
"""Bytes that go to the disk together, while the next ones are made."""


class BigFile:
    """A new file that goes to the disk while it grows.

    Leaving the block waits until all of it is there.

    Args:
        path: Where it goes; nothing is there yet.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("xb", buffering=0)
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._flushing: Future[None] | None = None
        self._size = self._flushed = 0

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes.

        Raises:
            OSError: Also for earlier ones that did not reach the disk.
        """
        view = memoryview(data).cast("B")
        while len(view):
            written = self._file.write(view[:PIECE])
            view, self._size = view[written:], self._size + written
            if self._size - self._flushed >= FLUSH:
                self._flush()

    def __enter__(self) -> BigFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._flush()
                self._wait()
        finally:
            self._pool.shutdown()
            self._file.close()

    def _flush(self) -> None:
        self._wait()
        start, self._flushed = self._flushed, self._size
        self._flushing = self._pool.submit(_to_disk, self._file.fileno(), start, self._size)

    def _wait(self) -> None:
        if self._flushing is not None:
            self._flushing.result()  # raises what went wrong


def _to_disk(descriptor: int, start: int, stop: int) -> None:
    getattr(os, "fdatasync", os.fsync)(descriptor)
    _drop(descriptor, start, stop - start)


def pieces(path: Path, start: int, count: int) -> Iterator[memoryview]:
    """Yield a part of a file; each piece is good until the next one.

    Raises:
        ValueError: When the file ends too early.
    """
    buffer = memoryview(bytearray(min(PIECE, count)))
    with path.open("rb") as file:  # buffered, since that fills a piece
        file.seek(start)
        while count:
            done = file.readinto(buffer[: min(PIECE, count)])
            if not done:
                raise ValueError(f"{path} became shorter while it was read. Try again.")
            yield buffer[:done]
            count -= done


def forget(path: Path, start: int, count: int) -> None:
    """Drop a part of a file from the page cache; parts that others have mapped stay."""
    with path.open("rb") as file:
        _drop(file.fileno(), start, count)


def _drop(descriptor: int, start: int, count: int) -> None:
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, start, count, os.POSIX_FADV_DONTNEED)


def check_room(path: Path, num_bytes: int) -> None:
    """Raise ValueError when the disk of `path` has no room for so many bytes."""
    parent = next(p for p in (path, *path.parents) if p.exists())
    free = shutil.disk_usage(parent).free
    if free < num_bytes:
        raise ValueError(
            f"{path} needs {size(num_bytes)}, but its disk has {size(free)} free. "
            "Make room, or choose a path on another disk."
        )
