"""Merge plans: which adjacent source layers become one, and which of them is the anchor.

A plan is data: it is written to plan.json, and a person can write or edit one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeGuard

from torch import Tensor

PlanMethod = Literal["block", "tail"]

SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class Group:
    """Adjacent source layers that become one merged layer."""

    members: tuple[int, ...]
    """Source layer indices from 0, rising by one."""
    anchor: int
    """The member that the others are aligned to and whose norms are kept."""

    def __post_init__(self) -> None:
        rising = all(b == a + 1 for a, b in zip(self.members, self.members[1:], strict=False))
        if len(self.members) < 2 or not rising:
            raise ValueError(
                f"a group must hold at least two adjacent layers in rising order, got "
                f"{list(self.members)}. Write it like [13, 14, 15]."
            )
        if self.anchor not in self.members:
            raise ValueError(
                f"a group's anchor must be one of its members {list(self.members)}, "
                f"got {self.anchor}."
            )

    @property
    def start(self) -> int:
        """First source layer of the group."""
        return self.members[0]

    @property
    def stop(self) -> int:
        """First source layer after the group."""
        return self.members[-1] + 1

    @property
    def anchor_position(self) -> int:
        """Position of the anchor among the members."""
        return self.members.index(self.anchor)


@dataclass(frozen=True, kw_only=True)
class MergePlan:
    """Which layers of a source with `num_layers` layers become one."""

    num_layers: int
    """Layers of the source."""
    groups: tuple[Group, ...]
    """Disjoint groups in rising order; layers in none of them stay as they are."""
    method: str = "file"
    """How the plan was made."""
    source: str = ""
    """Fingerprint of the source's weights; empty in a plan that fits any."""
    calibration: str = ""
    """Fingerprint of the questions that the plan was made on."""

    def __post_init__(self) -> None:
        for group in self.groups:
            if group.start < 0 or group.stop > self.num_layers:
                raise ValueError(
                    f"plan layers must lie in 0 to {self.num_layers - 1}, got "
                    f"{list(group.members)}. Is the plan for another model?"
                )
        for below, above in zip(self.groups, self.groups[1:], strict=False):
            if above.start < below.stop:
                raise ValueError(
                    f"plan groups must be disjoint and in rising order, got "
                    f"{list(below.members)} and {list(above.members)}."
                )

    @property
    def num_removed(self) -> int:
        """Layers that the merged model has less."""
        return sum(len(group.members) - 1 for group in self.groups)

    def origins(self) -> list[int]:
        """Return, for each merged layer, the source layer it stands for (a group's anchor)."""
        anchors = {i: group.anchor for group in self.groups for i in group.members}
        return sorted({anchors.get(i, i) for i in range(self.num_layers)})

    def position(self, group: Group) -> int:
        """Return the index of a group's layer in the merged model."""
        return self.origins().index(group.anchor)


def check_num_removed(num_removed: int, num_layers: int) -> None:
    """Raise ValueError when a model of `num_layers` layers cannot lose `num_removed`."""
    if not 0 <= num_removed < num_layers:
        raise ValueError(
            f"`num_removed` must be between 0 and {num_layers - 1} (the model has {num_layers} "
            f"layers), got {num_removed}. Lower it, or load a deeper model."
        )


def layers_of_budget(budget: str, num_layers: int) -> int:
    """Return the number of layers that a share such as `20%` of them is, rounded.

    Raises:
        ValueError: When the budget is not a percentage below 100.
    """
    share = budget.strip().removesuffix("%")
    try:
        percent = float(share) if budget.strip().endswith("%") else math.nan
    except ValueError:
        percent = math.nan
    if not 0 <= percent < 100:
        raise ValueError(
            f"`budget` must be a percentage of the layers such as 20%, got {budget!r}. For a "
            "number of layers use `num_removed`."
        )
    return round(percent / 100 * num_layers)


def block_groups(similarity_LL: Tensor, num_removed: int) -> tuple[Group, ...]:
    """Return the block whose first and last output are most similar (arXiv:2403.17887, sec. 3.2).

    Layers a + 1 to a + n go, and layer a stands for them: the group is a to a + n, anchored at a.
    The last layer is left alone, as in the paper's appendix, unless nothing else remains.
    """
    num_layers = len(similarity_LL)
    starts = range(max(num_layers - num_removed - 1, 1))
    best = max(starts, key=lambda a: float(similarity_LL[a, a + num_removed]))
    return (Group(members=tuple(range(best, best + num_removed + 1)), anchor=best),)


def tail_groups(similarity_LL: Tensor, num_removed: int) -> tuple[Group, ...]:
    """Return MKA's released schedule: merge the last two layers, n times (arXiv:2406.16330)."""
    start = len(similarity_LL) - num_removed - 1
    return (Group(members=tuple(range(start, len(similarity_LL))), anchor=start),)


PLAN_METHODS: dict[PlanMethod, Callable[[Tensor, int], tuple[Group, ...]]] = {
    "block": block_groups,
    "tail": tail_groups,
}


def make_plan(
    similarity_LL: Tensor,
    num_removed: int,
    method: PlanMethod,
    *,
    source: str = "",
    calibration: str = "",
) -> MergePlan:
    """Return the plan that removes `num_removed` layers by a method.

    Args:
        similarity_LL: Similarity of the layers' outputs; larger is more alike.
        num_removed: Layers to remove; 0 gives a plan that merges nothing.
        method: A row of `PLAN_METHODS`.
        source: Fingerprint of the source.
        calibration: Fingerprint of the calibration questions.
    """
    num_layers = len(similarity_LL)
    check_num_removed(num_removed, num_layers)
    groups = PLAN_METHODS[method](similarity_LL, num_removed) if num_removed else ()
    return MergePlan(
        num_layers=num_layers, groups=groups, method=method, source=source, calibration=calibration
    )


def plan_to_dict(plan: MergePlan) -> dict[str, Any]:
    """Return the plan as plain lists and dicts."""
    return {
        "num_layers": plan.num_layers,
        "groups": [{"members": list(g.members), "anchor": g.anchor} for g in plan.groups],
        "method": plan.method,
        "source": plan.source,
        "calibration": plan.calibration,
    }


def plan_from_dict(data: Any) -> MergePlan:
    """Return a plan from the content of a plan.json; `anchor` defaults to the first member.

    Raises:
        ValueError: One line that says which rule the content breaks.
    """
    if not isinstance(data, dict):
        raise ValueError(f"a plan must be a JSON object, got {type(data).__name__}.")
    unknown = set(data) - set(MergePlan.__dataclass_fields__) - {"schema", "provenance"}
    if unknown:
        raise ValueError(
            f"a plan has no key {min(unknown)!r}. Use {', '.join(MergePlan.__dataclass_fields__)}."
        )
    groups, num_layers = data.get("groups"), data.get("num_layers")
    if not isinstance(groups, list) or not _is_int(num_layers) or num_layers < 1:
        raise ValueError(
            "a plan needs `num_layers` (a whole number above 0) and `groups` (a list)."
        )
    texts = {key: data[key] for key in ("method", "source", "calibration") if key in data}
    if not all(isinstance(value, str) for value in texts.values()):
        raise ValueError("`method`, `source` and `calibration` of a plan must be strings.")
    return MergePlan(num_layers=num_layers, groups=tuple(map(_group, groups)), **texts)


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _group(data: Any) -> Group:
    known = isinstance(data, dict) and data.keys() <= {"members", "anchor"}
    members = data.get("members") if known else None
    if not isinstance(members, list) or not members or not all(map(_is_int, members)):
        raise ValueError(
            f'a plan group must look like {{"members": [13, 14], "anchor": 13}}, got '
            f"{json.dumps(data)[:80]}."
        )
    anchor = data.get("anchor", members[0])
    if not _is_int(anchor):
        raise ValueError(f"a group's anchor must be a layer index, got {anchor!r}.")
    return Group(members=tuple(members), anchor=anchor)


def check_plan(plan: MergePlan, num_layers: int, fingerprint: str, path: Path) -> None:
    """Raise ValueError when a plan from a file does not fit the source.

    Args:
        plan: The plan.
        num_layers: Layers of the source.
        fingerprint: Fingerprint of the source; empty while its weights are not loaded.
        path: Where the plan was read.
    """
    if plan.num_layers != num_layers:
        raise ValueError(
            f"plan {path} is for a model of {plan.num_layers} layers, but the source has "
            f"{num_layers}. Make a plan for this model."
        )
    if plan.source and fingerprint and plan.source != fingerprint:
        raise ValueError(
            f"plan {path} was made for a source with fingerprint {plan.source}, but this one has "
            f"{fingerprint}. Make a new plan, or empty its `source` to use it all the same."
        )
