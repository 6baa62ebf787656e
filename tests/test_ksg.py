import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from sklearn.feature_selection import mutual_info_regression
from torch import Tensor

from lmerge.ksg import knn_entropy, ksg_information


def gaussian(num_layers: int = 3, size: int = 30, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_layers, size, 2, generator=generator).double().cumsum(dim=0)


def ranks(x_LNC: Tensor) -> Tensor:
    return (x_LNC.argsort(dim=1).argsort(dim=1) + 1) / x_LNC.shape[1]


@pytest.mark.parametrize("kind", ["values", "ranks", "constant", "ties"])
@pytest.mark.parametrize("num_neighbors", [1, 5])
def test_information_is_that_of_scikit_learn_with_the_same_noise(
    kind: str, num_neighbors: int
) -> None:
    x = {
        "values": gaussian(),
        "ranks": ranks(gaussian()),
        "constant": gaussian() * torch.tensor([1.0, 0.0]),
        "ties": gaussian().round(),
    }[kind].double()
    found = ksg_information(x, x, num_neighbors=num_neighbors, seed=3)
    for i in range(3):
        for j in range(3):
            for e in range(2):
                wanted = mutual_info_regression(
                    x[i].numpy(), x[j, :, e].numpy(), n_neighbors=num_neighbors, random_state=3
                )
                np.testing.assert_allclose(found[i, j, :, e].numpy(), wanted, atol=1e-6)


def test_information_of_a_gaussian_pair_is_near_its_closed_form() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 1500, 1, generator=generator).double()
    x, y = noise[:1], 0.8 * noise[:1] + 0.6 * noise[1:]
    found = ksg_information(x, y, num_neighbors=5, seed=0)
    assert found.item() == pytest.approx(-0.5 * np.log(1 - 0.8**2), abs=0.06)


def test_information_of_independent_columns_is_near_0() -> None:
    x, y = gaussian(1, 1000), gaussian(1, 1000, seed=5)
    assert ksg_information(x, y, num_neighbors=5, seed=0).max() < 0.08


def test_information_is_never_negative() -> None:
    assert ksg_information(gaussian(), gaussian(seed=9), num_neighbors=5, seed=0).min() >= 0


def test_entropy_equals_a_loop_over_prompts() -> None:
    x = gaussian()
    found = knn_entropy(x, num_neighbors=4)
    for i in range(3):
        distance = cdist(x[i].numpy(), x[i].numpy())
        rho = np.array([sorted(row)[4] for row in distance])
        wanted = -np.mean([np.log(4 / (30 * r**2)) for r in rho])
        assert found[i].item() == pytest.approx(wanted, abs=1e-9)


def test_entropy_rises_by_the_log_of_a_stretch_for_each_coordinate() -> None:
    x = gaussian()
    rise = knn_entropy(7 * x, num_neighbors=4) - knn_entropy(x, num_neighbors=4)
    torch.testing.assert_close(rise, torch.full((3,), 2 * np.log(7)).double())
