"""The data module: questions and texts by domain and language, split by split."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase

from lmerge.data.batching import (
    BlockDataset,
    ResumableLoader,
    ShuffledOrder,
    context_length,
    in_rounds,
    sample_prompts,
    to_device,
    world,
)
from lmerge.data.mixing import Mix, calibration_streams, held_blocks, mix_blocks
from lmerge.data.prompts import build_choice_batches
from lmerge.data.records import IGNORE, ChoiceBatch, Question, Scoring, TextBatch, WordBatch
from lmerge.data.stage import StageData, read_stage
from lmerge.data.text import block_batches, text_batches
from lmerge.data.words import word_batches
from lmerge.source import load_config, load_tokenizer

EvaluationBatch = TextBatch | ChoiceBatch

HELD_OUT = "held-out"
"""Name of the held-out calibration blocks among the texts that a fit measures on."""

# Lists, not tuples, so that `--data.languages+=fr` adds to the default; they are never changed.
STUDY_DOMAINS = ["medical", "legal", "math", "cs", "humanities"]
ENGLISH = ["en"]
SCORINGS: list[Scoring] = ["letter", "cloze"]


class MMLUDataModule(LightningDataModule):
    """Multiple-choice questions and prose by domain and language.

    Few-shot examples come from dev. `fit` and `validate` read val: to calibrate on, and to measure
    on. `test` reads test and has nothing to calibrate on. Texts to measure on are the same in all
    stages and are never calibrated on.

    Args:
        source: Model whose tokenizer and context length are used: hub id, local folder, GGUF file
            or alias.
        questions: `bank` (bundled), a directory of MMLU's CSV files or of dev.jsonl, val.jsonl and
            test.jsonl, a .jsonl file, or a dataset on the hub such as cais/mmlu.
        domains: Domains to use: medical, legal, math, cs, humanities, mmlu_stem, mmlu_humanities,
            mmlu_social_sciences, mmlu_other, all, a row of `extra_domains`, or a subject.
        languages: ISO 639-1 codes of the languages to use.
        extra_domains: Further domains, each a list of subjects.
        num_shots: Answered examples before each question; at least 0.
        scorings: How questions are scored: letter (name the letter) and cloze (most likely text).
        calibration_text: Prose to calibrate on beside the questions: `bank`, a .txt file, a .jsonl
            file with `text`, a part of one such as wiki.txt[:80%], a list of these, or null for
            none.
        calibration_mix: Share of each text: length (in proportion to its length) or equal (as many
            blocks of each, as far as it goes; the questions of a domain and language are a text).
        eval_text: Prose to measure perplexity on: `bank`, a .txt file, a .jsonl file with `text`, a
            part of one such as wiki.txt[80%:], several of these, or null for none. A file's results
            go by its name without ending.
        stride: Tokens from one block's start to the next where perplexity is measured; below
            `block_size` blocks overlap, and each token is scored once, after at least
            `block_size - stride` others. 1 to `block_size`; null for `block_size`.
        last_word: .jsonl file with `text`, or several, of which the last words are to be guessed,
            as in LAMBADA; null for none.
        block_size: Tokens in a block of text; at least 2, at most the model's context.
        num_calibration_tokens: Tokens to calibrate on; at least `block_size`.
        holdout: Share of the calibration blocks that are never trained on, but choose the
            regularisation and early stopping; above 0 and at most 0.5.
        num_prompts: Prompts per domain and language for layer similarity; at least 1.
        batch_size: Blocks in a training batch; at least 1.
        eval_tokens: Bound on the tokens in an evaluation batch, few-shot examples not counted; at
            least 1.
        max_questions: Questions per subject and language, the first ones; null for all.
        seed: Seed of the samples and of the training order; at least 0.
        num_workers: Worker processes of each loader. 0 is best, since batches are made beforehand.
    """

    def __init__(
        self,
        source: str = "smollm2-135m",
        questions: str = "bank",
        domains: list[str] = STUDY_DOMAINS,
        languages: list[str] = ENGLISH,
        extra_domains: dict[str, list[str]] | None = None,
        num_shots: int = 5,
        scorings: list[Scoring] = SCORINGS,
        calibration_text: str | list[str] | None = "bank",
        calibration_mix: Mix = "length",
        eval_text: str | list[str] | None = "bank",
        stride: int | None = None,
        last_word: str | list[str] | None = None,
        block_size: int = 256,
        num_calibration_tokens: int = 16_384,
        holdout: float = 0.15,
        num_prompts: int = 40,
        batch_size: int = 4,
        eval_tokens: int = 2048,
        max_questions: int | None = None,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        _check_at_least(0, num_shots=num_shots, seed=seed, num_workers=num_workers)
        _check_at_least(1, num_prompts=num_prompts, batch_size=batch_size, eval_tokens=eval_tokens)
        _check_at_least(1, max_questions=1 if max_questions is None else max_questions)
        _check_at_least(2, block_size=block_size)
        _check_at_least(block_size, num_calibration_tokens=num_calibration_tokens)
        if stride is not None and not 1 <= stride <= block_size:
            raise ValueError(
                f"`stride` must be between 1 and the `block_size` of {block_size}, got {stride}; "
                "lower it."
            )
        if not scorings and not eval_text and not last_word:
            raise ValueError(
                "`scorings` must not be empty without `eval_text` and `last_word`; give one of "
                "them."
            )
        if not 0 < holdout <= 0.5:
            raise ValueError(f"`holdout` must be above 0 and at most 0.5, got {holdout}; try 0.15.")
        self.source = source
        self.question_source = questions
        self.domains = domains
        self.languages = languages
        self.extra_domains = extra_domains
        self.num_shots = num_shots
        self.scorings = scorings
        self.calibration_text = calibration_text
        self.calibration_mix = calibration_mix
        self.eval_text = eval_text
        self.stride = stride
        self.last_word = last_word
        self.block_size = block_size
        self.num_calibration_tokens = num_calibration_tokens
        self.holdout = holdout
        self.num_prompts = num_prompts
        self.batch_size = batch_size
        self.eval_tokens = eval_tokens
        self.max_questions = max_questions
        self.seed = seed
        self.num_workers = num_workers
        self._data: StageData | None = None
        self._blocks_NT: Tensor | None = None

    def setup(self, stage: str) -> None:
        """Read, check and encode all that a stage needs; a repeated call does nothing.

        Raises:
            ValueError: One line on whatever is wrong with the questions, the texts or an option.
        """
        if self._data is not None and self._data.stage == stage:
            return
        self._data = self._blocks_NT = None
        data = read_stage(
            stage,
            questions=self.question_source,
            domains=self.domains,
            extra_domains=self.extra_domains,
            languages=self.languages,
            num_shots=self.num_shots,
            max_questions=self.max_questions,
            calibration_text=self.calibration_text,
            eval_text=self.eval_text,
            last_word=self.last_word,
        )
        max_length = context_length(load_config(self.source))
        if self.block_size > max_length:
            raise ValueError(
                f"`block_size` must be at most the {max_length} tokens that the model can see, got "
                f"{self.block_size}; lower it."
            )
        self._tokenizer = load_tokenizer(self.source)
        self._data = data
        self._batches = self._evaluation_batches(data, max_length)

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
    def settings(self) -> dict[str, Any]:
        """Options that decide how questions and texts are measured."""
        names = ("scorings", "num_shots", "max_questions", "block_size", "stride")
        return {name: getattr(self, name) for name in names}

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
        counts = dict.fromkeys(self.text_bytes, 0)
        for batch in self._batches:
            if isinstance(batch, TextBatch) and not isinstance(batch, WordBatch):
                counts[batch.name] += int((batch.target_BT != IGNORE).sum())
        return counts

    @property
    def evaluation_batches(self) -> Sequence[EvaluationBatch]:
        """All batches that the stage measures on, in the order of a single process."""
        self._require()
        return self._batches

    def calibration_prompts(self) -> dict[tuple[str, str], list[Tensor]]:
        """Return zero-shot letter prompts (T,) of each (domain, language), from val."""
        data = self._require("fit", "validate")
        return sample_prompts(
            data.questions,
            data.domain_subjects,
            self._tokenizer,
            num_prompts=self.num_prompts,
            seed=self.seed,
        )

    def calibration_blocks(self) -> Tensor:
        """Return blocks (N, T) of val questions with their answers and of calibration prose."""
        data = self._require("fit", "validate")
        if self._blocks_NT is None:
            self._blocks_NT = mix_blocks(
                calibration_streams(
                    data.questions, data.domain_subjects, data.calibration_texts, self._tokenizer
                ),
                block_size=self.block_size,
                num_blocks=self.num_calibration_tokens // self.block_size,
                seed=self.seed,
                mix=self.calibration_mix,
            )
        return self._blocks_NT

    def held_out(self) -> Tensor:
        """Return which calibration blocks are never trained on (N,), bool, evenly spread."""
        held_N = held_blocks(len(self.calibration_blocks()), self.holdout)
        if held_N.all():
            raise ValueError(
                f"calibration needs blocks to train on beside the held-out ones, got {len(held_N)} "
                "block in all; raise `num_calibration_tokens` or lower `block_size`."
            )
        return held_N

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Serve the calibration blocks that are not held out, in an order that `seed` decides."""
        kept_N = (~self.held_out()).nonzero().flatten()
        return ResumableLoader(
            BlockDataset(self.calibration_blocks(), kept_N),
            batch_size=self.batch_size,
            sampler=ShuffledOrder(len(kept_N), self.seed),
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
        )

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

    def _evaluation_batches(self, data: StageData, max_length: int) -> list[EvaluationBatch]:
        batches: list[EvaluationBatch] = []
        if data.stage == "fit":
            blocks_NT = self.calibration_blocks()[self.held_out()]
            return list(block_batches(HELD_OUT, blocks_NT, self._blocks_per_batch()))
        for name, text in data.eval_texts.items():
            batches += text_batches(
                name,
                text,
                self._tokenizer,
                block_size=self.block_size,
                stride=self.stride or self.block_size,
                batch_size=self._blocks_per_batch(),
            )
        for name, texts in data.last_words.items():
            batches += word_batches(
                name,
                texts,
                self._tokenizer,
                max_tokens=self.eval_tokens,
                max_length=max_length,
            )
        for scoring in dict.fromkeys(self.scorings):
            batches += build_choice_batches(
                data.questions,
                data.examples,
                self._tokenizer,
                scoring=scoring,
                num_shots=self.num_shots,
                max_tokens_per_batch=self.eval_tokens,
                max_length=max_length,
            )
        return batches

    def _blocks_per_batch(self) -> int:
        return max(1, self.eval_tokens // self.block_size)

    def _evaluation_loader(self) -> DataLoader[EvaluationBatch]:
        # Batches are made beforehand, so that they are the same whatever the number of processes:
        # a distributed sampler hands out whole batches.
        return DataLoader(
            cast(Dataset[EvaluationBatch], in_rounds(self._batches, world()[1])),
            batch_size=None,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
        )


def _check_at_least(minimum: int, **options: int) -> None:
    for name, value in options.items():
        if value < minimum:
            raise ValueError(f"`{name}` must be at least {minimum}, got {value}; raise it.")
