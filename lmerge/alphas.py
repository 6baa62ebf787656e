"""Alphas: how much of each member a group's merged layer holds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lmerge.axes import ALPHA_AXIS
from lmerge.llama import MATRICES, LayerTensors
from lmerge.plan import Group

Granularity = Literal["layer", "tensor", "head", "neuron"]
Start = Literal["anchor", "uniform", "fixed", "mka", "similarity", "file"]

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
    plain average. Merges of two layers at a time, the upper into the lower: `fixed` (each keeps
    `value` of the lower), `mka` (the rule of MKA), `similarity` (of the two layers); `file`: read
    from `path`."""
    value: float = 0.5
    """Share of the layer that is merged into, at each merge of `fixed`; finite."""
    steps: dict[str, float] = field(default_factory=dict)
    """Shares of single merges of `fixed` that differ from `value`; 0 is a group's first merge,
    that of its last two layers."""
    beta: float = 1.0
    """Slope of the sigmoid of `mka`, a factor without unit; finite, 0 is equal shares."""
    path: str | None = None
    """For `file`: alphas.json of a run, or a published list of merges."""
    simplex: bool = False
    """Whether the alphas of a group are positive and sum to 1 (a softmax); else they are free."""

    def __post_init__(self) -> None:
        for name in ("value", "beta"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(
                    f"`alpha.{name}` must be finite, got {getattr(self, name)}. Try 0.5."
                )
        if (self.start == "file") != (self.path is not None):
            raise ValueError(
                f"`alpha.path` must be given with `alpha.start` file and with no other, got start "
                f"{self.start} and path {self.path}. Set both, or neither."
            )
        if self.steps and self.start != "fixed":
            raise ValueError(
                f"`alpha.steps` needs `alpha.start` fixed, got {self.start}. Leave one of them out."
            )


class PairMerge(NamedTuple):
    """One merge of two layers: W_into = alpha W_into + (1 - alpha) W_removed."""

    into: int
    removed: int
    alpha: float


def replay_shares(merges: Sequence[PairMerge], num_members: int, last: int) -> Tensor:
    """Return each member's share of a group after merges of two layers, one after the other.

    Args:
        merges: Merges by position in the group, in order.
        num_members: Members of the group.
        last: Position of the member that all end in.

    Returns:
        (G,) float32 shares that sum to 1; computed in float64.
    """
    share_GG = torch.eye(num_members, dtype=torch.float64)
    for into, removed, alpha in merges:
        share_GG[into] = alpha * share_GG[into] + (1 - alpha) * share_GG[removed]
    return share_GG[last].float()


def anchor_start(group: Group, config: AlphaConfig, similarity_LL: Tensor | None) -> Tensor:
    """Return 1 for the anchor and 0 for the others, (G,)."""
    place = torch.tensor(group.anchor_position)
    return torch.nn.functional.one_hot(place, len(group.members)).float()


def uniform_start(group: Group, config: AlphaConfig, similarity_LL: Tensor | None) -> Tensor:
    """Return 1 / G for every member, (G,)."""
    return torch.full((len(group.members),), 1 / len(group.members))


def fixed_start(group: Group, config: AlphaConfig, similarity_LL: Tensor | None) -> Tensor:
    """Return the shares after merges that each keep `value` of the layer merged into, (G,).

    Raises:
        ValueError: When `steps` names a merge that the group does not have.
    """
    beyond = [s for s in config.steps if s not in map(str, range(len(group.members) - 1))]
    if beyond:
        raise ValueError(
            f"`alpha.steps` must name merges 0 to {len(group.members) - 2} of the group "
            f"{list(group.members)}, got {beyond[0]}. Leave it out."
        )
    return _sequential(group, lambda step, i, j: config.steps.get(str(step), config.value))


def mka_start(group: Group, config: AlphaConfig, similarity_LL: Tensor | None) -> Tensor:
    """Return the shares of MKA's rule, (G,) (arXiv:2406.16330, as released by the layer study).

    s_i is layer i's mean similarity to all layers, r = s_i / (s_i + s_j), alpha = sigmoid(beta r).
    A layer that others were merged into keeps its own s.

    Raises:
        ValueError: When the mean similarities of two layers sum to zero.
    """
    assert similarity_LL is not None
    mean_L = similarity_LL.double().mean(dim=1)

    def share(step: int, i: int, j: int) -> float:
        total = float(mean_L[i] + mean_L[j])
        if total == 0:
            raise ValueError(
                f"the mean similarities of layers {i} and {j} must not sum to 0 for `alpha.start` "
                "mka. Use another measure or start."
            )
        return float(torch.sigmoid(config.beta * mean_L[i] / total))

    return _sequential(group, share)


def similarity_start(group: Group, config: AlphaConfig, similarity_LL: Tensor | None) -> Tensor:
    """Return the shares after merges that keep S_ij of the layer merged into, in [0, 1], (G,)."""
    assert similarity_LL is not None
    clipped_LL = similarity_LL.double().clamp(0, 1)
    return _sequential(group, lambda step, i, j: float(clipped_LL[i, j]))


def _sequential(group: Group, alpha: Callable[[int, int, int], float]) -> Tensor:
    """Merge the upper layer into the lower down to the anchor, then the lower ones up to it."""
    members, anchor = group.members, group.anchor_position
    above = [(i, i + 1) for i in range(len(members) - 2, anchor - 1, -1)]
    below = [(j + 1, j) for j in range(anchor)]
    merges = [
        PairMerge(i, j, alpha(step, members[i], members[j]))
        for step, (i, j) in enumerate(above + below)
    ]
    return replay_shares(merges, len(members), anchor)


Rule = Callable[[Group, AlphaConfig, "Tensor | None"], Tensor]

STARTS: dict[Start, Rule] = {
    "anchor": anchor_start,
    "uniform": uniform_start,
    "fixed": fixed_start,
    "mka": mka_start,
    "similarity": similarity_start,
}
"""`file` has no rule: its alphas are read."""

NEEDS_SIMILARITY: tuple[Start, ...] = ("mka", "similarity")

SIMPLEX_FLOOR = 1e-3
"""Smallest share on the simplex at the start, before the shares are made to sum to 1: a softmax
does not reach 0, and near it nothing is learned."""


def start_alphas(
    config: AlphaConfig,
    stacked: LayerTensors,
    group: Group,
    *,
    head_dim: int,
    similarity_LL: Tensor | None = None,
) -> Alphas:
    """Return the alphas that training starts from.

    Args:
        config: Granularity and start; `file` starts at the anchor until its alphas are set.
        stacked: The members' tensors stacked along G.
        group: The group.
        head_dim: Width of one attention head.
        similarity_LL: Layer similarity, for the rules of `NEEDS_SIMILARITY`; without it they start
            at the anchor (a saved run brings its own alphas).

    Returns:
        The key `layer` alone for granularity `layer`, else one entry for each matrix.

    Raises:
        ValueError: When shares of the start are negative and must lie on the simplex.
    """
    waits = similarity_LL is None and config.start in NEEDS_SIMILARITY
    rule = STARTS["anchor" if waits or config.start == "file" else config.start]
    share_G = rule(group, config, similarity_LL)
    if config.simplex:
        if bool((share_G < 0).any()):
            raise ValueError(
                f"`alpha.simplex` needs shares of at least 0, but the start {config.start} gives "
                f"{share_G.min():.3g}. Set it to false, or `alpha.value` into [0, 1]."
            )
        share_G = share_G.clamp_min(SIMPLEX_FLOOR)
        share_G = share_G / share_G.sum()
    return spread({"layer": share_G}, config.granularity, stacked, head_dim=head_dim)


def spread(
    alphas: Alphas, granularity: Granularity, stacked: LayerTensors, *, head_dim: int
) -> Alphas:
    """Return alphas at an equal or finer granularity, with the same merged weights.

    Raises:
        ValueError: When the wanted granularity is coarser than the alphas'.
    """
    if granularity == "layer":
        if set(alphas) != {"layer"}:
            raise ValueError(_coarser("layer"))
        return {"layer": alphas["layer"].clone()}
    return {
        name: _at_grain(
            alphas.get(name, alphas.get("layer", torch.empty(0))),
            stacked[name].shape[1 + ALPHA_AXIS[name]],
            name,
            granularity,
            head_dim,
        )
        for name in MATRICES
    }


def _coarser(name: str) -> str:
    return (
        f"alphas from a file must be at most as fine as `alpha.granularity`, but those of `{name}` "
        "are finer. Set `alpha.granularity` to the value of the run that saved them."
    )


def _at_grain(
    alpha: Tensor, num_slots: int, name: str, granularity: Granularity, head_dim: int
) -> Tensor:
    in_attention = name in MATRICES[:4]
    if granularity == "tensor" or (granularity == "head" and not in_attention):
        if alpha.ndim == 2:
            raise ValueError(_coarser(name))
        return alpha.clone()
    count = num_slots // (head_dim if granularity == "head" else 1)
    if alpha.ndim == 1:
        return alpha[:, None].repeat(1, count)
    if count % alpha.shape[1]:
        raise ValueError(_coarser(name))
    return alpha.repeat_interleave(count // alpha.shape[1], dim=1)


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
