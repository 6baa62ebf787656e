"""The artefacts of a run folder that rebuild its merged model: plan, orders, alphas, refits."""

from __future__ import annotations

import hashlib
import logging
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lmerge.align import Motion, Orders
from lmerge.alphas import Alphas
from lmerge.files import one_line, provenance, read_json, read_tensors, write_json, write_tensors
from lmerge.llama import MATRICES, PATHS
from lmerge.plan import SCHEMA as PLAN_SCHEMA
from lmerge.plan import Group, MergePlan, plan_from_dict, plan_to_dict
from lmerge.symmetry import Transform, transform_from_tensors, transform_tensors

logger = logging.getLogger(__name__)

ALPHAS_SCHEMA = 1

ALIGNMENT_VERSION = 1
"""Raised when an aligner changes, so that older cached alignments are not reused."""

Refits = list[dict[str, Tensor]]
"""For each group, the matrices that a repair put in the place of the merged ones."""


KeptRefits = dict[int, dict[str, Tensor]]
"""Position in the merged model -> the tensors that a repair changed in a layer of no group."""


@dataclass(kw_only=True)
class RunState:
    """What turns the source into the merged model."""

    plan: MergePlan
    """Which layers become one."""
    orders: Orders = field(default_factory=dict)
    """How each source layer is moved before the merge."""
    alphas: list[Alphas] | None = None
    """Alphas of each group; None before they exist."""
    refits: Refits | None = None
    """Refitted matrices of each group; None without a repair."""
    kept_refits: KeptRefits = field(default_factory=dict)
    """Refitted tensors of layers that are in no group."""


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


def write_orders(run_dir: Path, orders: Orders, path: Path | None = None) -> None:
    """Write orders.safetensors (or `path`): how each source layer is moved.

    The key `13` holds an order of neurons (int32), `13.neuron_F` and others the fields of a
    transform, `13.q_proj` and others orders of rows.
    """
    path = path or run_dir / "orders.safetensors"
    write_tensors(path, _flat(orders), {"schema": "1"})


def _flat(orders: Orders) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for layer, motion in orders.items():
        parts = motion_parts(motion)
        named = {"": parts} if isinstance(parts, Tensor) else {f".{n}": t for n, t in parts.items()}
        tensors |= {
            f"{layer}{n}": t if t.is_floating_point() else t.int() for n, t in named.items()
        }
    return tensors


def alignment_key(
    source: str, plan: MergePlan, method: tuple[str, str], blocks_BT: Tensor | None
) -> str:
    """Return 16 hex digits of all that decides an alignment."""
    groups = [(group.members, group.anchor) for group in plan.groups]
    digest = hashlib.sha256(repr((ALIGNMENT_VERSION, source, groups, method)).encode())
    if blocks_BT is not None:
        digest.update(blocks_BT.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def motion_parts(motion: Motion) -> Tensor | dict[str, Tensor]:
    """Return a motion as plain tensors."""
    return transform_tensors(motion) if isinstance(motion, Transform) else motion


def read_orders(path: Path) -> Orders:
    """Read orders.safetensors.

    Raises:
        ValueError: One line when an entry is not the motion of a layer.
    """
    tensors, _ = read_tensors(path)
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        layer, _dot, part = key.partition(".")
        layers.setdefault(layer, {})[part] = tensor
    orders: Orders = {}
    for layer, parts in layers.items():
        try:
            if not layer.isdecimal():
                raise ValueError("it is no layer number")
            orders[int(layer)] = motion_of(parts[""] if set(parts) == {""} else parts)
        except (ValueError, RuntimeError) as error:
            shapes = ", ".join(str(list(t.shape)) for t in parts.values())
            raise ValueError(
                f"{path} must hold a permutation (int32) or a transform under the number of each "
                f"layer, got {layer!r} of shape {shapes}: {one_line(error)}. Align again."
            ) from None
    return orders


def motion_of(parts: Tensor | dict[str, Tensor]) -> Motion:
    """Return the motion that `motion_parts` took apart.

    Raises:
        ValueError: When it is none.
    """
    if isinstance(parts, Tensor):
        return _order(parts)
    if set(parts) <= set(MATRICES):
        return {name: _order(order_O) for name, order_O in parts.items()}
    return transform_from_tensors(parts)


def _order(tensor: Tensor) -> Tensor:
    whole = tensor.ndim == 1 and tensor.dtype in (torch.int32, torch.int64)
    if not whole or not torch.equal(tensor.sort().values.long(), torch.arange(len(tensor))):
        raise ValueError("it is no permutation")
    return tensor.long()


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
        _group_alphas(path, data, group) for data, group in zip(groups, plan.groups, strict=True)
    ]


def _group_alphas(path: Path, data: Any, group: Group) -> Alphas:
    wanted = {"members": list(group.members), "anchor": group.anchor}
    if not isinstance(data, dict) or {key: data.get(key) for key in wanted} != wanted:
        raise ValueError(
            f"{path} must hold alphas for the layers {wanted['members']} with the anchor "
            f"{group.anchor}, as in the plan. Use the alphas.json of the same run."
        )
    alphas = data.get("alphas")
    if not isinstance(alphas, dict) or set(alphas) not in ({"layer"}, set(MATRICES)):
        raise ValueError(
            f"{path}: a group needs alphas for `layer`, or for each of {', '.join(MATRICES)}."
        )
    return {name: _alpha(path, name, values, len(group.members)) for name, values in alphas.items()}


def _alpha(path: Path, name: str, values: Any, num_members: int) -> Tensor:
    try:
        alpha = torch.tensor(values, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        alpha = torch.tensor(torch.nan)
    if alpha.ndim not in (1, 2) or len(alpha) != num_members or not alpha.isfinite().all():
        raise ValueError(
            f"{path}: alphas of `{name}` must be finite numbers, one row for each of the "
            f"{num_members} members. Use the alphas.json of the same run."
        )
    return alpha


def alphas_fingerprint(alphas: list[Alphas]) -> str:
    """Return 16 hex digits that tell one set of alphas from another."""
    digest = hashlib.sha256()
    for group in alphas:
        for name, alpha in sorted(group.items()):
            digest.update(name.encode() + alpha.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def write_refits(
    run_dir: Path, refits: Refits, alphas: list[Alphas], kept: KeptRefits | None = None
) -> None:
    """Write repair.safetensors, which belongs to these alphas alone."""
    tensors = {f"{i}.{name}": w for i, group in enumerate(refits) for name, w in group.items()}
    for position, layer in (kept or {}).items():
        tensors |= {f"kept.{position}.{name}": weight for name, weight in layer.items()}
    metadata = {"schema": "1", "alphas": alphas_fingerprint(alphas)}
    write_tensors(run_dir / "repair.safetensors", tensors, metadata)


def read_refits(path: Path, alphas: list[Alphas]) -> Refits | None:
    """Read repair.safetensors; None, and a warning, when it belongs to other alphas.

    Raises:
        ValueError: One line when an entry is not a matrix of one of the groups.
    """
    tensors, metadata = read_tensors(path)
    if metadata.get("alphas") != alphas_fingerprint(alphas):
        logger.warning("%s was fitted to other alphas, so it is left out", path)
        return None
    refits: Refits = [{} for _ in alphas]
    places = {f"{i}.{name}": (i, name) for i in range(len(alphas)) for name in PATHS}
    for key, weight in tensors.items():
        if key.startswith("kept."):
            continue
        if key not in places or weight.ndim != (1 if _is_vector(key) else 2):
            raise ValueError(
                f"{path} must hold matrices of the {len(alphas)} groups, such as '0.down_proj', "
                f"got {key!r} of shape {list(weight.shape)}. Repair again."
            )
        group, name = places[key]
        refits[group][name] = weight
    return refits


def _is_vector(key: str) -> bool:
    return key.rpartition(".")[2] not in MATRICES


def read_kept_refits(path: Path, alphas: list[Alphas], num_positions: int) -> KeptRefits:
    """Read the refits of layers in no group from repair.safetensors; none for other alphas.

    Raises:
        ValueError: One line when an entry is not a tensor of one of the layers.
    """
    tensors, metadata = read_tensors(path)
    kept: KeptRefits = {}
    if metadata.get("alphas") != alphas_fingerprint(alphas):
        return kept
    places = {f"kept.{i}.{name}": (i, name) for i in range(num_positions) for name in PATHS}
    for key, weight in tensors.items():
        if not key.startswith("kept."):
            continue
        if key not in places or weight.ndim != (1 if _is_vector(key) else 2):
            raise ValueError(
                f"{path} must hold tensors of the {num_positions} layers, such as "
                f"'kept.0.down_proj', got {key!r} of shape {list(weight.shape)}. Repair again."
            )
        position, name = places[key]
        kept.setdefault(position, {})[name] = weight
    return kept


def _add_refits(state: RunState, path: Path) -> None:
    if state.alphas is not None and path.is_file():
        state.refits = read_refits(path, state.alphas)
        num_positions = state.plan.num_layers - state.plan.num_removed
        state.kept_refits = read_kept_refits(path, state.alphas, num_positions)


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
        _add_refits(state, run_dir / "repair.safetensors")
    return state


def checkpoint_state(state: RunState, alphas: list[Alphas]) -> dict[str, Any]:
    """Return what a Lightning checkpoint keeps beside the optimiser: plan, orders and alphas."""
    orders = {layer: motion_parts(motion) for layer, motion in state.orders.items()}
    return {"plan": plan_to_dict(state.plan), "orders": orders, "alphas": alphas}


def read_checkpoint(path: Path) -> RunState:
    """Read plan, orders and alphas from a Lightning checkpoint, without unpickling code.

    Raises:
        ValueError: When the file is not a checkpoint of lmerge.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of other pickle protocols, then refuses
            saved = torch.load(path, map_location="cpu", weights_only=True)["lmerge"]
        orders = {layer: motion_of(parts) for layer, parts in saved["orders"].items()}
        return RunState(plan=plan_from_dict(saved["plan"]), orders=orders, alphas=saved["alphas"])
    except Exception as error:  # malformed files end in errors of every type
        raise ValueError(
            f"{path} must be a checkpoint that `lmerge fit` wrote, got: {one_line(error)}. "
            "Give one from the folder `checkpoints` of a run."
        ) from error


def with_refits_of(run_dir: Path, state: RunState) -> RunState:
    """Return the state with the run folder's repair, where that belongs to the same alphas."""
    _add_refits(state, run_dir / "repair.safetensors")
    return state
