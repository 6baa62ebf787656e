"""Layer similarity inside `fit`: the options and errors of `lmerge similarity`."""

import json
from pathlib import Path

import numpy as np
import pytest
from cli_run import fit

NPIB = ("--model.measure=npib", "--model.plan_method=block", "--data.max_questions=null")
FAST = ("--evaluate_after=false", "--trainer.max_steps=1", "--alignment.method=none")


def test_a_fit_takes_the_options_of_the_measures_of_information(
    tiny_dir: Path, tmp_path: Path
) -> None:
    options = ("--model.information.entropy_neighbors=5", "--model.information.sigma=0")
    fit(tiny_dir, tmp_path / "run", *FAST, *NPIB, *options)
    data = json.loads((tmp_path / "run" / "similarity" / "similarity.json").read_text())
    assert data["information"] == {
        "sigma": 0.0,
        "num_neighbors": 5,
        "entropy_neighbors": 5,
        "seed": 0,
    }
    matrix = np.load(tmp_path / "run" / "similarity" / "all.npy", allow_pickle=False)
    assert np.isfinite(matrix).all()


def test_too_few_prompts_for_the_neighbours_end_a_fit_in_one_line(
    tiny_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        fit(tiny_dir, tmp_path / "run", *FAST, *NPIB)
    assert stop.value.code == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(errors) == 1
    assert "`npib` needs more than `entropy_neighbors` = 50 prompts" in errors[0]
