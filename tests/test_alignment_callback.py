import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_run import SMALL, fit, run

from lmerge import alignment, alignment_jobs
from lmerge.llama import MATRICES
from lmerge.runs import read_orders
from lmerge.symmetry import Transform

METHOD = "--alignment.method"


def test_a_second_run_with_the_same_key_does_not_solve_again(
    tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit(tiny_dir, tmp_path / "run")
    wanted = read_orders(tmp_path / "run" / "orders.safetensors")
    assert all(isinstance(motion, Transform) for motion in wanted.values())
    assert len(list((tmp_path / "run" / "alignment_cache").glob("*.safetensors"))) == 1

    def refuse(*_args: object, **_options: object) -> None:
        raise AssertionError("solved again")

    monkeypatch.setattr(alignment, "align_tasks", refuse)
    fit(tiny_dir, tmp_path / "run", "--overwrite=true")
    found = read_orders(tmp_path / "run" / "orders.safetensors")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[i].neuron_F, wanted[i].neuron_F) for i in wanted)  # type: ignore[union-attr]


def test_an_alignment_that_was_killed_goes_on_with_the_layers_that_are_left(
    tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--model.num_removed=2", "--model.plan_method=block", "--evaluate_after=false")
    fit(tiny_dir, tmp_path / "whole", *options)
    solve, layers = alignment_jobs.solve, []

    def killed(task: alignment_jobs.Task, method: alignment_jobs.Method) -> object:
        if layers:
            raise SystemError  # nobody else raises it
        layers.extend(i for i in task.layers if i != task.anchor)
        return solve(task, method)

    monkeypatch.setattr(alignment_jobs, "solve", killed)
    with pytest.raises(SystemError):
        fit(tiny_dir, tmp_path / "cut", *options)
    first = layers.copy()
    monkeypatch.setattr(
        alignment_jobs,
        "solve",
        lambda task, method: layers.extend(task.layers) or solve(task, method),
    )
    fit(tiny_dir, tmp_path / "cut", *options, "--overwrite=true")
    assert first[0] not in layers[1:]
    assert len(layers) == 2
    wanted, found = (
        read_orders(tmp_path / name / "orders.safetensors") for name in ("whole", "cut")
    )
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[i].neuron_F, wanted[i].neuron_F) for i in wanted)  # type: ignore[union-attr]
    assert not list((tmp_path / "cut" / "alignment_cache").glob("*.parts"))


@pytest.mark.parametrize("method", ["both", "full", "soft", "rowwise"])
def test_every_aligner_runs_from_fit_to_validate(
    tiny_dir: Path, tmp_path: Path, method: str
) -> None:
    folder = tmp_path / "run"
    fit(tiny_dir, folder, f"{METHOD}={method}")
    assert (folder / "alignment" / "matrices.png").is_file()
    run("validate", "--config", folder / "config.yaml")


def test_similarity_before_and_after_is_logged_for_each_matrix(
    tiny_dir: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    fit(tiny_dir, folder, f"{METHOD}=full", "--evaluate_after=false", "--export.enabled=false")
    with open(folder / "logs" / "metrics.csv", newline="") as file:
        row = next(r for r in csv.DictReader(file) if r["alignment/before/q_proj"])
    saved = json.loads((folder / "alignment" / "similarity.json").read_text())
    for when in ("before", "after"):
        for name in MATRICES:
            cosines = [layer[name] for layer in saved[when].values()]
            wanted = sum(cosines) / len(cosines)
            assert float(row[f"alignment/{when}/{name}"]) == pytest.approx(wanted, abs=1e-6)
    neurons = [float(row[f"alignment/{when}/neurons"]) for when in ("before", "after")]
    assert neurons[1] > neurons[0]


@pytest.mark.parametrize(
    ("option", "rule"),
    [
        ("num_jobs=0", "`alignment.num_jobs` must be at least 1"),
        ("num_blocks=0", "`alignment.num_blocks` must be at least 1"),
        ("temperature=0", "`temperature` must be above 0"),
    ],
)
def test_options_of_the_alignment_are_checked_before_any_work(
    option: str, rule: str, tiny_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        fit(tiny_dir, tmp_path / "run", f"--alignment.{option}")
    assert rule in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_soft_alignment_asks_for_its_package_before_any_work(
    tiny_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "ot", None)
    with pytest.raises(SystemExit):
        fit(tiny_dir, tmp_path / "run", f"{METHOD}=soft")
    assert "pip install POT" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_another_temperature_is_another_alignment(tiny_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("ot")
    fast = ("--evaluate_after=false", "--export.enabled=false", f"{METHOD}=soft")
    for temperature in (0.1, 0.2):
        chosen = f"--alignment.temperature={temperature}"
        fit(tiny_dir, tmp_path / "run", "--overwrite=true", chosen, *fast)
    assert len(list((tmp_path / "run" / "alignment_cache").glob("*.safetensors"))) == 2


def notes_of_two_processes(tiny_dir: Path, run_dir: Path, *args: str) -> list[dict[str, Any]]:
    """Fit with two processes, and return what each noted of its alignment."""
    script = Path(__file__).with_name("noted_alignment.py")
    notes = run_dir.with_name("notes")
    notes.mkdir(exist_ok=True)
    two = ("--trainer.strategy=ddp", "--trainer.devices=2", f"{METHOD}=full")
    options = ("fit", f"--model.source={tiny_dir}", f"--run_dir={run_dir}", *SMALL, *two, *args)
    rest = ("--gate.enforce=false", "--evaluate_after=false", "--export.enabled=false")
    environment = {**os.environ, "ALIGNMENT_NOTES": str(notes), "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, str(script), *options, *rest], check=True, env=environment, timeout=180
    )
    return [json.loads((notes / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.slow
def test_with_two_processes_one_solves_both_agree_and_the_next_run_reads(
    tiny_dir: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    first, second = notes_of_two_processes(tiny_dir, folder)
    assert (first["solved"], second["solved"]) == (True, False)
    assert first["orders"] == second["orders"] != {}
    assert first["merged"] == second["merged"]
    assert len(list((folder / "alignment_cache").glob("*.safetensors"))) == 1
    for name in ("neurons.png", "matrices.png", "similarity.json"):
        assert (folder / "alignment" / name).is_file()
    again = notes_of_two_processes(tiny_dir, folder, "--overwrite=true")
    assert [note["solved"] for note in again] == [False, False]
    assert again[0]["orders"] == again[1]["orders"] == first["orders"]

    fit(tiny_dir, tmp_path / "one", f"{METHOD}=full", "--evaluate_after=false")
    alone = read_orders(tmp_path / "one" / "orders.safetensors")
    assert sorted(map(str, alone)) == sorted(first["orders"])
    for i, motion in alone.items():
        assert isinstance(motion, Transform)
        assert motion.neuron_F.tolist() == first["orders"][str(i)]["neuron_F"]
