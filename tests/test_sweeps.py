import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from cli_run import SMALL
from offline_run import Offline

from lmerge.cli import main
from lmerge.history import read_history
from lmerge.sweep import trial_command
from lmerge.sweep_figures import importance
from lmerge.trials import (
    ENGINES,
    Trial,
    propose_optuna,
    propose_wandb,
    read_sweep,
    short_names,
    to_stop,
)

pytest.importorskip("sweeps")
ROOT = Path(__file__).parents[1]
SWEEPS = sorted((ROOT / "sweeps").glob("*.yaml"))
LOGGED = {"val/kl/held-out", "val/loss/held-out", "val/ppl/held-out"}
BOWL = {
    "method": "bayes",
    "metric": {"name": "loss", "goal": "minimize"},
    "parameters": {"x": {"min": -1.0, "max": 1.0}},
}
HYPERBAND = {**BOWL, "early_terminate": {"type": "hyperband", "min_iter": 2, "eta": 2}}


def finished(index: int, x: float) -> Trial:
    value = (x - 0.3) ** 2
    return Trial(
        index=index, params={"x": x}, folder="", state="finished", metric=value, history=[value]
    )


def search(engine: str, count: int) -> float:
    trials: list[Trial] = []
    while len(trials) < count:
        params = ENGINES[engine](BOWL, trials, 0)
        trials.append(finished(len(trials), params["x"]))
    return min(trial.metric for trial in trials)


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_finds_the_bottom_of_a_bowl(engine: str) -> None:
    pytest.importorskip("optuna")
    assert search(engine, 12) < 0.01


@pytest.mark.parametrize("propose", [propose_wandb, propose_optuna])
def test_equal_seeds_and_trials_propose_equal_values(propose: object) -> None:
    pytest.importorskip("optuna")
    trials = [finished(0, 0.5), finished(1, -0.5)]
    assert propose(BOWL, trials, 3) == propose(BOWL, trials, 3)


def test_a_grid_ends() -> None:
    config = {**BOWL, "method": "grid", "parameters": {"x": {"values": [1, 2]}}}
    trials: list[Trial] = []
    while (params := propose_wandb(config, trials, 0)) is not None:
        trials.append(finished(len(trials), params["x"]))
    assert [trial.params["x"] for trial in trials] == [1, 2]


def test_hyperband_stops_the_running_trial_that_is_worst() -> None:
    trials = [
        Trial(
            index=i, params={"x": 0.0}, folder="", state=state, history=history, metric=history[-1]
        )
        for i, (state, history) in enumerate(
            [
                ("finished", [1, 0.5, 0.2, 0.1]),
                ("finished", [8, 0.5, 0.4, 0.3]),
                ("running", [9.0, 9.0, 9.0, 9.0]),
            ]
        )
    ]
    assert to_stop(HYPERBAND, trials) == [2]
    assert to_stop(BOWL, trials) == []


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("method: bay\nparameters: {x: {values: [1]}}", "bay"),
        ("method: grid\nmetric: {name: loss}\nparameters: {x: {min: 2, max: 1}}", "min"),
        ("method: grid\nparameters: {x: {values: [1]}}", "metric"),
        ("[1, 2]", "mapping"),
        ("a: [", "YAML"),
        ("method: bayes\nmetric: {name: l}\nparameters: {x: {min: 0, max: a}}", "int"),
    ],
)
def test_a_bad_sweep_is_refused_in_one_line(text: str, word: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"^[^\n]*{word}[^\n]*$"):
        read_sweep(path)


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_swept_key_is_an_option_and_its_metric_is_logged(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    config = read_sweep(path)
    assert config["metric"]["name"] in LOGGED
    first = {
        key: spec["values"][0] if "values" in spec else spec["min"]
        for key, spec in config["parameters"].items()
    }
    with pytest.raises(SystemExit) as stop:
        main([*trial_command(config, first), "--print_config"])
    assert stop.value.code in (0, None)
    printed = yaml.safe_load(capsys.readouterr().out)
    for key, value in first.items():
        node = printed
        for part in key.split("."):
            node = node[part]
        assert str(node).replace("'", "") == str(value)


def test_the_option_that_decides_is_the_most_important() -> None:
    trials = [
        Trial(index=i, params={"a": i, "b": (i * 7) % 5, "c": "x"}, folder="", metric=float(-i))
        for i in range(10)
    ]
    found = importance(trials)
    assert found["a"] == pytest.approx(1)
    assert found["b"] < 0.9
    assert found["c"] == 0


@pytest.mark.parametrize(
    ("keys", "short"),
    [
        (["model.alpha.value", "model.lr"], ["value", "lr"]),
        (["model.alpha.steps.0", "model.alpha.steps.1"], ["steps.0", "steps.1"]),
        (["a.method", "b.method"], ["a.method", "b.method"]),
        (["a", "a.1"], ["a", "a.1"]),
    ],
)
def test_options_are_shown_by_names_that_tell_them_apart(keys: list[str], short: list[str]) -> None:
    assert list(short_names(dict.fromkeys(keys)).values()) == short


def test_a_half_written_row_waits(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("step,loss\n0,0.5\n1,0.1")
    assert read_history(path, "loss") == [0.5]


def test_history_leaves_out_empty_cells(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("step,loss\n0,\n1,0.5\n2,nan\n")
    history = read_history(path, "loss")
    assert history[0] == 0.5
    assert len(history) == 2


def sweep_file(folder: Path, tiny_dir: Path, values: list[float]) -> Path:
    """A grid over a fixed alpha on the tiny model."""
    options = [option for option in SMALL if "wandb" not in option and "max_steps" not in option]
    fixed = ["--model.alpha.granularity=layer", "--model.alpha.start=fixed"]
    fixed += ["--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=0"]
    fixed += ["--trainer.max_steps=1", "--trainer.val_check_interval=1"]
    fixed += ["--evaluate_after=false", "--export.enabled=false", "--repair.config.method=none"]
    command = ["${program}", "fit", f"--model.source={tiny_dir}", *options, *fixed, "${args}"]
    config = {
        "method": "grid",
        "metric": {"name": "val/kl/held-out", "goal": "minimize"},
        "parameters": {"model.alpha.value": {"values": values}},
        "command": command,
    }
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.mark.slow
def test_a_killed_sweep_goes_on_and_survives_a_trial_that_fails(
    tiny_dir: Path, tmp_path: Path
) -> None:
    path = sweep_file(tmp_path, tiny_dir, [1.0, float("inf"), 0.5])
    path.write_text(path.read_text().replace(".inf", "bad"))
    out = tmp_path / "out"
    args = [sys.executable, "-m", "lmerge", "sweep", str(path)]
    args += ["--count=3", f"--run_dir={out}", "--wandb=offline"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(args, env=env) as process:
        deadline = time.monotonic() + 60
        while not (out / "results.json").is_file():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signal.SIGKILL)
    subprocess.run(args, env=env, check=True)
    trials = json.loads((out / "results.json").read_text())["trials"]
    assert [trial["state"] for trial in trials] == ["finished", "failed", "finished"]
    assert "model.alpha.value" in trials[1]["error"] or "alpha" in trials[1]["error"]
    assert trials[0]["metric"] != trials[2]["metric"]
    for name in ("results.csv", "best_so_far.png", "parallel.png", "importance.png"):
        assert (out / name).stat().st_size > 0
    logged = Offline(out)
    assert logged.data["name"] == "sweep"
    assert logged.summary["sweep/trials"]["nrows"] == 2
    # All trials used one plan, one alignment and one set of states.
    kept = [path.name.partition(".")[2] for path in (out / "cache").glob("*.*")]
    for kind in ("plan.json", "safetensors", "prefix_BTD", "final_BTD"):
        assert kept.count(kind) == 1
    plans = [(out / trial["folder"] / "plan.json").read_text() for trial in trials[::2]]
    assert len({plan.partition("provenance")[0] for plan in plans}) == 1
