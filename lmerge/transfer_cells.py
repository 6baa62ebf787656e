"""The cells of a study of transfer: written as they are finished, read again by a later call."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lmerge.activations import Pooling, layer_states
from lmerge.data.batching import held_blocks
from lmerge.files import read_json, write_json
from lmerge.information import InformationConfig
from lmerge.plan import Group
from lmerge.progress import track
from lmerge.search import search_plan
from lmerge.transfer import (
    MIXED,
    Rule,
    first_states,
    merged_model,
    mixed,
    mixed_texts,
    question_nats,
    raised,
    similar_group,
)
from lmerge.transfer_data import DomainTexts
from lmerge.transfer_table import Nats

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
        self.plans: dict[tuple[Rule, int, str], Group] = {}
        self.models: dict[tuple[Group, str], Nats] = {}
        self.source_nats: Nats = {}
        self._states: dict[str, Tensor] = {}

    @property
    def num_tokens(self) -> int:
        """Tokens that each plan and refit is calibrated on."""
        return self.texts[MIXED].blocks_BT.numel()

    def measured_tokens(self) -> dict[str, int]:
        """Return the predicted tokens of each domain."""
        return {name: int(sum(counts)) for name, counts in self.tokens.items()}

    def make_plans(self, rules: Iterable[Rule], numbers: Iterable[int]) -> None:
        """Make the plan of each rule, number of layers and domain, and that of the mixed text."""
        keys = [(r, n, name) for name in self.texts for r in rules for n in numbers]
        for rule, num_removed, name in track(keys, "plans", total=len(keys)):
            path = self._path("plan", rule, num_removed, name)
            if not path.is_file():
                group = self._group(rule, num_removed, name)
                write_json(path, {"first": group.start, "last": group.stop - 1}, schema=SCHEMA)
            cell = read_json(path, schema=SCHEMA)
            members = tuple(range(cell["first"], cell["last"] + 1))
            self.plans[rule, num_removed, name] = Group(members=members, anchor=members[0])

    def _group(self, rule: Rule, num_removed: int, name: str) -> Group:
        if rule == "block_repaired":
            blocks_BT = self.texts[name].blocks_BT
            found = search_plan(self.source, blocks_BT, self.held_B, num_removed, rule)
            return found[0].groups[0]
        return similar_group(self._layer_states(name), rule, num_removed, self.information)

    def _layer_states(self, name: str) -> Tensor:
        if name == MIXED:
            return torch.cat([self._layer_states(domain) for domain in self.domains], dim=1)
        if name not in self._states:
            prompts = self.texts[name].prompts
            self._states[name] = layer_states(self.source, prompts, pooling=self.pooling)
        return self._states[name]

    def measure(self) -> None:
        """Measure the source and every refitted model on all domains, lowest blocks first.

        A plan is refitted on its own domain and on the mixed text. Equal plans are one model.
        """
        keys = {(group, text) for (*_, name), group in self.plans.items() for text in (name, MIXED)}
        states, batches = first_states(self.source, self.domains)
        path = self._path("source")
        if not path.is_file():
            write_json(path, question_nats(self.source, states, batches), schema=SCHEMA)
        self.source_nats = read_json(path, schema=SCHEMA)
        ordered = sorted(keys, key=lambda key: (key[0].start, key[0].stop, key[1]))
        for group, text in track(ordered, "models", total=len(ordered)):
            path = self._path("model", group.start, group.stop - 1, text)
            if not path.is_file():
                states = raised(self.source, states, group.start)
                blocks = states.blocks
                prefix_BTD = mixed(list(blocks.values())) if text == MIXED else blocks[text]
                model = merged_model(self.source, group, prefix_BTD, self.held_B)
                write_json(path, question_nats(model, states, batches), schema=SCHEMA)
            self.models[group, text] = read_json(path, schema=SCHEMA)

    def _path(self, *parts: Any) -> Path:
        name = "-".join(str(part).replace("/", "-") for part in parts)
        return self.folder / "cells" / f"{name}.json"
