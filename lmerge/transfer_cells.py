"""The cells of a study of transfer: written as they are finished, read again by a later call."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lmerge.activations import Pooling, layer_states
from lmerge.data.mixing import held_blocks
from lmerge.files import read_json, write_json
from lmerge.information import InformationConfig
from lmerge.plan import Group
from lmerge.progress import track
from lmerge.search import SEARCHES, repaired_blocks_of, search_part, search_plan
from lmerge.similarity import MEASURES
from lmerge.transfer import (
    MIXED,
    Groups,
    Rule,
    first_states,
    merged_model,
    mixed,
    mixed_texts,
    question_nats,
    raised,
    similar_groups,
)
from lmerge.transfer_data import DomainTexts
from lmerge.transfer_table import Nats, Refitted, show

SCHEMA = 1
HELD_SHARE = 0.2
"""Share of the calibration blocks that choose the refit's regularisation and the search's block."""


class Study:
    """Plans of every domain, and the loss of each refitted model on every domain.

    Args:
        source: The source model.
        texts: What each domain and language gives.
        folder: Where the cells are.
        information: Options of the measures that take them.
        pooling: Which token's state stands for a prompt.
    """

    def __init__(
        self,
        source: PreTrainedModel,
        texts: Mapping[str, DomainTexts],
        folder: Path,
        information: InformationConfig,
        pooling: Pooling,
    ) -> None:
        self.source, self.folder = source, folder
        self.information, self.pooling = information, pooling
        self.domains = texts
        self.texts = {**texts, MIXED: mixed_texts(texts)}
        self.held_B = held_blocks(len(self.texts[MIXED].blocks_BT), HELD_SHARE)
        self.tokens = {
            name: [float(len(row_T) - 1) for row_T in group.questions]
            for name, group in texts.items()
        }
        self.plans: dict[tuple[Rule, int, str], Groups] = {}
        self.models: dict[tuple[Groups, str], Nats] = {}
        self.source_nats: Nats = {}
        self._states: dict[str, Tensor] = {}

    @property
    def num_tokens(self) -> int:
        """Tokens that each plan and refit is calibrated on."""
        return self.texts[MIXED].blocks_BT.numel()

    def measured_tokens(self) -> dict[str, int]:
        """Return the predicted tokens of each domain."""
        return {name: int(sum(counts)) for name, counts in self.tokens.items()}

    def make_plans(self, rules: Sequence[Rule], numbers: Sequence[int]) -> None:
        """Make the plan of each rule, number of layers and domain, and that of the mixed text."""
        keys = [(rule, name) for name in self.texts for rule in rules]
        for rule, name in track(keys, "plans", total=len(keys)):
            paths = {n: self._path("plan", rule, n, name) for n in numbers}
            missing = [n for n in numbers if not paths[n].is_file()]
            for num_removed, groups in self._groups(rule, missing, name):
                cell = {"groups": [[list(g.members), g.anchor] for g in groups]}
                write_json(paths[num_removed], cell, schema=SCHEMA)
            for num_removed, path in paths.items():
                found = read_json(path, schema=SCHEMA)
                self.plans[rule, num_removed, name] = tuple(
                    Group(members=tuple(members), anchor=anchor)
                    for members, anchor in found["groups"]
                )

    def _groups(
        self, rule: Rule, numbers: Sequence[int], name: str
    ) -> Iterator[tuple[int, Groups]]:
        """Yield the plans of a rule for several numbers of layers to remove."""
        blocks_BT = self.texts[name].blocks_BT
        if rule == "block_repaired" and numbers:
            part_BT, held_B = search_part(blocks_BT, self.held_B)
            found = repaired_blocks_of(self.source, part_BT, held_B, numbers)
            yield from ((n, candidates[0].groups) for n, candidates in found.items())
            return
        method = next((row for row in SEARCHES if row == rule), None)
        measure = next((row for row in MEASURES if row == rule), None)
        for n in numbers:
            if method is not None:
                yield n, search_plan(self.source, blocks_BT, self.held_B, n, method)[0].groups
            if measure is not None:
                yield n, similar_groups(self._layer_states(name), measure, n, self.information)

    def _layer_states(self, name: str) -> Tensor:
        if name == MIXED:
            return torch.cat([self._layer_states(domain) for domain in self.domains], dim=1)
        if name not in self._states:
            prompts = self.texts[name].prompts
            self._states[name] = layer_states(self.source, prompts, pooling=self.pooling)
        return self._states[name]

    def measure(self, refits: Sequence[Refitted]) -> None:
        """Measure the source and every refitted model on all domains, lowest groups first.

        Equal plans with the same text are one model.

        Args:
            refits: Whether a plan is refitted on its own domain's text, on the mixed one, or on
                each of them.
        """
        states, batches = first_states(self.source, self.domains)
        path = self._path("source")
        if not path.is_file():
            write_json(path, question_nats(self.source, states, batches), schema=SCHEMA)
        self.source_nats = read_json(path, schema=SCHEMA)
        keys = {
            (groups, name if refit == "own" else MIXED)
            for (*_, name), groups in self.plans.items()
            for refit in refits
        }
        ordered = sorted(keys, key=lambda key: ([g.members for g in key[0]], key[1]))
        for groups, text in track(ordered, "models", total=len(ordered)):
            path = self._path("model", show(groups), text)
            if not path.is_file():
                states = raised(self.source, states, groups[0].start)
                blocks = states.blocks
                prefix_BTD = mixed(list(blocks.values())) if text == MIXED else blocks[text]
                model = merged_model(self.source, groups, prefix_BTD, self.held_B)
                write_json(path, question_nats(model, states, batches), schema=SCHEMA)
            self.models[groups, text] = read_json(path, schema=SCHEMA)

    def _path(self, *parts: Any) -> Path:
        name = "-".join(str(part).replace("/", "-").replace(" ", "_") for part in parts)
        return self.folder / "cells" / f"{name}.json"
