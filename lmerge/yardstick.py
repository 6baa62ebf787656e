"""The source's scores on fixed texts and questions, and other models measured against them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from lmerge.cost import measure_costs
from lmerge.data.records import IGNORE, ChoiceBatch, TextBatch
from lmerge.llama import lm_logits
from lmerge.metrics import ChoiceMetric, Outcomes, TextMetric, micro_accuracy
from lmerge.prefix import PrefixCache
from lmerge.progress import track
from lmerge.score import compare_text, normalise_cloze, score_choices

CHUNK = 256
"""Positions whose logits exist at once."""


class Yardstick:
    """Texts and questions with the source's results on them.

    Args:
        source: The source model.
        texts: Batches of each text by name.
        choices: Batches of multiple-choice questions.
    """

    def __init__(
        self,
        source: PreTrainedModel,
        texts: Mapping[str, Sequence[TextBatch]],
        choices: Sequence[ChoiceBatch],
    ) -> None:
        self.source = source
        self.texts = texts
        self.choices = choices
        batches = [batch for part in texts.values() for batch in part]
        self.finals = [final_states(source, b) for b in track(batches, "source on texts")]
        self.outcomes = score_questions(source, choices, "source on questions")

    def score(self, model: PreTrainedModel) -> dict[str, Any]:
        """Return losses, KL, accuracies and costs of a model, as JSON data."""
        texts: dict[str, Any] = {}
        finals = iter(self.finals)
        total = len(self.finals)
        with_names = [(name, b) for name, part in self.texts.items() for b in part]
        metrics = {(name, which): TextMetric() for name in self.texts for which in (0, 1)}
        for name, batch in track(with_names, "texts", total=total):
            rows = self._text_rows(model, batch, next(finals))
            metrics[name, 0].update(batch.index_B, rows["source"], rows["tokens"])
            metrics[name, 1].update(
                batch.index_B, rows["model"], rows["tokens"], kl_B=rows["kl"], agree_B=rows["agree"]
            )
        for name in self.texts:
            before, after = (metrics[name, which].compute() for which in (0, 1))
            after["source_loss"] = before["loss"]
            after["source_block_nats"] = before["block_nats"]
            texts[name] = after
        outcomes = score_questions(model, self.choices, "questions")
        return {
            "texts": texts,
            "choices": {name: accuracy(found) for name, found in outcomes.items()},
            "source_choices": {name: accuracy(found) for name, found in self.outcomes.items()},
            "cost": measure_costs({"source": self.source, "model": model}),
        }

    @torch.no_grad()
    def _text_rows(
        self, model: PreTrainedModel, batch: TextBatch, final_ND: Tensor
    ) -> dict[str, Tensor]:
        """Return sums over each block of a batch, (B,) float64."""
        mask_BT = batch.target_BT != IGNORE
        target_N = batch.target_BT[mask_BT].to(model.device)
        ours_ND = final_states(model, batch)
        columns: dict[str, list[Tensor]] = {"source": [], "model": [], "kl": [], "agree": []}
        parts = zip(final_ND.split(CHUNK), ours_ND.split(CHUNK), target_N.split(CHUNK), strict=True)
        for source_ND, model_ND, part_N in parts:
            source_NV = lm_logits(self.source, source_ND.to(model.device)).float()
            model_NV = lm_logits(model, model_ND.to(model.device)).float()
            kl_N, agree_N = compare_text(source_NV, model_NV)
            columns["source"].append(F.cross_entropy(source_NV, part_N, reduction="none"))
            columns["model"].append(F.cross_entropy(model_NV, part_N, reduction="none"))
            columns["kl"].append(kl_N)
            columns["agree"].append(agree_N)
        sums = {name: _by_block(torch.cat(found), mask_BT) for name, found in columns.items()}
        return {**sums, "tokens": mask_BT.sum(dim=1)}


@torch.no_grad()
def final_states(model: PreTrainedModel, batch: TextBatch) -> Tensor:
    """Return the states after the final norm where a target exists, (N, D) on the CPU."""
    states_BTD: Tensor = model.model(
        input_ids=batch.token_BT.to(model.device), use_cache=False
    ).last_hidden_state
    return states_BTD[(batch.target_BT != IGNORE).to(model.device)].cpu()


def score_questions(
    model: PreTrainedModel, batches: Sequence[ChoiceBatch], description: str
) -> dict[str, Outcomes]:
    """Return what a model chooses on each question, by scoring."""
    metrics: dict[str, ChoiceMetric] = {}
    prefixes = PrefixCache()
    for batch in track(batches, description, total=len(batches)):
        logp_B4 = score_choices(model, batch, prefixes)
        if batch.scoring == "cloze":
            logp_B4 = normalise_cloze(logp_B4, batch.choice_length_B4)
        metric = metrics.setdefault(batch.scoring, ChoiceMetric())
        metric.update(batch.index_B, logp_B4, batch.answer_B)
    prefixes.release()
    return {name: metric.compute() for name, metric in metrics.items()}


def accuracy(outcomes: Outcomes) -> dict[str, Any]:
    """Return an accuracy with its interval, and whether each question was answered right."""
    rate = micro_accuracy(outcomes.correct_N)
    return {
        "accuracy": rate.value,
        "low": rate.low,
        "high": rate.high,
        "num_questions": rate.total,
        "correct": outcomes.correct_N.int().tolist(),
    }


def _by_block(value_N: Tensor, mask_BT: Tensor) -> Tensor:
    value_BT = torch.zeros(mask_BT.shape, dtype=torch.float64)
    value_BT[mask_BT] = value_N.double().cpu()
    return value_BT.sum(dim=1)
