"""The artefacts of a run folder that rebuild its merged model: plan, orders, alphas, refits."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from lmerge.align import Orders, motion_of, motion_parts
from lmerge.alpha_files import alphas_fingerprint, read_alphas
from lmerge.alphas import Alphas
from lmerge.files import one_line, provenance, read_json, read_tensors, write_json, write_tensors
from lmerge.llama import MATRICES, PATHS
from lmerge.plan import SCHEMA as PLAN_SCHEMA
from lmerge.plan import MergePlan, plan_from_dict, plan_to_dict

logger = logging.getLogger(__name__)

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


def write_plan(run_dir: Path, plan: MergePlan, path: Path | None = None) -> None:
    """Write plan.json (or `path`)."""
    data = {**plan_to_dict(plan), "provenance": provenance()}
    write_json(path or run_dir / "plan.json", data, schema=PLAN_SCHEMA)


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
    source: str, plan: MergePlan, method: tuple[str, ...], blocks_BT: Tensor | None
) -> str:
    """Return 16 hex digits of all that decides an alignment."""
    groups = [(group.members, group.anchor) for group in plan.groups]
    digest = hashlib.sha256(repr((ALIGNMENT_VERSION, source, groups, method)).encode())
    if blocks_BT is not None:
        digest.update(blocks_BT.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


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


def check_orders(orders: Orders, plan: MergePlan, path: Path) -> Orders:
    """Return the orders that were read at `path`.

    Raises:
        ValueError: When one is of a layer that the plan does not merge.
    """
    merged = {layer for group in plan.groups for layer in group.members}
    others = sorted(set(orders) - merged)
    if others:
        raise ValueError(
            f"{path}: orders must be of the plan's merged layers {sorted(merged)}, got one of "
            f"layer {others[0]}. Use the files of one run."
        )
    return orders


def write_refits(
    run_dir: Path, refits: Refits, alphas: list[Alphas], kept: KeptRefits | None = None
) -> None:
    """Write repair.safetensors, which belongs to these alphas alone."""
    tensors = {f"{i}.{name}": w for i, group in enumerate(refits) for name, w in group.items()}
    for position, layer in (kept or {}).items():
        tensors |= {f"kept.{position}.{name}": weight for name, weight in layer.items()}
    metadata = {"schema": "1", "alphas": alphas_fingerprint(alphas)}
    write_tensors(run_dir / "repair.safetensors", tensors, metadata)


def read_refits(
    path: Path, alphas: list[Alphas], num_positions: int
) -> tuple[Refits | None, KeptRefits]:
    """Read repair.safetensors; nothing, and a warning, when it belongs to other alphas.

    Args:
        path: The file.
        alphas: Alphas of each group.
        num_positions: Layers of the merged model.

    Raises:
        ValueError: One line when an entry is not a tensor of one of the groups or layers.
    """
    tensors, metadata = read_tensors(path)
    if metadata.get("alphas") != alphas_fingerprint(alphas):
        logger.warning("%s was fitted to other alphas, so it is left out", path)
        return None, {}
    refits: Refits = [{} for _ in alphas]
    kept: KeptRefits = {}
    groups = {f"{i}.{name}": (i, name) for i in range(len(alphas)) for name in PATHS}
    layers = {f"kept.{i}.{name}": (i, name) for i in range(num_positions) for name in PATHS}
    known = groups | layers
    for key, weight in tensors.items():
        is_vector = key.rpartition(".")[2] not in MATRICES
        if key not in known or weight.ndim != (1 if is_vector else 2):
            raise ValueError(
                f"{path} must hold tensors of the {len(alphas)} groups, such as '0.down_proj', or "
                f"of the {num_positions} layers, such as 'kept.0.down_proj', got {key!r} of shape "
                f"{list(weight.shape)}. Repair again."
            )
        if key in groups:
            group, name = groups[key]
            refits[group][name] = weight
        else:
            position, name = layers[key]
            kept.setdefault(position, {})[name] = weight
    return refits, kept


def _add_refits(state: RunState, path: Path) -> None:
    if state.alphas is not None and path.is_file():
        num_positions = state.plan.num_layers - state.plan.num_removed
        state.refits, state.kept_refits = read_refits(path, state.alphas, num_positions)


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
        path = run_dir / "orders.safetensors"
        state.orders = check_orders(read_orders(path), state.plan, path)
    if (run_dir / "alphas.json").is_file():
        state.alphas = read_alphas(run_dir / "alphas.json", state.plan)
        _add_refits(state, run_dir / "repair.safetensors")
    return state


def with_refits_of(run_dir: Path, state: RunState) -> RunState:
    """Return the state with the run folder's repair, where that belongs to the same alphas."""
    _add_refits(state, run_dir / "repair.safetensors")
    return state
