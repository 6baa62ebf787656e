import numpy as np
import pytest
import torch
from sklearn.feature_selection import mutual_info_regression
from test_diffusion import states, straight_spectral_map

from lmerge.diffusion import distances, rank_map
from lmerge.information import InformationConfig, gaussian_nmi, gaussian_nmi_bounded, npib
from lmerge.ksg import knn_entropy


def straight_gaussian(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """The information and its normalised value of two maps, from numpy's covariances."""
    joint = np.cov(np.hstack([a, b]).T) + 1e-6 * np.eye(4)

    def logdet(m: np.ndarray) -> float:
        return float(np.linalg.slogdet(m)[1])

    own = [logdet(joint[:2, :2]), logdet(joint[2:, 2:])]
    information = 0.5 * (sum(own) - logdet(joint))
    entropy = [0.5 * (x + 2 * np.log(2 * np.pi * np.e)) for x in own]
    product = entropy[0] * entropy[1]
    return information, information / np.sqrt(product) if product > 0 else np.nan


def test_gaussian_information_is_the_straight_one() -> None:
    config = InformationConfig(sigma=3.0)
    found, bounded = gaussian_nmi(states(), config), gaussian_nmi_bounded(states(), config)
    maps = [straight_spectral_map(x.numpy(), 3.0) for x in states()]
    for i, j in [(0, 1), (0, 2), (2, 1)]:
        information, ratio = straight_gaussian(maps[i], maps[j])
        np.testing.assert_allclose(found[i, j], ratio, atol=1e-6)
        np.testing.assert_allclose(bounded[i, j], np.sqrt(1 - np.exp(-2 * information)), atol=1e-6)


def test_npib_is_the_straight_double_loop() -> None:
    config = InformationConfig(sigma=3.0, entropy_neighbors=7)
    found, x = npib(states(30), config), rank_map(distances(states(30)), 3.0)
    entropy = knn_entropy(x, num_neighbors=7)
    for i in range(3):
        for j in range(i):
            orders = [(x[i], x[j]), (x[j], x[i])]
            information = np.mean(
                [
                    mutual_info_regression(a, b[:, c], n_neighbors=5, random_state=0).mean()
                    for a, b in orders
                    for c in range(2)
                ]
            )
            product = float(entropy[i] * entropy[j])
            wanted = information / np.sqrt(product) if product > 0 else np.nan
            np.testing.assert_allclose(found[i, j], wanted, atol=1e-6)


@pytest.mark.parametrize("num_prompts", [5, 50])
def test_too_few_prompts_for_the_neighbours_are_refused(num_prompts: int) -> None:
    with pytest.raises(ValueError, match=rf"^`npib` needs more than [^\n]*got {num_prompts}\."):
        npib(states(num_prompts))


@pytest.mark.parametrize(
    ("name", "value"),
    [("sigma", -1.0), ("sigma", float("nan")), ("num_neighbors", 0), ("seed", -1)],
)
def test_an_option_out_of_range_is_refused_by_its_name(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"^`{name}` must be [^\n]*$"):
        InformationConfig(**{name: value})


def test_a_linear_map_of_gaussian_coordinates_keeps_all_information() -> None:
    x = states()[:1]
    twice = torch.cat([x, x])
    assert gaussian_nmi_bounded(twice)[0, 1].item() == pytest.approx(1, abs=1e-2)
