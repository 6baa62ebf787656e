"""Alphas: how much of each member a group's merged layer holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lmerge.llama import ALPHA_AXIS, MATRICES, LayerTensors

Granularity = Literal["layer", "tensor", "head", "neuron"]
Start = Literal["anchor", "uniform"]

Alphas = dict[str, Tensor]
"""Matrix name -> alphas of its members: (G,), (G, heads) or (G, slots), float32."""


@dataclass(frozen=True, kw_only=True)
class AlphaConfig:
    """What the alphas can express and where they start."""

    granularity: Granularity = "neuron"
    """One alpha a member per `layer`, `tensor` (seven matrices), `head` (attention heads; tensors
    in the MLP) or `neuron` (rows of q, k, v, gate, up; columns of o, down)."""
    start: Start = "anchor"
    """`anchor`: the anchor's weights alone, the same as dropping the other layers; `uniform`: the
    plain average."""
    simplex: bool = False
    """Whether the alphas of a group are positive and sum to 1 (a softmax); else they are free."""


def anchor_start(num_members: int, anchor: int) -> Tensor:
    """Return 1 for the anchor and 0 for the others, (G,)."""
    return torch.nn.functional.one_hot(torch.tensor(anchor), num_members).float()


def uniform_start(num_members: int, anchor: int) -> Tensor:
    """Return 1 / G for every member, (G,)."""
    return torch.full((num_members,), 1 / num_members)


STARTS: dict[Start, Callable[[int, int], Tensor]] = {
    "anchor": anchor_start,
    "uniform": uniform_start,
}

SIMPLEX_FLOOR = 1e-3
"""Smallest share on the simplex at the start, before the shares are made to sum to 1: a softmax
does not reach 0, and near it nothing is learned."""


def start_alphas(
    config: AlphaConfig, stacked: LayerTensors, anchor: int, *, head_dim: int
) -> Alphas:
    """Return the alphas that training starts from.

    Args:
        config: Granularity and start.
        stacked: The members' tensors stacked along G.
        anchor: Position of the anchor among the members.
        head_dim: Width of one attention head.

    Returns:
        The key `layer` alone for granularity `layer`, else one entry for each matrix.
    """
    share_G = STARTS[config.start](len(stacked["q_proj"]), anchor)
    if config.simplex:
        share_G = share_G.clamp_min(SIMPLEX_FLOOR)
        share_G = share_G / share_G.sum()
    if config.granularity == "layer":
        return {"layer": share_G}
    return {
        name: _at_grain(share_G, stacked[name].shape[1 + ALPHA_AXIS[name]], name, config, head_dim)
        for name in MATRICES
    }


def _at_grain(
    share_G: Tensor, num_slots: int, name: str, config: AlphaConfig, head_dim: int
) -> Tensor:
    in_attention = name in MATRICES[:4]
    if config.granularity == "tensor" or (config.granularity == "head" and not in_attention):
        return share_G.clone()
    width = head_dim if config.granularity == "head" else 1
    return share_G[:, None].repeat(1, num_slots // width)


def to_free(alphas: Alphas, *, simplex: bool) -> Alphas:
    """Return the unconstrained parameters of alphas: themselves, or logits on the simplex.

    Raises:
        ValueError: When alphas that are not shares are put on the simplex.
    """
    if not simplex:
        return {name: alpha.clone() for name, alpha in alphas.items()}
    for name, alpha in alphas.items():
        if bool((alpha < 0).any()) or not torch.allclose(
            alpha.sum(dim=0), torch.tensor(1.0), atol=1e-4
        ):
            raise ValueError(
                f"alphas on the simplex must be at least 0 and sum to 1 over a group, but those of "
                f"`{name}` do not. Set `simplex` to false for free alphas."
            )
    smallest = torch.finfo(torch.float32).tiny
    return {name: alpha.clamp_min(smallest).log() for name, alpha in alphas.items()}


def to_shares(free: Alphas, *, simplex: bool) -> Alphas:
    """Return the alphas of unconstrained parameters: the inverse of `to_free`."""
    return {name: p.softmax(dim=0) if simplex else p for name, p in free.items()}
