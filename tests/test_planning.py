from pathlib import Path

import pytest
from cli_run import SMALL, fit, run

from lmerge.runs import read_plan

ROOT = Path(__file__).parents[1]


def test_plan_writes_the_plan_of_the_fit_and_no_run_folder(tiny_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    source, run_dir = f"--model.source={tiny_dir}", f"--run_dir={tmp_path / 'none'}"
    run("plan", source, *SMALL, run_dir, "--output", path)
    fit(tiny_dir, tmp_path / "run", "--trainer.max_steps=0", "--evaluate_after=false")
    assert read_plan(path).groups == read_plan(tmp_path / "run" / "plan.json").groups
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("name", ["llama-3-8b", "llama-3-70b"])
def test_memory_is_told_from_a_config_alone(
    name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run("plan", "--memory", f"--model.source={ROOT / 'configs' / 'shapes' / name}")
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("FSDP2,", "each", "of 8", "GPUs"))
    assert "peak: training" in printed
    assert list(tmp_path.iterdir()) == []


def test_memory_of_the_config_for_split_layers_is_told_without_gpus(
    tiny_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = ROOT / "configs" / "fsdp2.yaml"
    few = ("--model.num_removed=1", f"--model.source={tiny_dir}")
    run("plan", "--config", config, *few, "--memory", "--num_processes=2")
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("FSDP2,", "each", "of 2", "GPUs"))
