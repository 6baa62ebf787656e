"""The table of baselines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from lmerge.baselines.calibration import Calibration, Shallow, keep_layers
from lmerge.baselines.dropping import (
    drop_angular,
    drop_last,
    drop_random,
    drop_shortgpt,
    drop_sleb,
)
from lmerge.baselines.merging import merge_laco, merge_laco_released, merge_mka
from lmerge.baselines.patching import (
    linear_patch,
    prune_and_compensate,
    replaceme_cosine,
    replaceme_least_squares,
)
from lmerge.plan import check_num_removed

Baseline = Literal[
    "last",
    "random",
    "shortgpt",
    "angular_block",
    "sleb",
    "mka",
    "laco",
    "laco_released",
    "replaceme",
    "replaceme_cosine",
    "linear_patch",
    "prune_comp",
]

BASELINES: dict[Baseline, Callable[[Calibration, int], Shallow]] = {
    "last": drop_last,
    "random": drop_random,
    "shortgpt": drop_shortgpt,
    "angular_block": drop_angular,
    "sleb": drop_sleb,
    "mka": merge_mka,
    "laco": merge_laco,
    "laco_released": merge_laco_released,
    "replaceme": replaceme_least_squares,
    "replaceme_cosine": replaceme_cosine,
    "linear_patch": linear_patch,
    "prune_comp": prune_and_compensate,
}
"""`last` is also what MKA's released code amounts to (`dropping.drop_last`)."""


def make_baseline(name: Baseline, data: Calibration, num_removed: int) -> Shallow:
    """Return a baseline's model with `num_removed` layers less.

    Args:
        name: A row of `BASELINES`.
        data: Source and calibration blocks.
        num_removed: Layers to remove; 0 gives the source's layers.
    """
    check_num_removed(num_removed, data.depth)
    if not num_removed:
        return keep_layers(data.source, range(data.depth))
    return BASELINES[name](data, num_removed)
