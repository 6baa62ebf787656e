from pathlib import Path

import pytest
import torch
from models import plan_of

from lmerge.kept import kept_plan
from lmerge.plan import MergePlan

PLAN, OTHER = plan_of([0, 1]), plan_of([1, 2])
PROMPTS = [torch.arange(3), torch.arange(5)]


def never() -> MergePlan:
    raise AssertionError("the plan is there already")


def test_a_plan_is_made_once(tmp_path: Path) -> None:
    assert kept_plan(tmp_path, "a", ("block", 1), PROMPTS, lambda: PLAN) == PLAN
    assert kept_plan(tmp_path, "a", ("block", 1), PROMPTS, never) == PLAN


@pytest.mark.parametrize(
    ("source", "options", "prompts"),
    [
        ("b", ("block", 1), PROMPTS),
        ("a", ("block", 2), PROMPTS),
        ("a", ("block", 1), PROMPTS[:1]),
    ],
)
def test_a_plan_for_anything_else_is_made_anew(
    source: str, options: tuple[str, int], prompts: list[torch.Tensor], tmp_path: Path
) -> None:
    kept_plan(tmp_path, "a", ("block", 1), PROMPTS, lambda: PLAN)
    assert kept_plan(tmp_path, source, options, prompts, lambda: OTHER) == OTHER
