"""The cells of a comparison: one method at one budget each, calibrated and measured alike."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lmerge.baselines.calibration import Calibration, spread_blocks
from lmerge.baselines.table import make_baseline
from lmerge.compose import Composer, MethodConfig, Planner
from lmerge.data.batching import by_domain_language
from lmerge.data.mixing import Mix, held_blocks
from lmerge.data.module import MMLUDataModule
from lmerge.data.prompts import questions_text
from lmerge.data.records import ChoiceBatch, Scoring, TextBatch
from lmerge.data.text import block_batches, read_texts, text_batches
from lmerge.files import provenance, read_json, write_json
from lmerge.llama import num_layers
from lmerge.plan import Group, MergePlan
from lmerge.runs import read_plan, write_plan
from lmerge.search import Costs, SearchMethod
from lmerge.source import model_fingerprint
from lmerge.yardstick import Yardstick

SCHEMA = 1

QUESTIONS = "questions"
"""Name of the text that the test questions with their answers make; with several domains or
languages there is one of each, such as `questions: medical, en`."""

CALIBRATION = "calibration"
"""Name of the calibration blocks among the texts, so that overfitting shows."""

BASELINE_TOKENS = 65_536
"""Calibration tokens that the baselines see: each estimates at most D x D numbers from them."""


@dataclass(frozen=True, kw_only=True)
class CompareData:
    """What methods are calibrated on, and what they are measured on."""

    questions: str = "bank"
    """As `--data.questions` of fit: val to calibrate on, test to measure on."""
    domains: list[str] = field(default_factory=lambda: ["all"])
    """Domains of the questions that are calibrated on."""
    eval_domains: list[str] = field(default_factory=lambda: ["all"])
    """Domains of the questions that are measured on; each is a text of its own."""
    languages: list[str] = field(default_factory=lambda: ["en"])
    """ISO 639-1 codes."""
    calibration_text: str | list[str] | None = "bank"
    """Prose to calibrate on: `bank`, files, parts of files, or null for none."""
    calibration_mix: Mix = "length"
    """Share of each text, as `--data.calibration_mix` of fit."""
    eval_text: str | list[str] | None = "bank"
    """Prose to measure on, never calibrated on: `bank`, files, parts of files, or null for none."""
    block_size: int = 256
    """Tokens in a block."""
    num_calibration_tokens: int = 98_304
    """Tokens to calibrate on."""
    calibration_questions: int | None = None
    """Val questions a subject, the first ones; null for all."""
    eval_questions: int | None = 2
    """Test questions a subject, the first ones; null for all."""
    eval_tokens: int = 4096
    """Tokens of each text that are measured on, its last ones; at least two blocks."""
    num_shots: int = 0
    """Answered examples before each question."""
    scorings: list[Scoring] = field(default_factory=lambda: ["cloze", "letter"])
    """How questions are scored."""
    holdout: float = 0.15
    """Share of the calibration blocks that choose the regularisation and the plan."""


class Bench:
    """Source, calibration and yardstick of a comparison; each is made when it is first needed.

    Args:
        source: The source model.
        source_name: What it was loaded from.
        data: What is calibrated and measured on.
        run_dir: Folder of the cells.
        seed: Seed of the methods.
        most_removed: Largest budget of the comparison.
    """

    def __init__(
        self,
        source: PreTrainedModel,
        source_name: str,
        data: CompareData,
        run_dir: Path,
        seed: int,
        *,
        most_removed: int,
    ) -> None:
        source.requires_grad_(False)
        self.source, self.source_name, self.data, self.seed = source, source_name, data, seed
        self.run_dir, self.most_removed = run_dir, most_removed
        self.setting = {
            "source": model_fingerprint(source),
            "data": asdict(data),
            "seed": seed,
        }
        self._calibration: tuple[Tensor, Tensor, dict[str, str]] | None = None
        self._baseline: Calibration | None = None
        self._yardstick: Yardstick | None = None
        self._planner: Planner | None = None
        self._composer: Composer | None = None

    def path(self, method: MethodConfig, num_removed: int) -> Path:
        """Return where a cell is kept: its name tells what it depends on."""
        options = asdict(method)
        if method.baseline is not None:  # no other option concerns it
            options = {"name": method.name, "baseline": method.baseline}
        digest = self._digest(options, num_removed)
        title = "".join(c if c.isalnum() else "_" for c in method.title)
        return self.run_dir / "cells" / f"{title}-{num_removed}-{digest}.json"

    def _digest(self, *told: object) -> str:
        """Return hex digits of the setting and of what else a file depends on."""
        text = json.dumps([self.setting, *told], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:8]

    def has(self, method: MethodConfig, num_removed: int) -> bool:
        """Return whether a cell was computed before."""
        return self.path(method, num_removed).is_file()

    def cell(self, method: MethodConfig, num_removed: int) -> dict[str, Any]:
        """Return what a cell holds."""
        return read_json(self.path(method, num_removed), schema=SCHEMA)

    def compute(self, method: MethodConfig, num_removed: int) -> None:
        """Make a method's model, measure it and write the cell."""
        start = time.monotonic()
        model, kept = self._make(method, num_removed)
        minutes = (time.monotonic() - start) / 60
        results = self.yardstick().score(model)
        cell = {
            "method": method.title,
            "num_removed": num_removed,
            "kept": kept,
            "minutes": minutes,
            "config": asdict(method),
            "source": self.source_name,
            "fingerprints": {"source": self.setting["source"], **self.calibration()[2]},
            "setting": asdict(self.data),
            **results,
            "provenance": provenance(),
        }
        write_json(self.path(method, num_removed), cell, schema=SCHEMA)

    def _make(self, method: MethodConfig, num_removed: int) -> tuple[PreTrainedModel, list[Any]]:
        token_BT, held_B, _ = self.calibration()
        if method.baseline is not None:
            if self._baseline is None:
                part_BT = spread_blocks(token_BT, BASELINE_TOKENS)
                self._baseline = Calibration(self.source, part_BT, seed=self.seed)
            shallow = make_baseline(method.baseline, self._baseline, num_removed)
            return shallow.model, list(shallow.kept)
        if self._composer is None:
            self._composer = Composer(self.source, token_BT, held_B, seed=self.seed)
        groups = self._groups(method.plan_method, num_removed)
        merged = self._composer.compose(groups, method)
        return merged.plain(), [list(group.members) for group in groups]

    def _groups(self, method: SearchMethod, num_removed: int) -> tuple[Group, ...]:
        """Return the plan of a search; it is kept in the run folder for other rows and calls."""
        digest = self._digest(method, num_removed)
        path = self.run_dir / "plan" / f"{method}-{num_removed}-{digest}.json"
        if path.is_file():
            return read_plan(path).groups
        groups = self.planner().groups(method, num_removed)
        self._save_costs()
        depth = num_layers(self.source)
        plan = MergePlan(num_layers=depth, groups=groups, method=method)
        write_plan(path.parent, plan, path)
        return groups

    def calibration(self) -> tuple[Tensor, Tensor, dict[str, str]]:
        """Return calibration blocks, which are held out, and fingerprints of what they are."""
        if self._calibration is None:
            module = self._module(self.data.domains, self.data.calibration_questions)
            module.setup("fit")
            blocks_BT = module.calibration_blocks()
            held_B = held_blocks(len(blocks_BT), self.data.holdout)
            self._calibration = (blocks_BT, held_B, module.fingerprints)
        return self._calibration

    def _module(self, domains: list[str], max_questions: int | None) -> MMLUDataModule:
        data = self.data
        return MMLUDataModule(
            source=self.source_name,
            questions=data.questions,
            domains=domains,
            languages=data.languages,
            num_shots=data.num_shots,
            scorings=data.scorings,
            calibration_text=data.calibration_text,
            calibration_mix=data.calibration_mix,
            eval_text=data.eval_text,
            block_size=data.block_size,
            num_calibration_tokens=data.num_calibration_tokens,
            holdout=data.holdout,
            max_questions=max_questions,
            seed=self.seed,
        )

    def planner(self) -> Planner:
        """Return the plan search that all budgets share."""
        if self._planner is None:
            token_BT, held_B, _ = self.calibration()
            self._planner = Planner(
                self.source,
                token_BT,
                held_B,
                costs=self._known_costs(),
                most_removed=self.most_removed,
            )
        return self._planner

    def _costs_path(self) -> Path:
        return self.run_dir / "plan" / f"costs-{self._digest(self.most_removed)}.json"

    def _known_costs(self) -> Costs:
        path = self._costs_path()
        rows = read_json(path, schema=SCHEMA)["costs"] if path.is_file() else []
        return {(first, stop): cost for first, stop, cost in rows}

    def _save_costs(self) -> None:
        path = self._costs_path()
        if self._planner is not None and self._planner.costs and not path.is_file():
            rows = [[first, stop, cost] for (first, stop), cost in self._planner.costs.items()]
            write_json(path, {"costs": rows}, schema=SCHEMA)

    def yardstick(self) -> Yardstick:
        """Return texts and questions with the source's results."""
        if self._yardstick is None:
            module = self._module(self.data.eval_domains, self.data.eval_questions)
            module.setup("test")
            choices = [b for b in module.test_dataloader() if isinstance(b, ChoiceBatch)]
            self._yardstick = Yardstick(self.source, self._texts(module), choices)
        return self._yardstick

    def _texts(self, module: MMLUDataModule) -> Mapping[str, Sequence[TextBatch]]:
        data, blocks = self.data, max(2, self.data.eval_tokens // self.data.block_size)
        texts = read_texts(data.eval_text, data.languages, split="test")
        texts |= question_texts(module)
        found: dict[str, Sequence[TextBatch]] = {}
        for name, text in texts.items():
            # A long text is cut before it is tokenised: six characters a token are plenty.
            batches = text_batches(
                name,
                text[-8 * blocks * data.block_size :],
                module.tokenizer,
                block_size=data.block_size,
                stride=data.block_size,
                batch_size=1,
            )
            found[name] = batches[-blocks:]
        held_BT = self.calibration()[0][self.calibration()[1]]
        place_B = torch.linspace(0, len(held_BT) - 1, min(blocks, len(held_BT))).long()
        found[CALIBRATION] = block_batches(CALIBRATION, held_BT[place_B], 1)
        return found


def question_texts(module: MMLUDataModule) -> dict[str, str]:
    """Return the questions with their answers as a text for each domain and language."""
    groups = by_domain_language(module.questions, module.domain_subjects)
    return {
        f"{QUESTIONS}: {', '.join(key)}" if len(groups) > 1 else QUESTIONS: questions_text(group)
        for key, group in groups.items()
    }
