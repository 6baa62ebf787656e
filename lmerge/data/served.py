"""What a data module tells and serves of the questions and texts that its stage has read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase

from lmerge.data.batching import in_rounds, to_device, world
from lmerge.data.evaluation import HELD_OUT, EvaluationBatch, count_tokens
from lmerge.data.records import ChoiceBatch, Question, TextBatch
from lmerge.data.stage import StageData


class ServedData(LightningDataModule):
    """Serves the batches that a stage measures on; which they are, a subclass's `setup` decides."""

    num_workers: int
    _tokenizer: PreTrainedTokenizerBase
    _batches: list[EvaluationBatch]

    def __init__(self) -> None:
        super().__init__()
        self._data: StageData | None = None

    @property
    def questions(self) -> list[Question]:
        """Questions of the stage's split; `ChoiceBatch.index_B` points into this list."""
        return self._require().questions

    @property
    def domain_subjects(self) -> dict[str, tuple[str, ...]]:
        """Domain -> those of its subjects that the questions cover."""
        return self._require().domain_subjects

    @property
    def fingerprints(self) -> dict[str, str]:
        """Fingerprint of each split and text in use: `dev`, `val`, `calibration/en`, `eval/en`."""
        return self._require().fingerprints()

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Tokenizer of the source."""
        self._require()
        return self._tokenizer

    @property
    def text_bytes(self) -> dict[str, int | None]:
        """UTF-8 bytes of each text that is measured on; unknown for the held-out blocks of fit."""
        data = self._require()
        if data.stage == "fit":
            return {HELD_OUT: None}
        return {name: len(text.encode()) for name, text in data.eval_texts.items()}

    @property
    def last_words(self) -> list[str]:
        """Names of the files whose texts' last words are to be guessed; none while fitting."""
        data = self._require()
        return [] if data.stage == "fit" else list(data.last_words)

    @property
    def text_tokens(self) -> dict[str, int]:
        """Predicted tokens of each text that is measured on: all but the very first."""
        return count_tokens(self._batches, self.text_bytes)

    @property
    def evaluation_batches(self) -> Sequence[EvaluationBatch]:
        """All batches that the stage measures on, in the order of a single process."""
        self._require()
        return self._batches

    def val_dataloader(self) -> DataLoader[EvaluationBatch]:
        """Serve texts, then val questions for each scoring; in `fit` the held-out blocks alone."""
        self._require("fit", "validate")
        return self._evaluation_loader()

    def test_dataloader(self) -> DataLoader[EvaluationBatch]:
        """Serve texts, then test questions for each scoring."""
        self._require("test")
        return self._evaluation_loader()

    def transfer_batch_to_device(
        self, batch: Any, device: torch.device, dataloader_idx: int
    ) -> Any:
        if isinstance(batch, ChoiceBatch | TextBatch):
            return to_device(batch, device)
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def _require(self, *stages: str) -> StageData:
        if self._data is None:
            raise ValueError("the data module has read nothing yet; call setup(stage) first.")
        if stages and self._data.stage not in stages:
            raise ValueError(
                f"this belongs to stage {' or '.join(stages)}, got stage {self._data.stage!r}, "
                "which must not see that split; call setup with the other stage first."
            )
        return self._data

    def _evaluation_loader(self) -> DataLoader[EvaluationBatch]:
        # Batches are made beforehand, so that they are the same whatever the number of processes:
        # a distributed sampler hands out whole batches.
        return DataLoader(
            cast(Dataset[EvaluationBatch], in_rounds(self._batches, world()[1])),
            batch_size=None,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
        )
