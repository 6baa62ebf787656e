"""Every config in configs/ parses with the command that its first lines name."""

import re
from pathlib import Path

import pytest
import yaml

from lmerge.cli import main

ROOT = Path(__file__).parents[1]


CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
SWEEPS = [path for path in CONFIGS if "\nprogram:" in path.read_text()]


@pytest.mark.parametrize(
    "path", [path for path in CONFIGS if path not in SWEEPS], ids=lambda path: path.stem
)
def test_a_config_parses_and_opens_with_its_command(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    text = path.read_text()
    shown = path.relative_to(ROOT)
    commands = re.findall(rf"^#.*?(\w+) --config {shown}", text, flags=re.M)
    assert commands
    for command in dict.fromkeys(commands):
        with pytest.raises(SystemExit) as stop:
            main([command, "--config", str(path), "--print_config"])
        assert stop.value.code in (0, None)
        assert "source:" in capsys.readouterr().out


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_value_of_a_study_sweep_is_an_option_of_its_command(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    sweep = yaml.safe_load(path.read_text())
    assert f"lmerge sweep {path.relative_to(ROOT)}" in path.read_text()
    fixed = sweep["command"][3:-1]
    tried = [f"--{name}={bounds['min']}" for name, bounds in sweep["parameters"].items()]
    with pytest.raises(SystemExit) as stop:
        main([*fixed, *tried, "--print_config"])
    assert stop.value.code in (0, None)
    assert capsys.readouterr().out.count("0.3") >= len(tried)


def test_every_experiment_of_the_study_has_a_twin_on_the_small_model() -> None:
    names = {path.stem for path in (ROOT / "configs" / "study").glob("*.yaml")}
    experiments = ("gradient", "bayes", "domains", "languages", "align_merge")
    assert names == {f"{e}_{model}" for e in experiments for model in ("llama3_8b", "smollm2")}
