"""The data module: questions and texts by domain and language, split by split."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader

from lmerge.data.batching import (
    BlockDataset,
    ResumableLoader,
    ShuffledOrder,
    context_length,
    sample_prompts,
)
from lmerge.data.evaluation import (
    EvaluationBatch,
    evaluation_batches,
    held_out_batches,
)
from lmerge.data.limits import check_options
from lmerge.data.mixing import Mix, calibration_streams, held_blocks, mix_blocks
from lmerge.data.records import Scoring
from lmerge.data.served import ServedData
from lmerge.data.stage import StageData, read_stage
from lmerge.source import load_config, load_tokenizer

# Lists, not tuples, so that `--data.languages+=fr` adds to the default; they are never changed.
STUDY_DOMAINS = ["medical", "legal", "math", "cs", "humanities"]
ENGLISH = ["en"]
SCORINGS: list[Scoring] = ["letter", "cloze"]


class MMLUDataModule(ServedData):
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
        check_options(locals())
        super().__init__()
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
    def settings(self) -> dict[str, Any]:
        """Options that decide how questions and texts are measured."""
        names = ("scorings", "num_shots", "max_questions", "block_size", "stride")
        return {name: getattr(self, name) for name in names}

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

    def _evaluation_batches(self, data: StageData, max_length: int) -> list[EvaluationBatch]:
        if data.stage == "fit":
            return held_out_batches(
                self.calibration_blocks()[self.held_out()], max_tokens=self.eval_tokens
            )
        return evaluation_batches(
            data,
            self._tokenizer,
            scorings=self.scorings,
            num_shots=self.num_shots,
            block_size=self.block_size,
            stride=self.stride,
            max_tokens=self.eval_tokens,
            max_length=max_length,
        )
