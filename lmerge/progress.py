"""Progress bars of the stages that Lightning does not draw."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from lightning.fabric.utilities.rank_zero import rank_zero_only
from tqdm.auto import tqdm

from lmerge.verbosity import verbosity

Item = TypeVar("Item")


def track(items: Iterable[Item], description: str, *, total: int | None = None) -> Iterator[Item]:
    """Iterate with a bar and an ETA on rank 0; it appears after one second.

    With `-q` there is none.
    """
    other_rank = getattr(rank_zero_only, "rank", 0) not in (0, None)
    silent = other_rank or verbosity() == "quiet"
    bar = tqdm(items, desc=description, total=total, delay=1, disable=silent, dynamic_ncols=True)
    yield from bar
