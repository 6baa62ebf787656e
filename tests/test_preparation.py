"""What a run starts from: alphas of a file, and saved parts that must fit the source."""

from pathlib import Path

import pytest
import torch
from conftest import tiny_model
from models import plan_of

from lmerge.alphas import AlphaConfig
from lmerge.llama import MATRICES
from lmerge.preparation import alphas_of_file, check_fits
from lmerge.runs import RunState

PLAN = plan_of([1, 2])


@pytest.mark.parametrize("granularity", ["layer", "neuron"])
@pytest.mark.parametrize("name", ["bayes", "gradient", "heuristic"])
def test_published_alphas_load_as_a_file(name: str, granularity: str, shared_dir: Path) -> None:
    path = shared_dir / "reference" / f"alphas_{name}.json"
    config = AlphaConfig(start="file", path=str(path), granularity=granularity)
    state = alphas_of_file(None, config, tiny_model(num_hidden_layers=32))
    assert [(g.members, g.anchor) for g in state.plan.groups] == [(tuple(range(18, 32)), 18)]
    assert state.alphas is not None
    (alphas,) = state.alphas
    assert set(alphas) == ({"layer"} if granularity == "layer" else set(MATRICES))
    for alpha in alphas.values():
        assert len(alpha) == 14
        torch.testing.assert_close(alpha.sum(dim=0), torch.ones_like(alpha[0]))


def test_alphas_that_the_simplex_cannot_express_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "alphas.json"
    path.write_text('[{"layer_to_merge_into": 1, "layer_to_remove": 2, "ratio_i_alpha": 1.5}]')
    config = AlphaConfig(start="file", path=str(path), granularity="layer", simplex=True)
    with pytest.raises(ValueError, match=r"^alphas on the simplex[^\n]*$"):
        alphas_of_file(None, config, tiny_model())


@pytest.mark.parametrize(
    ("orders", "refits", "what"),
    [
        ({2: torch.randperm(40)}, None, "must move layer 2"),
        ({2: torch.randperm(64)}, None, "must move layer 2"),
        ({2: {"q_proj": torch.randperm(16)}}, None, "must move layer 2"),
        ({}, [{"down_proj": torch.zeros(32, 40)}], "the refit of down_proj must have"),
    ],
)
def test_parts_of_another_width_are_refused(orders: dict, refits: list, what: str) -> None:
    state = RunState(plan=PLAN, orders=orders, refits=refits)
    with pytest.raises(ValueError, match=rf"^[^\n]*{what}[^\n]*$"):
        check_fits(state, tiny_model())


def test_parts_of_this_source_fit() -> None:
    state = RunState(
        plan=PLAN, orders={2: torch.randperm(48)}, refits=[{"down_proj": torch.zeros(32, 48)}]
    )
    check_fits(state, tiny_model())
