"""Compositions of plan, repair and healing without a trainer, as `lmerge compare` runs them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor
from transformers import PreTrainedModel

from lmerge.alphas import AlphaConfig
from lmerge.baselines.table import Baseline
from lmerge.cache import StateCache, cache_states
from lmerge.heal import HealConfig, heal
from lmerge.llama import num_layers
from lmerge.merged import MergedLlama
from lmerge.plan import Group, MergePlan
from lmerge.refine import refine_layers
from lmerge.repair import RepairConfig, RepairMethod, refit_groups
from lmerge.runs import KeptRefits, Refits
from lmerge.search import Costs, GroupSearch, SearchMethod, repaired_blocks, search_part


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """A row of a comparison: a baseline, or a composition of ours."""

    name: str = ""
    """What the row is called; the baseline's name unless given."""
    baseline: Baseline | None = None
    """A published method; null for a composition of the options below."""
    plan_method: SearchMethod = "groups_repaired"
    """How the layers that become one are chosen."""
    repair: RepairConfig = field(default_factory=RepairConfig)
    """What is refitted in closed form."""
    heal: HealConfig = field(default_factory=HealConfig)
    """What is trained by KL afterwards; nothing by default."""

    def __post_init__(self) -> None:
        if not self.title:
            raise ValueError("a method needs a `name`, or a `baseline` whose name it has.")

    @property
    def title(self) -> str:
        """The name of the row."""
        return self.name or self.baseline or ""


class Planner:
    """Plans of several budgets that share one search.

    Args:
        source: The source model.
        token_BT: Calibration blocks.
        held_B: Which of them are held out (bool).
        costs: Costs of groups that are known from before; empty if none are.
        most_removed: Layers of the largest budget that will be asked for.
    """

    def __init__(
        self,
        source: PreTrainedModel,
        token_BT: Tensor,
        held_B: Tensor,
        *,
        costs: Costs,
        most_removed: int,
    ) -> None:
        self.source = source
        self.part_BT, self.part_held_B = search_part(token_BT, held_B)
        self.costs = dict(costs)
        self.most_removed = most_removed
        self._search: GroupSearch | None = None

    def groups(self, method: SearchMethod, num_removed: int) -> tuple[Group, ...]:
        """Return the groups that a search finds for a budget."""
        if method == "block_repaired":
            found = repaired_blocks(self.source, self.part_BT, self.part_held_B, num_removed)
            return found[0].groups
        if self._search is None:
            self._search = GroupSearch(self.source, self.part_BT, self.part_held_B)
        if not self.costs:
            self.costs = self._search.costs(self.most_removed)
        return self._search.plans(self.costs, num_removed)[0].groups


class Composer:
    """Merged models of plans after their repair and healing; the last repair is kept.

    Args:
        source: The source model.
        token_BT: Calibration blocks.
        held_B: Which of them are held out (bool).
        seed: Seed of the healing.
    """

    def __init__(
        self, source: PreTrainedModel, token_BT: Tensor, held_B: Tensor, *, seed: int
    ) -> None:
        self.source, self.token_BT, self.held_B, self.seed = source, token_BT, held_B, seed
        self._last: tuple[MergePlan, RepairConfig] | None = None
        self._repaired: tuple[Refits, KeptRefits, StateCache] | None = None

    def compose(self, groups: tuple[Group, ...], method: MethodConfig) -> MergedLlama:
        """Return the merged model of a plan after its repair and healing.

        It is what `lmerge fit` gives with the same plan, `alpha.start` anchor and no training
        steps.
        """
        depth = num_layers(self.source)
        plan = MergePlan(num_layers=depth, groups=groups, method=method.plan_method)
        merged = MergedLlama(self.source, plan, {}, AlphaConfig(granularity="tensor"))
        if self._last == (plan, method.repair) and self._repaired is not None:
            refits, kept, cache = self._repaired
            merged.set_refits(refits)
            for position, tensors in kept.items():
                merged.refit_layer(position, tensors)
        else:
            cache = cache_states(self.source, self.token_BT, merged.first_merged)
            repair(self.source, merged, cache, self.held_B, method.repair)
            self._last = (plan, method.repair)
            self._repaired = (merged.refits(), dict(merged.kept_refits), cache)
        heal(self.source, merged, cache, self.held_B, method.heal, seed=self.seed)
        return merged


def repair(
    source: PreTrainedModel,
    merged: MergedLlama,
    cache: StateCache,
    held_B: Tensor,
    config: RepairConfig,
) -> None:
    """Refit a merged model in closed form, by the configured method; it is changed in place."""
    REPAIRS[config.method](source, merged, cache.prefix_BTD, held_B, config)


def _nothing(*_: object) -> None:
    """Leave the merged model as it is."""


Repairer = Callable[[PreTrainedModel, MergedLlama, Tensor, Tensor, RepairConfig], object]

REPAIRS: dict[RepairMethod, Repairer] = {
    "down": refit_groups,
    "deep": refine_layers,
    "none": _nothing,
}
"""Method -> what changes a merged model in place: source, merged model, input states of the first
merged layer on the calibration blocks, which of these are held out, and the options."""
