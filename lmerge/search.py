"""Plans chosen by what they cost once repaired, not by how alike the layers look."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lmerge.block_refits import (
    BlockRefits,
    kl_of,
    layer_inputs,
    layers_above,
    log_probabilities,
    normed_output,
    run_part,
    spread_places,
)
from lmerge.llama import num_layers, span, with_layers
from lmerge.plan import Group, check_num_removed
from lmerge.progress import track

SearchMethod = Literal["block_repaired", "groups_repaired"]

NUM_CHECKED = 3
"""Plans of several groups whose cost is measured, not only added up from that of each group."""


SLACK = 1.5
"""How much dearer than the best plan so far a group may be for longer ones to be tried."""


class Candidate(NamedTuple):
    """Groups of layers that could become one each, and what that costs after a refit."""

    groups: tuple[Group, ...]
    kl: float
    """KL(source || merged) in nats a token, on the held-out blocks."""


@torch.no_grad()
def repaired_blocks(
    source: PreTrainedModel, token_BT: Tensor, held_B: Tensor, num_removed: int
) -> list[Candidate]:
    """Return the cost of every contiguous block of `num_removed` + 1 layers, best first.

    The block's first layer is its anchor. Its down projection is refitted in closed form to the
    states after the block (docs/method.md, repair), on the blocks of text that are not held out;
    the KL is taken through the rest of the model on those that are.

    Args:
        source: The source model.
        token_BT: Calibration blocks, unpadded.
        held_B: Which of them are held out (bool).
        num_removed: Layers that the block loses.
    """
    return repaired_blocks_of(source, token_BT, held_B, [num_removed])[num_removed]


@torch.no_grad()
def repaired_blocks_of(
    source: PreTrainedModel, token_BT: Tensor, held_B: Tensor, numbers: Sequence[int]
) -> dict[int, list[Candidate]]:
    """Return the candidates of `repaired_blocks` for several numbers of layers to lose.

    States and normal equations of a layer are the same for all of them.
    """
    depth = num_layers(source)
    for num_removed in numbers:
        check_num_removed(num_removed, depth)
    fit_states = layer_inputs(source, token_BT[~held_B])
    held_states = layer_inputs(source, token_BT[held_B])
    logp_NV = log_probabilities(source, normed_output(source, held_states[-1], depth))
    found: dict[int, list[Candidate]] = {num_removed: [] for num_removed in numbers}
    num_first = depth - min(numbers)
    for first in track(range(num_first), "plan search", total=num_first):
        refits = BlockRefits(source, first, fit_states[first])
        for num_removed in numbers:
            stop = first + num_removed + 1
            if stop > depth:
                continue
            above = layers_above(source, refits.toward(fit_states[stop]), first, stop)
            kl = kl_of(source, run_part(above, held_states[first]), logp_NV)
            found[num_removed].append(Candidate((_block(first, stop),), kl))
    return {num_removed: _best_first(candidates) for num_removed, candidates in found.items()}


def _block(first: int, stop: int) -> Group:
    return Group(members=tuple(range(first, stop)), anchor=first)


def _best_first(candidates: list[Candidate]) -> list[Candidate]:
    return sorted(candidates, key=lambda c: math.inf if math.isnan(c.kl) else c.kl)


@torch.no_grad()
def repaired_groups(
    source: PreTrainedModel, token_BT: Tensor, held_B: Tensor, num_removed: int
) -> list[Candidate]:
    """Return plans of one or several groups that lose `num_removed` layers, best first.

    Each contiguous group alone is refitted and its KL measured, as in `repaired_blocks`. Costs of
    groups are taken to add up, which a dynamic program minimises over all plans; the best of them
    are then measured as a whole, each refit on the states that the groups below it leave.

    Args:
        source: The source model.
        token_BT: Calibration blocks, unpadded.
        held_B: Which of them are held out (bool).
        num_removed: Layers to lose in all.
    """
    check_num_removed(num_removed, num_layers(source))
    search = GroupSearch(source, token_BT, held_B)
    return search.plans(search.costs(num_removed), num_removed)


Costs = dict[tuple[int, int], float]
"""(First layer, layer after the last) of a group -> its cost."""


class GroupSearch:
    """Costs of single groups, and of whole plans, on the same states of the source.

    Args:
        source: The source model.
        token_BT: Calibration blocks, unpadded.
        held_B: Which of them are held out (bool).
    """

    @torch.no_grad()
    def __init__(self, source: PreTrainedModel, token_BT: Tensor, held_B: Tensor) -> None:
        self.source = source
        self.depth = num_layers(source)
        self.fit_states = layer_inputs(source, token_BT[~held_B])
        self.held_states = layer_inputs(source, token_BT[held_B])
        final_BTD = normed_output(source, self.held_states[-1], self.depth)
        self.logp_NV = log_probabilities(source, final_BTD)

    @torch.no_grad()
    def costs(self, num_removed: int) -> Costs:
        """Return the KL of each group alone that loses at most `num_removed` layers.

        A row of groups with one first layer ends where one is dearer than `SLACK` times the best
        plan found so far that loses as many layers: longer ones cost more still.
        """
        costs: Costs = {}
        best = [math.inf] * (num_removed + 1)
        for first in track(_middle_out(self.depth), "plan search", total=self.depth - 1):
            refits = BlockRefits(self.source, first, self.fit_states[first])
            for stop in range(first + 2, min(first + num_removed + 2, self.depth + 1)):
                layer = refits.toward(self.fit_states[stop])
                above = layers_above(self.source, layer, first, stop)
                normed_BTD = run_part(above, self.held_states[first])
                costs[first, stop] = kl_of(self.source, normed_BTD, self.logp_NV)
                if not costs[first, stop] <= SLACK * best[stop - first - 1]:
                    break
            for lost in range(1, num_removed + 1):
                best[lost] = min(best[lost], _least_cost(costs, self.depth, lost))
        return costs

    def plans(self, costs: Costs, num_removed: int) -> list[Candidate]:
        """Return the cheapest plans with the KL of each as a whole, best first."""
        plans = cheapest_plans(costs, self.depth, num_removed, NUM_CHECKED)
        return _best_first(
            [
                Candidate(groups, self._plan_kl(groups))
                for groups in track(plans, "plan check", total=len(plans))
            ]
        )

    @torch.no_grad()
    def _plan_kl(self, groups: tuple[Group, ...]) -> float:
        """Return the KL of a whole plan, refitted from the lowest group up."""
        at = groups[0].start
        fit_BTD, held_BTD = self.fit_states[at], self.held_states[at]
        for group in groups:
            if at < group.start:
                between = span(self.source, at, group.start)
                fit_BTD, held_BTD = run_part(between, fit_BTD), run_part(between, held_BTD)
            refits = BlockRefits(self.source, group.start, fit_BTD)
            layer = refits.toward(self.fit_states[group.stop])
            one = with_layers(self.source, [layer], [group.start], final_norm=False)
            fit_BTD, held_BTD, at = run_part(one, fit_BTD), run_part(one, held_BTD), group.stop
        return kl_of(self.source, normed_output(self.source, held_BTD, at), self.logp_NV)


def _middle_out(depth: int) -> list[int]:
    """Return the first layers of all groups, those in the middle first: they cost least."""
    return sorted(range(depth - 1), key=lambda first: abs(first - depth * 0.45))


def cheapest_plans(
    costs: Costs, depth: int, num_removed: int, num_plans: int
) -> list[tuple[Group, ...]]:
    """Return the plans of least summed cost that lose `num_removed` layers, best first.

    Args:
        costs: Cost of each group that may be used.
        depth: Layers of the source.
        num_removed: Layers to lose.
        num_plans: Plans to return; fewer where there are fewer.

    Raises:
        ValueError: When no plan of these groups loses so many layers.
    """
    found = _cheapest(costs, depth, num_removed, num_plans)
    if not found:
        raise ValueError(
            f"no plan of the groups tried loses {num_removed} of {depth} layers at a finite cost. "
            "Lower `num_removed`, or use another `plan_method`."
        )
    return [groups for _, groups in found]


Way = tuple[float, tuple[Group, ...]]
"""A plan and its summed cost."""


def _cheapest(costs: Costs, depth: int, num_removed: int, num_plans: int) -> list[Way]:
    ways: dict[tuple[int, int], list[Way]] = {(0, 0): [(0.0, ())]}
    for layer in range(depth):
        for lost in range(num_removed + 1):
            here = sorted(ways.get((layer, lost), []), key=lambda way: way[0])[:num_plans]
            ways.setdefault((layer + 1, lost), []).extend(here)
            for stop in range(layer + 2, min(layer + 2 + num_removed - lost, depth + 1)):
                cost = costs.get((layer, stop), math.inf)
                if math.isfinite(cost):
                    longer = [(c + cost, (*groups, _block(layer, stop))) for c, groups in here]
                    ways.setdefault((stop, lost + stop - layer - 1), []).extend(longer)
    return sorted(ways.get((depth, num_removed), []), key=lambda way: way[0])[:num_plans]


def _least_cost(costs: Costs, depth: int, num_removed: int) -> float:
    found = _cheapest(costs, depth, num_removed, 1)
    return found[0][0] if found else math.inf


SEARCHES: dict[SearchMethod, Callable[[PreTrainedModel, Tensor, Tensor, int], list[Candidate]]] = {
    "block_repaired": repaired_blocks,
    "groups_repaired": repaired_groups,
}
"""Ways to choose groups that run the model; each returns its candidates, best first."""


def search_plan(
    source: PreTrainedModel,
    token_BT: Tensor,
    held_B: Tensor,
    num_removed: int,
    method: SearchMethod,
    *,
    num_fit_tokens: int = 6144,
    num_held_tokens: int = 1024,
) -> list[Candidate]:
    """Return the candidates of a search on a part of the calibration blocks, best first.

    Args:
        source: The source model.
        token_BT: Calibration blocks.
        held_B: Which of them are held out (bool).
        num_removed: Layers to remove.
        method: A row of `SEARCHES`.
        num_fit_tokens: Tokens to refit on, at least one block.
        num_held_tokens: Tokens to compare on, at least one block.
    """
    part_BT, is_held_B = search_part(
        token_BT, held_B, num_fit_tokens=num_fit_tokens, num_held_tokens=num_held_tokens
    )
    return SEARCHES[method](source, part_BT, is_held_B, num_removed)


def search_part(
    token_BT: Tensor, held_B: Tensor, *, num_fit_tokens: int = 6144, num_held_tokens: int = 1024
) -> tuple[Tensor, Tensor]:
    """Return the part of the calibration blocks that a search uses, and which are held out."""
    length = token_BT.shape[1]
    place_B = torch.arange(len(token_BT))
    fit_B = spread_places(place_B[~held_B], max(1, num_fit_tokens // length))
    compare_B = spread_places(place_B[held_B], max(1, num_held_tokens // length))
    chosen_B = torch.cat([fit_B, compare_B])
    return token_BT[chosen_B], torch.arange(len(chosen_B)) >= len(fit_B)
