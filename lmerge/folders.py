"""Whole folders that appear, or are replaced, in one step."""

from __future__ import annotations

import ctypes
import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lmerge.files import sibling, sync, writing

AT_FDCWD, RENAME_EXCHANGE = -100, 2
"""Constants of Linux: paths are relative to the working folder; swap two paths."""

MIN_AGE = 60.0
"""Seconds after which a temporary folder that nobody holds counts as left behind."""


@contextmanager
def atomic_folder(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty folder that becomes `path` when the block ends without an error.

    An error removes it and leaves `path` as it was. With `overwrite` old and new folder are swapped
    in one step, so that a process killed at any moment leaves one of them whole; what it leaves
    under a temporary name is removed by the next one. On systems that cannot swap, the old folder
    is moved aside first, as `.NAME.TOKEN.old`.

    Raises:
        ValueError: If `path` exists and may not be replaced, or cannot be written.
    """
    target = path.expanduser().resolve()
    _check_replaceable(path, target, overwrite=overwrite)
    temporary = sibling(target, "tmp")
    try:
        with writing(path):
            target.parent.mkdir(parents=True, exist_ok=True)
            remove_left(target)
            temporary.mkdir()
        with held(temporary):
            yield temporary
            with writing(path):
                for file_path in filter(Path.is_file, temporary.rglob("*")):
                    sync(file_path)
                _check_replaceable(path, target, overwrite=overwrite)  # another may be faster
                _move_in(temporary, target)
                _sync_folder(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_left(target: Path) -> None:
    """Remove the temporary folders or files of processes that were killed over `target`."""
    for left in target.parent.glob(f".{target.name}.*.tmp"):
        try:
            if time.time() - left.stat().st_mtime > MIN_AGE:
                with held(left, must=True):
                    if left.is_dir():
                        shutil.rmtree(left, ignore_errors=True)
                    else:
                        left.unlink()
        except OSError:
            pass  # held by a process that is still writing, or gone by now


@contextmanager
def held(path: Path, *, must: bool = False) -> Iterator[None]:
    """Hold a lock on a folder or file, which the kernel releases however the process ends.

    Raises:
        OSError: If it `must` be had, and another process has it.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # some network disks know no locks
            if must:
                raise
        yield
    finally:
        os.close(descriptor)


def check_apart(path: Path, *kept: Path) -> None:
    """Raise ValueError when a folder or file that is to be replaced is, or holds, one of `kept`."""
    target = path.expanduser().resolve()
    for other in kept:
        found = other.expanduser().resolve()
        if target == found or target in found.parents:
            raise ValueError(
                f"{path} would be replaced, but {other} is read and lies there. Choose another "
                "path."
            )


def _check_replaceable(path: Path, target: Path, *, overwrite: bool) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise ValueError(f"{path} must be a folder or free, got a file. Choose another path.")
    if not overwrite:
        raise ValueError(f"{path} already exists. Choose another path, or allow overwriting it.")
    here = Path.cwd()
    if target == Path.home() or target == here or target in here.parents:
        raise ValueError(
            f"{path} is a folder that people work in, so it is never replaced. Choose another path."
        )


def _move_in(temporary: Path, target: Path) -> None:
    if not target.exists():
        os.rename(temporary, target)
        return
    if exchange(temporary, target):
        return  # the old folder is the temporary one now, and is removed as such
    old = sibling(target, "old")
    os.rename(target, old)
    try:
        os.rename(temporary, target)
    except OSError:
        os.rename(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step; False where the system cannot."""
    call = getattr(ctypes.CDLL(None), "renameat2", None)
    paths = os.fsencode(one), os.fsencode(other)
    return call is not None and not call(AT_FDCWD, paths[0], AT_FDCWD, paths[1], RENAME_EXCHANGE)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
