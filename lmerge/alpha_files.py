"""Alphas from a file: alphas.json of a run, or a published list of merges of two layers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from lmerge.alphas import Alphas, PairMerge, replay_shares
from lmerge.plan import Group, MergePlan
from lmerge.runs import read_alphas

KEYS = ("layer_to_merge_into", "layer_to_remove", "ratio_i_alpha")
"""Of one merge in a published list: W_into = alpha W_into + (1 - alpha) W_removed."""


def load_alphas(path: Path, plan: MergePlan) -> list[Alphas]:
    """Return the alphas of each of the plan's groups from either kind of file.

    Raises:
        ValueError: One line when the file is malformed or does not fit the plan.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"`alpha.path` must be a JSON file of alphas, got {path}: {error}. Give alphas.json of "
            "a run, or a published list of merges."
        ) from error
    if not isinstance(data, list):
        return read_alphas(path, plan)
    merges = [_merge(path, entry) for entry in data]
    known = {layer for group in plan.groups for layer in group.members}
    used = {layer for merge in merges for layer in (merge.into, merge.removed)}
    if used != known:
        raise ValueError(
            f"{path} must merge the layers of the plan, {sorted(known)}, got {sorted(used)}. "
            "Use the plan that the alphas were made for."
        )
    return [{"layer": _shares(path, merges, group)} for group in plan.groups]


def published_group(path: Path) -> Group:
    """Return the group that a published list of merges turns into one layer."""
    merges = [_merge(path, entry) for entry in json.loads(path.read_text(encoding="utf-8"))]
    layers = sorted({layer for merge in merges for layer in (merge.into, merge.removed)})
    return Group(members=tuple(layers), anchor=merges[-1].into)


def _shares(path: Path, merges: list[PairMerge], group: Group) -> Any:
    inside = [m for m in merges if m.into in group.members and m.removed in group.members]
    removed = [m.removed for m in inside]
    if sorted([*removed, group.anchor]) != list(group.members):
        raise ValueError(
            f"{path} must remove each of the layers {list(group.members)} but the anchor "
            f"{group.anchor} once, got {removed}. Use the plan that the alphas were made for."
        )
    first = group.start
    local = [PairMerge(m.into - first, m.removed - first, m.alpha) for m in inside]
    return replay_shares(local, len(group.members), group.anchor_position)


def _merge(path: Path, entry: Any) -> PairMerge:
    values: list[Any] = [entry.get(key) for key in KEYS] if isinstance(entry, dict) else [None] * 3
    layers, alpha = values[:2], values[2]
    whole = all(type(layer) is int for layer in layers)
    if not whole or type(alpha) not in (int, float) or not math.isfinite(alpha):
        raise ValueError(
            f"{path}: each merge needs the layers {KEYS[0]} and {KEYS[1]} and a finite {KEYS[2]}, "
            f"got {str(entry)[:80]}."
        )
    return PairMerge(layers[0], layers[1], float(alpha))
