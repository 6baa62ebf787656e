"""A LightningModule that evaluates source and merged model side by side."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule
from transformers import PreTrainedModel

from lmerge.data.module import MMLUDataModule
from lmerge.data.records import ChoiceBatch, TextBatch
from lmerge.evaluate import Evaluation
from lmerge.gate import Check, GateConfig
from lmerge.journal import Journal, evaluation_key
from lmerge.merged import MergedLlama

logger = logging.getLogger(__name__)


class SideBySide(LightningModule):
    """Scores `source` and `merged` on the same batches, in validation and test."""

    source: PreTrainedModel
    merged: MergedLlama
    run_dir: Path

    def __init__(self) -> None:
        super().__init__()
        self.results: dict[str, Any] = {}
        self.journal: Journal | None = None
        self.gate = GateConfig()
        self.checks: list[Check] = []

    def data(self) -> MMLUDataModule:
        """Return the trainer's data module."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, MMLUDataModule)
        return data

    def on_validation_epoch_start(self) -> None:
        self._start_evaluation()

    def on_test_epoch_start(self) -> None:
        self._start_evaluation()

    def _start_evaluation(self) -> None:
        data, fitting = self.data(), self.trainer.state.fn == "fit"
        self.journal = None if fitting or self.is_sharded else self._open_journal()
        self.evaluation = Evaluation(
            data.text_bytes,
            () if fitting else data.scorings,
            last_words=data.last_words,
            device=self.device,
            # Layers that are split over processes must run equally often on each.
            keep_prefixes=not self.is_sharded,
            journal=self.journal,
        )
        if self.evaluation.known and self.trainer.is_global_zero:
            done, total = len(self.evaluation.known), len(data.evaluation_batches)
            logger.info("%d of %d batches were scored before; going on from there", done, total)

    def _open_journal(self) -> Journal:
        key = evaluation_key(self.source, self.merged, self.data().evaluation_batches)
        stage = "test" if self.trainer.testing else "validate"
        return Journal(self.run_dir / "journal", f"{stage}-{key}", self.global_rank)

    @property
    def is_sharded(self) -> bool:
        """Whether FSDP2 splits the frozen layers over the processes."""
        return self.device_mesh is not None

    def validation_step(self, batch: TextBatch | ChoiceBatch, batch_idx: int) -> None:
        self.evaluation.update(self.source, self.merged.causal_lm, batch)

    def test_step(self, batch: TextBatch | ChoiceBatch, batch_idx: int) -> None:
        self.evaluation.update(self.source, self.merged.causal_lm, batch)

    def on_validation_epoch_end(self) -> None:
        self._finish_evaluation("val")

    def on_test_epoch_end(self) -> None:
        self._finish_evaluation("test")

    def _finish_evaluation(self, stage: str) -> None:
        data = self.data()
        self.results = self.evaluation.results(data.questions, data.domain_subjects)
        for name, models in self.results["text"].items():
            for key in ("loss", "ppl", "kl"):
                # Equal on every process: the mean over them is the value itself.
                self.log(f"{stage}/{key}/{name}", models["merged"][key], sync_dist=True)
        for name, models in self.results["last_word"].items():
            accuracy = models["merged"]["accuracy"]
            self.log(f"{stage}/last_word_accuracy/{name}", accuracy, sync_dist=True)
        for scoring, models in self.results["choices"].items():
            for domain, rate in models["merged"]["by_domain"].items():
                name = f"{stage}/{scoring}_accuracy/{domain}"
                self.log(name, rate["accuracy"], sync_dist=True)
        del self.evaluation
