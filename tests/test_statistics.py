import math

import numpy as np
import pytest
import scipy.stats
import torch

from lmerge.statistics import (
    bootstrap_interval,
    exact_sum,
    macro_interval,
    mcnemar_exact,
    paired_bootstrap,
    stratified_bootstrap,
    wilson_interval,
)


@pytest.mark.parametrize(
    ("successes", "total"), [(0, 1), (1, 1), (0, 30), (7, 30), (30, 30), (3511, 14042)]
)
def test_wilson_interval_equals_scipy(successes: int, total: int) -> None:
    expected = scipy.stats.binomtest(successes, total).proportion_ci(method="wilson")
    assert wilson_interval(successes, total) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("successes", "total"), [(0, 0), (3, 2), (-1, 2)])
def test_impossible_counts_are_refused(successes: int, total: int) -> None:
    with pytest.raises(ValueError, match=f"got {successes} of {total}"):
        wilson_interval(successes, total)


def test_macro_interval_of_one_stratum_adds_two_successes_and_two_failures() -> None:
    share = (12 + 2) / (40 + 4)
    radius = 1.959964 * math.sqrt(share * (1 - share) / 44)
    assert macro_interval([12], [40]) == pytest.approx((share - radius, share + radius), abs=1e-6)


def test_macro_interval_equals_its_published_formula() -> None:
    totals, adjusted = [10, 20, 60], [(3 + 2 / 3), (20 + 2 / 3), (7 + 2 / 3)]
    shares = [x / (n + 4 / 3) for x, n in zip(adjusted, totals, strict=True)]
    variances = [p * (1 - p) / (n + 4 / 3) / 9 for p, n in zip(shares, totals, strict=True)]
    center, radius = sum(shares) / 3, 1.959964 * math.sqrt(sum(variances))
    expected = (center - radius, center + radius)
    assert macro_interval([3, 20, 7], totals) == pytest.approx(expected, abs=1e-6)


def test_macro_interval_covers_the_truth_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    totals = [5, 8, 11, 20, 40, 3, 10, 10]
    truth = np.array([0.25, 0.3, 0.5, 0.9, 0.7, 0.4, 0.25, 0.95])
    hits = 0
    for successes in generator.binomial(totals, truth, size=(2000, len(totals))).tolist():
        low, high = macro_interval(successes, totals)
        hits += low <= truth.mean() <= high
    assert 0.94 <= hits / 2000 <= 0.975


@pytest.mark.parametrize("share", [0, 1])
def test_macro_interval_of_perfect_strata_has_a_width(share: int) -> None:
    low, high = macro_interval([10 * share] * 57, [10] * 57)
    assert low < share < high or (low, high)[share] == share


@pytest.mark.parametrize(
    ("successes", "totals", "message"),
    [([], [], "at least one stratum"), ([1], [2, 3], "same length"), ([4], [3], "got 4 of 3")],
)
def test_unusable_strata_are_refused(successes: list[int], totals: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        macro_interval(successes, totals)


VALUES = torch.randn(80, generator=torch.Generator().manual_seed(3)).exp().double()
WEIGHTS = torch.randint(1, 200, (80,), generator=torch.Generator().manual_seed(4)).double()


def test_bootstrap_interval_agrees_with_scipy() -> None:
    expected = scipy.stats.bootstrap(
        (VALUES.numpy(),), np.mean, n_resamples=20_000, method="percentile", rng=0
    ).confidence_interval
    interval = bootstrap_interval(VALUES, seed=0, num_samples=20_000)
    assert interval == pytest.approx(tuple(expected), rel=0.02)


def test_bootstrap_interval_of_a_ratio_agrees_with_scipy() -> None:
    def ratio(x: np.ndarray, y: np.ndarray, axis: int) -> np.ndarray:
        return x.sum(axis=axis) / y.sum(axis=axis)

    data = (VALUES.numpy(), WEIGHTS.numpy())
    expected = scipy.stats.bootstrap(
        data, ratio, paired=True, n_resamples=20_000, method="percentile", rng=0
    ).confidence_interval
    interval = bootstrap_interval(VALUES, weights=WEIGHTS, seed=0, num_samples=20_000)
    assert interval == pytest.approx(tuple(expected), rel=0.02)


def test_equal_seeds_give_equal_bits() -> None:
    assert bootstrap_interval(VALUES, seed=5) == bootstrap_interval(VALUES, seed=5)


def test_another_seed_gives_another_interval() -> None:
    assert bootstrap_interval(VALUES, seed=5) != bootstrap_interval(VALUES, seed=6)


def test_equal_values_have_an_interval_of_one_point() -> None:
    assert bootstrap_interval([2.5] * 9, seed=0) == (2.5, 2.5)


def test_one_value_says_nothing_about_the_spread() -> None:
    assert all(math.isnan(end) for end in bootstrap_interval([2.5], seed=0))


@pytest.mark.parametrize(
    ("values", "weights", "message"),
    [
        ([], None, "`values` must be a list of at least one number"),
        ([1.0, math.nan], None, "`values` must be finite, got nan at place 1"),
        ([math.inf], None, "`values` must be finite, got inf at place 0"),
        ([1.0, 2.0], [1.0], "`values` and `weights` must have the same length, got 2 and 1"),
        ([1.0, 2.0], [1.0, 0.0], "`weights` must be positive"),
    ],
)
def test_unusable_values_are_refused(
    values: list[float], weights: list[float] | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        bootstrap_interval(values, weights=weights, seed=0)


def test_a_bootstrap_without_samples_is_refused() -> None:
    with pytest.raises(ValueError, match="`num_samples` must be at least 1, got 0"):
        bootstrap_interval([1.0, 2.0], seed=0, num_samples=0)


def test_every_error_is_one_line() -> None:
    with pytest.raises(ValueError, match="values") as caught:
        bootstrap_interval([], seed=0)
    assert "\n" not in str(caught.value)


def outcomes(only_a: int, only_b: int, both: int = 5) -> tuple[list[bool], list[bool]]:
    pairs = [(True, False)] * only_a + [(False, True)] * only_b + [(True, True)] * both
    return [a for a, _ in pairs], [b for _, b in pairs]


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 1), (1, 9), (10, 10), (11, 10), (60, 95)])
def test_mcnemar_equals_the_binomial_test(only_a: int, only_b: int) -> None:
    expected = scipy.stats.binomtest(only_a, only_a + only_b).pvalue
    assert mcnemar_exact(*outcomes(only_a, only_b)).p_value == pytest.approx(expected, rel=1e-9)


def test_mcnemar_counts_the_questions_that_differ() -> None:
    assert mcnemar_exact(*outcomes(3, 4))[:2] == (3, 4)


def test_mcnemar_of_equal_answers_is_one() -> None:
    assert mcnemar_exact(*outcomes(0, 0)).p_value == 1


def test_mcnemar_does_not_depend_on_the_order_of_the_models() -> None:
    a, b = outcomes(2, 9)
    assert mcnemar_exact(a, b).p_value == mcnemar_exact(b, a).p_value


def test_mcnemar_takes_tensors() -> None:
    a, b = outcomes(2, 9)
    assert mcnemar_exact(torch.tensor(a), torch.tensor(b)) == mcnemar_exact(a, b)


@pytest.mark.parametrize("test", [mcnemar_exact, lambda a, b: paired_bootstrap(a, b, seed=0)])
def test_paired_tests_refuse_different_lengths(test: object) -> None:
    with pytest.raises(ValueError, match="`a` and `b` must have the same length, got 2 and 1"):
        test([True, False], [True])


@pytest.mark.parametrize("test", [mcnemar_exact, lambda a, b: paired_bootstrap(a, b, seed=0)])
def test_paired_tests_refuse_no_questions(test: object) -> None:
    with pytest.raises(ValueError, match="`a` must be a list of at least one number"):
        test([], [])


def test_a_model_does_not_differ_from_itself() -> None:
    assert paired_bootstrap(VALUES, VALUES, seed=0) == (0, 0, 0, 1)


def test_the_difference_is_first_minus_second() -> None:
    difference = paired_bootstrap(VALUES + 0.25, VALUES, seed=0)
    assert difference.value == pytest.approx(0.25)


def test_the_difference_of_ratios_is_the_difference_of_the_losses() -> None:
    other = VALUES.flip(0)
    expected = float(VALUES.sum() / WEIGHTS.sum() - other.sum() / WEIGHTS.sum())
    difference = paired_bootstrap(VALUES, other, weights=WEIGHTS, seed=0)
    assert difference.value == pytest.approx(expected, abs=1e-12)


def test_exchanging_the_models_changes_the_sign_alone() -> None:
    a, b = VALUES, VALUES.roll(1)
    value, low, high, p_value = paired_bootstrap(a, b, seed=0)
    swapped = paired_bootstrap(b, a, seed=0)
    assert swapped == pytest.approx((-value, -high, -low, p_value), abs=1e-12)


def test_the_paired_interval_agrees_with_the_normal_one() -> None:
    generator = np.random.default_rng(1)
    a, b = generator.normal(size=(2, 400))
    delta = a - b
    expected = scipy.stats.norm.interval(0.95, delta.mean(), delta.std() / 20)
    difference = paired_bootstrap(a.tolist(), b.tolist(), seed=0, num_samples=10_000)
    assert difference[1:3] == pytest.approx(expected, abs=0.01)


def test_the_p_value_agrees_with_the_interval() -> None:
    generator = np.random.default_rng(2)
    for delta in generator.normal(0.2, 1, size=(40, 60)):
        result = paired_bootstrap(np.zeros(60).tolist(), delta.tolist(), seed=0)
        # The interval interpolates between resamples, so a p-value at the border may go either way.
        if abs(result.p_value - 0.05) > 0.003:
            assert (result.p_value < 0.05) == (not result.low <= 0 <= result.high)


def test_equal_models_rarely_look_different() -> None:
    generator = np.random.default_rng(3)
    pairs = generator.normal(size=(400, 2, 50)).tolist()
    p_values = [paired_bootstrap(a, b, seed=0, num_samples=400).p_value for a, b in pairs]
    assert np.mean([p < 0.05 for p in p_values]) < 0.085


def test_the_exact_sum_does_not_depend_on_the_order() -> None:
    value_N = torch.tensor([1e16, 1.0, -1e16, 3.0, 1e-3], dtype=torch.float64)
    assert exact_sum(value_N) == exact_sum(value_N.flip(0)) == 4.001


def test_a_single_unit_is_no_evidence_of_a_difference() -> None:
    assert paired_bootstrap([1.0], [0.0], seed=0).p_value == 1


def test_one_stratum_has_the_interval_of_its_ratio() -> None:
    values, weights = [1.0, 5.0, 2.0, 4.0], [1.0, 2.0, 1.0, 3.0]
    wanted = bootstrap_interval(values, seed=3, weights=weights)
    assert stratified_bootstrap([values], seeds=[3], weights=[weights]) == wanted


def test_strata_of_one_seed_are_drawn_alike_and_others_average_out() -> None:
    values, weights = [1.0, 5.0, 2.0, 4.0, 9.0], [1.0] * 5
    alone = bootstrap_interval(values, seed=0)
    same = stratified_bootstrap([values] * 4, seeds=[0] * 4, weights=[weights] * 4)
    other = stratified_bootstrap([values] * 4, seeds=range(4), weights=[weights] * 4)
    assert same == pytest.approx(alone)
    assert other.high - other.low < 0.7 * (alone.high - alone.low)
