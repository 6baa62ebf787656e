from typing import get_args

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity as torch_cosine

from lmerge.information import InformationConfig
from lmerge.similarity import (
    INFORMATION,
    MEASURES,
    Measure,
    angular_similarity,
    cosine_similarity,
    linear_cka,
)
from lmerge.similarity import similarity_matrix as checked_matrix

ROUNDING = {"angular": 1e-7, "npib": 1e-9, "gaussian_nmi": 1e-8, "gaussian_nmi_bounded": 1e-8}
"""Where it is not 1e-12: arccos turns the last place near 1 into half of the places, and a ridge of
1e-6 costs some too."""

LOW = {"cosine": -1.0, "block_influence": -5.0}
"""Lower bound where it is not 0; an influence is at most 2 a layer."""

UNBOUNDED = {"npib", "gaussian_nmi"}
"""Normalised by entropies, which may be near 0: not bounded by 1, as published."""

INFORMATION_CONFIG = InformationConfig(num_neighbors=3, entropy_neighbors=4, sigma=2.0)


def random_states(num_layers: int = 4, num_prompts: int = 9, width: int = 6) -> Tensor:
    """States of layers that resemble their neighbours."""
    generator = torch.Generator().manual_seed(0)
    steps = torch.randn(num_layers, num_prompts, width, generator=generator)
    return steps.cumsum(dim=0)


def similarity_matrix(states: Tensor, measure: Measure) -> Tensor:
    """The matrix with options for few prompts, undefined cells as NaN."""
    return checked_matrix(states, measure, INFORMATION_CONFIG, allow_undefined=True)


def rotation(width: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.linalg.qr(torch.randn(width, width, generator=generator).double()).Q


def close(found: Tensor, wanted: Tensor, measure: Measure) -> None:
    torch.testing.assert_close(
        found, wanted, rtol=0, atol=ROUNDING.get(measure, 1e-12), equal_nan=True
    )


def test_table_has_every_measure() -> None:
    assert set(MEASURES) == set(get_args(Measure))


@pytest.mark.parametrize("measure", MEASURES)
def test_a_matrix_is_float64_and_has_a_row_for_each_layer(measure: Measure) -> None:
    matrix = similarity_matrix(random_states(), measure)
    assert matrix.dtype == torch.float64
    assert matrix.shape == (4, 4)


@pytest.mark.parametrize("measure", MEASURES)
def test_a_matrix_is_symmetric(measure: Measure) -> None:
    matrix = similarity_matrix(random_states(), measure)
    close(matrix, matrix.T, measure)


@pytest.mark.parametrize("measure", MEASURES)
def test_a_layer_is_like_itself(measure: Measure) -> None:
    diagonal = similarity_matrix(random_states(), measure).diagonal()
    close(diagonal, torch.ones(4).double(), measure)


@pytest.mark.parametrize("measure", MEASURES)
def test_no_two_layers_are_more_alike_than_one_with_itself(measure: Measure) -> None:
    matrix = similarity_matrix(random_states(), measure)
    high = torch.inf if measure in UNBOUNDED else 1 + 1e-12
    defined = matrix[matrix.isfinite()]
    assert len(defined) > 0
    assert ((defined >= LOW.get(measure, 0) - 1e-12) & (defined <= high)).all()


@pytest.mark.parametrize("measure", sorted(set(MEASURES) - {"npib"}))
def test_the_order_of_prompts_does_not_matter(measure: Measure) -> None:
    states = random_states()
    matrix = similarity_matrix(states[:, torch.randperm(9)], measure)
    close(matrix, similarity_matrix(states, measure), measure)


def test_the_order_of_prompts_matters_to_npib_through_the_noise_that_breaks_ties_alone() -> None:
    # Ranks tie everywhere, and the noise goes by a prompt's place; its effect stays small.
    generator = torch.Generator().manual_seed(3)
    states = torch.randn(3, 120, 6, generator=generator).cumsum(dim=0)
    matrices = [
        checked_matrix(states[:, order], "npib")
        for order in (torch.arange(120), torch.randperm(120, generator=generator))
    ]
    torch.testing.assert_close(matrices[0], matrices[1], rtol=0, atol=0.1, equal_nan=True)


@pytest.mark.parametrize("measure", sorted(set(MEASURES) - {"block_influence"}))
def test_the_order_of_layers_is_that_of_the_rows(measure: Measure) -> None:
    states, order = random_states(), torch.tensor([2, 0, 3, 1])
    matrix = similarity_matrix(states, measure)
    close(similarity_matrix(states[order], measure), matrix[order][:, order], measure)


@pytest.mark.parametrize("measure", INFORMATION)
def test_scale_does_not_matter_with_a_layers_own_bandwidth(measure: Measure) -> None:
    states = random_states()
    scale = torch.tensor([0.5, 1, 2, 1024]).double()[:, None, None]
    config = InformationConfig(num_neighbors=3, entropy_neighbors=4, sigma=0)
    found, wanted = (
        checked_matrix(x, measure, config, allow_undefined=True) for x in (states * scale, states)
    )
    close(found, wanted, measure)


@pytest.mark.parametrize("measure", INFORMATION)
def test_a_shift_of_a_layer_does_not_matter_to_distances(measure: Measure) -> None:
    states = random_states().double()
    close(similarity_matrix(states + 5, measure), similarity_matrix(states, measure), measure)


@pytest.mark.parametrize("measure", sorted(set(MEASURES) - set(INFORMATION)))
def test_the_positive_scale_of_a_layer_does_not_matter(measure: Measure) -> None:
    states = random_states()
    scale = torch.tensor([0.01, 1, 30, 1e4]).double()[:, None, None]
    close(similarity_matrix(states * scale, measure), similarity_matrix(states, measure), measure)


@pytest.mark.parametrize("measure", MEASURES)
def test_a_rotation_of_all_layers_does_not_matter(measure: Measure) -> None:
    states = random_states().double()
    close(
        similarity_matrix(states @ rotation(), measure), similarity_matrix(states, measure), measure
    )


@pytest.mark.parametrize("measure", ["cosine", "angular", "block_influence"])
def test_the_scale_of_a_prompt_does_not_matter_to_angles(measure: Measure) -> None:
    states = random_states()
    scale = torch.logspace(-2, 2, 9).double()[None, :, None]
    close(similarity_matrix(states * scale, measure), similarity_matrix(states, measure), measure)


@pytest.mark.parametrize("change", ["rotation", "scale", "sign", "shift"])
def test_cka_of_a_layer_with_its_rotated_scaled_or_shifted_copy_is_1(change: str) -> None:
    (states,) = random_states(1).double()
    copies = {"rotation": states @ rotation(), "scale": states * 7, "sign": -states}
    copy = copies.get(change, states + 5)
    torch.testing.assert_close(linear_cka(torch.stack([states, copy]))[0, 1].item(), 1.0)


def test_cka_equals_the_formula_of_features() -> None:
    x, y = (s - s.mean(dim=0) for s in random_states(2).double())
    wanted = (x.T @ y).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm())
    torch.testing.assert_close(linear_cka(random_states(2))[0, 1], wanted)


def test_cosine_is_the_mean_over_prompts() -> None:
    states = random_states().double()
    wanted = torch_cosine(states[:, None], states[None, :], dim=-1).mean(dim=-1)
    torch.testing.assert_close(cosine_similarity(states), wanted)


@pytest.mark.parametrize(("degrees", "similarity"), [(0, 1.0), (60, 2 / 3), (90, 0.5), (180, 0.0)])
def test_angular_similarity_falls_linearly_with_the_angle(
    degrees: float, similarity: float
) -> None:
    angle = torch.deg2rad(torch.tensor(float(degrees)).double())
    states = torch.stack(
        [torch.tensor([1.0, 0.0]).double(), torch.stack([angle.cos(), angle.sin()])]
    )
    found = angular_similarity(states[:, None])[0, 1]
    torch.testing.assert_close(found.item(), similarity, rtol=0, atol=1e-7)


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_states_that_are_not_finite_are_refused_by_layer(measure: Measure, value: float) -> None:
    states = random_states()
    states[2, 3, 1] = value
    with pytest.raises(
        ValueError, match=r"^layer states must be finite, but layer 2 holds [^\n]*$"
    ):
        checked_matrix(states, measure, INFORMATION_CONFIG)


@pytest.mark.parametrize("measure", MEASURES)
def test_a_layer_of_zeros_is_refused_by_its_number(measure: Measure) -> None:
    states = random_states()
    states[2] = 0
    with pytest.raises(ValueError, match=rf"^`{measure}` is undefined for layer 2: [^\n]*$"):
        checked_matrix(states, measure, INFORMATION_CONFIG)


def test_a_layer_that_is_the_same_on_every_prompt_has_no_cka() -> None:
    states = random_states()
    states[2] = states[2, :1]
    with pytest.raises(ValueError, match=r"^`cka` is undefined for layer 2: [^\n]*prompts[^\n]*$"):
        checked_matrix(states, "cka")


@pytest.mark.parametrize("measure", ["cosine", "angular"])
def test_a_layer_that_is_the_same_on_every_prompt_has_angles(measure: Measure) -> None:
    states = random_states()
    states[2] = states[2, :1]
    assert checked_matrix(states, measure, INFORMATION_CONFIG).isfinite().all()


def test_one_prompt_is_too_few_for_cka() -> None:
    with pytest.raises(ValueError, match=r"^`cka` is undefined for layer 0: [^\n]*more[^\n]*$"):
        checked_matrix(random_states(num_prompts=1), "cka")


@pytest.mark.parametrize("measure", INFORMATION)
def test_a_layer_that_is_the_same_on_every_prompt_has_no_map(measure: Measure) -> None:
    states = random_states()
    states[2] = states[2, :1]
    with pytest.raises(ValueError, match=rf"^`{measure}` is undefined for layer 2: [^\n]*$"):
        checked_matrix(states, measure, INFORMATION_CONFIG)
    undefined = similarity_matrix(states, measure).isnan()
    assert undefined[2].all()
    assert undefined[:, 2].all()
    assert not undefined.diagonal()[[0, 1, 3]].any()


def test_neighbours_have_their_cosine_and_a_path_the_sum_of_its_influences() -> None:
    states = random_states()
    matrix, cosine = (checked_matrix(states, m) for m in ("block_influence", "cosine"))
    torch.testing.assert_close(matrix.diagonal(1), cosine.diagonal(1))
    torch.testing.assert_close(matrix[0, 3], 1 - (1 - matrix.diagonal(1)).sum())
