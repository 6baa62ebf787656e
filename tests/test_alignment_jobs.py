import pytest
import torch
from conftest import tiny_model
from test_merge import tensors_of

from lmerge.align import Aligner, motion_parts
from lmerge.alignment_jobs import Method, Task, align_tasks, solve
from lmerge.llama import head_spec
from lmerge.runs import Orders


def tasks() -> list[Task]:
    """A group of three and a pair, with activations."""
    model = tiny_model()
    layers = dict(enumerate(tensors_of(model, 0, 1, 2, 3)))
    acts = {i: torch.randn(50, 48, generator=torch.Generator().manual_seed(i)) for i in layers}
    groups = {1: (0, 1, 2), 3: (2, 3)}
    return [
        Task(anchor, {i: layers[i] for i in g}, {i: acts[i] for i in g})
        for anchor, g in groups.items()
    ]


def method(aligner: Aligner, reference: str = "anchor") -> Method:
    spec = head_spec(tiny_model().config)
    return Method(aligner=aligner, spec=spec, reference=reference)  # type: ignore[arg-type]


def same(left: Orders, right: Orders) -> bool:
    assert left.keys() == right.keys()
    for i, motion in left.items():
        parts, parts2 = motion_parts(motion), motion_parts(right[i])
        assert isinstance(parts, dict)
        assert isinstance(parts2, dict)
        if not all(torch.allclose(parts[n].double(), parts2[n].double()) for n in parts):
            return False
    return True


@pytest.mark.parametrize("aligner", ["full", "both", "rowwise"])
@pytest.mark.parametrize("reference", ["anchor", "joint"])
def test_pairs_are_solved_as_the_whole_group_is(aligner: Aligner, reference: str) -> None:
    task = tasks()[0]
    how = method(aligner, reference)
    found: Orders = {}
    for part in align_tasks([task], how):
        found |= part
    assert same(found, solve(task, how))


@pytest.mark.slow  # each process imports everything anew
def test_two_processes_find_what_one_finds() -> None:
    wanted = list(align_tasks(tasks(), method("both")))
    found = list(align_tasks(tasks(), method("both"), num_jobs=2))
    assert len(found) == len(wanted) == 3
    assert all(same(a, b) for a, b in zip(found, wanted, strict=True))


def test_tasks_are_taken_when_a_process_is_free_for_them() -> None:
    taken = []

    def watched():  # type: ignore[no-untyped-def]
        for task in tasks():
            taken.append(task.anchor)
            yield task

    next(align_tasks(watched(), method("weights")))
    assert taken == [1]
