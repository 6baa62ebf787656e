import numpy as np
import pytest
import torch
from torch import Tensor

from lmerge.diffusion import distances, rank_map, spectral_map


def states(num_prompts: int = 20) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, num_prompts, 5, generator=generator).double().cumsum(dim=0)


def straight_rank_map(x: np.ndarray, sigma: float) -> np.ndarray:
    """The map before ranks, one prompt pair at a time."""
    size = len(x)
    kernel = np.zeros((size, size))
    for i in range(size):
        for j in range(size):
            kernel[i, j] = np.exp(-np.sqrt(np.linalg.norm(x[i] - x[j]) / sigma))
    p = kernel @ np.ones(size)
    kernel = kernel / np.sqrt(np.outer(p, p))
    v = np.sqrt(kernel @ np.ones(size))
    u = np.linalg.svd(kernel / np.outer(v, v))[0]
    return u[:, 1:3] / u[:, :1]


def straight_spectral_map(x: np.ndarray, sigma: float) -> np.ndarray:
    size = len(x)
    kernel = np.zeros((size, size))
    for i in range(size):
        for j in range(size):
            kernel[i, j] = np.exp(-((x[i] - x[j]) ** 2).sum() / (2 * sigma**2))
    value, vector = np.linalg.eig(kernel / kernel.sum(axis=1, keepdims=True))
    order = np.argsort(-value.real)[1:3]
    return vector.real[:, order] * np.sqrt(value.real[order])


@pytest.mark.parametrize("sigma", [2.0, 8.0])
def test_rank_map_is_the_straight_one_up_to_signs(sigma: float) -> None:
    found = rank_map(distances(states()), sigma)
    for layer in range(3):
        wanted = straight_rank_map(states()[layer].numpy(), sigma)
        for c in range(2):
            up = (wanted[:, c].argsort().argsort() + 1) / 20
            down = ((-wanted[:, c]).argsort().argsort() + 1) / 20
            column = found[layer, :, c].numpy()
            assert np.allclose(column, up, atol=1e-6) or np.allclose(column, down, atol=1e-6)


@pytest.mark.parametrize("sigma", [2.0, 8.0])
def test_spectral_map_is_the_straight_one_up_to_signs(sigma: float) -> None:
    found = spectral_map(distances(states()), sigma)
    for layer in range(3):
        wanted = straight_spectral_map(states()[layer].numpy(), sigma)
        for c in range(2):
            column = found[layer, :, c].numpy()
            sign = np.sign(column @ wanted[:, c])
            np.testing.assert_allclose(column, sign * wanted[:, c], atol=1e-6)


@pytest.mark.parametrize("embed", [rank_map, spectral_map])
@pytest.mark.parametrize("sigma", [0.0, 8.0])
@pytest.mark.parametrize("kind", ["constant", "zeros"])
def test_a_layer_without_spread_has_no_map_and_spoils_no_other(embed, sigma, kind) -> None:
    x = states()
    x[1] = 0 if kind == "zeros" else x[1, :1]
    undefined = embed(distances(x), sigma).isnan()
    assert undefined[1].all()
    assert not undefined[[0, 2]].any()


@pytest.mark.parametrize("embed", [rank_map, spectral_map])
def test_prompts_all_equally_far_apart_have_no_map(embed) -> None:
    corners = torch.eye(8).double()[None]
    assert embed(distances(corners), 8.0).isnan().all()


@pytest.mark.parametrize("embed", [rank_map, spectral_map])
def test_a_bandwidth_far_below_the_distances_gives_no_map(embed) -> None:
    far = 1e6 * states() if embed is spectral_map else 1e8 * states()
    assert embed(distances(far), 8.0).isnan().all()


def test_ranks_of_two_equal_prompts_are_undefined() -> None:
    x = states()
    x[1, 3] = x[1, 4]
    undefined = rank_map(distances(x), 8.0).isnan()
    assert undefined[1].all()
    assert not undefined[[0, 2]].any()


@pytest.mark.parametrize("embed", [rank_map, spectral_map])
@pytest.mark.parametrize("num_prompts", [1, 2])
def test_too_few_prompts_have_no_map(embed, num_prompts: int) -> None:
    assert embed(distances(states(num_prompts)), 8.0).isnan().all()
