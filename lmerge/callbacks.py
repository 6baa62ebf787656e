"""Callbacks: when alignment, repair, artefacts and export happen; the functions decide what."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import Callback, LightningModule, Trainer

from lmerge.alignment import HungarianAlignment
from lmerge.alpha_files import write_alphas
from lmerge.artefacts import (
    alpha_figures,
    card,
    finish_evaluation,
    log_alphas,
    logged_names,
    write_alignment,
    write_search,
    write_similarity,
)
from lmerge.compose import repair
from lmerge.export import verify_export
from lmerge.heal import HealConfig, heal
from lmerge.module import AlphaModule
from lmerge.repair import RepairConfig
from lmerge.report import FILE_NAME, write_report
from lmerge.runs import write_orders, write_plan, write_refits
from lmerge.source import checkpoint_folder
from lmerge.streamed_export import export_streamed
from lmerge.streamed_merge import StreamedMerge
from lmerge.wandb_log import (
    TRAINING,
    define_goals,
    log_images,
    log_model,
    log_page,
    log_plan,
    wandb_loggers,
)

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
    """Writes what a run leaves behind: plan, orders, alphas, figures, metrics, table and report.

    Args:
        report: Whether fit, validate and test end with report.html in the run folder.
    """

    def __init__(self, report: bool = True) -> None:
        self.report = report

    @rank_zero_only
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module = _module(pl_module)
        assert module.state is not None
        write_plan(module.run_dir, module.state.plan)
        write_orders(module.run_dir, module.state.orders)
        write_similarity(trainer, module)
        write_search(trainer, module)
        log_plan(trainer.loggers, module.state.plan, module.candidates)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, HungarianAlignment) and callback.similarity["after"]:
                write_alignment(trainer, module, callback)

    @rank_zero_only
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        define_goals(trainer.loggers, TRAINING)
        log_alphas(trainer, _module(pl_module))

    @rank_zero_only
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        define_goals(trainer.loggers, logged_names(_module(pl_module), "val"))

    @rank_zero_only
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        define_goals(trainer.loggers, logged_names(_module(pl_module), "test"))

    @rank_zero_only
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            log_alphas(trainer, _module(pl_module))

    @rank_zero_only
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module = _module(pl_module)
        alphas, refits = module.merged.alphas(), module.merged.refits()
        write_alphas(module.run_dir, module.merged.plan, alphas)
        if any(refits) or module.merged.kept_refits:
            write_refits(module.run_dir, refits, alphas, module.merged.kept_refits)
        log_images(trainer.loggers, alpha_figures(module))
        self._write_report(trainer, module)

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
            self._write_report(trainer, _module(pl_module))

    @rank_zero_only
    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        finish_evaluation(trainer, _module(pl_module), "test")
        self._write_report(trainer, _module(pl_module))

    def _write_report(self, trainer: Trainer, module: AlphaModule) -> None:
        """Write the page; what hinders it costs a warning, since all else is written by now."""
        if not self.report:
            return
        try:
            write_report([module.run_dir], module.run_dir / FILE_NAME)
        except ValueError as error:
            logger.warning("no report: %s", error)
            return
        log_page(trainer.loggers, module.run_dir / FILE_NAME)


class ExportCheckpoint(Callback):
    """Writes the merged model as a plain Hugging Face checkpoint when fitting ends.

    Args:
        enabled: Whether to write `model/` in the run folder.
        wandb: Whether W&B gets that model too, as an artifact; with `--wandb online` it is sent.
    """

    def __init__(self, enabled: bool = True, wandb: bool = False) -> None:
        if wandb and not enabled:
            raise ValueError(
                "`export.wandb` needs `export.enabled`, got false. Leave one of them out."
            )
        self.enabled = enabled
        self.wandb = wandb

    @rank_zero_only
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.enabled:
            return
        module = _module(pl_module)
        if module.is_sharded:
            _say_later(module, "exported")
            return
        folder = module.run_dir / "model"
        difference = export_merged(module, folder, text=card(module, []), overwrite=True)
        logger.info("exported to %s; reloaded logits differ by at most %.1e", folder, difference)
        if self.wandb and not wandb_loggers(trainer.loggers):
            logger.warning("`export.wandb` is ignored, since nothing is logged to W&B")
        elif self.wandb:
            log_model(trainer.loggers, folder, module.merged.plan)


def export_merged(module: AlphaModule, folder: Path, *, text: str, overwrite: bool) -> float:
    """Write the merged model of a module from its source on disk, as `lmerge export` does.

    Args:
        module: What holds the merged model.
        folder: Where the checkpoint goes.
        text: Its model card.
        overwrite: Whether an older checkpoint there may be replaced.

    Returns:
        The largest difference of a logit between the model in memory and the checkpoint.
    """
    assert module.state is not None
    merged, source_dir = module.merged, checkpoint_folder(module.source_name, weights=True)
    state = replace(
        module.state,
        alphas=merged.alphas(),
        refits=merged.refits(),
        kept_refits=merged.kept_refits,
    )
    streamed = StreamedMerge(source_dir, state, dtype=module.dtype_name)
    export_streamed(
        source_dir,
        streamed,
        folder,
        card=text,
        fingerprint=merged.plan.source,
        overwrite=overwrite,
    )
    return verify_export(folder, merged.plain(), module.data().calibration_blocks()[:1])
