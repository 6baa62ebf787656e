"""Training of alphas: mixed precision, accumulation, stopping, resuming, many processes."""

import contextlib
import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from cli_run import SMALL, fit, run
from torch import Tensor

from lmerge.alpha_files import read_alphas
from lmerge.checkpoints import read_checkpoint
from lmerge.runs import read_plan

FAST = ("--evaluate_after=false", "--export.enabled=false", "--repair.config.method=none")


SGD = ("--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=0.5")
WILD = ("--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=1e38")


def alphas(run_dir: Path) -> dict[str, Tensor]:
    (group,) = read_alphas(run_dir / "alphas.json", read_plan(run_dir / "plan.json"))
    return group


def largest_difference(left: Path, right: Path) -> float:
    found, other = alphas(left), alphas(right)
    assert found.keys() == other.keys()
    return max((found[name] - other[name]).abs().max().item() for name in found)


def moves(run_dir: Path) -> dict[str, float]:
    """How far each matrix's alphas are from the start, which is the anchor alone."""
    (group,) = read_plan(run_dir / "plan.json").groups
    found = {}
    for name, alpha in alphas(run_dir).items():
        assert alpha.isfinite().all()
        start = torch.zeros_like(alpha)
        start[group.anchor_position] = 1
        found[name] = (alpha - start).abs().max().item()
    return found


def column(run_dir: Path, name: str) -> list[float]:
    """The values that a fit logged under a name."""
    with open(run_dir / "logs" / "metrics.csv", newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


def error_of(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    """The one line with which a fit ends."""
    with pytest.raises(SystemExit) as stop:
        fit(*args)  # type: ignore[arg-type]
    assert stop.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize("weights", [(0, 1, 0), (0, 0, 1), (1, 0.5, 0.25)])
def test_the_sum_of_losses_is_logged_and_moves_every_matrix(
    weights: tuple[float, ...], tiny_dir: Path, tmp_path: Path
) -> None:
    options = [
        f"--model.loss.{name}={weight}"
        for name, weight in zip(("kl", "state", "answer"), weights, strict=True)
    ]
    fit(tiny_dir, tmp_path / "run", *FAST, *options)
    total = sum(
        weight * column(tmp_path / "run", f"train/{name}")[0]
        for name, weight in zip(("kl", "state", "answer"), weights, strict=True)
        if weight
    )
    assert column(tmp_path / "run", "train/loss")[0] == pytest.approx(total, rel=1e-4)
    # Adam's first steps are as long as the learning rate, 0.001, wherever there is a gradient.
    assert all(0.0005 < moved < 0.0035 for moved in moves(tmp_path / "run").values())


@pytest.mark.parametrize("granularity", ["layer", "neuron"])
def test_every_step_on_all_blocks_lowers_the_loss(
    granularity: str, tiny_dir: Path, tmp_path: Path
) -> None:
    whole = ("--data.batch_size=16", "--model.num_positions=0", "--trainer.max_epochs=6")
    steps = ("--trainer.max_steps=6", "--model.optimizer=torch.optim.SGD")
    rate, grain = "--model.optimizer.lr=0.02", f"--model.alpha.granularity={granularity}"
    fit(tiny_dir, tmp_path / "run", *FAST, *whole, *steps, rate, grain)
    losses = column(tmp_path / "run", "train/loss")
    assert len(losses) == 6
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 1e-5


def test_two_accumulated_batches_are_one_of_twice_the_size(tiny_dir: Path, tmp_path: Path) -> None:
    fit(tiny_dir, tmp_path / "one", *FAST, *SGD, "--data.batch_size=4")
    accumulate = "--trainer.accumulate_grad_batches=2"
    fit(tiny_dir, tmp_path / "two", *FAST, *SGD, "--data.batch_size=2", accumulate)
    assert largest_difference(tmp_path / "one", tmp_path / "two") < 1e-5
    assert min(moves(tmp_path / "one").values()) > 1e-3


def test_training_works_in_mixed_precision(tiny_dir: Path, tmp_path: Path) -> None:
    fit(tiny_dir, tmp_path / "full", *FAST, *SGD)
    mixed = ("--trainer.precision=bf16-mixed", "--trainer.enable_model_summary=false")
    fit(tiny_dir, tmp_path / "mixed", *FAST, *SGD, *mixed)
    moved = moves(tmp_path / "full")
    for name, alpha in alphas(tmp_path / "mixed").items():
        difference = (alpha - alphas(tmp_path / "full")[name]).abs().max().item()
        assert 0 < difference < 0.1 * moved[name]  # 16 bits were used, and were enough


def test_early_stopping_on_the_held_out_kl_stops(tiny_dir: Path, tmp_path: Path) -> None:
    stop = ("--trainer.callbacks=EarlyStopping", "--trainer.callbacks.monitor=val/kl/held-out")
    rest = ("--trainer.callbacks.min_delta=100", "--trainer.callbacks.patience=2")
    # Lightning takes an interval of 1 for once an epoch, and would then look at epochs' ends alone.
    checks = ("--trainer.max_epochs=20", "--trainer.max_steps=40", "--trainer.val_check_interval=2")
    fit(tiny_dir, tmp_path / "run", *FAST, *checks, *stop, *rest)
    # The first value is the best so far; the next two are not better by 100.
    assert len(column(tmp_path / "run", "val/kl/held-out")) == 3
    assert len(column(tmp_path / "run", "train/loss")) == 6


def test_a_loss_that_is_not_finite_stops_at_once_and_keeps_the_last_good_alphas(
    tiny_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    error = error_of(capsys, tiny_dir, run_dir, *FAST, *WILD, "--trainer.max_steps=30")
    assert "the loss must be finite" in error
    assert "in step 1" in error
    assert set(moves(run_dir).values()) == {0.0}  # those of step 0, the only finite one


def test_alphas_that_are_not_finite_after_the_last_step_are_not_kept(
    tiny_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wild = (*WILD, "--model.loss.kl=1e12", "--trainer.max_steps=1")
    assert "NaN or infinite" in error_of(capsys, tiny_dir, tmp_path / "run", *FAST, *wild)
    assert set(moves(tmp_path / "run").values()) == {0.0}


BAD_ALPHAS = {
    "missing": (None, "must be a JSON file"),
    "no JSON": ("[", "must be a JSON file"),
    "no groups": ('{"schema": 1}', "`groups`"),
    "no list of merges": ("[1]", "each merge needs"),
    "no merges": ("[]", "at least one merge"),
    "not of this model": (
        '[{"layer_to_merge_into": 8, "layer_to_remove": 9, "ratio_i_alpha": 0.5}]',
        "layers",
    ),
    "not finite": (
        '{"schema": 1, "groups": [{"members": [1, 2], "anchor": 1, '
        '"alphas": {"layer": [1e999, 0.5]}}]}',
        "finite",
    ),
    "too many members": (
        '{"schema": 1, "groups": [{"members": [1, 2], "anchor": 1, '
        '"alphas": {"layer": [0.5, 0.2, 0.3]}}]}',
        "members",
    ),
}


@pytest.mark.parametrize("name", BAD_ALPHAS)
def test_a_bad_file_of_alphas_is_refused_before_there_is_a_run_folder(
    name: str, tiny_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content, message = BAD_ALPHAS[name]
    path = tmp_path / "alphas.json"
    if content is not None:
        path.write_text(content)
    start = ("--model.alpha.start=file", f"--model.alpha.path={path}")
    error = error_of(capsys, tiny_dir, tmp_path / "run", *FAST, *start)
    assert message in error
    assert "alphas.json" in error
    assert not (tmp_path / "run").exists()


def test_alphas_finer_than_the_granularity_are_refused_before_there_is_a_run_folder(
    tiny_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(tiny_dir, tmp_path / "fine", *FAST)
    capsys.readouterr()
    start = ("--model.alpha.start=file", f"--model.alpha.path={tmp_path / 'fine' / 'alphas.json'}")
    error = error_of(
        capsys, tiny_dir, tmp_path / "run", *FAST, *start, "--model.alpha.granularity=layer"
    )
    assert "`alpha.granularity`" in error
    assert not (tmp_path / "run").exists()


def test_a_published_list_of_merges_is_a_plan_and_its_alphas(
    tiny_dir: Path, tmp_path: Path
) -> None:
    merges = [(2, 3, 0.25), (1, 2, 0.5)]
    keys = ("layer_to_merge_into", "layer_to_remove", "ratio_i_alpha")
    path = tmp_path / "published.json"
    path.write_text(json.dumps([dict(zip(keys, merge, strict=True)) for merge in merges]))
    start = ("--model.alpha.start=file", f"--model.alpha.path={path}", "--trainer.max_steps=0")
    fit(tiny_dir, tmp_path / "run", *FAST, *start, "--model.alpha.granularity=layer")
    (group,) = read_plan(tmp_path / "run" / "plan.json").groups
    assert (group.members, group.anchor) == ((1, 2, 3), 1)
    assert alphas(tmp_path / "run")["layer"].tolist() == [0.5, 0.125, 0.375]


@pytest.mark.parametrize("start", ["fixed", "mka", "similarity"])
def test_a_rule_that_is_not_trained_is_kept(start: str, tiny_dir: Path, tmp_path: Path) -> None:
    frozen = ("--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=0")
    layer = ("--model.alpha.granularity=layer", f"--model.alpha.start={start}")
    fit(tiny_dir, tmp_path / "rule", *FAST, *frozen, *layer)
    (share_G,) = alphas(tmp_path / "rule").values()
    assert share_G.sum().item() == pytest.approx(1, abs=1e-6)
    assert 0 < share_G[0] < 1
    again = ("--model.alpha.start=file", f"--model.alpha.path={tmp_path / 'rule' / 'alphas.json'}")
    fit(
        tiny_dir, tmp_path / "file", *FAST, *frozen, *again, "--model.alpha.granularity=layer",
        f"--model.plan={tmp_path / 'rule' / 'plan.json'}",
    )  # fmt: skip
    assert largest_difference(tmp_path / "rule", tmp_path / "file") == 0


def start_fit(source: Path, run_dir: Path, *args: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "lmerge", "fit"]
    command += [f"--model.source={source}", f"--run_dir={run_dir}", *SMALL, *FAST, *args]
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})


def whole_checkpoint(folder: Path) -> Path:
    """The newest checkpoint that a kill did not cut off."""
    for path in sorted(folder.glob("*.ckpt"), key=lambda p: p.stat().st_mtime, reverse=True):
        with contextlib.suppress(ValueError):
            read_checkpoint(path)
            return path
    raise AssertionError("no checkpoint is whole")


@pytest.mark.slow
@pytest.mark.parametrize("num_positions", [8, 0])
def test_a_fit_killed_between_steps_and_resumed_learns_the_same_alphas_to_the_bit(
    num_positions: int, tiny_dir: Path, tmp_path: Path
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    steps = ("--trainer.max_steps=40", "--trainer.max_epochs=10")
    steps += (f"--model.num_positions={num_positions}",)
    fit(tiny_dir, whole, *FAST, *steps)
    saved = ("--trainer.callbacks=ModelCheckpoint", "--trainer.callbacks.every_n_train_steps=1")
    saved += ("--trainer.callbacks.save_last=true",)
    where = f"--trainer.callbacks.dirpath={cut / 'checkpoints'}"
    with start_fit(tiny_dir, cut, *saved, *steps, where) as process:
        deadline = time.monotonic() + 60
        while not (cut / "checkpoints" / "last.ckpt").is_file():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.kill()
    assert not (cut / "alphas.json").is_file()
    checkpoint = whole_checkpoint(cut / "checkpoints")
    run("fit", "--config", cut / "config.yaml", f"--ckpt_path={checkpoint}", *FAST)
    assert min(moves(whole).values()) > 0.01
    assert largest_difference(whole, cut) == 0
