"""Callbacks: when alignment, repair, artefacts and export happen; the functions decide what."""

from __future__ import annotations

import logging
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from matplotlib.figure import Figure
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lmerge.alignment import HungarianAlignment
from lmerge.alpha_files import write_alphas
from lmerge.compose import repair
from lmerge.cost import measure_costs
from lmerge.data.tokens import encode
from lmerge.export import model_card, verify_export, write_card
from lmerge.figures import (
    matching_figure,
    matrices_figure,
    save,
    search_figure,
    similarity_figure,
)
from lmerge.files import provenance, write_json
from lmerge.gate import check_gate, gate_notes, gate_rows
from lmerge.generation import NUM_TOKENS, PROMPTS, generation_sanity, greedy
from lmerge.heal import HealConfig, heal
from lmerge.module import AlphaModule
from lmerge.progress import track
from lmerge.repair import RepairConfig
from lmerge.results import Row, group_tables, print_table, table_rows, write_metrics
from lmerge.runs import write_orders, write_plan, write_refits
from lmerge.similarity import INFORMATION
from lmerge.source import checkpoint_folder
from lmerge.streamed_export import export_streamed
from lmerge.streamed_merge import StreamedMerge

logger = logging.getLogger(__name__)


def _module(pl_module: LightningModule) -> AlphaModule:
    assert isinstance(pl_module, AlphaModule)
    return pl_module


@rank_zero_only
def _say_later(module: AlphaModule, what: str) -> None:
    run_dir = module.run_dir
    logger.warning(
        "not %s, since the layers are split over processes. Afterwards, on a machine that holds "
        "the model: lmerge fit --config %s/config.yaml --ckpt_path %s/checkpoints/last.ckpt "
        "--trainer.strategy auto --trainer.devices 1 --trainer.accelerator cpu",
        *(what, run_dir, run_dir),
    )


class Repair(Callback):
    """Refits layers in closed form when training ends, and heals them if that is asked for.

    Args:
        config: Method and regularisation.
        heal: A short training by KL afterwards; none by default.
    """

    def __init__(
        self,
        config: RepairConfig = RepairConfig(),  # noqa: B008 - frozen
        heal: HealConfig = HealConfig(),  # noqa: B008 - frozen
    ) -> None:
        self.config = config
        self.heal = heal

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module = _module(pl_module)
        if module.is_sharded:
            _say_later(module, "repaired")
            return
        if trainer.is_global_zero:
            repair_and_heal(module, self.config, self.heal)
        merged = module.merged
        found = trainer.strategy.broadcast((merged.refits(), merged.kept_refits))
        merged.set_refits(*found)


def repair_and_heal(module: AlphaModule, config: RepairConfig, healing: HealConfig) -> None:
    """Refit the merged model of a module to the source, then train what `healing` names."""
    cache, held_B, merged = module.cache(), module.data().held_out(), module.merged
    repair(module.source, merged, cache, held_B, config)
    heal(module.source, merged, cache, held_B, healing, seed=module.seed)


class Artefacts(Callback):
    """Writes what a run leaves behind: plan, orders, alphas, figures, metrics and the table."""

    @rank_zero_only
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module = _module(pl_module)
        assert module.state is not None
        write_plan(module.run_dir, module.state.plan)
        write_orders(module.run_dir, module.state.orders)
        write_similarity(trainer, module)
        write_search(trainer, module)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, HungarianAlignment) and callback.similarity["after"]:
                write_alignment(trainer, module, callback)

    @rank_zero_only
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module = _module(pl_module)
        alphas, refits = module.merged.alphas(), module.merged.refits()
        write_alphas(module.run_dir, module.merged.plan, alphas)
        if any(refits) or module.merged.kept_refits:
            write_refits(module.run_dir, refits, alphas, module.merged.kept_refits)

    @rank_zero_only
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        module = _module(pl_module)
        if isinstance(exception, ValueError) and module.restore_good():
            write_alphas(module.run_dir, module.merged.plan, module.merged.alphas())

    @rank_zero_only
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "validate":
            finish_evaluation(trainer, _module(pl_module), "validate")

    @rank_zero_only
    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        finish_evaluation(trainer, _module(pl_module), "test")


def write_alignment(trainer: Trainer, module: AlphaModule, alignment: HungarianAlignment) -> None:
    """Write and log how alike neurons and matrices are before and after, and their figures."""
    log_figure(trainer, module, matching_figure(**alignment.similarity), "alignment/neurons")
    log_figure(trainer, module, matrices_figure(**alignment.matrices), "alignment/matrices")
    data = {"method": alignment.method, **_text_keys(alignment.matrices)}
    write_json(module.run_dir / "alignment" / "similarity.json", data, schema=1)
    for any_logger in trainer.loggers:
        any_logger.log_metrics(alignment.means(), step=0)


def _text_keys(matrices: dict[str, dict[int, dict[str, float]]]) -> dict[str, dict[str, object]]:
    return {when: {str(i): dict(v) for i, v in found.items()} for when, found in matrices.items()}


def write_similarity(trainer: Trainer, module: AlphaModule) -> None:
    """Write the similarity matrices of the plan stage and their figure."""
    matrices = module.similarity_LL
    if not matrices:
        return
    assert module.state is not None
    folder = module.run_dir / "similarity"
    folder.mkdir(parents=True, exist_ok=True)
    for name, matrix_LL in matrices.items():
        np.save(folder / f"{name.replace('/', '_')}.npy", matrix_LL.numpy(), allow_pickle=False)
    data = {
        "measure": module.measure,
        "information": asdict(module.information) if module.measure in INFORMATION else None,
        "pooling": module.pooling,
        "matrices": list(matrices),
        "provenance": provenance(),
    }
    write_json(folder / "similarity.json", data, schema=1)
    figure = similarity_figure(matrices, module.measure, module.state.plan)
    log_figure(trainer, module, figure, "similarity/layers")


def write_search(trainer: Trainer, module: AlphaModule) -> None:
    """Write what the candidates of the plan search cost, and their figure."""
    if not module.candidates:
        return
    costs = [
        {"groups": [list(group.members) for group in c.groups], "kl": c.kl}
        for c in module.candidates
    ]
    data = {"method": module.plan_method, "candidates": costs, "provenance": provenance()}
    write_json(module.run_dir / "plan" / "search.json", data, schema=1)
    log_figure(trainer, module, search_figure(module.candidates), "plan/search")


def log_figure(trainer: Trainer, module: AlphaModule, figure: Figure, name: str) -> None:
    """Save a figure in the run folder and show it in W&B."""
    path = module.run_dir / f"{name}.png"
    save(figure, path)
    for wandb_logger in trainer.loggers:
        if isinstance(wandb_logger, WandbLogger):
            wandb_logger.log_image(name, [str(path)])


def finish_evaluation(trainer: Trainer, module: AlphaModule, stage: str) -> None:
    """Measure costs, write metrics.json, print the table and bring the model card up to date."""
    data = module.data()
    if not module.is_sharded:  # this process alone cannot run layers that are split over all
        _measure_alone(module)
    module.checks = check_gate(module.results, module.gate)
    module.results["gate"] = [check._asdict() for check in module.checks]
    read: dict[str, Any] = {"fingerprints": data.fingerprints, "settings": data.settings}
    read["source_fingerprint"] = module.merged.plan.source
    read["seeds"] = {"alphas": module.seed, "data": data.seed}
    write_metrics(module.run_dir, stage, {"source": module.source_name, **read, **module.results})
    if module.journal is not None:
        module.journal.remove()
    rows = table_rows(module.results) + gate_rows(module.checks)
    for title, groups in group_tables(module.results).items():
        print_table(groups, f"{module.source_name}: {stage}, {title}")
    print_table(rows, f"{module.source_name}: {stage} of source and merged model")
    for wandb_logger in trainer.loggers:
        if isinstance(wandb_logger, WandbLogger):
            wandb_logger.log_table(
                f"{stage}/results", ["what", "source", "merged"], [list(row) for row in rows]
            )
    if (module.run_dir / "model" / "config.json").is_file():
        write_card(module.run_dir / "model", card(module, rows))


def _measure_alone(module: AlphaModule) -> None:
    """Measure what needs the models but no data: costs, and whether they write sensibly."""
    models = {"source": module.source, "merged": module.merged.plain()}
    module.results["cost"] = measure_costs(models)
    module.results["generation"] = {
        name: write_on(model, module.data().tokenizer)
        for name, model in track(models.items(), "generation", total=2)
    }


def write_on(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, object]:
    """Return what a model writes after each of the prompts, and how much it repeats itself."""
    texts = greedy(model, [torch.tensor(ids) for ids in encode(tokenizer, PROMPTS)], NUM_TOKENS)
    written = {prompt: tokenizer.decode(ids) for prompt, ids in zip(PROMPTS, texts, strict=True)}
    return {**generation_sanity(texts), "texts": written}


def card(module: AlphaModule, rows: list[Row]) -> str:
    """Return the model card of the exported model."""
    plan = module.merged.plan
    return model_card(
        source=module.source_name,
        num_source_layers=plan.num_layers,
        num_layers=plan.num_layers - plan.num_removed,
        groups=[list(group.members) for group in plan.groups],
        table=rows,
        command=None,
        provenance={**provenance(), "plan": plan.method, "source_fingerprint": plan.source or None},
        notes=gate_notes(module.checks),
    )


class ExportCheckpoint(Callback):
    """Writes the merged model as a plain Hugging Face checkpoint when fitting ends.

    Args:
        enabled: Whether to write `model/` in the run folder.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled

    @rank_zero_only
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.enabled:
            return
        module = _module(pl_module)
        if module.is_sharded:
            _say_later(module, "exported")
            return
        difference = export_merged(module, module.run_dir / "model")
        message = "exported to %s; reloaded logits differ by at most %.1e"
        logger.info(message, module.run_dir / "model", difference)


def export_merged(module: AlphaModule, folder: Path) -> float:
    """Write the merged model of a module from its source on disk, as `lmerge export` does.

    Returns:
        The largest difference of a logit between the model in memory and the checkpoint.
    """
    assert module.state is not None
    merged, source_dir = module.merged, checkpoint_folder(module.source_name, weights=True)
    learned = {"alphas": merged.alphas(), "refits": merged.refits()}
    state = replace(module.state, **learned, kept_refits=merged.kept_refits)
    streamed = StreamedMerge(source_dir, state, dtype=module.dtype_name)
    made_for = {"card": card(module, []), "fingerprint": merged.plan.source}
    export_streamed(source_dir, streamed, folder, **made_for, overwrite=True)
    return verify_export(folder, merged.plain(), module.data().calibration_blocks()[:1])
