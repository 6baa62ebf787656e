"""Evaluation of source and merged model on the same batches, and its results as plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lmerge.data.records import ChoiceBatch, Question, TextBatch, WordBatch
from lmerge.indexed import IndexedMetric
from lmerge.journal import Entry, Journal
from lmerge.metrics import (
    ChoiceMetric,
    Outcomes,
    Rate,
    TextMetric,
    accuracy_by,
    calibration_error,
    confusion,
    macro_accuracy,
    micro_accuracy,
)
from lmerge.score import PrefixCache, normalise_cloze, score_choices, score_text_pair
from lmerge.statistics import mcnemar_exact, paired_bootstrap
from lmerge.words import LastWordMetric, score_last_words

MODELS = ("source", "merged")


class Evaluation:
    """Metrics of both models over one evaluation loop, exact on any number of processes.

    Args:
        text_bytes: UTF-8 bytes of each evaluation text by name, for bits per byte; None if unknown.
        scorings: Ways of scoring choices; every process must name the same.
        last_words: Names of the files whose texts' last words are to be guessed.
        device: Where the metrics gather over processes.
        keep_prefixes: Whether few-shot examples are encoded once; without, each batch takes an
            equal number of passes, as layers split over processes need.
        journal: Where scored batches are kept; those that it holds already are not scored again.
    """

    def __init__(
        self,
        text_bytes: Mapping[str, int | None],
        scorings: Sequence[str] = (),
        *,
        last_words: Sequence[str] = (),
        device: torch.device | str = "cpu",
        keep_prefixes: bool = True,
        journal: Journal | None = None,
    ) -> None:
        self.texts = {
            (name, model): TextMetric(num_bytes=size).to(device)
            for name, size in text_bytes.items()
            for model in MODELS
        }
        self.choices = {
            (scoring, model): ChoiceMetric().to(device) for scoring in scorings for model in MODELS
        }
        self.last_words = {
            (name, model): LastWordMetric().to(device) for name in last_words for model in MODELS
        }
        size = 2 if keep_prefixes else 0
        self.prefixes = {model: PrefixCache(max_entries=size) for model in MODELS}
        self.journal = journal
        self.known = self._restore()

    def _restore(self) -> set[tuple[str, tuple[int, ...]]]:
        """Fill the metrics from the journal and return which batches that were."""
        known = set()
        for entry in self.journal.read() if self.journal else ():
            key = (entry.name, entry.indices)
            if key not in known:
                for metric, rows in zip(self._pair(entry.name), entry.rows, strict=True):
                    metric.restore(rows)
            known.add(key)
        return known

    def _pair(self, name: str) -> list[IndexedMetric]:
        """Return the metrics of source and merged model that a batch's name stands for."""
        kind, _, key = name.partition("/")
        table: Mapping[tuple[str, str], IndexedMetric] = getattr(self, kind)
        return [table[key, model] for model in MODELS]

    def update(
        self,
        source: PreTrainedModel,
        merged: PreTrainedModel,
        batch: TextBatch | ChoiceBatch,
    ) -> None:
        """Score one batch with both models, unless the journal holds its scores."""
        name = _name(batch)
        if (name, tuple(batch.index_B.tolist())) in self.known:
            return
        if isinstance(batch, ChoiceBatch):
            self._update_choices(source, merged, batch)
        elif isinstance(batch, WordBatch):
            for key, model in zip(MODELS, (source, merged), strict=True):
                nll_B, hit_B = score_last_words(model, batch)
                self.last_words[batch.name, key].update(batch.index_B, nll_B, hit_B)
        else:
            self._update_text(source, merged, batch)
        if self.journal is not None:
            self.journal.append(Entry(name, [metric.last_rows() for metric in self._pair(name)]))

    def _update_choices(
        self, source: PreTrainedModel, merged: PreTrainedModel, batch: ChoiceBatch
    ) -> None:
        for name, model in zip(MODELS, (source, merged), strict=True):
            logp_B4 = score_choices(model, batch, self.prefixes[name])
            if batch.scoring == "cloze":
                logp_B4 = normalise_cloze(logp_B4, batch.choice_length_B4)
            metric = self.choices[batch.scoring, name]
            metric.update(batch.index_B, logp_B4, batch.answer_B)

    def _update_text(
        self, source: PreTrainedModel, merged: PreTrainedModel, batch: TextBatch
    ) -> None:
        scores = score_text_pair(source, merged, batch)
        token_B = scores.mask_BT.sum(dim=1)

        def add(model: str, nll_BT: Tensor, **extra: Tensor) -> None:
            metric = self.texts[batch.name, model]
            metric.update(batch.index_B, nll_BT.sum(dim=1), token_B, **extra)

        add("source", scores.source_nll_BT)
        kl_B, agree_B = scores.kl_BT.sum(dim=1), scores.agree_BT.sum(dim=1)
        add("merged", scores.merged_nll_BT, kl_B=kl_B, agree_B=agree_B)

    def results(
        self, questions: Sequence[Question], domain_subjects: Mapping[str, Sequence[str]]
    ) -> dict[str, Any]:
        """Return texts, choices and per-question outcomes as JSON data.

        Args:
            questions: The questions that `index_B` of the batches points into.
            domain_subjects: Domain -> subjects, for accuracy by domain.
        """
        for cache in self.prefixes.values():
            cache.release()
        texts: dict[str, Any] = {}
        for (name, model), text_metric in self.texts.items():
            texts.setdefault(name, {})[model] = text_metric.compute()
        last_words: dict[str, Any] = {}
        for (name, model), word_metric in self.last_words.items():
            last_words.setdefault(name, {})[model] = word_metric.compute()
        outcomes: dict[str, dict[str, Outcomes]] = {}
        for (scoring, model), choice_metric in self.choices.items():
            outcomes.setdefault(scoring, {})[model] = choice_metric.compute()
        return {
            "text": texts,
            "last_word": {
                name: {**both, **_compare_hits(both)} for name, both in last_words.items()
            },
            "choices": {
                scoring: _choice_results(both, questions, domain_subjects)
                for scoring, both in outcomes.items()
            },
            "questions": _question_rows(outcomes, questions),
        }


def _name(batch: TextBatch | ChoiceBatch) -> str:
    """Return the attribute and the key of the metrics that a batch feeds."""
    if isinstance(batch, ChoiceBatch):
        return f"choices/{batch.scoring}"
    return f"{'last_words' if isinstance(batch, WordBatch) else 'texts'}/{batch.name}"


def _compare_hits(both: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return _compare(*(torch.tensor(both[model]["item_correct"]) for model in MODELS))


def _compare(source_N: Tensor, merged_N: Tensor) -> dict[str, Any]:
    """Return the paired tests of which answers are right."""
    return {
        "mcnemar": mcnemar_exact(source_N, merged_N)._asdict(),
        # Merged minus source: negative where merging costs accuracy.
        "difference": paired_bootstrap(merged_N.double(), source_N.double(), seed=0)._asdict(),
    }


def _choice_results(
    both: Mapping[str, Outcomes],
    questions: Sequence[Question],
    domain_subjects: Mapping[str, Sequence[str]],
) -> dict[str, Any]:
    asked = [questions[i] for i in both["source"].index_N.tolist()]
    return {
        **{model: _one_model(both[model], asked, domain_subjects) for model in MODELS},
        **_compare(both["source"].correct_N, both["merged"].correct_N),
    }


def _one_model(
    outcomes: Outcomes, asked: Sequence[Question], domain_subjects: Mapping[str, Sequence[str]]
) -> dict[str, Any]:
    correct_N = outcomes.correct_N
    subjects, languages = [q.subject for q in asked], [q.language for q in asked]
    return {
        "micro": _rate(micro_accuracy(correct_N)),
        "macro": _rate(macro_accuracy(correct_N, subjects)),
        "by_subject": {k: _rate(r) for k, r in accuracy_by(correct_N, subjects).items()},
        "by_domain": _by_domain(correct_N, subjects, domain_subjects),
        "by_language": {k: _rate(r) for k, r in accuracy_by(correct_N, languages).items()},
        "calibration_error": calibration_error(outcomes.probability_N4, outcomes.answer_N),
        "confusion": confusion(outcomes.answer_N, outcomes.chosen_N).tolist(),
    }


def _by_domain(
    correct_N: Tensor, subjects: Sequence[str], domain_subjects: Mapping[str, Sequence[str]]
) -> dict[str, dict[str, float]]:
    """Return the accuracy of each domain; a subject counts in every domain that has it."""
    rates = {}
    for domain, members in domain_subjects.items():
        inside_N = torch.tensor([subject in members for subject in subjects])
        if inside_N.any():
            rates[domain] = _rate(micro_accuracy(correct_N[inside_N]))
    return rates


def _rate(rate: Rate) -> dict[str, float]:
    return {
        "accuracy": rate.value,
        "low": rate.low,
        "high": rate.high,
        "num_questions": rate.total,
    }


def _question_rows(
    outcomes: Mapping[str, Mapping[str, Outcomes]], questions: Sequence[Question]
) -> list[dict[str, Any]]:
    """Return what each model chose on each question, so that runs can be compared later."""
    rows: dict[int, dict[str, Any]] = {}
    for scoring, both in outcomes.items():
        for model, outcome in both.items():
            for i, chosen in zip(outcome.index_N.tolist(), outcome.chosen_N.tolist(), strict=True):
                question = questions[i]
                row = rows.setdefault(
                    i,
                    {
                        "id": question.id,
                        "language": question.language,
                        "subject": question.subject,
                        "answer": question.answer,
                    },
                )
                row[f"{scoring}_{model}"] = chosen
    return [rows[i] for i in sorted(rows)]
