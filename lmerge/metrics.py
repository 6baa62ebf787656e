"""Loss and accuracy: functions first, then torchmetrics classes around them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lmerge.indexed import IndexedMetric
from lmerge.statistics import (
    Interval,
    bootstrap_interval,
    exact_sum,
    macro_interval,
    wilson_interval,
)


class Rate(NamedTuple):
    """A share of questions with its 95% interval."""

    value: float
    low: float
    high: float
    total: int
    """Questions it was measured on."""


class Outcomes:
    """What a model chose on each question, sorted by index.

    Not a tuple or dataclass: torchmetrics would squeeze the tensors inside when there is one
    question.
    """

    def __init__(self, *, index_N: Tensor, logp_N4: Tensor, answer_N: Tensor) -> None:
        self.index_N = index_N
        """Place in the data module's list (int64), ascending, without repeats."""
        self.logp_N4 = logp_N4
        """Log-probability of each choice as it was scored (float64)."""
        self.answer_N = answer_N
        """Index of the right choice (int64)."""
        self.chosen_N = logp_N4.argmax(dim=1)
        """Index of the most probable choice; the first one in a tie, as in lm-eval."""
        self.correct_N = self.chosen_N == answer_N
        """Whether the choice is right (bool)."""
        self.probability_N4 = logp_N4.softmax(dim=1)
        """Probabilities over the four choices alone (float64)."""

    def __len__(self) -> int:
        return len(self.index_N)


def perplexity(total_nats: float, num_tokens: int) -> float:
    """Return exp(total nats / tokens); infinity where that exceeds a float."""
    if num_tokens < 1:
        raise ValueError(f"`num_tokens` must be at least 1, got {num_tokens}. Use a longer text.")
    try:
        return math.exp(total_nats / num_tokens)
    except OverflowError:
        return math.inf


def exp_interval(interval: Interval) -> Interval:
    """Return the interval of a perplexity from that of a loss; NaN stays NaN."""
    low, high = (x if math.isnan(x) else perplexity(x, 1) for x in interval)
    return Interval(low, high)


def bits_per_byte(total_nats: float, num_bytes: int) -> float:
    """Return the loss in bits for each UTF-8 byte, comparable across tokenizers."""
    if num_bytes < 1:
        raise ValueError(f"`num_bytes` must be at least 1, got {num_bytes}. Use a longer text.")
    return total_nats / math.log(2) / num_bytes


def micro_accuracy(correct_N: Tensor) -> Rate:
    """Return the share of right answers with its Wilson interval."""
    right, total = int(correct_N.sum()), len(correct_N)
    interval = wilson_interval(right, total)
    return Rate(right / total, *interval, total)


def macro_accuracy(correct_N: Tensor, labels: Sequence[str]) -> Rate:
    """Return the unweighted mean of the accuracies of the groups, such as MMLU subjects.

    Args:
        correct_N: Whether each answer is right.
        labels: Group of each question, in the same order.
    """
    groups = list(accuracy_by(correct_N, labels).values())
    counts = [round(group.value * group.total) for group in groups]
    interval = macro_interval(counts, [group.total for group in groups])
    value = math.fsum(group.value for group in groups) / len(groups)
    return Rate(value, *interval, len(correct_N))


def accuracy_by(correct_N: Tensor, labels: Sequence[str]) -> dict[str, Rate]:
    """Return the accuracy of each subject, domain or language, sorted by name.

    Args:
        correct_N: Whether each answer is right.
        labels: Group of each question, in the same order.

    Raises:
        ValueError: If the lengths differ or there is no question.
    """
    if len(labels) != len(correct_N) or not labels:
        raise ValueError(
            f"`labels` must name the group of each of the {len(correct_N)} questions (at least "
            f"one), got {len(labels)}. Look them up by `Outcomes.index_N`."
        )
    places: dict[str, list[int]] = {}
    for place, label in enumerate(labels):
        places.setdefault(label, []).append(place)
    return {label: micro_accuracy(correct_N[places[label]]) for label in sorted(places)}


def calibration_error(probability_N4: Tensor, answer_N: Tensor, *, num_bins: int = 15) -> float:
    """Return the expected calibration error, in [0, 1] (Guo et al. 2017, arXiv:1706.04599, eq. 3).

    Args:
        probability_N4: Probabilities over the four choices.
        answer_N: Index of the right choice.
        num_bins: Bins of equal width over the probability of the chosen answer, closed on the
            left; at least 1.
    """
    _check_questions(probability_N4, answer_N)
    if num_bins < 1:
        raise ValueError(f"`num_bins` must be at least 1, got {num_bins}. Use 10 or 15.")
    confidence_N, chosen_N = probability_N4.double().cpu().max(dim=1)
    gap_N = (chosen_N == answer_N.cpu()).double() - confidence_N
    bin_N = (confidence_N * num_bins).long().clamp_max(num_bins - 1)
    gap_of_bins = torch.bincount(bin_N, weights=gap_N, minlength=num_bins)
    return exact_sum(gap_of_bins.abs()) / len(gap_N)


def confusion(answer_N: Tensor, chosen_N: Tensor) -> Tensor:
    """Return counts (4, 4): row the right letter, column the chosen one (int64)."""
    if len(answer_N) != len(chosen_N) or len(answer_N) == 0:
        raise ValueError(
            "`answer_N` and `chosen_N` must have the same length of at least 1, got "
            f"{len(answer_N)} and {len(chosen_N)}. Pass the columns of one `Outcomes`."
        )
    cell_N = answer_N.cpu() * 4 + chosen_N.cpu()
    return torch.bincount(cell_N, minlength=16).reshape(4, 4)


def letter_counts(chosen_N: Tensor) -> Tensor:
    """Return how often each letter was chosen (int64, 4); one full entry shows a broken model."""
    return torch.bincount(chosen_N.cpu(), minlength=4)


class TextMetric(IndexedMetric):
    """Loss of a model on one text, and its distance from the source where that is given."""

    def __init__(self, *, num_bytes: int | None = None, seed: int = 0, **kwargs: object) -> None:
        """Start empty.

        Args:
            num_bytes: UTF-8 bytes of the predicted text, for bits per byte.
            seed: Seed of the bootstrap over blocks.
            kwargs: Options of `torchmetrics.Metric`.
        """
        super().__init__(num_columns=5, **kwargs)
        self.num_bytes = num_bytes
        self.seed = seed

    def update(
        self,
        index_B: Tensor,
        nll_B: Tensor,
        token_B: Tensor,
        *,
        kl_B: Tensor | None = None,
        agree_B: Tensor | None = None,
    ) -> None:
        """Add blocks.

        Args:
            index_B: Place of each block in the text.
            nll_B: Negative log-likelihood of its tokens, summed, in nats.
            token_B: How many tokens that are.
            kl_B: KL from the source, summed over the same tokens, in nats.
            agree_B: On how many of them the top tokens of both models agree.
        """
        # -1 stands for absent: no KL or count is negative.
        kl_B = torch.full_like(nll_B, -1) if kl_B is None else kl_B
        agree_B = torch.full_like(nll_B, -1) if agree_B is None else agree_B
        columns = {"nll_B": nll_B, "token_B": token_B, "kl_B": kl_B, "agree_B": agree_B}
        self.append(index_B, columns)

    def restore_columns(self, index_B: Tensor, *columns: Tensor) -> None:
        nll_B, token_B, kl_B, agree_B = columns
        self.update(index_B, nll_B, token_B, kl_B=kl_B, agree_B=agree_B)

    def compute(self) -> dict[str, Any]:
        """Return the scores of the whole text.

        Returns:
            `block_nats` and `block_tokens` of each block with a target, so that two runs can be
            paired; `loss` (nats a token) with `loss_low` and `loss_high` (95%, bootstrap over
            blocks), `ppl` with `ppl_low` and `ppl_high`, `tokens`; `bits_per_byte`, `kl` (nats a
            token) and `agreement` (a share) where they are known.
        """
        _, nll_N, token_N, kl_N, agree_N = self.sorted_rows().unbind(dim=1)
        counted_N = token_N > 0
        if not bool(counted_N.any()):
            raise ValueError("A text needs at least one target, got none. Use a longer text.")
        nats, tokens = exact_sum(nll_N), int(exact_sum(token_N))
        interval = bootstrap_interval(nll_N[counted_N], weights=token_N[counted_N], seed=self.seed)
        scores: dict[str, Any] = {
            "loss": nats / tokens,
            "loss_low": interval.low,
            "loss_high": interval.high,
            "ppl": perplexity(nats, tokens),
            "ppl_low": exp_interval(interval).low,
            "ppl_high": exp_interval(interval).high,
            "tokens": float(tokens),
            "block_nats": nll_N[counted_N].tolist(),
            "block_tokens": token_N[counted_N].long().tolist(),
        }
        if self.num_bytes is not None:
            scores["bits_per_byte"] = bits_per_byte(nats, self.num_bytes)
        for name, value_N in {"kl": kl_N, "agreement": agree_N}.items():
            if bool((value_N >= 0).all()):
                scores[name] = exact_sum(value_N) / tokens
        return scores


class ChoiceMetric(IndexedMetric):
    """Which choice a model takes on each question."""

    def __init__(self, **kwargs: object) -> None:
        super().__init__(num_columns=6, **kwargs)

    def update(self, index_B: Tensor, logp_B4: Tensor, answer_B: Tensor) -> None:
        """Add questions.

        Args:
            index_B: Place of each question in the data module's list.
            logp_B4: Log-probability of each choice; already normalised for `cloze`.
            answer_B: Index of the right choice, 0 to 3.
        """
        _check_questions(logp_B4, answer_B)
        self.append(index_B, {"answer_B": answer_B, "logp_B4": logp_B4})

    def restore_columns(self, index_B: Tensor, *columns: Tensor) -> None:
        answer_B, *logp = columns
        self.update(index_B, torch.stack(logp, dim=1), answer_B)

    def compute(self) -> Outcomes:
        """Return the outcome of each question, sorted by index."""
        row_N6 = self.sorted_rows()
        index_N, answer_N = row_N6[:, 0].long(), row_N6[:, 1].long()
        return Outcomes(index_N=index_N, logp_N4=row_N6[:, 2:], answer_N=answer_N)


def _check_questions(score_N4: Tensor, answer_N: Tensor) -> None:
    if len(answer_N) == 0 or score_N4.shape != (len(answer_N), 4):
        raise ValueError(
            "Scores must have one row of four for each answer (at least one), got shapes "
            f"{tuple(score_N4.shape)} and {tuple(answer_N.shape)}. Pass one batch."
        )
    if not bool(((answer_N >= 0) & (answer_N < 4)).all()):
        raise ValueError(
            f"Answers must lie in 0 to 3, got {answer_N.tolist()}. Check the data file."
        )
