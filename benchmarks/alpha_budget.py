"""What the methods of alpha_experiment.py share: data, plans, orders and the source's states."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lmerge.align import Orders
from lmerge.alphas import AlphaConfig
from lmerge.cache import StateCache
from lmerge.data.module import MMLUDataModule
from lmerge.data.records import ChoiceBatch
from lmerge.data.text import read_text, token_blocks
from lmerge.divergence import Targets, source_targets
from lmerge.files import read_tensors, write_tensors
from lmerge.frames import members_in_one_frame
from lmerge.groups import align_members
from lmerge.information import InformationConfig
from lmerge.llama import (
    capture_outputs,
    decoder_layers,
    embed,
    head_spec,
    head_weight,
    layer_tensors,
    lm_logits,
    num_layers,
    run_span,
    span,
)
from lmerge.merged import MergedLlama
from lmerge.plan import MergePlan, make_plan
from lmerge.preparation import similarity_by_domain
from lmerge.progress import track
from lmerge.runs import read_plan, write_plan
from lmerge.search import SearchMethod, search_plan
from lmerge.source import load_model


class Shared:
    """What all budgets share: source, data, similarity and texts."""

    def __init__(self, folder: Path, name: str, questions: str, plan: str) -> None:
        self.folder, self.name, self.questions, self.plan = folder, name, questions, plan
        self.source = load_model(name, "float32").requires_grad_(False)
        self.data = self.data_of("fit", num_calibration_tokens=6_144, num_prompts=16)
        text_ids = self.data.tokenizer(read_text("bank", split="test"))["input_ids"]
        held_NT = self.data.calibration_blocks()[self.data.held_out()]
        self.held = self.data.held_out().nonzero().flatten()
        self.text_BT = torch.cat([held_NT, token_blocks(text_ids, 256)[:8]])
        """Held-out blocks, then blocks to report on."""

    def data_of(self, stage: str, **options: Any) -> MMLUDataModule:
        """Read the questions of a stage."""
        data = MMLUDataModule(self.name, questions=self.questions, num_shots=0, **options)
        data.setup(stage)
        return data

    @cached_property
    def similarity(self) -> Tensor:
        """Angular similarity of the layers on calibration prompts."""
        path = self.folder / "similarity.json"
        if not path.is_file():
            found = similarity_by_domain(
                self.source, self.data, "angular", "last", InformationConfig()
            )["all"]
            path.write_text(json.dumps(found.tolist()))
        return torch.tensor(json.loads(path.read_text()), dtype=torch.float64)

    def prepare(self, firsts: list[int]) -> None:
        """Compute the source's states for groups that start at these layers, or read them."""
        self.states: dict[tuple[str, int], StateCache] = {}
        blocks = {"calibration": self.data.calibration_blocks(), "text": self.text_BT}
        for name, token_BT in blocks.items():
            path = self.folder / f"{name}.safetensors"
            if not path.is_file():
                write_tensors(path, self._states(name, token_BT, firsts), {})
            found, _ = read_tensors(path)
            for first in firsts:
                self.states[name, first] = StateCache(found[str(first)], found["final"])
        head_VD = head_weight(self.source)
        assert head_VD is not None
        final_BTD = self.states["text", firsts[0]].final_BTD
        self.targets: list[Targets] = [source_targets(s_TD, head_VD) for s_TD in final_BTD]
        """What a KL needs of the source, for each block of text."""

    @torch.no_grad()
    def _states(self, name: str, token_BT: Tensor, firsts: list[int]) -> dict[str, Tensor]:
        parts: dict[str, list[Tensor]] = {key: [] for key in ("final", *map(str, firsts))}
        for part_BT in track(token_BT.split(2), f"{name} states", total=-(-len(token_BT) // 2)):
            seen: list[Tensor] = [embed(self.source, part_BT)]
            with capture_outputs(self.source, seen):
                final_BTD = self.source.model(part_BT, use_cache=False).last_hidden_state
            parts["final"].append(final_BTD)
            for first in firsts:
                parts[str(first)].append(seen[first])  # after the embedding: inputs of the layers
        return {key: torch.cat(found) for key, found in parts.items()}

    @cached_property
    def choices(self) -> list[ChoiceBatch]:
        """MMLU test questions, two a subject of the study's domains, zero-shot."""
        data = self.data_of("test", max_questions=2, eval_text=None)
        return [b for b in data.test_dataloader() if isinstance(b, ChoiceBatch)]


class Budget:
    """One plan, its orders, and the source's states around it."""

    def __init__(self, shared: Shared, removed: int) -> None:
        self.shared, self.removed, self.folder = shared, removed, shared.folder / str(removed)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.plan = self._plan()
        self.orders = self._orders()

    def _plan(self) -> MergePlan:
        path, shared = self.folder / "plan.json", self.shared
        if not path.is_file() and shared.plan == "block":
            write_plan(self.folder, make_plan(shared.similarity, self.removed, "block"))
        elif not path.is_file():
            blocks_BT, held_B = shared.data.calibration_blocks(), shared.data.held_out()
            sizes = {"num_fit_tokens": 2048, "num_held_tokens": 512}
            method: SearchMethod = "block_repaired"
            found = search_plan(shared.source, blocks_BT, held_B, self.removed, method, **sizes)
            groups, depth = found[0].groups, num_layers(shared.source)
            write_plan(self.folder, MergePlan(num_layers=depth, groups=groups, method=method))
        return read_plan(path)

    def _orders(self) -> Orders:
        (group,), source = self.plan.groups, self.shared.source
        raw = [layer_tensors(decoder_layers(source)[i]) for i in group.members]
        framed = members_in_one_frame(raw, [None] * len(raw), group.anchor_position)
        layers = dict(zip(group.members, framed, strict=True))
        return align_members(group.anchor, layers, "weights", head_spec(source.config))

    @property
    def calibration(self) -> StateCache:
        """States of the calibration blocks."""
        return self.shared.states["calibration", self.plan.groups[0].start]

    @property
    def text(self) -> StateCache:
        """States of the held-out blocks and of the text that is reported on."""
        return self.shared.states["text", self.plan.groups[0].start]

    def model(self, config: AlphaConfig) -> MergedLlama:
        """Return a merged model with the alphas that a config starts from."""
        return MergedLlama(
            self.shared.source, self.plan, self.orders, config, self.shared.similarity
        )

    @torch.no_grad()
    def scores(self, merged: MergedLlama, *, held: bool) -> tuple[list[float], list[float]]:
        """Return the summed nats and the summed KL of each block."""
        count, model = len(self.shared.held), merged.causal_lm
        blocks = range(count) if held else range(count, len(self.shared.text_BT))
        suffix = span(model, merged.first_merged, num_layers(model), final_norm=True)
        nats, kls = [], []
        for i in blocks:
            state_ND = run_span(suffix, self.text.prefix_BTD[i][None])[0]
            logits_NV = lm_logits(model, state_ND)
            lse_N = logits_NV.logsumexp(dim=-1)
            target_N = self.shared.text_BT[i, 1:]
            nll_N = lse_N[:-1] - logits_NV[:-1].gather(1, target_N[:, None])[:, 0]
            mean_ND, plogp_N = self.shared.targets[i]
            kl_N = plogp_N + lse_N - (state_ND * mean_ND).sum(dim=-1)
            nats.append(float(nll_N.double().sum()))
            kls.append(float(kl_N[:-1].double().sum()))
        return nats, kls

    def held_kl(self, merged: MergedLlama) -> float:
        """Return the KL on the held-out calibration blocks, in nats a token."""
        _, kls = self.scores(merged, held=True)
        return sum(kls) / (255 * len(kls))

    @torch.no_grad()
    def source_nats(self) -> list[float]:
        """Return the source's summed nats of each block that is reported on."""
        nats = []
        for i in range(len(self.shared.held), len(self.shared.text_BT)):
            logits_NV = lm_logits(self.shared.source, self.text.final_BTD[i])
            nats.append(
                float(
                    torch.nn.functional.cross_entropy(
                        logits_NV[:-1], self.shared.text_BT[i, 1:], reduction="sum"
                    )
                )
            )
        return nats
