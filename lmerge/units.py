"""Durations and sizes as people read them."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """Return a duration for people, such as `8 seconds`, `3 minutes` or `2.5 hours`."""
    if seconds < 90:
        return _counted(max(round(seconds), 1), "second")
    if seconds < 5400:
        return _counted(round(seconds / 60), "minute")
    return f"{seconds / 3600:.1f} hours"


def _counted(number: int, unit: str) -> str:
    return f"{number} {unit}" if number == 1 else f"{number} {unit}s"


def size(num_bytes: float) -> str:
    """Return a number of bytes for people, in units of 1024."""
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.2f} GiB"
