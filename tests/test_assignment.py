import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from lmerge.assignment import assign


def similarity(kind: str, size: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    if kind == "noise":
        return torch.randn(size, size, generator=g)
    if kind == "low rank":
        return torch.randn(size, 3, generator=g) @ torch.randn(3, size, generator=g)
    if kind == "ties":
        return torch.randint(4, (size, size), generator=g).float()
    if kind == "one wanted column":
        return torch.randn(size, size, generator=g) + 10 * (torch.arange(size) == 0)
    if kind == "equal":
        return torch.zeros(size, size)
    planted = torch.eye(size)[torch.randperm(size, generator=g)]
    return planted + 0.25 * torch.randn(size, size, generator=g)


KINDS = ("noise", "low rank", "ties", "one wanted column", "equal", "planted")


@pytest.mark.parametrize("size", [1, 2, 3, 40, 200])
@pytest.mark.parametrize("kind", KINDS)
def test_the_total_is_that_of_scipys_dense_solver(kind: str, size: int) -> None:
    similarity_FF = similarity(kind, size)
    rows, columns = linear_sum_assignment(similarity_FF.double().numpy(), maximize=True)
    best = float(similarity_FF.double().numpy()[rows, columns].sum())
    found = assign(similarity_FF, num_candidates=4)
    assert found.total == pytest.approx(best, abs=1e-5)
    assert torch.equal(found.order_F.sort().values, torch.arange(size))


@pytest.mark.parametrize("kind", KINDS)
def test_the_gap_is_proven_to_be_nothing_in_the_end(kind: str) -> None:
    found = assign(similarity(kind, 150), num_candidates=4)
    assert found.gap <= 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_the_gap_after_one_round_holds(kind: str) -> None:
    similarity_FF = similarity(kind, 150)
    found = assign(similarity_FF, num_candidates=1, max_rounds=1)
    best = assign(similarity_FF).total
    assert found.total - 1e-6 <= best <= found.total + found.gap + 1e-6


def test_the_total_is_that_of_the_order() -> None:
    similarity_FF = similarity("noise", 100)
    found = assign(similarity_FF)
    pairs = similarity_FF[torch.arange(100), found.order_F].double().sum()
    assert found.total == pytest.approx(float(pairs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_every_float_dtype_is_solved(dtype: torch.dtype) -> None:
    similarity_FF = similarity("noise", 60).to(dtype)
    rows, columns = linear_sum_assignment(similarity_FF.double().numpy(), maximize=True)
    best = float(similarity_FF.double().numpy()[rows, columns].sum())
    assert assign(similarity_FF).total == pytest.approx(best, abs=1e-5)
