"""Runs made by hand: a tiny source, a merged model in memory, and the run folder that stores it."""

from dataclasses import replace
from pathlib import Path

import torch
import yaml
from conftest import byte_tokenizer
from models import plan_of, tiny_variant
from test_symmetry import random_transform
from transformers import AutoConfig, PreTrainedModel

from lmerge.align import Orders
from lmerge.alpha_files import write_alphas
from lmerge.alphas import AlphaConfig, Granularity
from lmerge.llama import head_spec
from lmerge.merged import MergedLlama
from lmerge.plan import MergePlan
from lmerge.runs import RunState, write_orders, write_plan, write_refits
from lmerge.source import load_model, model_fingerprint
from lmerge.streamed_export import export_streamed
from lmerge.streamed_merge import StreamedMerge

PLAN = plan_of([0, 1], [2, 3], anchors=[1, 2])


def source(folder: Path, name: str = "llama", dtype: torch.dtype = torch.float32, **save) -> Path:  # type: ignore[no-untyped-def]
    """Save a tiny model with a tokenizer."""
    tiny_variant(name).to(dtype).save_pretrained(folder, **save)
    byte_tokenizer().save_pretrained(folder)
    return folder


def export_unmerged(folder: Path, out: Path, **options) -> None:  # type: ignore[no-untyped-def]
    """Export a checkpoint with a plan that merges nothing."""
    num_layers = AutoConfig.from_pretrained(folder).num_hidden_layers
    state = RunState(plan=MergePlan(num_layers=num_layers, groups=()), alphas=[])
    export_streamed(folder, StreamedMerge(folder, state), out, **{"card": "", **options})


def motions(model: PreTrainedModel, kind: str) -> Orders:
    """Motions of the layers that are no anchors."""
    generator = torch.Generator().manual_seed(3)
    num_neurons, spec = model.config.intermediate_size, head_spec(model.config)
    if kind == "neurons":
        return {i: torch.randperm(num_neurons, generator=generator) for i in (0, 3)}
    if kind == "full":
        normed = model.config.model_type == "qwen3"
        return {i: random_transform(num_neurons, spec, seed=i, normed=normed) for i in (0, 3)}
    if kind == "rowwise":
        rows = spec.num_heads * spec.head_dim
        return {i: {"q_proj": torch.randperm(rows, generator=generator)} for i in (0, 3)}
    return {}


def merged_state(
    model: PreTrainedModel,
    kind: str = "full",
    grain: Granularity = "neuron",
    *,
    plan: MergePlan = PLAN,
    repair: bool = True,
    drop: bool = False,
) -> tuple[MergedLlama, RunState]:
    """A merged model in memory, and what a run stores of it.

    Alphas are random, and there are refits if `repair`; with `drop` the anchors alone remain.
    """
    orders = {} if drop else motions(model, kind)
    merged = MergedLlama(model, plan, orders, AlphaConfig(granularity=grain))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in merged.alpha_parameters().values() if not drop else ():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    if repair and not drop:
        weight = merged.merged_layers()[1].tensors()["down_proj"]
        merged.set_refits([{}, {"down_proj": weight + 0.1}])
    state = RunState(plan=plan, orders=orders, alphas=merged.alphas(), refits=merged.refits())
    return merged, state


def made_run(run_dir: Path, folder: Path, **state: object) -> MergedLlama:
    """Write a run folder for a source as `fit` would; return its merged model in memory."""
    model = load_model(str(folder))
    merged, made = merged_state(model, **state)
    plan = replace(made.plan, source=model_fingerprint(model))
    assert made.alphas is not None
    write_plan(run_dir, plan)
    write_orders(run_dir, made.orders)
    write_alphas(run_dir, plan, made.alphas)
    if made.refits is not None and any(made.refits):
        write_refits(run_dir, made.refits, made.alphas)
    settings = {"seed_everything": 0, "model": {"source": str(folder), "dtype": "auto"}}
    (run_dir / "config.yaml").write_text(yaml.safe_dump(settings))
    return merged
