"""The one command that most users need, on the tiny model."""

import json
import logging
from pathlib import Path

import pytest
import torch
from cli_run import run
from transformers import AutoModelForCausalLM

from lmerge.runs import read_plan, read_run

CONFIG = Path(__file__).parents[1] / "configs" / "best.yaml"

SMALL = (
    "--data.domains=[medical]",
    "--data.num_shots=1",
    "--data.max_questions=3",
    "--data.block_size=64",
    "--data.num_calibration_tokens=2048",
    "--repair.heal.num_steps=3",
    "--trainer.accelerator=cpu",
    "--wandb=disabled",
)


@pytest.fixture(scope="module")
def run_dir(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "best"
    options = ("--model.budget=25%", f"--model.source={tiny_dir}", f"--run_dir={folder}")
    run("fit", "--config", CONFIG, *options, *SMALL)
    return folder


def test_the_budget_is_kept(run_dir: Path) -> None:
    assert read_plan(run_dir / "plan.json").num_removed == 1


def test_layers_above_the_merged_one_are_saved_with_it(run_dir: Path) -> None:
    state = read_run(run_dir)
    (group,) = state.plan.groups
    assert state.refits is not None
    assert {"o_proj", "down_proj"} <= set(state.refits[0])
    position = state.plan.position(group)
    assert set(state.kept_refits) == set(range(position + 1, 3))


def test_a_saved_run_validates_to_the_same_numbers(run_dir: Path) -> None:
    before = json.loads((run_dir / "metrics.json").read_text())["validate"]["text"]
    run("validate", "--config", run_dir / "config.yaml")
    after = json.loads((run_dir / "metrics.json").read_text())["validate"]["text"]
    assert after == before


def test_the_exported_model_is_the_one_that_was_measured(run_dir: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(run_dir / "model")
    assert model.config.num_hidden_layers == 3
    state = read_run(run_dir)
    for position, tensors in state.kept_refits.items():
        down = model.model.layers[position].mlp.down_proj.weight
        assert torch.equal(down, tensors["down_proj"])


def test_the_time_is_estimated_before_anything_is_computed(
    tiny_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="lmerge"):
        options = ("--model.num_removed=1", f"--model.source={tiny_dir}", "--evaluate_after=false")
        run("fit", "--config", CONFIG, f"--run_dir={tmp_path / 'run'}", *options, *SMALL)
    messages = [record.getMessage() for record in caplog.records]
    estimate = next(i for i, text in enumerate(messages) if text.startswith("estimated time"))
    repair = next(i for i, text in enumerate(messages) if "refitted" in text)
    assert estimate < repair
