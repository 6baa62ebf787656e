"""Intervals and paired tests: how far a measured number can be trusted.

Every interval covers 95%. Resampling takes a seed, so equal seeds give equal bits. Totals are
`math.fsum`, which is exact and therefore independent of order and of the number of threads.
Shapes: N units (questions or blocks), S resamples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from scipy.stats import binom
from torch import Tensor

Z_95 = 1.959963984540054
"""Two-sided 95% quantile of the normal distribution."""

NUM_SAMPLES = 2000
"""Resamples of a bootstrap unless told otherwise."""

MAX_DRAWS = 2**22
"""Indices drawn at once, so that a bootstrap of any size needs some 100 MB."""

Numbers = Tensor | Sequence[float]


class Interval(NamedTuple):
    """Both ends of a 95% interval; NaN where nothing is known of the spread."""

    low: float
    high: float


class McNemar(NamedTuple):
    """What McNemar's test saw."""

    only_a: int
    """Questions that only the first model answers right."""
    only_b: int
    """Questions that only the second model answers right."""
    p_value: float
    """Two-sided; the chance of a split this uneven if both were equally good."""


class Difference(NamedTuple):
    """First mean minus second mean, with its 95% interval."""

    value: float
    low: float
    high: float
    p_value: float
    """Two-sided; below 0.05 when the interval leaves out zero."""


def wilson_interval(successes: int, total: int) -> Interval:
    """Return the Wilson score interval of a proportion (Wilson 1927).

    Raises:
        ValueError: If `total` is below 1 or `successes` is outside [0, total].
    """
    _check_counts(successes, total)
    share, square = successes / total, Z_95**2 / total
    center = (share + square / 2) / (1 + square)
    radius = math.sqrt(square * share * (1 - share) + square**2 / 4) / (1 + square)
    # At the borders the formula is exact, the rounding is not.
    low = 0.0 if successes == 0 else center - radius
    return Interval(low, 1.0 if successes == total else center + radius)


def macro_interval(successes: Sequence[int], totals: Sequence[int]) -> Interval:
    """Return the interval of the unweighted mean of independent proportions.

    Strata are taken as fixed: only the questions inside them are a sample. The 2 + 2 pseudo
    observations of Price and Bonett (2004, doi:10.1016/S0167-9473(03)00007-0) are spread over the
    strata, so that a stratum of one question or without an error keeps some variance.

    Args:
        successes: Right answers of each stratum, such as an MMLU subject.
        totals: Questions of each stratum.

    Raises:
        ValueError: If there is no stratum, the lengths differ or a count is impossible.
    """
    _check_same_length(len(successes), len(totals), "successes", "totals")
    if not totals:
        raise ValueError("`totals` must name at least one stratum, got none. Evaluate a question.")
    for right, total in zip(successes, totals, strict=True):
        _check_counts(right, total)
    extra = 4 / len(totals)
    shares = [(r + extra / 2) / (n + extra) for r, n in zip(successes, totals, strict=True)]
    variances = [p * (1 - p) / (n + extra) for p, n in zip(shares, totals, strict=True)]
    center = math.fsum(shares) / len(shares)
    radius = Z_95 * math.sqrt(math.fsum(variances)) / len(shares)
    return Interval(max(0.0, center - radius), min(1.0, center + radius))


def bootstrap_interval(
    values: Numbers, *, seed: int, weights: Numbers | None = None, num_samples: int = NUM_SAMPLES
) -> Interval:
    """Return the percentile bootstrap interval of a mean, or of a ratio of sums.

    Args:
        values: One number for each unit that is drawn, such as the summed nats of a block.
        seed: Seed of the resampling.
        weights: Denominators, such as the tokens of a block; the statistic is then
            sum(values) / sum(weights).
        num_samples: Number of resamples.

    Raises:
        ValueError: If `values` is empty or not finite, or `weights` does not fit it.
    """
    value_N = _vector(values, "values")
    weight_N = _weights(weights, len(value_N))
    return _percentiles(_resample(value_N, weight_N, seed=seed, num_samples=num_samples))


def paired_bootstrap(
    a: Numbers,
    b: Numbers,
    *,
    seed: int,
    weights: Numbers | None = None,
    num_samples: int = NUM_SAMPLES,
) -> Difference:
    """Compare two models on the same units by resampling the units.

    The p-value is the one that inverts the interval: twice the smaller share of resampled
    differences on either side of zero, with one added to each count so that it is never 0.

    Args:
        a: One number a unit for the first model, such as 1 for a right answer or summed nats.
        b: The same units in the same order for the second model.
        seed: Seed of the resampling.
        weights: Denominators as in `bootstrap_interval`, equal for both models.
        num_samples: Number of resamples.

    Returns:
        First minus second, as in `scipy.stats.ttest_rel`.

    Raises:
        ValueError: If the lengths differ, or an input is empty or not finite.
    """
    a_N, b_N = _vector(a, "a"), _vector(b, "b")
    _check_same_length(len(a_N), len(b_N), "a", "b")
    weight_N = _weights(weights, len(a_N))
    sample_S = _resample(a_N - b_N, weight_N, seed=seed, num_samples=num_samples)
    below, above = int((sample_S <= 0).sum()), int((sample_S >= 0).sum())
    # Resampling a single unit says nothing of the spread.
    p_value = min(1.0, 2 * (1 + min(below, above)) / (1 + num_samples)) if len(a_N) > 1 else 1.0
    value = exact_sum(a_N - b_N) / exact_sum(weight_N)
    return Difference(value, *_percentiles(sample_S), p_value)


def stratified_bootstrap(
    values: Sequence[Numbers],
    *,
    seeds: Sequence[int],
    weights: Sequence[Numbers],
    num_samples: int = NUM_SAMPLES,
) -> Interval:
    """Return the interval of the unweighted mean over strata of sum(values) / sum(weights).

    Strata, such as domains, are taken as fixed: units are drawn inside each of them. Strata of one
    seed and length are drawn alike, as befits translations of the same questions.

    Args:
        values: One number for each unit of each stratum, such as the nats of a question.
        seeds: Seed of the resampling of each stratum.
        weights: Denominators, such as the tokens of a question.
        num_samples: Number of resamples.

    Raises:
        ValueError: If there is no stratum, or one is empty, not finite or of another length.
    """
    _check_same_length(len(values), len(weights), "values", "weights")
    if not values:
        raise ValueError("`values` must hold at least one stratum, got none. Give one.")
    samples = []
    for value, weight, seed in zip(values, weights, seeds, strict=True):
        value_N = _vector(value, "values")
        weight_N = _weights(weight, len(value_N))
        samples.append(_resample(value_N, weight_N, seed=seed, num_samples=num_samples))
    return _percentiles(torch.stack(samples).mean(dim=0))


def mcnemar_exact(a: Tensor | Sequence[bool], b: Tensor | Sequence[bool]) -> McNemar:
    """Test whether two models answer the same questions equally well (McNemar 1947, exact).

    Args:
        a: Whether the first model is right on each question.
        b: The same questions in the same order for the second model.

    Raises:
        ValueError: If the lengths differ or there is no question.
    """
    a_N, b_N = _vector(a, "a") != 0, _vector(b, "b") != 0
    _check_same_length(len(a_N), len(b_N), "a", "b")
    only_a, only_b = int((a_N & ~b_N).sum()), int((b_N & ~a_N).sum())
    tail = float(binom.cdf(min(only_a, only_b), only_a + only_b, 0.5))
    return McNemar(only_a, only_b, min(1.0, 2 * tail))


def exact_sum(value_N: Tensor) -> float:
    """Return the correctly rounded sum; the order of the values cannot change a bit of it."""
    return math.fsum(value_N.tolist())


def _resample(value_N: Tensor, weight_N: Tensor, *, seed: int, num_samples: int) -> Tensor:
    """Return sum(values) / sum(weights) of `num_samples` draws with replacement."""
    if num_samples < 1:
        raise ValueError(f"`num_samples` must be at least 1, got {num_samples}. Use {NUM_SAMPLES}.")
    size = len(value_N)
    if size == 1:
        # One unit says nothing about the spread; an interval of width zero would be a lie.
        return torch.full((num_samples,), math.nan, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    step = max(1, MAX_DRAWS // size)
    parts = []
    for start in range(0, num_samples, step):
        shape = (min(step, num_samples - start), size)
        draw_SN = torch.randint(size, shape, generator=generator)
        parts.append(value_N[draw_SN].sum(dim=1) / weight_N[draw_SN].sum(dim=1))
    return torch.cat(parts)


def _percentiles(sample_S: Tensor) -> Interval:
    ends = torch.quantile(sample_S, torch.tensor([0.025, 0.975], dtype=torch.float64))
    return Interval(float(ends[0]), float(ends[1]))


def _vector(values: Numbers | Sequence[bool], name: str) -> Tensor:
    value_N = torch.as_tensor(values, dtype=torch.float64).detach().cpu()
    if value_N.ndim != 1 or len(value_N) == 0:
        raise ValueError(
            f"`{name}` must be a list of at least one number, got shape {tuple(value_N.shape)}. "
            "Evaluate at least one question or block."
        )
    if not bool(value_N.isfinite().all()):
        place = int((~value_N.isfinite()).nonzero()[0])
        raise ValueError(
            f"`{name}` must be finite, got {float(value_N[place])} at place {place}. "
            "Look for NaN in the model's weights."
        )
    return value_N


def _weights(weights: Numbers | None, size: int) -> Tensor:
    if weights is None:
        return torch.ones(size, dtype=torch.float64)
    weight_N = _vector(weights, "weights")
    _check_same_length(size, len(weight_N), "values", "weights")
    if bool((weight_N <= 0).any()):
        raise ValueError(
            f"`weights` must be positive, got {float(weight_N.min())}. Leave out empty units."
        )
    return weight_N


def _check_counts(successes: int, total: int) -> None:
    if total < 1 or not 0 <= successes <= total:
        raise ValueError(
            f"`successes` must lie in [0, total] and `total` be at least 1, got {successes} of "
            f"{total}. Evaluate at least one question."
        )


def _check_same_length(left: int, right: int, left_name: str, right_name: str) -> None:
    if left != right:
        raise ValueError(
            f"`{left_name}` and `{right_name}` must have the same length, got {left} and {right}. "
            "Compare the same questions in the same order."
        )
