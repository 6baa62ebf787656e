"""Does alignment help averaging? Losses of merged SmolLM2 models under every aligner.

Run `python benchmarks/alignment_experiment.py`. Pairs of adjacent layers along the depth, and
removals of three layers, are averaged at alpha 0.5 (1/G in a group); `drop` keeps the anchor alone.
Loss in nats a token on bundled English prose (split val; nothing is chosen by it), with 95%
bootstrap intervals over blocks of the paired difference to the folded average without alignment.
"""

from __future__ import annotations

import argparse
import json

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lmerge.activations import neuron_activations
from lmerge.align import BY_ACTIVATIONS, Aligner, Orders
from lmerge.alphas import AlphaConfig
from lmerge.data.records import TextBatch
from lmerge.data.text import block_batches, read_text, token_blocks
from lmerge.groups import align_group
from lmerge.llama import (
    LayerTensors,
    decoder_layers,
    head_spec,
    layer_tensors,
    with_layer_index,
    with_layers,
    with_tensors,
)
from lmerge.merged import MergedLlama, members_in_one_frame
from lmerge.plan import Group, MergePlan
from lmerge.score import score_text
from lmerge.source import load_model, load_tokenizer
from lmerge.statistics import bootstrap_interval

UNIFORM = AlphaConfig(start="uniform")
ALIGNERS: tuple[Aligner, ...] = ("none", "rowwise", "weights", "activations", "both", "full")


def losses(model: PreTrainedModel, batches: list[TextBatch]) -> Tensor:
    """Return the summed nats of each block, float64 (B,)."""
    return torch.cat([score_text(model, batch).sum(dim=1) for batch in batches])


def naive(source: PreTrainedModel, plan: MergePlan) -> PreTrainedModel:
    """The published average: weights without folding, the anchor's norms kept."""
    groups = {group.anchor: group for group in plan.groups}
    layers = []
    for index, origin in enumerate(plan.origins()):
        layer = with_layer_index(decoder_layers(source)[origin], index)
        if origin in groups:
            members = [layer_tensors(decoder_layers(source)[i]) for i in groups[origin].members]
            mean = {
                name: members[0][name]
                if "norm" in name
                else torch.stack([member[name] for member in members]).mean(dim=0)
                for name in members[0]
            }
            layer = with_tensors(layer, mean)
        layers.append(layer)
    return with_layers(source, layers, plan.origins())


def orders_of(
    source: PreTrainedModel, plan: MergePlan, aligner: Aligner, acts: dict[int, Tensor]
) -> Orders:
    """Align every group of a plan."""
    orders: Orders = {}
    for group in plan.groups:
        raw = [layer_tensors(decoder_layers(source)[i]) for i in group.members]
        framed: list[LayerTensors] = members_in_one_frame(raw, [None] * len(raw), 0)
        layers = dict(zip(group.members, framed, strict=True))
        known = acts if aligner in BY_ACTIVATIONS else None
        spec = head_spec(source.config)
        orders |= align_group(group, layers, aligner, spec, activations=known)
    return orders


def run_plan(
    source: PreTrainedModel, plan: MergePlan, batches: list[TextBatch], acts: dict[int, Tensor]
) -> dict[str, Tensor]:
    """Return the blocks' losses under each way to merge."""
    drop = MergedLlama(source, plan, {}, AlphaConfig()).plain()
    found = {"drop": losses(drop, batches), "naive": losses(naive(source, plan), batches)}
    for aligner in ALIGNERS:
        orders = orders_of(source, plan, aligner, acts)
        merged = MergedLlama(source, plan, orders, UNIFORM).plain()
        found["folded" if aligner == "none" else aligner] = losses(merged, batches)
    return found


def plan_of(*groups: tuple[int, ...], depth: int) -> MergePlan:
    """A plan whose anchors are the first members."""
    return MergePlan(num_layers=depth, groups=tuple(Group(members=g, anchor=g[0]) for g in groups))


def needed(plans: dict[str, MergePlan], only: list[str] | None) -> list[int]:
    """The layers that the chosen plans merge."""
    chosen = [plan for name, plan in plans.items() if not only or name in only]
    return sorted({i for plan in chosen for group in plan.groups for i in group.members})


def main() -> None:
    """Print a table, one line for each plan."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--num_blocks", type=int, default=8, help="blocks of 256 tokens")
    parser.add_argument("--step", type=int, default=3, help="layers between two pairs")
    parser.add_argument("--only", nargs="+", help="plans by name, such as 13,14; default all")
    args = parser.parse_args()
    source, tokenizer = load_model("smollm2-135m", "float32"), load_tokenizer("smollm2-135m")
    token_ids = tokenizer(read_text("bank", split="val"))["input_ids"]
    blocks_BT = token_blocks(token_ids, 256)
    eval_BT, calibration_BT = blocks_BT[: args.num_blocks], blocks_BT[args.num_blocks :][:16]
    batches = block_batches("en", eval_BT, 4)
    depth, num_tokens = len(decoder_layers(source)), float((eval_BT.shape[1] - 1) * len(eval_BT))
    base_B = losses(source, batches)
    print(json.dumps({"source": float(base_B.sum()) / num_tokens, "blocks": len(eval_BT),
                      "calibration_blocks": len(calibration_BT)}), flush=True)  # fmt: skip
    plans = {f"{i},{i + 1}": plan_of((i, i + 1), depth=depth) for i in range(1, 28, args.step)}
    plans["13-16"] = plan_of((13, 14, 15, 16), depth=depth)
    plans["13,14 17,18 21,22"] = plan_of((13, 14), (17, 18), (21, 22), depth=depth)
    acts = neuron_activations(source, needed(plans, args.only), calibration_BT)
    for name, plan in plans.items():
        if args.only and name not in args.only:
            continue
        row: dict[str, object] = {"plan": name}
        found = run_plan(source, plan, batches, acts)
        per_block = num_tokens / len(eval_BT)
        for method, loss_B in found.items():
            row[method] = round(float(loss_B.sum()) / num_tokens, 3)
            if method in ("full", "weights", "activations", "rowwise", "drop"):
                gap = bootstrap_interval((loss_B - found["folded"]) / per_block, seed=0)
                row[f"{method}-folded"] = [round(gap.low, 3), round(gap.high, 3)]
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
