"""KL from the source: one law for all forms of it."""

import math

import pytest
import torch

from lmerge.divergence import (
    Targets,
    exact_kl,
    head_kl,
    kl_rows,
    source_targets,
    top_logits,
    truncated_kl,
)

GENERATOR = torch.Generator().manual_seed(5)
SOURCE_NV = 3 * torch.randn(20, 50, generator=GENERATOR)
MERGED_NV = SOURCE_NV + torch.randn(20, 50, generator=GENERATOR)
# More positions than a chunk holds, and states that give logits of some 20.
HEAD_VD = torch.randn(97, 16, generator=GENERATOR, dtype=torch.float64)
SOURCE_ND = 3 * torch.randn(300, 16, generator=GENERATOR, dtype=torch.float64)
STATE_ND = SOURCE_ND + torch.randn(300, 16, generator=GENERATOR, dtype=torch.float64)


def slow_kl() -> float:
    p, q = SOURCE_NV.double().softmax(-1), MERGED_NV.double().softmax(-1)
    pairs = zip(p.flatten().tolist(), q.flatten().tolist(), strict=True)
    return sum(a * math.log(a / b) for a, b in pairs) / 20


def known(dtype: torch.dtype, kind: str) -> Targets | torch.Tensor:
    source_ND = SOURCE_ND.to(dtype)
    return source_targets(source_ND, HEAD_VD.to(dtype)) if kind == "targets" else source_ND


def test_kl_agrees_with_the_slow_sum() -> None:
    assert float(exact_kl(SOURCE_NV, MERGED_NV)) == pytest.approx(slow_kl(), rel=1e-5)
    assert float(kl_rows(SOURCE_NV, MERGED_NV).mean()) == pytest.approx(slow_kl(), rel=1e-5)


@pytest.mark.parametrize("kind", ["targets", "states"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kl_from_states_is_that_of_their_logits(kind: str, dtype: torch.dtype) -> None:
    found = head_kl(STATE_ND.to(dtype), known(dtype, kind), HEAD_VD.to(dtype))
    wanted = exact_kl(SOURCE_ND @ HEAD_VD.T, STATE_ND @ HEAD_VD.T)
    assert found.dtype == dtype
    assert float(found) == pytest.approx(
        float(wanted), rel=1e-5 if dtype == torch.float32 else 1e-12
    )


@pytest.mark.parametrize("kind", ["targets", "states"])
def test_gradient_of_kl_from_states_is_that_through_their_logits(kind: str) -> None:
    grads = []
    for function in (
        lambda state_ND: head_kl(state_ND, known(torch.float64, kind), HEAD_VD),
        lambda state_ND: exact_kl(SOURCE_ND @ HEAD_VD.T, state_ND @ HEAD_VD.T),
    ):
        leaf_ND = STATE_ND.clone().requires_grad_()
        (2 * function(leaf_ND)).backward()
        grads.append(leaf_ND.grad)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["targets", "states"])
def test_gradient_of_kl_from_states_is_the_numerical_one(kind: str) -> None:
    source = known(torch.float64, kind)
    few = Targets(*(part[:5] for part in source)) if isinstance(source, Targets) else source[:5]
    state_ND = STATE_ND[:5].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: head_kl(x, few, HEAD_VD), state_ND)


@pytest.mark.parametrize("kind", ["targets", "states"])
def test_kl_of_equal_states_is_zero_with_zero_gradient(kind: str) -> None:
    state_ND = SOURCE_ND.float().requires_grad_()
    loss = head_kl(state_ND, known(torch.float32, kind), HEAD_VD.float())
    loss.backward()
    assert abs(loss.item()) < 1e-5
    assert float(state_ND.grad.abs().max()) < 1e-6


@pytest.mark.parametrize("kind", ["targets", "states"])
def test_kl_from_states_is_finite_where_the_source_is_certain(kind: str) -> None:
    head_VD = HEAD_VD.float()
    source_ND = 100 * head_VD[:4]
    source = source_targets(source_ND, head_VD) if kind == "targets" else source_ND
    state_ND = (-source_ND).requires_grad_()
    loss = head_kl(state_ND, source, head_VD)
    loss.backward()
    assert loss.isfinite()
    assert state_ND.grad.isfinite().all()


def test_kl_from_states_in_bfloat16_is_near_that_in_float64() -> None:
    state_ND = STATE_ND.bfloat16().requires_grad_()
    head_VD = HEAD_VD.bfloat16()
    loss = head_kl(state_ND, SOURCE_ND.bfloat16(), head_VD)
    loss.backward()
    wanted = float(exact_kl(SOURCE_ND @ HEAD_VD.T, STATE_ND @ HEAD_VD.T))
    assert loss.item() == pytest.approx(wanted, rel=0.02)
    assert state_ND.grad.dtype == torch.bfloat16


def test_the_truncated_kl_rises_to_the_exact_one() -> None:
    exact = float(exact_kl(SOURCE_NV, MERGED_NV))
    found = [float(truncated_kl(top_logits(SOURCE_NV, k), MERGED_NV)) for k in (1, 4, 16, 49, 50)]
    assert found[:-1] == sorted(found[:-1])
    assert all(value <= exact + 1e-5 for value in found)
    assert found[2] > 0.8 * exact
    assert found[-2:] == pytest.approx([exact, exact], rel=1e-4)


def test_the_truncated_kl_of_equal_logits_is_zero_with_zero_gradient() -> None:
    merged_NV = SOURCE_NV.clone().requires_grad_()
    loss = truncated_kl(top_logits(SOURCE_NV, 8), merged_NV)
    loss.backward()
    assert abs(loss.item()) < 1e-5
    assert float(merged_NV.grad.abs().max()) < 1e-5


def test_the_truncated_kl_is_finite_where_the_source_is_certain() -> None:
    certain_NV = torch.zeros(2, 50)
    certain_NV[:, 3] = 200
    merged_NV = (-certain_NV).requires_grad_()
    loss = truncated_kl(top_logits(certain_NV, 4), merged_NV)
    loss.backward()
    assert loss.isfinite()
    assert merged_NV.grad.isfinite().all()
