"""LightningCLI's `plan`, `fit`, `validate` and `test` around a run folder."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import (
    ArgsType,
    LightningArgumentParser,
    LightningCLI,
    SaveConfigCallback,
)
from lightning.pytorch.loggers import CSVLogger, Logger
from torch import nn

from lmerge.alignment import HungarianAlignment
from lmerge.callbacks import Artefacts, ExportCheckpoint, Repair
from lmerge.data.module import MMLUDataModule
from lmerge.estimate import Work, estimate_seconds, measure_speed
from lmerge.files import write_text
from lmerge.gate import EXIT_CODE, GateConfig
from lmerge.module import AlphaModule
from lmerge.parser import Hints, docstring_options
from lmerge.planning import PlanningTrainer
from lmerge.run_folder import prepare_run_dir, remove_run
from lmerge.search import SEARCHES
from lmerge.stopping import StopTogether
from lmerge.units import duration
from lmerge.verbosity import verbosity
from lmerge.wandb_log import WandbMode, fit_logger

logger = logging.getLogger(__name__)


class Parser(Hints, LightningArgumentParser):
    """Lightning's parser, with hints."""


class WriteConfig(SaveConfigCallback):
    """Writes config.yaml into the run folder when fitting starts."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "save_to_log_dir": False, "overwrite": True})

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and isinstance(pl_module, AlphaModule):
            text = self.parser.dump(self.config, skip_none=False)
            write_text(pl_module.run_dir / "config.yaml", text)


class CLI(LightningCLI):
    """LightningCLI with a run folder, its loggers and callbacks, and checks before any work."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        known = {
            "fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule"},
            "validate": {"model", "dataloaders", "datamodule"},
            "test": {"model", "dataloaders", "datamodule"},
            "plan": {"model", "datamodule"},
        }
        # The parser of one takes as long as the rest of the start, so others are not built.
        return {name: known[name] for name in sys.argv[1:2] if name in known} or known

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--run_dir", type=str, default="runs/default", help="Folder of the run's artefacts."
        )
        parser.add_argument(
            "--overwrite", type=bool, default=False, help="Whether `fit` may replace a run folder."
        )
        parser.add_argument(
            "--evaluate_after",
            type=bool,
            default=True,
            help="Whether `fit` ends with an evaluation of source and merged model.",
        )
        parser.add_argument(
            "--wandb",
            type=WandbMode,
            default="offline",
            help="W&B: `offline` writes files in the run folder, `online` sends them.",
        )
        parser.add_lightning_class_args(HungarianAlignment, "alignment")
        parser.add_lightning_class_args(Repair, "repair")
        parser.add_lightning_class_args(Artefacts, "artefacts")
        parser.add_lightning_class_args(ExportCheckpoint, "export")
        parser.add_class_arguments(GateConfig, "gate")
        parser.link_arguments("run_dir", "model.run_dir")
        parser.link_arguments("run_dir", "trainer.default_root_dir")
        parser.link_arguments("model.source", "data.source")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        config = self._get(self.config_init, "trainer")
        if self.subcommand == "plan":  # on what is here, whatever the fit is meant for
            kind = "cpu" if config.get("accelerator") == "cpu" else "auto"
            here = {"accelerator": kind, "devices": 1, "num_nodes": 1, "strategy": "auto"}
            return super().instantiate_trainer(**here, logger=False, **kwargs)
        run_dir = Path(self._get(self.config_init, "run_dir"))
        if config.get("logger") in (None, True):
            kwargs["logger"] = self._loggers(run_dir)
        if verbosity() == "quiet":
            kwargs["enable_progress_bar"] = False
        callbacks = [*(config.get("callbacks") or []), StopTogether()]
        has_own = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
        wanted = self.subcommand == "fit" and config.get("enable_checkpointing") is not False
        if wanted and not has_own:
            folder = run_dir / "checkpoints"
            callbacks.append(ModelCheckpoint(folder, filename="alphas-{step}", save_last=True))
        return super().instantiate_trainer(callbacks=callbacks, **kwargs)

    def _loggers(self, run_dir: Path) -> list[Logger]:
        loggers: list[Logger] = []
        if self.subcommand == "fit":
            # A resumed fit keeps the log of what came before: logs, logs-2, ...
            names = ["logs", *(f"logs-{i}" for i in range(2, 1000))]
            overwrite = not self._get(self.config, "ckpt_path")
            free = next(n for n in names if overwrite or not (run_dir / n).exists())
            loggers.append(CSVLogger(run_dir, name="", version=free))
        mode: WandbMode = self._get(self.config_init, "wandb")
        if mode != "disabled" and os.environ.get("WANDB_MODE") != "disabled":
            offline = mode == "offline" and "WANDB_SWEEP_ID" not in os.environ
            config = self.config[str(self.subcommand)].as_dict()
            loggers.append(fit_logger(config, str(self.subcommand), run_dir, offline=offline))
        return loggers

    def _parse_ckpt_path(self) -> None:
        """Do nothing: lmerge's checkpoints hold no options, and bad ones are refused later."""

    # Checks before anything is written.

    def before_instantiate_classes(self) -> None:
        """Check the run folder; a W&B agent's run gets its own inside, named by its id."""
        run_id = os.environ.get("WANDB_RUN_ID") if "WANDB_SWEEP_ID" in os.environ else None
        if run_id:
            config = self.config[str(self.subcommand)]
            run_dir = Path(config.run_dir) / run_id
            config.run_dir = config.model.run_dir = str(run_dir)
            config.trainer.default_root_dir = str(run_dir)
        run_dir = Path(self._get(self.config, "run_dir"))
        resumed = self._get(self.config, "ckpt_path")
        if self.subcommand == "fit":
            check_epochs(self._get(self.config, "trainer.max_epochs"))
        if self.subcommand == "fit" and not resumed:
            prepare_run_dir(run_dir, overwrite=self._get(self.config, "overwrite"))

    def after_instantiate_classes(self) -> None:
        """Check data and model; only then the run folder is made, or emptied to be replaced."""
        if self.subcommand == "plan":
            if not self._get(self.config_init, "memory"):
                self.datamodule.setup("fit")
                self.model.check("fit", None)
            return
        ckpt_path = self._get(self.config, "ckpt_path")
        self.model.gate = self._get(self.config_init, "gate")
        if self.subcommand == "fit" and self._get(self.config_init, "evaluate_after"):
            # What the evaluation at the end could not take must not cost a whole fit.
            self.datamodule.setup("validate")
        self.datamodule.setup(self.subcommand)
        self.model.check(self.subcommand, ckpt_path)
        if self.subcommand == "fit":
            # Refuses settings such as a negative learning rate before anything is written.
            self.model.optimizer([nn.Parameter(torch.zeros(1))])
        if self.subcommand == "fit" and not ckpt_path:
            remove_run(self.model.run_dir, self.model.source_name)
        if self.subcommand == "fit":
            self._announce()
        self.model.run_dir.mkdir(parents=True, exist_ok=True)

    @rank_zero_only
    def _announce(self) -> None:
        """Say how long the fit will take, before it starts."""
        model, data = self.model, self.datamodule
        repair: Repair = self._get(self.config_init, "repair")
        searched = model.plan_path is None and model.plan_method in SEARCHES
        work = Work(
            num_tokens=data.calibration_blocks().numel(),
            num_removed=model.num_removed,
            search=str(model.plan_method) if searched else "",
            num_steps=max(0, self.trainer.max_steps),
            step_tokens=data.batch_size * data.block_size,
            repair=repair.config,
            heal=repair.heal,
            block_size=data.block_size,
        )
        seconds = estimate_seconds(model.source, work, measure_speed(model.source))
        logger.info("estimated time: about %s, then the evaluation", duration(seconds))

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        # Nothing is unpickled: a checkpoint holds tensors and plain values.
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        if subcommand == "plan":
            return kwargs
        return {**kwargs, "weights_only": kwargs.get("weights_only") is not False}

    def after_fit(self) -> None:
        """Evaluate source and merged model, unless `--evaluate_after` is false."""
        if self._get(self.config_init, "evaluate_after"):
            self.trainer.validate(self.model, datamodule=self.datamodule, verbose=False)


def check_epochs(max_epochs: int | None) -> None:
    """Raise ValueError when a fit would end before it starts."""
    if max_epochs == 0:
        raise ValueError(
            "`trainer.max_epochs` must be above 0, got 0. Raise it, or give `--trainer.max_steps "
            "0` to merge without training."
        )


def run(args: list[str]) -> CLI:
    """Run one of Lightning's commands; exits with `gate.EXIT_CODE` where an enforced gate failed.

    Args:
        args: Name and options of the command.
    """
    cli = run_cli(args)
    if cli.model.gate.enforce and not all(check.passed for check in cli.model.checks):
        sys.stderr.write("lmerge: the merged model failed its gate; see the table.\n")
        sys.exit(EXIT_CODE)
    return cli


def run_cli(args: list[str]) -> CLI:
    """Run one of Lightning's commands, whatever its gate says."""
    with _argv(args):
        return _make_cli(CLI)


def lightning_parser(name: str) -> ArgumentParser:
    """Return the parser of one of Lightning's commands; nothing is run."""
    try:
        with _argv([name]):
            _make_cli(_ParserOnly)
    except _Made as made:
        return made.parsers[name]
    raise AssertionError("the parser is made before anything is parsed")


class _Made(Exception):  # noqa: N818 - it tells of no error
    """Ends the making of a CLI once its parsers are there."""

    def __init__(self, parsers: Mapping[str, ArgumentParser]) -> None:
        self.parsers = parsers


class _ParserOnly(CLI):
    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        raise _Made(self._subcommand_parsers)


def _make_cli(kind: type[CLI]) -> CLI:
    docstring_options()
    return kind(
        AlphaModule,
        MMLUDataModule,
        trainer_class=PlanningTrainer,
        save_config_callback=WriteConfig,
        parser_kwargs={"prog": "lmerge"},
        parser_class=Parser,
        seed_everything_default=0,
        trainer_defaults={"max_epochs": 2, "num_sanity_val_steps": 0},
        auto_configure_optimizers=False,
    )


@contextmanager
def _argv(args: list[str]) -> Iterator[None]:
    """Let LightningCLI, and the processes that a strategy starts, read the arguments from argv."""
    before, sys.argv = sys.argv, [sys.argv[0], *args]
    try:
        yield
    finally:
        sys.argv = before
