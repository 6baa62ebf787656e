"""A LightningModule that evaluates source and merged model side by side."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule
from transformers import PreTrainedModel

from lmerge.data.module import MMLUDataModule
from lmerge.data.records import ChoiceBatch, TextBatch
from lmerge.evaluate import Evaluation
from lmerge.gate import Check, GateConfig
from lmerge.merged import MergedLlama


class SideBySide(LightningModule):
    """Scores `source` and `merged` on the same batches, in validation and test."""

    source: PreTrainedModel
    merged: MergedLlama

    def __init__(self) -> None:
        super().__init__()
        self.results: dict[str, Any] = {}
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
        data = self.data()
        scorings = () if self.trainer.state.fn == "fit" else data.scorings
        # Layers that are split over processes must run equally often on each.
        keep_prefixes = self.device_mesh is None
        self.evaluation = Evaluation(
            data.text_bytes, scorings, device=self.device, keep_prefixes=keep_prefixes
        )

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
        for scoring, models in self.results["choices"].items():
            for domain, rate in models["merged"]["by_domain"].items():
                name = f"{stage}/{scoring}_accuracy/{domain}"
                self.log(name, rate["accuracy"], sync_dist=True)
        del self.evaluation
