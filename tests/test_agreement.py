import numpy as np
import pytest
import torch
from scipy.stats import pearsonr, spearmanr
from torch import Tensor

from lmerge.agreement import (
    agreement,
    all_agreements,
    pearson,
    percentiles,
    resample_matrices,
    split_half,
    upper_pearson,
)
from lmerge.similarity import cosine_similarity


def matrix(seed: int, size: int = 6) -> Tensor:
    x = torch.rand(size, size, generator=torch.Generator().manual_seed(seed)).double()
    x = (x + x.T) / 2
    return x.fill_diagonal_(1)


@pytest.mark.parametrize(
    ("a", "b", "published"),
    [
        ("math_40s", "cs_40s", 0.9512),
        ("legal_40s", "humanities_40s", 0.8628),
        ("medical_es_20s", "medical_zh_20s", 0.7295),
        ("medical_es_20s", "medical_fr_20s", 0.8365),
        ("medical_zh_20s", "medical_fr_20s", 0.7751),
    ],
)
def test_published_correlations_come_out(shared_dir, a: str, b: str, published: float) -> None:
    folder = shared_dir / "reference" / "similarity"
    left, right = (torch.from_numpy(np.load(folder / f"similarity_{n}.npy")) for n in (a, b))
    assert round(agreement(left, right).pearson_full, 4) == published


@pytest.mark.parametrize(
    ("a", "b", "published"),
    [("math_40s", "cs_40s", 0.9454), ("medical_es_20s", "medical_zh_20s", 0.7037)],
)
def test_published_correlations_off_the_diagonal(shared_dir, a, b, published) -> None:
    folder = shared_dir / "reference" / "similarity"
    left, right = (torch.from_numpy(np.load(folder / f"similarity_{n}.npy")) for n in (a, b))
    assert round(agreement(left, right).pearson_upper, 4) == published


def test_correlations_are_those_of_scipy() -> None:
    a, b = matrix(0), matrix(1)
    upper = torch.ones(6, 6).triu(1).bool()
    found = agreement(a, b)
    wanted = [
        function(x.numpy(), y.numpy()).statistic
        for x, y in ((a.flatten(), b.flatten()), (a[upper], b[upper]))
        for function in (pearsonr, spearmanr)
    ]
    np.testing.assert_allclose(found[:4], wanted, atol=1e-12)


def test_undefined_cells_are_left_out_and_counted() -> None:
    a, b = matrix(0), matrix(1)
    a[1, 2] = a[2, 1] = torch.nan
    b[4, 4] = torch.nan
    found = agreement(a, b)
    assert found.num_undefined == 1
    kept = a.isfinite() & torch.ones(6, 6).triu(1).bool()
    assert found.pearson_upper == pytest.approx(pearson(a[kept], b[kept]))


@pytest.mark.parametrize("change", ["one constant", "nothing defined"])
def test_a_correlation_that_does_not_exist_is_nan(change: str) -> None:
    b = torch.full((6, 6), 1.0 if change == "one constant" else torch.nan).double()
    assert np.isnan(agreement(matrix(0), b).pearson_upper)


def test_matrices_of_two_models_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^matrices must have the same shape, [^\n]*$"):
        agreement(matrix(0), matrix(0, 5))


def test_every_pair_is_compared_once() -> None:
    found = all_agreements({"a": matrix(0), "b": matrix(1), "c": matrix(2)})
    assert list(found) == [("a", "b"), ("a", "c"), ("b", "c")]


def states(seed: int) -> Tensor:
    return torch.randn(5, 12, 4, generator=torch.Generator().manual_seed(seed)).cumsum(dim=0)


@pytest.mark.parametrize("halves", [False, True])
def test_equal_seeds_give_equal_resamples_and_groups_share_their_draw(halves: bool) -> None:
    groups = {"es": states(0), "fr": states(0)}
    first = resample_matrices(groups, cosine_similarity, seed=1, halves=halves)
    again = resample_matrices(groups, cosine_similarity, seed=1, halves=halves)
    other = resample_matrices(groups, cosine_similarity, seed=2, halves=halves)
    assert torch.equal(first["es"], again["es"])
    assert torch.equal(first["es"], first["fr"])
    assert not torch.equal(first["es"], other["es"])


def test_halves_spread_a_mean_as_a_bootstrap_does() -> None:
    groups = {"a": states(0)}
    spread = []
    for halves in (False, True):
        values = [
            resample_matrices(groups, cosine_similarity, seed=s, halves=halves)["a"][0, 4]
            for s in range(600)
        ]
        spread.append(torch.stack(values).std())
    assert spread[0] == pytest.approx(float(spread[1]), rel=0.15)


def test_percentiles_need_values() -> None:
    assert percentiles([0.5] * 19 + [float("nan")]) is None
    assert percentiles([i / 100 for i in range(101)]) == pytest.approx((0.025, 0.975))


def test_split_halves_of_one_source_of_prompts_agree_alike_within_and_between() -> None:
    everything = torch.randn(5, 400, 4, generator=torch.Generator().manual_seed(0)).cumsum(dim=0)
    groups = {"a": everything[:, :200], "b": everything[:, 200:]}
    found = split_half(groups, cosine_similarity, seed=0)
    assert list(found) == [("a", "a"), ("a", "b"), ("b", "b")]
    assert min(found.values()) > 0.95


def test_the_short_way_to_pearson_off_the_diagonal_is_the_same_number() -> None:
    a, b = torch.rand(2, 6, 6, generator=torch.Generator().manual_seed(0)).double()
    a[1, 3] = torch.nan
    assert upper_pearson(a, b) == agreement(a, b).pearson_upper
