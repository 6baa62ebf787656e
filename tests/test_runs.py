import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from models import plan_of
from torch import Tensor

from lmerge.align import Orders
from lmerge.alpha_files import alphas_fingerprint, read_alphas, write_alphas
from lmerge.alphas import Alphas
from lmerge.checkpoints import checkpoint_state, read_checkpoint
from lmerge.files import write_json, write_tensors
from lmerge.llama import MATRICES, HeadSpec
from lmerge.plan import MergePlan
from lmerge.runs import (
    Refits,
    RunState,
    alignment_key,
    motion_of,
    read_orders,
    read_plan,
    read_refits,
    read_run,
    with_refits_of,
    write_orders,
    write_plan,
    write_refits,
)
from lmerge.symmetry import Transform, identity, transform_tensors

PLAN = plan_of([0, 1], [2, 3], anchors=[1, 2])
ONE_LINE = r"^[^\n]*%s[^\n]*\Z"
LAYER = {"members": [0, 1], "anchor": 1, "alphas": {"layer": [0.25, 0.75]}}
SECOND = {"members": [2, 3], "anchor": 2, "alphas": {"layer": [1.0, 0.0]}}


def random_alphas(seed: int = 0) -> list[Alphas]:
    """Neuron alphas of both groups, of many sizes and either sign."""
    generator = torch.Generator().manual_seed(seed)

    def alpha(width: int) -> Tensor:
        return torch.randn(2, width, generator=generator) * torch.logspace(-30, 30, width)

    return [{name: alpha(5 + i) for i, name in enumerate(MATRICES)} for _ in PLAN.groups]


def random_orders() -> Orders:
    return {i: torch.randperm(48) for i in range(4)}


def random_refits() -> Refits:
    return [{"down_proj": torch.randn(4, 6)}, {"down_proj": torch.randn(4, 6).bfloat16()}]


def equal(left: list[dict[str, Tensor]] | None, right: list[dict[str, Tensor]]) -> bool:
    """Whether names, dtypes and every bit are the same."""
    assert left is not None
    return all(
        a.keys() == b.keys()
        and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)
        for a, b in zip(left, right, strict=True)
    )


def write_groups(folder: Path, *groups: object) -> Path:
    """An alphas.json with these groups, which need not be right."""
    write_json(folder / "alphas.json", {"groups": list(groups)}, schema=1)
    return folder / "alphas.json"


# Plans.


def test_a_plan_survives_its_file(tmp_path: Path) -> None:
    write_plan(tmp_path, PLAN)
    assert read_plan(tmp_path / "plan.json") == PLAN


def test_a_person_can_write_a_plan(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text('{"schema": 1, "num_layers": 4, "groups": [{"members": [1, 2]}]}')
    assert read_plan(path).groups == plan_of([1, 2]).groups


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        '{"num_layers": 4, "groups": []}',
        '{"schema": 1, "groups": []}',
        '{"schema": 1, "num_layers": 4, "groups": [{"members": [3, 4]}]}',
        '{"schema": 1, "num_layers": 4, "groups": [{"members": [0, 1000000000000]}]}',
    ],
)
def test_a_malformed_plan_is_one_line_that_names_the_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "mine.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=ONE_LINE % r"mine\.json"):
        read_plan(path)


# Orders.


def test_orders_survive_their_file(tmp_path: Path) -> None:
    orders = random_orders()
    write_orders(tmp_path, orders)
    found = read_orders(tmp_path / "orders.safetensors")
    assert found.keys() == orders.keys()
    assert all(torch.equal(found[i], orders[i]) and found[i].dtype == torch.int64 for i in orders)


def test_transforms_and_orders_of_rows_survive_their_file_and_a_checkpoint(tmp_path: Path) -> None:
    transform = identity(48, HeadSpec(4, 2, 8))
    orders: Orders = {1: transform, 2: {"q_proj": torch.randperm(32)}, 3: torch.randperm(48)}
    write_orders(tmp_path, orders)
    state = RunState(plan=PLAN, orders=orders)
    saved = checkpoint_state(state, [])["orders"]
    reread = {layer: motion_of(parts) for layer, parts in saved.items()}
    for found in (read_orders(tmp_path / "orders.safetensors"), reread):
        assert isinstance(found[1], Transform)
        wanted, got = transform_tensors(transform), transform_tensors(found[1])
        assert all(
            torch.equal(wanted[n], got[n]) and wanted[n].dtype == got[n].dtype for n in wanted
        )
        assert torch.equal(found[2]["q_proj"], orders[2]["q_proj"])  # type: ignore[index,call-overload]
        assert torch.equal(found[3], orders[3])  # type: ignore[arg-type]


def test_the_key_of_an_alignment_sees_what_decides_it() -> None:
    blocks = torch.arange(6)[None]
    keys = {
        alignment_key("a", PLAN, ("weights", "anchor"), None),
        alignment_key("b", PLAN, ("weights", "anchor"), None),
        alignment_key("a", PLAN, ("full", "anchor"), None),
        alignment_key("a", PLAN, ("weights", "joint"), None),
        alignment_key("a", PLAN, ("weights", "anchor"), blocks),
        alignment_key("a", PLAN, ("weights", "anchor"), blocks + 1),
    }
    assert len(keys) == 6
    assert alignment_key("a", PLAN, ("weights", "anchor"), None) in keys


def test_no_orders_survive_their_file(tmp_path: Path) -> None:
    write_orders(tmp_path, {})
    assert read_orders(tmp_path / "orders.safetensors") == {}


@pytest.mark.parametrize(
    ("name", "order"),
    [
        ("one", torch.arange(4)),
        ("-1", torch.arange(4)),
        ("1", torch.tensor([0, 1, 1, 3])),
        ("1", torch.tensor([0, 1, 2, 4])),
        ("1", torch.tensor([-1, 0, 1, 2])),
        ("1", torch.tensor([[0, 1], [1, 0]])),
        ("1", torch.tensor(0)),
        ("1", torch.arange(4).float()),
    ],
)
def test_what_is_no_order_is_one_line_that_names_the_file(
    tmp_path: Path, name: str, order: Tensor
) -> None:
    stored = order if order.is_floating_point() else order.int()
    write_tensors(tmp_path / "orders.safetensors", {name: stored}, {})
    with pytest.raises(ValueError, match=ONE_LINE % r"orders\.safetensors"):
        read_orders(tmp_path / "orders.safetensors")


def test_a_broken_tensor_file_is_one_line_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / "orders.safetensors"
    path.write_bytes(b"\x00" * 30)
    with pytest.raises(ValueError, match=ONE_LINE % r"orders\.safetensors"):
        read_orders(path)


# Alphas.


def test_alphas_survive_their_file_bit_for_bit(tmp_path: Path) -> None:
    alphas = random_alphas()
    write_alphas(tmp_path, PLAN, alphas)
    assert equal(read_alphas(tmp_path / "alphas.json", PLAN), alphas)


def test_one_alpha_a_layer_survives_its_file(tmp_path: Path) -> None:
    alphas: list[Alphas] = [{"layer": torch.rand(2)}, {"layer": torch.rand(2)}]
    write_alphas(tmp_path, PLAN, alphas)
    assert equal(read_alphas(tmp_path / "alphas.json", PLAN), alphas)


def test_a_person_can_write_whole_numbers(tmp_path: Path) -> None:
    whole = {**LAYER, "alphas": {"layer": [0, 1]}}
    found = read_alphas(write_groups(tmp_path, whole, SECOND), PLAN)
    assert torch.equal(found[0]["layer"], torch.tensor([0.0, 1.0]))


def test_alphas_that_are_not_finite_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=ONE_LINE % r"alphas\.json"):
        write_alphas(tmp_path, PLAN, [{"layer": torch.tensor([torch.nan, 1])}] * 2)


ALL = {name: [0.5, 0.5] for name in MATRICES}
BAD_ALPHAS: list[Any] = [
    None,
    3,
    "text",
    [1, 2],
    {},
    {"layer": None},
    {"layer": {}},
    {"layer": "half"},
    {"layer": 0.5},
    {"layer": []},
    {"layer": [0.5]},
    {"layer": [0.5, 0.5, 0.5]},
    {"layer": [0.5, None]},
    {"layer": [0.5, "x"]},
    {"layer": [[0.5], [0.5, 0.5]]},
    {"layer": [[[0.5]], [[0.5]]]},
    {"layer": [0.5, 10**400]},
    {"layer": [0.5, 1e300]},
    {"layer": [0.5, 0.5], "q_proj": [0.5, 0.5]},
    {"neuron": [0.5, 0.5]},
    {"q_proj": [0.5, 0.5]},
    {**ALL, "q_proj": [0.5]},
    {**ALL, "extra": [0.5, 0.5]},
]


@pytest.mark.parametrize("alphas", BAD_ALPHAS, ids=lambda alphas: json.dumps(alphas)[:40])
def test_malformed_alphas_are_one_line_that_names_the_file(tmp_path: Path, alphas: object) -> None:
    path = write_groups(tmp_path, {**LAYER, "alphas": alphas}, SECOND)
    with pytest.raises(ValueError, match=ONE_LINE % r"alphas\.json"):
        read_alphas(path, PLAN)


def test_alphas_beyond_a_float_are_refused(tmp_path: Path) -> None:
    path = write_groups(tmp_path, LAYER, SECOND)
    path.write_text(path.read_text().replace("0.75", "1e999"))  # JSON reads it as infinity
    with pytest.raises(ValueError, match=ONE_LINE % "finite"):
        read_alphas(path, PLAN)


@pytest.mark.parametrize(
    "groups",
    [
        (LAYER,),
        (LAYER, SECOND, SECOND),
        (SECOND, LAYER),
        (LAYER, 3),
        (LAYER, None),
        (LAYER, {**SECOND, "anchor": 3}),
        (LAYER, {**SECOND, "members": [1, 2]}),
        (LAYER, {"members": [2, 3], "alphas": SECOND["alphas"]}),
    ],
)
def test_alphas_of_another_plan_are_one_line_that_names_the_file(
    tmp_path: Path, groups: tuple[object, ...]
) -> None:
    with pytest.raises(ValueError, match=ONE_LINE % r"alphas\.json must hold"):
        read_alphas(write_groups(tmp_path, *groups), PLAN)


@pytest.mark.parametrize("groups", [None, {}, "text", 3])
def test_alphas_without_a_list_of_groups_are_one_line(tmp_path: Path, groups: object) -> None:
    write_json(tmp_path / "alphas.json", {"groups": groups}, schema=1)
    with pytest.raises(ValueError, match=ONE_LINE % r"alphas\.json must hold"):
        read_alphas(tmp_path / "alphas.json", PLAN)


# Refits.

NUM_KEPT = PLAN.num_layers - PLAN.num_removed


def test_refits_survive_their_file(tmp_path: Path) -> None:
    refits, alphas = random_refits(), random_alphas()
    write_refits(tmp_path, refits, alphas)
    found, kept = read_refits(tmp_path / "repair.safetensors", alphas, NUM_KEPT)
    assert equal(found, refits)
    assert kept == {}


def test_refits_belong_to_their_alphas(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_refits(tmp_path, random_refits(), random_alphas())
    changed = random_alphas()
    changed[1]["q_proj"][0, 0] += 1e-35
    with caplog.at_level(logging.WARNING):
        assert read_refits(tmp_path / "repair.safetensors", changed, NUM_KEPT) == (None, {})
    assert "repair.safetensors" in caplog.text


def test_alphas_that_were_read_again_are_still_those_of_the_refits(tmp_path: Path) -> None:
    write_alphas(tmp_path, PLAN, random_alphas())
    found = read_alphas(tmp_path / "alphas.json", PLAN)
    assert alphas_fingerprint(found) == alphas_fingerprint(random_alphas())


def test_swapped_groups_have_other_alphas() -> None:
    assert alphas_fingerprint(random_alphas()[::-1]) != alphas_fingerprint(random_alphas())


@pytest.mark.parametrize(
    ("name", "weight"),
    [
        ("down_proj", torch.ones(2, 2)),
        ("x.down_proj", torch.ones(2, 2)),
        ("2.down_proj", torch.ones(2, 2)),
        ("-1.down_proj", torch.ones(2, 2)),
        ("0.lm_head", torch.ones(2, 2)),
        ("0.down_proj", torch.ones(2)),
    ],
)
def test_malformed_refits_are_one_line_that_names_the_file(
    tmp_path: Path, name: str, weight: Tensor
) -> None:
    alphas = random_alphas()
    metadata = {"alphas": alphas_fingerprint(alphas)}
    write_tensors(tmp_path / "repair.safetensors", {name: weight}, metadata)
    with pytest.raises(ValueError, match=ONE_LINE % r"repair\.safetensors"):
        read_refits(tmp_path / "repair.safetensors", alphas, NUM_KEPT)


# Whole runs and checkpoints.


def write_run(folder: Path) -> RunState:
    state = RunState(
        plan=PLAN, orders=random_orders(), alphas=random_alphas(), refits=random_refits()
    )
    assert state.alphas is not None
    assert state.refits is not None
    write_plan(folder, state.plan)
    write_orders(folder, state.orders)
    write_alphas(folder, state.plan, state.alphas)
    write_refits(folder, state.refits, state.alphas)
    return state


def test_a_run_is_read_as_it_was_written(tmp_path: Path) -> None:
    state, found = write_run(tmp_path), read_run(tmp_path)
    assert found.plan == state.plan
    assert all(torch.equal(found.orders[i], state.orders[i]) for i in state.orders)
    assert state.alphas is not None
    assert state.refits is not None
    assert equal(found.alphas, state.alphas)
    assert equal(found.refits, state.refits)


def test_a_run_without_a_plan_is_one_line_that_names_the_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=ONE_LINE % r"run folder .*plan\.json.*`lmerge fit`"):
        read_run(tmp_path / "missing")


def test_a_run_that_has_a_plan_alone_has_no_alphas(tmp_path: Path) -> None:
    write_plan(tmp_path, PLAN)
    found = read_run(tmp_path)
    assert (found.orders, found.alphas, found.refits) == ({}, None, None)


def test_refits_without_alphas_are_not_read(tmp_path: Path) -> None:
    write_run(tmp_path)
    (tmp_path / "alphas.json").unlink()
    assert read_run(tmp_path).refits is None


def save(path: Path, state: RunState) -> Path:
    """A checkpoint as Lightning writes it."""
    assert state.alphas is not None
    torch.save({"state_dict": {}, "lmerge": checkpoint_state(state, state.alphas)}, path)
    return path


def checkpointed(folder: Path) -> RunState:
    return read_checkpoint(save(folder / "last.ckpt", write_run(folder)))


def test_a_checkpoint_holds_plan_orders_and_alphas(tmp_path: Path) -> None:
    found, wanted = checkpointed(tmp_path), read_run(tmp_path)
    assert wanted.alphas is not None
    assert found.plan == wanted.plan
    assert all(torch.equal(found.orders[i], wanted.orders[i]) for i in wanted.orders)
    assert equal(found.alphas, wanted.alphas)


def test_a_checkpoint_of_a_run_gets_its_refits(tmp_path: Path) -> None:
    found = with_refits_of(tmp_path, checkpointed(tmp_path))
    assert found.refits is not None


def test_a_checkpoint_with_other_alphas_gets_no_refits(tmp_path: Path) -> None:
    state = checkpointed(tmp_path)
    state.alphas = random_alphas(seed=1)
    assert with_refits_of(tmp_path, state).refits is None


def test_a_checkpoint_of_a_run_that_was_not_repaired_gets_no_refits(tmp_path: Path) -> None:
    state = checkpointed(tmp_path)
    (tmp_path / "repair.safetensors").unlink()
    assert with_refits_of(tmp_path, state).refits is None


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04", b"\x80\x02K\x01."])
def test_what_is_no_checkpoint_is_one_line_that_names_the_file(
    tmp_path: Path, content: bytes
) -> None:
    path = tmp_path / "last.ckpt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=ONE_LINE % r"last\.ckpt"):
        read_checkpoint(path)


def damaged(**changes: object) -> dict[str, object]:
    state = RunState(plan=PLAN, alphas=random_alphas())
    return {**checkpoint_state(state, random_alphas()), **changes}


@pytest.mark.parametrize(
    "content",
    [
        3,
        {},
        {"lmerge": None},
        {"lmerge": {}},
        {"lmerge": damaged(plan={"num_layers": 4})},
        {"lmerge": damaged(plan=None)},
        {"lmerge": damaged(alphas=None)},
        {"lmerge": damaged(alphas=[])},
        {"lmerge": damaged(alphas=[{"layer": torch.ones(3)}] * len(PLAN.groups))},
        {"lmerge": damaged(alphas=[{"q_proj": torch.ones(2)}] * len(PLAN.groups))},
        {"lmerge": damaged(alphas=[{"layer": torch.tensor([1.0, torch.nan])}] * len(PLAN.groups))},
        {"lmerge": damaged(alphas=[{"layer": "text"}] * len(PLAN.groups))},
        {"lmerge": damaged(orders=None)},
        {"lmerge": damaged(orders={"1": torch.arange(48)})},
        {"lmerge": damaged(orders={77: torch.arange(48)})},
        {"lmerge": damaged(orders={PLAN.groups[0].start: torch.zeros(48, dtype=torch.long)})},
        {"lmerge": damaged(orders={PLAN.groups[0].start: torch.ones(48)})},
    ],
)
def test_a_checkpoint_of_something_else_is_one_line_that_names_the_file(
    tmp_path: Path, content: object
) -> None:
    torch.save(content, tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match=ONE_LINE % r"last\.ckpt"):
        read_checkpoint(tmp_path / "last.ckpt")


def test_a_truncated_checkpoint_is_one_line_that_names_the_file(tmp_path: Path) -> None:
    path = save(tmp_path / "last.ckpt", write_run(tmp_path))
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(ValueError, match=ONE_LINE % r"last\.ckpt"):
        read_checkpoint(path)


def test_a_missing_checkpoint_is_one_line_that_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=ONE_LINE % r"last\.ckpt"):
        read_checkpoint(tmp_path / "last.ckpt")


class Harmful:
    """Would write a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path, str]]:
        return Path.write_text, (self.path, "harm")


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    torch.save({"lmerge": Harmful(tmp_path / "harm")}, tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match=ONE_LINE % r"last\.ckpt"):
        read_checkpoint(tmp_path / "last.ckpt")
    assert not (tmp_path / "harm").exists()


def test_an_empty_plan_makes_an_empty_run(tmp_path: Path) -> None:
    plan = MergePlan(num_layers=4, groups=())
    write_plan(tmp_path, plan)
    write_alphas(tmp_path, plan, [])
    assert read_run(tmp_path).alphas == []
