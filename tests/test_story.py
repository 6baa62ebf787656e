"""The main job on the tiny model, from the source to the exported and reloaded checkpoint."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cli_run import fit, run
from transformers import AutoModelForCausalLM

from lmerge.alpha_files import read_alphas
from lmerge.runs import read_plan


@pytest.fixture(scope="module")
def run_dir(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on the tiny model."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    fit(tiny_dir, folder, "--model.optimizer=torch.optim.Adam", "--model.optimizer.lr=0.01")
    return folder


def stage(name: str, run_dir: Path, *args: str | Path) -> dict[str, object]:
    """Run `validate` or `test` on a finished run and return its part of metrics.json."""
    run(name, "--config", run_dir / "config.yaml", *args)
    metrics: dict[str, dict[str, object]] = json.loads((run_dir / "metrics.json").read_text())
    return metrics[name]


def test_run_folder_holds_the_artefacts(run_dir: Path) -> None:
    names = {path.relative_to(run_dir).as_posix() for path in run_dir.rglob("*")}
    assert names >= {
        "config.yaml",
        "plan.json",
        "orders.safetensors",
        "alphas.json",
        "repair.safetensors",
        "metrics.json",
        "similarity/all.npy",
        "similarity/layers.png",
        "alignment/neurons.png",
        "checkpoints/last.ckpt",
        "logs/metrics.csv",
        "model/config.json",
        "model/model.safetensors",
        "model/README.md",
    }


def test_artefacts_carry_schema_and_provenance(run_dir: Path) -> None:
    for name in ("plan", "alphas"):
        data = json.loads((run_dir / f"{name}.json").read_text())
        assert data["schema"] == 1
        assert data["provenance"]["lmerge"]
    validate = json.loads((run_dir / "metrics.json").read_text())["validate"]
    assert set(validate["fingerprints"]) >= {"dev", "val", "calibration/en", "eval/en"}
    assert "test" not in validate["fingerprints"]


def test_checkpoint_holds_alphas_plan_and_orders_alone(run_dir: Path) -> None:
    checkpoint = torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["state_dict"]
    assert all(".free." in name for name in checkpoint["state_dict"])
    assert set(checkpoint["lmerge"]) == {"plan", "orders", "alphas"}


def test_alphas_moved_from_their_start(run_dir: Path) -> None:
    plan = read_plan(run_dir / "plan.json")
    (alphas,) = read_alphas(run_dir / "alphas.json", plan)
    anchor = plan.groups[0].anchor_position
    assert any(bool((alpha[anchor] != 1).any()) for alpha in alphas.values())


def test_exported_model_loads_without_lmerge_with_the_same_logits(run_dir: Path) -> None:
    token_BT = torch.arange(40)[None]
    expected = AutoModelForCausalLM.from_pretrained(run_dir / "model")(token_BT).logits
    torch.save(expected, run_dir / "expected.pt")
    code = f"""
import sys; sys.modules["lmerge"] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(r"{run_dir / "model"}")
tokenizer = AutoTokenizer.from_pretrained(r"{run_dir / "model"}")
assert len(model.model.layers) == model.config.num_hidden_layers == 2
expected = torch.load(r"{run_dir / "expected.pt"}")
assert (model(torch.arange(40)[None]).logits - expected).abs().max() < 1e-4
ids = tokenizer("The", return_tensors="pt").input_ids
assert model.generate(ids, max_new_tokens=5, do_sample=False).shape[1] == ids.shape[1] + 5
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)


def test_validate_repeats_the_numbers_of_the_fit(run_dir: Path) -> None:
    first = json.loads((run_dir / "metrics.json").read_text())["validate"]
    again = stage("validate", run_dir)
    for key in ("text", "choices", "questions", "fingerprints"):
        assert again[key] == first[key]


def test_validate_from_the_checkpoint_gives_the_same_numbers(run_dir: Path) -> None:
    plain = stage("validate", run_dir)
    resumed = stage("validate", run_dir, "--ckpt_path", run_dir / "checkpoints" / "last.ckpt")
    assert resumed["text"] == plain["text"]


def test_test_stage_uses_the_test_split_and_the_saved_plan(run_dir: Path) -> None:
    plan = (run_dir / "plan.json").read_text()
    results = stage("test", run_dir)
    assert {question["id"].split("/")[1] for question in results["questions"]} == {"test"}
    assert "val" not in results["fingerprints"]
    assert (run_dir / "plan.json").read_text() == plan


def test_model_card_shows_the_results(run_dir: Path) -> None:
    card = (run_dir / "model" / "README.md").read_text()
    assert "loss on en text" in card


def test_resumed_fit_equals_an_uninterrupted_one(tiny_dir: Path, tmp_path: Path) -> None:
    options = ("--data.num_calibration_tokens=2048", "--trainer.max_steps=6")
    fit(tiny_dir, tmp_path / "whole", *options)
    fit(tiny_dir, tmp_path / "part", *options, "--trainer.max_steps=3")
    resumed = ("--ckpt_path", tmp_path / "part" / "checkpoints" / "last.ckpt")
    fit(tiny_dir, tmp_path / "part", *options, *resumed)
    plan = read_plan(tmp_path / "whole" / "plan.json")
    (whole,) = read_alphas(tmp_path / "whole" / "alphas.json", plan)
    (part,) = read_alphas(tmp_path / "part" / "alphas.json", plan)
    assert all(torch.equal(whole[name], part[name]) for name in whole)


def test_merging_nothing_reproduces_the_source(tiny_dir: Path, tmp_path: Path) -> None:
    fit(tiny_dir, tmp_path / "run", "--model.num_removed=0")
    (text,) = json.loads((tmp_path / "run" / "metrics.json").read_text())["validate"][
        "text"
    ].values()
    assert text["merged"]["loss"] == text["source"]["loss"]
    assert text["merged"]["kl"] == 0


def test_finished_run_is_replaced_with_overwrite(tiny_dir: Path, tmp_path: Path) -> None:
    fit(tiny_dir, tmp_path, "--model.num_removed=1")
    fit(tiny_dir, tmp_path, "--model.num_removed=2", "--overwrite=true")
    assert read_plan(tmp_path / "plan.json").num_removed == 2


def test_plan_from_a_file_replaces_the_plan_stage(tiny_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    groups = [{"members": [0, 1]}, {"members": [2, 3], "anchor": 3}]
    path.write_text(json.dumps({"schema": 1, "num_layers": 4, "groups": groups}))
    fit(tiny_dir, tmp_path / "run", f"--model.plan={path}")
    plan = read_plan(tmp_path / "run" / "plan.json")
    assert [group.anchor for group in plan.groups] == [0, 3]


@pytest.mark.parametrize("granularity", ["layer", "tensor", "head", "neuron"])
def test_every_granularity_runs_and_reloads(
    granularity: str, tiny_dir: Path, tmp_path: Path
) -> None:
    fit(tiny_dir, tmp_path / "run", f"--model.alpha.granularity={granularity}")
    first = json.loads((tmp_path / "run" / "metrics.json").read_text())["validate"]["text"]
    assert stage("validate", tmp_path / "run")["text"] == first


def test_validate_of_an_unfinished_fit_is_refused(
    tiny_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(tiny_dir, tmp_path / "run")
    (tmp_path / "run" / "alphas.json").unlink()
    with pytest.raises(SystemExit):
        run("validate", "--config", tmp_path / "run" / "config.yaml")
    assert "did not finish" in capsys.readouterr().err
