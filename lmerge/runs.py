"""The artefacts of a run folder that rebuild its merged model: plan, orders, alphas, refits."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lmerge.align import Orders
from lmerge.alphas import Alphas
from lmerge.files import provenance, read_json, read_tensors, write_json, write_tensors
from lmerge.llama import ALPHA_AXIS
from lmerge.plan import SCHEMA as PLAN_SCHEMA
from lmerge.plan import MergePlan, plan_from_dict, plan_to_dict

ALPHAS_SCHEMA = 1

Refits = list[dict[str, Tensor]]
"""For each group, the matrices that a repair put in the place of the merged ones."""


@dataclass(kw_only=True)
class RunState:
    """What turns the source into the merged model."""

    plan: MergePlan
    """Which layers become one."""
    orders: Orders = field(default_factory=dict)
    """Neuron orders by source layer."""
    alphas: list[Alphas] | None = None
    """Alphas of each group; None before they exist."""
    refits: Refits | None = None
    """Refitted matrices of each group; None without a repair."""


def write_plan(run_dir: Path, plan: MergePlan) -> None:
    """Write plan.json."""
    data = {**plan_to_dict(plan), "provenance": provenance()}
    write_json(run_dir / "plan.json", data, schema=PLAN_SCHEMA)


def read_plan(path: Path) -> MergePlan:
    """Read a plan.json, made by a run or written by a person.

    Raises:
        ValueError: One line that names the file and the rule it breaks.
    """
    data = read_json(path, schema=PLAN_SCHEMA)
    try:
        return plan_from_dict(data)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def write_orders(run_dir: Path, orders: Orders) -> None:
    """Write orders.safetensors: for each source layer, the order of its neurons (int32)."""
    tensors = {str(layer): order_F.int() for layer, order_F in orders.items()}
    write_tensors(run_dir / "orders.safetensors", tensors, {"schema": "1"})


def read_orders(path: Path) -> Orders:
    """Read orders.safetensors."""
    return {int(layer): order_F.long() for layer, order_F in read_tensors(path)[0].items()}


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
    write_json(run_dir / "alphas.json", data, schema=ALPHAS_SCHEMA)


def read_alphas(path: Path, plan: MergePlan) -> list[Alphas]:
    """Read alphas.json for a plan.

    Raises:
        ValueError: One line when the file is malformed or for another plan.
    """
    groups = read_json(path, schema=ALPHAS_SCHEMA).get("groups")
    if not isinstance(groups, list) or len(groups) != len(plan.groups):
        raise ValueError(
            f"{path} must hold one entry for each of the plan's {len(plan.groups)} groups. "
            "Use the alphas.json of the same run."
        )
    return [
        _group_alphas(path, data, list(group.members))
        for data, group in zip(groups, plan.groups, strict=True)
    ]


def _group_alphas(path: Path, data: Any, members: list[int]) -> Alphas:
    if not isinstance(data, dict) or data.get("members") != members:
        raise ValueError(
            f"{path} must hold alphas for the layers {members} of the plan. "
            "Use the alphas.json of the same run."
        )
    alphas = {}
    for name, values in dict(data.get("alphas") or {}).items():
        try:
            alphas[name] = torch.tensor(values, dtype=torch.float32)
        except (TypeError, ValueError, RuntimeError):
            raise ValueError(f"{path}: alphas of {name!r} must be a list of numbers.") from None
        if alphas[name].ndim not in (1, 2) or len(alphas[name]) != len(members):
            raise ValueError(
                f"{path}: alphas of {name!r} must have one row for each of the "
                f"{len(members)} members, got shape {list(alphas[name].shape)}."
            )
    if set(alphas) not in ({"layer"}, set(ALPHA_AXIS)):
        raise ValueError(
            f"{path}: a group needs alphas for `layer`, or for each of {', '.join(ALPHA_AXIS)}."
        )
    return alphas


def alphas_fingerprint(alphas: list[Alphas]) -> str:
    """Return 16 hex digits that tell one set of alphas from another."""
    digest = hashlib.sha256()
    for group in alphas:
        for name, alpha in sorted(group.items()):
            digest.update(name.encode() + alpha.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def write_refits(run_dir: Path, refits: Refits, alphas: list[Alphas]) -> None:
    """Write repair.safetensors, which belongs to these alphas alone."""
    tensors = {f"{i}.{name}": w for i, group in enumerate(refits) for name, w in group.items()}
    metadata = {"schema": "1", "alphas": alphas_fingerprint(alphas), "groups": str(len(refits))}
    write_tensors(run_dir / "repair.safetensors", tensors, metadata)


def read_refits(path: Path, alphas: list[Alphas]) -> Refits | None:
    """Read repair.safetensors; None when it belongs to other alphas."""
    tensors, metadata = read_tensors(path)
    if metadata.get("alphas") != alphas_fingerprint(alphas):
        return None
    refits: Refits = [{} for _ in range(int(metadata["groups"]))]
    for key, weight in tensors.items():
        group, name = key.split(".", 1)
        refits[int(group)][name] = weight
    return refits


def read_run(run_dir: Path) -> RunState:
    """Read the merged model of a run folder.

    Raises:
        ValueError: When the folder holds no plan.json.
    """
    if not (run_dir / "plan.json").is_file():
        raise ValueError(
            f"run folder {run_dir} holds no plan.json. Run `lmerge fit` first, or give the "
            "`--run_dir` of a finished run."
        )
    state = RunState(plan=read_plan(run_dir / "plan.json"))
    if (run_dir / "orders.safetensors").is_file():
        state.orders = read_orders(run_dir / "orders.safetensors")
    if (run_dir / "alphas.json").is_file():
        state.alphas = read_alphas(run_dir / "alphas.json", state.plan)
        if (run_dir / "repair.safetensors").is_file():
            state.refits = read_refits(run_dir / "repair.safetensors", state.alphas)
    return state
