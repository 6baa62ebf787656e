from itertools import product
from typing import get_args

import pytest
import torch
from models import tiny_variant

from lmerge.alphas import (
    SIMPLEX_FLOOR,
    STARTS,
    AlphaConfig,
    Alphas,
    Granularity,
    Start,
    start_alphas,
    to_free,
    to_shares,
)
from lmerge.axes import ALPHA_AXIS
from lmerge.llama import MATRICES, decoder_layers, head_dim, layer_tensors, stack_layers
from lmerge.plan import Group

GRANULARITIES = get_args(Granularity)
CONFIGS = [
    AlphaConfig(granularity=granularity, start=start, simplex=simplex)
    for granularity, start, simplex in product(GRANULARITIES, STARTS, (False, True))
]
SIMILARITY_LL = torch.tensor(
    [[1.0, 0.8, 0.5, 0.1], [0.8, 1.0, 0.7, 0.3], [0.5, 0.7, 1.0, 0.6], [0.1, 0.3, 0.6, 1.0]]
)
HEADS = {"q_proj": 4, "k_proj": 2, "v_proj": 2, "o_proj": 4}


def start(config: AlphaConfig, name: str = "llama", anchor: int = 1) -> Alphas:
    """The alphas that a group of three layers of a tiny model starts from."""
    model = tiny_variant(name)
    stacked = stack_layers([layer_tensors(layer) for layer in decoder_layers(model)[:3]])
    group = Group(members=(0, 1, 2), anchor=anchor)
    width = head_dim(model.config)
    return start_alphas(config, stacked, group, head_dim=width, similarity_LL=SIMILARITY_LL)


def describe(config: AlphaConfig) -> str:
    return f"{config.granularity}-{config.start}-{'simplex' if config.simplex else 'free'}"


def test_table_has_every_start() -> None:
    assert {*STARTS, "file"} == set(get_args(Start))


@pytest.mark.parametrize("config", CONFIGS, ids=describe)
def test_there_is_one_alpha_for_all_or_one_for_each_matrix(config: AlphaConfig) -> None:
    assert set(start(config)) == ({"layer"} if config.granularity == "layer" else set(MATRICES))


@pytest.mark.parametrize("granularity", ["layer", "tensor"])
def test_a_coarse_alpha_is_one_number_a_member(granularity: Granularity) -> None:
    alphas = start(AlphaConfig(granularity=granularity))
    assert {alpha.shape for alpha in alphas.values()} == {(3,)}


@pytest.mark.parametrize("name", ["llama", "llama-wide-heads", "qwen3"])
def test_a_head_alpha_is_one_number_a_head_and_one_a_matrix_of_the_mlp(name: str) -> None:
    shapes = {key: a.shape for key, a in start(AlphaConfig(granularity="head"), name).items()}
    assert shapes == {key: (3, HEADS[key]) if key in HEADS else (3,) for key in MATRICES}


@pytest.mark.parametrize("name", ["llama", "llama-wide-heads", "qwen3"])
def test_a_neuron_alpha_is_one_number_a_row_or_column(name: str) -> None:
    layer = layer_tensors(decoder_layers(tiny_variant(name))[0])
    shapes = {key: a.shape for key, a in start(AlphaConfig(), name).items()}
    assert shapes == {key: (3, layer[key].shape[ALPHA_AXIS[key]]) for key in MATRICES}


@pytest.mark.parametrize("config", CONFIGS, ids=describe)
def test_shares_sum_to_1_over_a_group(config: AlphaConfig) -> None:
    for alpha in start(config).values():
        torch.testing.assert_close(alpha.sum(dim=0), torch.ones_like(alpha[0]))


@pytest.mark.parametrize("anchor", [0, 1, 2])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_the_anchor_start_is_the_anchor_alone(granularity: Granularity, anchor: int) -> None:
    for alpha in start(AlphaConfig(granularity=granularity), anchor=anchor).values():
        wanted = torch.zeros_like(alpha)
        wanted[anchor] = 1
        assert torch.equal(alpha, wanted)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_the_anchor_start_on_the_simplex_leaves_the_others_a_little(
    granularity: Granularity,
) -> None:
    for alpha in start(AlphaConfig(granularity=granularity, simplex=True)).values():
        others = alpha[[0, 2]]
        torch.testing.assert_close(
            others, torch.full_like(others, SIMPLEX_FLOOR), rtol=0.01, atol=0
        )


@pytest.mark.parametrize("config", [c for c in CONFIGS if c.start == "uniform"], ids=describe)
def test_the_uniform_start_is_equal_shares(config: AlphaConfig) -> None:
    for alpha in start(config).values():
        torch.testing.assert_close(alpha, torch.full_like(alpha, 1 / 3))


@pytest.mark.parametrize("config", CONFIGS, ids=describe)
def test_shares_come_back_from_their_parameters(config: AlphaConfig) -> None:
    alphas = start(config)
    back = to_shares(to_free(alphas, simplex=config.simplex), simplex=config.simplex)
    for name, alpha in alphas.items():
        torch.testing.assert_close(back[name], alpha, rtol=1e-6, atol=1e-7)


def test_free_alphas_come_back_bit_for_bit() -> None:
    alphas = {"layer": torch.randn(3)}
    back = to_shares(to_free(alphas, simplex=False), simplex=False)
    assert torch.equal(back["layer"], alphas["layer"])


def test_shares_that_were_learned_to_be_tiny_come_back_from_the_simplex() -> None:
    alphas = {"layer": torch.tensor([1 - 3e-6, 1e-6, 2e-6, 0.0])}
    back = to_shares(to_free(alphas, simplex=True), simplex=True)
    torch.testing.assert_close(back["layer"], alphas["layer"], rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("config", CONFIGS, ids=describe)
def test_parameters_share_no_memory_with_the_alphas(config: AlphaConfig) -> None:
    alphas = start(config)
    free = to_free(alphas, simplex=config.simplex)
    assert all(free[name].data_ptr() != alphas[name].data_ptr() for name in alphas)


@pytest.mark.parametrize("config", CONFIGS, ids=describe)
def test_no_two_matrices_share_the_memory_of_their_alphas(config: AlphaConfig) -> None:
    free = to_free(start(config), simplex=config.simplex)
    assert len({alpha.data_ptr() for alpha in free.values()}) == len(free)


@pytest.mark.parametrize("config", CONFIGS, ids=describe)
def test_a_member_has_memory_of_its_own_for_every_alpha(config: AlphaConfig) -> None:
    assert all(a.is_contiguous() for a in to_free(start(config), simplex=config.simplex).values())


def test_the_simplex_is_kept_by_any_parameters() -> None:
    share = to_shares({"layer": 30 * torch.randn(5, 100)}, simplex=True)["layer"]
    assert (share >= 0).all()
    torch.testing.assert_close(share.sum(dim=0), torch.ones(100))


@pytest.mark.parametrize(
    "alpha", [[0.5, 0.6], [1.5, -0.5], [float("nan"), 1.0], [[0.5, 0.5], [0.5, 0.4]]]
)
def test_what_is_no_share_is_refused_on_the_simplex(alpha: list[float]) -> None:
    with pytest.raises(ValueError, match=r"^alphas on the simplex[^\n]*`layer`[^\n]*`simplex`.*$"):
        to_free({"layer": torch.tensor(alpha)}, simplex=True)
