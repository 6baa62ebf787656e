"""Lightning checkpoints of alphas: what they keep beside the optimiser, and how it is read."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

from lmerge.align import motion_of, motion_parts
from lmerge.alpha_files import check_alphas
from lmerge.alphas import Alphas
from lmerge.files import one_line
from lmerge.plan import MergePlan, plan_from_dict, plan_to_dict
from lmerge.runs import RunState, check_orders


def checkpoint_state(state: RunState, alphas: list[Alphas]) -> dict[str, Any]:
    """Return what a Lightning checkpoint keeps beside the optimiser: plan, orders and alphas."""
    orders = {layer: motion_parts(motion) for layer, motion in state.orders.items()}
    return {"plan": plan_to_dict(state.plan), "orders": orders, "alphas": alphas}


def read_checkpoint(path: Path) -> RunState:
    """Read plan, orders and alphas from a Lightning checkpoint, without unpickling code.

    Raises:
        ValueError: When the file is not a checkpoint of lmerge, or its parts do not fit.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of other pickle protocols, then refuses
            saved = torch.load(path, map_location="cpu", weights_only=True)["lmerge"]
        plan = plan_from_dict(saved["plan"])
        orders = {_layer(layer): motion_of(parts) for layer, parts in saved["orders"].items()}
        alphas = _alphas(saved["alphas"], plan)
        return RunState(plan=plan, orders=check_orders(orders, plan, path), alphas=alphas)
    except Exception as error:  # malformed files end in errors of every type
        raise ValueError(
            f"{path} must be a checkpoint that `lmerge fit` wrote, got: {one_line(error)}. "
            "Give one from the folder `checkpoints` of a run."
        ) from error


def _layer(key: Any) -> int:
    if type(key) is not int:
        raise ValueError(f"orders must have layer numbers as keys, got {key!r}")
    return key


def _alphas(saved: Any, plan: MergePlan) -> list[Alphas]:
    if not isinstance(saved, list) or len(saved) != len(plan.groups):
        raise ValueError(f"alphas must be a list, one entry for each of {len(plan.groups)} groups")
    return [
        check_alphas(alphas, len(group.members))
        for alphas, group in zip(saved, plan.groups, strict=True)
    ]
