"""Does alignment help averaging? Losses of merged SmolLM2 models under every aligner.

Run `python benchmarks/alignment_experiment.py --questions DIR_OF_MMLU_CSVS`, then
`python benchmarks/alignment_report.py`. Pairs of adjacent layers along the depth, and removals of
3, 6 and 10 layers, are averaged (1/G each), or their alphas learned on the groups' output states;
each model is measured with and without the closed-form repair. `drop` keeps the anchor alone,
`naive` averages the weights as they are, as published, and `folded` does so in one frame of norms.

Every model is a line of JSON in `--out`; a model that has its line is not made again, so that the
program may be stopped and started at will. Calibration: val questions and bundled prose. Measured
on: bundled English prose (split test) and, for removals, MMLU questions (test, cloze) after the
repair; nothing is chosen by either.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from lmerge.activations import neuron_activations
from lmerge.align import BY_ACTIVATIONS, Aligner, Orders
from lmerge.alphas import AlphaConfig
from lmerge.cache import StateCache, cache_states
from lmerge.data.module import MMLUDataModule
from lmerge.data.prompts import build_choice_batches
from lmerge.data.questions import load_questions
from lmerge.data.records import ChoiceBatch
from lmerge.data.text import read_text, token_blocks
from lmerge.frames import members_in_one_frame
from lmerge.groups import align_members
from lmerge.llama import (
    decoder_layers,
    head_spec,
    layer_tensors,
    lm_logits,
    num_layers,
    run_span,
    span,
    stack_layers,
)
from lmerge.losses import LossConfig
from lmerge.merged import MergedLlama
from lmerge.objective import Objective
from lmerge.plan import Group, MergePlan
from lmerge.prefix import PrefixCache
from lmerge.progress import track
from lmerge.repair import RepairConfig, refit_groups
from lmerge.score import compare_text, normalise_cloze, score_choices
from lmerge.source import load_model

SOURCE = "smollm2-135m"
ALIGNED: dict[str, Aligner] = {
    "folded": "none",
    "rowwise": "rowwise",
    "weights": "weights",
    "activations": "activations",
    "full": "full",
    "soft": "soft",
}
METHODS, LEARNED = ("drop", "naive", *ALIGNED), ("folded", "weights", "activations", "full")
PAIRS = {f"{i},{i + 1}": ((i, i + 1),) for i in (14, 4, 22, 8, 18, 26, 1, 11)}
REMOVALS: dict[str, tuple[tuple[int, ...], ...]] = {
    "3 (pairs)": ((13, 14), (17, 18), (21, 22)),
    "6 (pairs)": ((13, 14), (15, 16), (17, 18), (19, 20), (21, 22), (25, 26)),
    "6 (block)": (tuple(range(12, 19)),),
    "10 (triples)": tuple((i, i + 1, i + 2) for i in (12, 15, 18, 21, 24)),
}
ASKED = ("drop", "naive", "folded", "weights", "full")
"""Methods whose repaired models answer MMLU questions, which takes longest."""
LEARN_ON = ("4,5", "14,15", "22,23", "3 (pairs)", "6 (block)")


class Cell(NamedTuple):
    """One merged model, measured as it is and after the repair."""

    plan: str
    method: str
    alphas: str
    """`average` or `learned`."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all models share."""

    source: PreTrainedModel
    blocks_BT: Tensor
    """Calibration blocks."""
    held_B: Tensor
    """Which of them choose the refit's regularisation."""
    eval_BT: Tensor
    """Blocks that are measured on."""
    questions: list[ChoiceBatch]
    num_steps: int


class States(NamedTuple):
    """States below the first merged layer, and the source's last ones."""

    calibration: StateCache
    evaluation: StateCache
    activations: dict[int, Tensor]


def make_setting(args: argparse.Namespace) -> Setting:
    """Load the source, the calibration data and what is measured on."""
    data = MMLUDataModule(
        SOURCE, args.questions, ["all"], num_shots=0, num_calibration_tokens=args.calibration_tokens
    )
    data.setup("fit")
    tokens = data.tokenizer(read_text("bank", split="test"))["input_ids"]
    found = load_questions(args.questions, "test")
    chosen = found[:: max(1, len(found) // args.num_questions)][: args.num_questions]
    batches = build_choice_batches(
        chosen, {}, data.tokenizer, scoring="cloze", num_shots=0, max_tokens_per_batch=2048
    )
    return Setting(
        source=load_model(SOURCE, "float32"),
        blocks_BT=data.calibration_blocks(),
        held_B=data.held_out(),
        eval_BT=token_blocks(tokens, 256)[: args.num_blocks],
        questions=batches,
        num_steps=args.num_steps,
    )


def plan_of(groups: tuple[tuple[int, ...], ...], depth: int) -> MergePlan:
    """A plan whose anchors are the first members."""
    return MergePlan(num_layers=depth, groups=tuple(Group(members=g, anchor=g[0]) for g in groups))


def states_of(setting: Setting, plan: MergePlan) -> States:
    """Run the source once for a plan."""
    first = plan.groups[0].start
    members = [i for group in plan.groups for i in group.members]
    return States(
        cache_states(setting.source, setting.blocks_BT, first),
        cache_states(setting.source, setting.eval_BT, first),
        neuron_activations(setting.source, members, setting.blocks_BT[:16]),
    )


def orders_of(setting: Setting, plan: MergePlan, aligner: Aligner, states: States) -> Orders:
    """Align every group of a plan."""
    orders: Orders = {}
    for group in plan.groups:
        raw = [layer_tensors(decoder_layers(setting.source)[i]) for i in group.members]
        framed = members_in_one_frame(raw, [None] * len(raw), 0)
        layers = dict(zip(group.members, framed, strict=True))
        known = states.activations if aligner in BY_ACTIVATIONS else None
        spec = head_spec(setting.source.config)
        orders |= align_members(group.anchor, layers, aligner, spec, activations=known)
    return orders


def make_merged(setting: Setting, plan: MergePlan, cell: Cell, states: States) -> MergedLlama:
    """Return the merged model of a cell, before the repair."""
    source, average = setting.source, AlphaConfig(granularity="layer", start="uniform")
    if cell.method == "drop":
        return MergedLlama(source, plan, {}, AlphaConfig(granularity="layer"))
    if cell.method == "naive":
        return unfolded(source, MergedLlama(source, plan, {}, average))
    orders = orders_of(setting, plan, ALIGNED[cell.method], states)
    if cell.alphas == "average":
        return MergedLlama(source, plan, orders, average)
    merged = MergedLlama(source, plan, orders, AlphaConfig(granularity="neuron", start="anchor"))
    learn(setting, merged, states)
    return merged


def unfolded(source: PreTrainedModel, merged: MergedLlama) -> MergedLlama:
    """Put the members' weights as they are in the place of the folded ones (published)."""
    for group, layer in zip(merged.plan.groups, merged.merged_layers(), strict=True):
        stacked = stack_layers([layer_tensors(decoder_layers(source)[i]) for i in group.members])
        for name, tensor in layer.stacked().items():
            tensor.copy_(stacked[name])
    return merged


def learn(setting: Setting, merged: MergedLlama, states: States) -> None:
    """Learn neuron alphas on the groups' output states, on the blocks that are not held out."""
    kept = (~setting.held_B).nonzero().flatten()
    cache = StateCache(*(part[kept] for part in states.calibration))
    objective = Objective(setting.source, merged, cache, LossConfig(kl=0.0, state=1.0))
    optimizer = torch.optim.Adam(merged.alpha_parameters().values(), lr=0.02)
    for step in range(setting.num_steps):
        generator = torch.Generator().manual_seed(step)
        index_B = torch.randperm(len(kept), generator=generator)[:4]
        optimizer.zero_grad()
        objective(index_B, step)["loss"].backward()
        optimizer.step()


@torch.no_grad()
def measure(
    setting: Setting, merged: MergedLlama, states: States, *, ask: bool
) -> dict[str, object]:
    """Return loss and KL of each block, in nats a token, and which questions are answered right."""
    source, model = setting.source, merged.plain()
    above = span(model, merged.first_merged, num_layers(model), final_norm=True)
    rows = []
    for token_BT, prefix_BTD, final_BTD in zip(
        setting.eval_BT.split(4), *(part.split(4) for part in states.evaluation), strict=True
    ):
        logits_BTV = lm_logits(source, run_span(above, prefix_BTD))[:, :-1]
        wanted_BTV = lm_logits(source, final_BTD)[:, :-1]
        for tokens, logits, wanted in zip(token_BT[:, 1:], logits_BTV, wanted_BTV, strict=True):
            kl_T, _agree = compare_text(wanted, logits)
            rows.append((float(cross_entropy(logits, tokens)), float(kl_T.mean())))
    found: dict[str, object] = {"loss": [r[0] for r in rows], "kl": [r[1] for r in rows]}
    return {**found, "correct": answers(model, setting.questions)} if ask else found


def answers(model: PreTrainedModel, batches: list[ChoiceBatch]) -> list[int]:
    """Return 1 for each question whose likeliest answer by character is right, else 0."""
    right: dict[int, int] = {}
    for batch in batches:
        logp_B4 = score_choices(model, batch, PrefixCache())
        chosen_B = normalise_cloze(logp_B4, batch.choice_length_B4).argmax(dim=1)
        right |= dict(
            zip(batch.index_B.tolist(), (chosen_B == batch.answer_B).int().tolist(), strict=True)
        )
    return [right[i] for i in sorted(right)]


def run_cell(
    setting: Setting, plan: MergePlan, cell: Cell, states: States
) -> list[dict[str, object]]:
    """Return the lines of a cell: without and with the repair."""
    start, ask = time.perf_counter(), cell.plan in REMOVALS and cell.method in ASKED
    merged = make_merged(setting, plan, cell, states)
    rows = [{"repair": False, **measure(setting, merged, states, ask=False)}]
    prefix_BTD = states.calibration.prefix_BTD
    refit_groups(setting.source, merged, prefix_BTD, setting.held_B, RepairConfig())
    rows.append({"repair": True, **measure(setting, merged, states, ask=ask)})
    return [{**cell._asdict(), **row, "seconds": time.perf_counter() - start} for row in rows]


def all_cells() -> list[Cell]:
    """Return every cell, those of a plan together."""
    cells = []
    for plan in (*PAIRS, *REMOVALS):
        cells += [Cell(plan, method, "average") for method in METHODS]
        cells += [Cell(plan, method, "learned") for method in LEARNED if plan in LEARN_ON]
    return cells


def done_cells(path: Path) -> set[Cell]:
    """Return the cells whose two lines are there."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    rows = [json.loads(line) for line in lines]
    return {Cell(*(row[key] for key in Cell._fields)) for row in rows if row.get("repair")}


def source_row(setting: Setting) -> dict[str, object]:
    """Return the line of the source itself."""
    plan = MergePlan(num_layers=num_layers(setting.source), groups=())
    merged = MergedLlama(setting.source, plan, {}, AlphaConfig())
    states = States(*[cache_states(setting.source, setting.eval_BT, plan.num_layers)] * 2, {})
    return {"plan": "source", "method": "source", "alphas": "", "repair": True,
            **measure(setting, merged, states, ask=True)}  # fmt: skip


def main() -> None:
    """Make the models that have no line yet."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--questions", default="bank", help="bank, or a folder of MMLU CSV files")
    parser.add_argument("--out", type=Path, default=Path("runs/alignment_experiment.jsonl"))
    parser.add_argument("--num_blocks", type=int, default=8, help="blocks of 256 tokens")
    parser.add_argument("--num_questions", type=int, default=114)
    parser.add_argument("--calibration_tokens", type=int, default=8192)
    parser.add_argument("--num_steps", type=int, default=80, help="of the learned alphas")
    parser.add_argument("--only", nargs="+", help="plans by name, such as 14,15; default all")
    parser.add_argument("--alphas", nargs="+", default=["average", "learned"])
    parser.add_argument("--minutes", type=float, default=1e9, help="start no plan after so many")
    args = parser.parse_args()
    logging.getLogger("lmerge").setLevel(logging.WARNING)
    start, done = time.monotonic(), done_cells(args.out)
    wanted = [c for c in all_cells() if c.alphas in args.alphas and c not in done]
    cells = [c for c in wanted if c.plan in (args.only or {c.plan})]
    setting = make_setting(args)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    states, plan, name = None, None, None
    with args.out.open("a", encoding="utf-8") as file:
        if Cell("source", "source", "") not in done:
            file.write(json.dumps(source_row(setting)) + "\n")
        for cell in track(cells, "models", total=len(cells)):
            if time.monotonic() - start > 60 * args.minutes:
                break
            if cell.plan != name:
                name, plan = cell.plan, plan_of({**PAIRS, **REMOVALS}[cell.plan], 30)
                states = states_of(setting, plan)
            assert plan is not None
            assert states is not None
            for row in run_cell(setting, plan, cell, states):
                file.write(json.dumps(row) + "\n")
            file.flush()


if __name__ == "__main__":
    main()
