import pytest
import torch
from torch import Tensor, nn

from lmerge.good_alphas import GoodAlphas, check_alphas_finite


def parameters(*values: float) -> list[nn.Parameter]:
    return [nn.Parameter(torch.tensor([value])) for value in values]


def test_before_the_first_good_step_nothing_is_restored() -> None:
    alphas = parameters(1.0, 2.0)
    assert not GoodAlphas().restore(alphas)
    assert [alpha.item() for alpha in alphas] == [1.0, 2.0]


def test_the_alphas_of_the_last_good_step_come_back() -> None:
    alphas, good = parameters(1.0, 2.0), GoodAlphas()
    good.keep(alphas)
    with torch.no_grad():
        for alpha in alphas:
            alpha.fill_(torch.nan)
    assert good.restore(alphas)
    assert [alpha.item() for alpha in alphas] == [1.0, 2.0]


@pytest.mark.parametrize("loss", [torch.tensor(torch.nan), torch.tensor(torch.inf)])
def test_a_loss_that_is_not_finite_is_refused(loss: Tensor) -> None:
    GoodAlphas().check(torch.tensor(1.0), 3)
    with pytest.raises(ValueError, match=r"must be finite, got (nan|inf) in step 3"):
        GoodAlphas().check(loss, 3)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_alphas_that_are_not_finite_are_refused(value: float) -> None:
    check_alphas_finite(parameters(1.0))
    with pytest.raises(ValueError, match="NaN or infinite"):
        check_alphas_finite(parameters(1.0, value))
