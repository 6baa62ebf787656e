"""Alphas from a file: alphas.json of a run, or a published list of merges of two layers."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lmerge.alphas import Alphas, PairMerge, replay_shares
from lmerge.files import one_line, provenance, read_json, write_json
from lmerge.llama import MATRICES
from lmerge.plan import Group, MergePlan, plan_from_dict

SCHEMA = 1

KEYS = ("layer_to_merge_into", "layer_to_remove", "ratio_i_alpha")
"""Of one merge in a published list: W_into = alpha W_into + (1 - alpha) W_removed."""


def write_alphas(run_dir: Path, plan: MergePlan, alphas: list[Alphas]) -> None:
    """Write alphas.json: the alphas of each group, readable and exact."""
    groups = [
        {
            "members": list(group.members),
            "anchor": group.anchor,
            "alphas": {name: alpha.tolist() for name, alpha in group_alphas.items()},
        }
        for group, group_alphas in zip(plan.groups, alphas, strict=True)
    ]
    data = {"groups": groups, "provenance": provenance()}
    write_json(run_dir / "alphas.json", data, schema=SCHEMA)


def read_alphas(path: Path, plan: MergePlan) -> list[Alphas]:
    """Read alphas.json for a plan.

    Raises:
        ValueError: One line when the file is malformed or for another plan.
    """
    groups = read_alpha_groups(path)
    if len(groups) != len(plan.groups):
        raise ValueError(
            f"{path} must hold one entry for each of the plan's {len(plan.groups)} groups. "
            "Use the alphas.json of the same run."
        )
    return [
        _group_alphas(path, data, group) for data, group in zip(groups, plan.groups, strict=True)
    ]


def read_alpha_groups(path: Path) -> list[Any]:
    """Return the entries of alphas.json, one a group, as they are.

    Raises:
        ValueError: When there is no list of them.
    """
    groups = read_json(path, schema=SCHEMA).get("groups")
    if not isinstance(groups, list):
        raise ValueError(
            f"{path} must hold a list `groups`, one entry for each group of the plan. Use the "
            "alphas.json of a run."
        )
    return groups


def _group_alphas(path: Path, data: Any, group: Group) -> Alphas:
    wanted = {"members": list(group.members), "anchor": group.anchor}
    if not isinstance(data, dict) or {key: data.get(key) for key in wanted} != wanted:
        raise ValueError(
            f"{path} must hold alphas for the layers {wanted['members']} with the anchor "
            f"{group.anchor}, as in the plan. Use the alphas.json of the same run."
        )
    try:
        return check_alphas(data.get("alphas"), len(group.members))
    except ValueError as error:
        raise ValueError(f"{path}: {error} Use the alphas.json of the same run.") from None


def check_alphas(alphas: Any, num_members: int) -> Alphas:
    """Return the alphas of a group from what a file holds, lists or tensors, as float32.

    Raises:
        ValueError: When they are none.
    """
    if not isinstance(alphas, dict) or set(alphas) not in ({"layer"}, set(MATRICES)):
        raise ValueError(f"a group needs alphas for `layer`, or for each of {', '.join(MATRICES)}.")
    return {name: _alpha(name, values, num_members) for name, values in alphas.items()}


def _alpha(name: str, values: Any, num_members: int) -> Tensor:
    try:
        alpha = torch.as_tensor(values, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        alpha = torch.tensor(torch.nan)
    if alpha.ndim not in (1, 2) or len(alpha) != num_members or not alpha.isfinite().all():
        raise ValueError(
            f"alphas of `{name}` must be finite numbers, one row for each of the {num_members} "
            "members."
        )
    return alpha


def alphas_fingerprint(alphas: list[Alphas]) -> str:
    """Return 16 hex digits that tell one set of alphas from another."""
    digest = hashlib.sha256()
    for group in alphas:
        for name, alpha in sorted(group.items()):
            digest.update(name.encode() + alpha.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def load_alphas(path: Path, plan: MergePlan) -> list[Alphas]:
    """Return the alphas of each of the plan's groups from either kind of file.

    Raises:
        ValueError: One line when the file is malformed or does not fit the plan.
    """
    merges = _merges(path)
    if merges is None:
        return read_alphas(path, plan)
    known = {layer for group in plan.groups for layer in group.members}
    used = _layers(merges)
    if used != known:
        raise ValueError(
            f"{path} must merge the layers of the plan, {sorted(known)}, got {sorted(used)}. "
            "Use the plan that the alphas were made for."
        )
    return [{"layer": _shares(path, merges, group)} for group in plan.groups]


def plan_of_alphas(path: Path, num_layers: int) -> MergePlan:
    """Return the plan that alphas in either kind of file were made for.

    A published list of merges turns all its layers into one, the last that is merged into.

    Raises:
        ValueError: One line when the file is malformed or does not fit the number of layers.
    """
    merges = _merges(path)
    if merges is None:
        groups = [_places(entry) for entry in read_alpha_groups(path)]
    elif not merges:
        raise ValueError(f"{path} must list at least one merge. Use another file.")
    else:
        groups = [{"members": sorted(_layers(merges)), "anchor": merges[-1].into}]
    try:
        return plan_from_dict({"num_layers": num_layers, "groups": groups})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _places(entry: Any) -> Any:
    """Leave the alphas out of an entry of alphas.json; what is malformed is refused later."""
    return {k: v for k, v in entry.items() if k != "alphas"} if isinstance(entry, dict) else entry


def _merges(path: Path) -> list[PairMerge] | None:
    """Return the merges of a published list; None for another JSON file."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(
            f"`alpha.path` must be a JSON file of alphas, got {path}: {one_line(error)}. Give "
            "alphas.json of a run, or a published list of merges."
        ) from error
    return [_merge(path, entry) for entry in data] if isinstance(data, list) else None


def _layers(merges: list[PairMerge]) -> set[int]:
    return {layer for merge in merges for layer in (merge.into, merge.removed)}


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
