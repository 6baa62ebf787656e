"""Progress bars of the stages that Lightning does not draw."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm.auto import tqdm

from lmerge.verbosity import verbosity

Item = TypeVar("Item")


def track(items: Iterable[Item], description: str, *, total: int | None = None) -> Iterator[Item]:
    """Iterate with a bar and an ETA on rank 0; it appears after one second.

    With `-q` there is none.
    """
    silent = _rank() not in (0, None) or verbosity() == "quiet"
    bar = tqdm(items, desc=description, total=total, delay=1, disable=silent, dynamic_ncols=True)
    yield from bar


def _rank() -> int | None:
    # Where Lightning was not imported there is one process, and importing it takes seconds.
    lightning = sys.modules.get("lightning.fabric.utilities.rank_zero")
    return getattr(getattr(lightning, "rank_zero_only", None), "rank", None)
