import json
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lmerge.plan import (
    PLAN_METHODS,
    Group,
    MergePlan,
    PlanMethod,
    block_groups,
    check_num_removed,
    check_plan,
    layers_of_budget,
    make_plan,
    plan_from_dict,
    plan_to_dict,
    tail_groups,
)

PATH = Path("plan.json")
EVERY_BUDGET = [(depth, n) for depth in (1, 2, 3, 7) for n in range(depth)]


def random_similarity(num_layers: int, seed: int = 0) -> Tensor:
    states = torch.randn(num_layers, 20, generator=torch.Generator().manual_seed(seed)).double()
    return torch.corrcoef(states).reshape(num_layers, num_layers)


# Methods.


def test_table_has_every_method() -> None:
    assert set(PLAN_METHODS) == set(get_args(PlanMethod))


@pytest.mark.parametrize("method", PLAN_METHODS)
@pytest.mark.parametrize(("depth", "num_removed"), EVERY_BUDGET)
def test_a_plan_removes_as_many_layers_as_asked(
    method: PlanMethod, depth: int, num_removed: int
) -> None:
    plan = make_plan(random_similarity(depth), num_removed, method)
    assert plan.num_removed == num_removed
    assert len(plan.origins()) == depth - num_removed


@pytest.mark.parametrize("method", PLAN_METHODS)
@pytest.mark.parametrize(("depth", "num_removed"), EVERY_BUDGET)
def test_every_layer_is_kept_or_in_one_group(
    method: PlanMethod, depth: int, num_removed: int
) -> None:
    plan = make_plan(random_similarity(depth), num_removed, method)
    inside = [i for group in plan.groups for i in group.members]
    anchors = {group.anchor for group in plan.groups}
    assert sorted([*inside, *(set(plan.origins()) - anchors)]) == list(range(depth))


@pytest.mark.parametrize("method", PLAN_METHODS)
@pytest.mark.parametrize(("depth", "num_removed"), EVERY_BUDGET)
def test_a_plan_survives_its_file(method: PlanMethod, depth: int, num_removed: int) -> None:
    made = make_plan(random_similarity(depth), num_removed, method, source="ab", calibration="cd")
    assert plan_from_dict(json.loads(json.dumps(plan_to_dict(made)))) == made


@pytest.mark.parametrize("method", PLAN_METHODS)
@pytest.mark.parametrize("num_removed", [-1, 4, 5])
def test_a_plan_for_an_impossible_number_is_refused(method: PlanMethod, num_removed: int) -> None:
    with pytest.raises(ValueError, match=r"^`num_removed` must be between 0 and 3 [^\n]*$"):
        make_plan(random_similarity(4), num_removed, method)


@pytest.mark.parametrize("num_removed", range(4))
def test_every_number_that_leaves_a_layer_is_allowed(num_removed: int) -> None:
    check_num_removed(num_removed, 4)


@pytest.mark.parametrize("method", PLAN_METHODS)
def test_a_plan_records_how_it_was_made(method: PlanMethod) -> None:
    plan = make_plan(random_similarity(5), 2, method, source="weights", calibration="questions")
    assert (plan.method, plan.source, plan.calibration) == (method, "weights", "questions")


@pytest.mark.parametrize("start", range(4))
def test_block_finds_the_planted_block(start: int) -> None:
    similarity = torch.full((8, 8), 0.5)
    similarity[start, start + 3] = 0.9  # the outputs of layers `start` and `start + 3`
    (group,) = block_groups(similarity, 3)
    assert group.members == tuple(range(start, start + 4))
    assert group.anchor == start


@pytest.mark.parametrize("num_removed", range(1, 6))
def test_block_leaves_the_last_layer_alone(num_removed: int) -> None:
    similarity = torch.eye(7)
    similarity[6 - num_removed, 6] = 2
    (group,) = block_groups(similarity, num_removed)
    assert group.stop <= 6


def test_block_takes_the_last_layer_when_nothing_else_remains() -> None:
    (group,) = block_groups(random_similarity(7), 6)
    assert group.members == tuple(range(7))


@pytest.mark.parametrize("num_removed", range(1, 7))
def test_block_equals_a_search_over_all_blocks(num_removed: int) -> None:
    similarity = random_similarity(8, seed=3)
    found = {a: float(similarity[a, a + num_removed]) for a in range(7 - num_removed)}
    (group,) = block_groups(similarity, num_removed)
    assert found[group.start] == max(found.values())


@pytest.mark.parametrize("num_removed", range(1, 7))
def test_tail_is_one_group_at_the_end(num_removed: int) -> None:
    (group,) = tail_groups(random_similarity(7), num_removed)
    assert group.members == tuple(range(6 - num_removed, 7))
    assert group.anchor == group.start


# Groups and plans.


@pytest.mark.parametrize("members", [(), (3,), (3, 3), (4, 3), (3, 5), (0, 10**18), (-(10**18), 0)])
def test_members_that_are_not_adjacent_are_refused(members: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"^a group must hold at least two adjacent [^\n]*$"):
        Group(members=members, anchor=3)


def test_an_anchor_outside_its_group_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^a group's anchor must be one of .*\[3, 4\], got 5.*$"):
        Group(members=(3, 4), anchor=5)


def test_a_group_knows_its_ends_and_its_anchor() -> None:
    group = Group(members=(3, 4, 5), anchor=4)
    assert (group.start, group.stop, group.anchor_position) == (3, 6, 1)


@pytest.mark.parametrize("members", [(-1, 0), (3, 4)])
def test_layers_outside_the_model_are_refused(members: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"^plan layers must lie in 0 to 3, got [^\n]*$"):
        MergePlan(num_layers=4, groups=(Group(members=members, anchor=members[0]),))


@pytest.mark.parametrize("pair", [((0, 1), (1, 2)), ((2, 3), (0, 1)), ((0, 1), (0, 1))])
def test_groups_that_overlap_or_fall_are_refused(pair: tuple[tuple[int, ...], ...]) -> None:
    groups = tuple(Group(members=members, anchor=members[0]) for members in pair)
    with pytest.raises(ValueError, match=r"^plan groups must be disjoint and in rising [^\n]*$"):
        MergePlan(num_layers=4, groups=groups)


def test_a_merged_layer_stands_at_the_place_of_its_group() -> None:
    groups = (Group(members=(1, 2, 3), anchor=3), Group(members=(5, 6), anchor=5))
    plan = MergePlan(num_layers=8, groups=groups)
    assert plan.origins() == [0, 3, 4, 5, 7]
    assert [plan.position(group) for group in groups] == [1, 3]


# Files.


def test_the_anchor_of_a_file_is_the_first_member_unless_it_says_so() -> None:
    plan = plan_from_dict({"num_layers": 4, "groups": [{"members": [1, 2]}]})
    assert plan.groups[0].anchor == 1


def test_a_plan_that_a_person_wrote_is_of_the_method_file() -> None:
    assert plan_from_dict({"num_layers": 4, "groups": []}).method == "file"


BROKEN: list[Any] = [
    [],
    None,
    {},
    {"num_layers": 4},
    {"num_layers": True, "groups": []},
    {"num_layers": 0, "groups": []},
    {"num_layers": -3, "groups": []},
    {"num_layers": 4.0, "groups": []},
    {"num_layers": 4, "groups": {}},
    {"num_layers": 4, "groups": [], "method": 3},
    {"num_layers": 4, "groups": [], "grups": 1},
    {"num_layers": 4, "groups": [[1, 2]]},
    {"num_layers": 4, "groups": [{"members": []}]},
    {"num_layers": 4, "groups": [{"members": [True, 2]}]},
    {"num_layers": 4, "groups": [{"members": [1.0, 2.0]}]},
    {"num_layers": 4, "groups": [{"members": [1, 2], "anchor": None}]},
    {"num_layers": 4, "groups": [{"members": [1, 2], "anchor": 1.0}]},
    {"num_layers": 4, "groups": [{"members": [1, 2], "anchors": 2}]},
    {"num_layers": 4, "groups": [{"members": [0, 10**18]}]},
]


@pytest.mark.parametrize("data", BROKEN, ids=json.dumps)
def test_a_broken_plan_is_refused_in_one_line(data: object) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]+\Z"):
        plan_from_dict(data)


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
anything = st.recursive(
    scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8
)
numbers = st.integers(-2, 9) | st.integers() | scalars
almost_groups = st.fixed_dictionaries(
    {},
    optional={"members": st.lists(numbers, max_size=4) | anything, "anchor": numbers | anything},
)
almost_plans = st.fixed_dictionaries(
    {},
    optional={
        "num_layers": numbers,
        "groups": st.lists(almost_groups | anything, max_size=3) | anything,
        "method": scalars,
        "source": scalars,
        "schema": anything,
        "extra\nkey": anything,
    },
)


def read(data: object) -> MergePlan | str:
    """The plan in the content of a file, or what is wrong with it."""
    try:
        return plan_from_dict(data)
    except ValueError as error:
        return str(error)


@settings(deadline=None)  # a shared machine is slow at times
@given(anything | almost_plans)
def test_whatever_a_file_holds_is_a_plan_or_one_line(data: object) -> None:
    found = read(data)
    if isinstance(found, MergePlan):
        assert plan_from_dict(plan_to_dict(found)) == found
    else:
        assert len(found.splitlines()) == 1


def made_for(num_layers: int, source: str = "") -> MergePlan:
    return MergePlan(num_layers=num_layers, groups=(), source=source)


def test_a_plan_for_another_depth_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"^plan plan\.json is for a model of 5 layers, but [^\n]*$"
    ):
        check_plan(made_for(5), 4, "ab", PATH)


def test_a_plan_for_other_weights_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"^plan plan\.json was made for .* ab, but [^\n]* cd\. .*$"
    ):
        check_plan(made_for(4, "ab"), 4, "cd", PATH)


@pytest.mark.parametrize(("source", "fingerprint"), [("ab", "ab"), ("", "ab"), ("ab", "")])
def test_a_plan_fits_its_source_and_any_when_one_of_them_has_no_fingerprint(
    source: str, fingerprint: str
) -> None:
    check_plan(made_for(4, source), 4, fingerprint, PATH)


@pytest.mark.parametrize(
    ("budget", "num_layers", "wanted"),
    [("20%", 30, 6), (" 10 % ", 30, 3), ("0%", 4, 0), ("33.3%", 30, 10)],
)
def test_a_budget_is_a_share_of_the_layers(budget: str, num_layers: int, wanted: int) -> None:
    assert layers_of_budget(budget, num_layers) == wanted


@pytest.mark.parametrize("budget", ["20", "100%", "-1%", "a%", "%", "", "nan%"])
def test_a_budget_that_is_no_percentage_is_refused(budget: str) -> None:
    with pytest.raises(ValueError, match="must be a percentage of the layers such as 20%"):
        layers_of_budget(budget, 30)
