"""The real `wandb sweep` and `wandb agent` run the shipped sweeps against a stub of the API."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from wandb_stub import ENTITY, OPTIONAL, PROJECT, SWEEP, Stub

from lmerge.history import read_history

pytest.importorskip("sweeps")
ROOT = Path(__file__).parents[1]
SWEEPS = sorted((ROOT / "sweeps").glob("*.yaml"))
METRIC = "val/kl/held-out"
TINY = {"domains": ["medical"], "block_size": 64, "num_calibration_tokens": 1024}


@pytest.fixture
def project(tmp_path: Path, tiny_dir: Path) -> Path:
    """A folder like the repository, but its configs are about the tiny model."""
    for name in ("train.py", "sweeps"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    config = yaml.safe_load((ROOT / "configs" / "alpha_eval.yaml").read_text())
    config["model"]["source"] = str(tiny_dir)
    config["data"] |= TINY
    config["trainer"]["accelerator"] = "cpu"
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "alpha_eval.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


def wandb(stub: Stub, folder: Path, *args: str) -> str:
    """Run the `wandb` program against the stub and return what it printed."""
    bin_dir = Path(sys.executable).parent
    env = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    env |= {"WANDB_MODE": "online", "WANDB_BASE_URL": stub.url, "WANDB_API_KEY": "0" * 40}
    env |= {"PATH": f"{bin_dir}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    env |= {"PYTHONPATH": str(ROOT), "WANDB_ERROR_REPORTING": "false", "WANDB_DIR": str(folder)}
    done = subprocess.run(
        [str(bin_dir / "wandb"), *args],
        cwd=folder, env=env, text=True, timeout=240,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return done.stdout


def without_distributions(config: dict[str, Any]) -> dict[str, Any]:
    """The sweep without what `wandb sweep` fills in for ranges and lists."""
    specs = config["parameters"].items()
    plain = {
        key: {name: v for name, v in spec.items() if name != "distribution"} for key, spec in specs
    }
    return {**config, "parameters": plain}


@pytest.mark.slow
def test_wandb_sweep_sends_every_shipped_file_as_it_is(tmp_path: Path) -> None:
    with Stub() as stub:
        for path in SWEEPS:
            printed = wandb(stub, tmp_path, "sweep", "--project", PROJECT, str(path))
            assert f"wandb agent {ENTITY}/{PROJECT}/{SWEEP}" in printed
    assert stub.unknown <= OPTIONAL
    for path, sent in zip(SWEEPS, stub.sweeps, strict=True):
        written = yaml.safe_load(path.read_text())
        assert without_distributions(sent) == without_distributions(written)


@pytest.mark.slow
def test_wandb_agent_runs_a_shipped_sweep_unchanged(project: Path) -> None:
    with Stub(num_trials=2) as stub:
        wandb(stub, project, "sweep", "--project", PROJECT, "sweeps/alpha_bayes.yaml")
        wandb(stub, project, "agent", f"{ENTITY}/{PROJECT}/{SWEEP}")
    assert stub.unknown <= OPTIONAL
    assert len(stub.runs) == 2
    alphas = set()
    for run_id, run in stub.runs.items():
        assert run.sweep == SWEEP
        assert run.exit_code == 0
        assert {key: run.config[key]["value"] for key in run.params} == run.params
        folder = project / "runs" / "alpha_eval" / run_id
        (logged,) = read_history(folder / "logs" / "metrics.csv", METRIC)
        assert run.summary[METRIC] == pytest.approx(logged)
        assert [row[METRIC] for row in run.history if METRIC in row] == [run.summary[METRIC]]
        figures = [name for name, data in run.files.items() if data[:4] == b"\x89PNG"]
        assert any("alignment/neurons" in name for name in figures)
        assert any("report" in name and name.endswith(".html") for name in run.files)
        assert f"run-{run_id}-plangroups" in {name.rpartition("-")[0] for name in stub.artifacts}
        assert b"calibration prompts" in run.files["output.log"]
        alphas.add((folder / "alphas.json").read_text().partition("provenance")[0])
    assert len(alphas) == 2
