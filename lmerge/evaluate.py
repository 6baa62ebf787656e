"""Evaluation of source and merged model on the same batches, and its results as plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lmerge.data.records import ChoiceBatch, Question, TextBatch
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

MODELS = ("source", "merged")


class Evaluation:
    """Metrics of both models over one evaluation loop, exact on any number of processes.

    Args:
        text_bytes: UTF-8 bytes of each evaluation text by name, for bits per byte; None if unknown.
        scorings: Ways of scoring choices; every process must name the same.
        device: Where the metrics gather over processes.
        keep_prefixes: Whether few-shot examples are encoded once; without, each batch takes an
            equal number of passes, as layers split over processes need.
    """

    def __init__(
        self,
        text_bytes: Mapping[str, int | None],
        scorings: Sequence[str] = (),
        *,
        device: torch.device | str = "cpu",
        keep_prefixes: bool = True,
    ) -> None:
        self.texts = {
            (name, model): TextMetric(num_bytes=size).to(device)
            for name, size in text_bytes.items()
            for model in MODELS
        }
        self.choices = {
            (scoring, model): ChoiceMetric().to(device) for scoring in scorings for model in MODELS
        }
        size = 2 if keep_prefixes else 0
        self.prefixes = {model: PrefixCache(max_entries=size) for model in MODELS}

    def update(
        self,
        source: PreTrainedModel,
        merged: PreTrainedModel,
        batch: TextBatch | ChoiceBatch,
    ) -> None:
        """Score one batch with both models."""
        if isinstance(batch, TextBatch):
            self._update_text(source, merged, batch)
            return
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
        outcomes: dict[str, dict[str, Outcomes]] = {}
        for (scoring, model), choice_metric in self.choices.items():
            outcomes.setdefault(scoring, {})[model] = choice_metric.compute()
        return {
            "text": texts,
            "choices": {
                scoring: _choice_results(both, questions, domain_subjects)
                for scoring, both in outcomes.items()
            },
            "questions": _question_rows(outcomes, questions),
        }


def _choice_results(
    both: Mapping[str, Outcomes],
    questions: Sequence[Question],
    domain_subjects: Mapping[str, Sequence[str]],
) -> dict[str, Any]:
    asked = [questions[i] for i in both["source"].index_N.tolist()]
    source_N, merged_N = both["source"].correct_N, both["merged"].correct_N
    return {
        **{model: _one_model(both[model], asked, domain_subjects) for model in MODELS},
        "mcnemar": mcnemar_exact(source_N, merged_N)._asdict(),
        # Merged minus source: negative where merging costs accuracy.
        "difference": paired_bootstrap(merged_N.double(), source_N.double(), seed=0)._asdict(),
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
