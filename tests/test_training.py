"""Training of alphas: mixed precision, accumulation, stopping, resuming, many processes."""

import csv
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cli_run import SMALL, fit, run
from torch import Tensor

from lmerge.runs import read_alphas, read_plan

FAST = ("--evaluate_after=false", "--export.enabled=false", "--repair.config.method=none")


def alphas(run_dir: Path) -> list[Tensor]:
    (group,) = read_alphas(run_dir / "alphas.json", read_plan(run_dir / "plan.json"))
    return list(group.values())


def largest_difference(left: Path, right: Path) -> float:
    pairs = zip(alphas(left), alphas(right), strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)


@pytest.mark.parametrize("weights", [(0, 1, 0), (0, 0, 1), (1, 0.5, 0.25)])
def test_the_sum_of_losses_is_logged_and_trains(
    weights: tuple[float, ...], tiny_dir: Path, tmp_path: Path
) -> None:
    options = [
        f"--model.loss.{name}={weight}"
        for name, weight in zip(("kl", "state", "answer"), weights, strict=True)
    ]
    fit(tiny_dir, tmp_path / "run", *FAST, *options)
    with open(tmp_path / "run" / "logs" / "metrics.csv", newline="") as file:
        row = next(r for r in csv.DictReader(file) if r.get("train/loss"))
    parts = [float(row.get(f"train/{n}") or 0) for n in ("kl", "state", "answer")]
    total = sum(weight * part for weight, part in zip(weights, parts, strict=True))
    assert float(row["train/loss"]) == pytest.approx(total, rel=1e-4)
    assert any((a[1:] != 0).any() for a in alphas(tmp_path / "run"))


def test_two_accumulated_batches_are_one_of_twice_the_size(tiny_dir: Path, tmp_path: Path) -> None:
    sgd = ("--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=0.5", *FAST)
    fit(tiny_dir, tmp_path / "one", *sgd, "--data.batch_size=4")
    accumulate = "--trainer.accumulate_grad_batches=2"
    fit(tiny_dir, tmp_path / "two", *sgd, "--data.batch_size=2", accumulate)
    assert largest_difference(tmp_path / "one", tmp_path / "two") < 1e-5


def test_training_works_in_mixed_precision(tiny_dir: Path, tmp_path: Path) -> None:
    fit(tiny_dir, tmp_path / "full", *FAST)
    fit(
        tiny_dir,
        tmp_path / "mixed",
        *FAST,
        "--trainer.precision=bf16-mixed",
        "--trainer.enable_model_summary=false",
    )
    assert all(a.isfinite().all() for a in alphas(tmp_path / "mixed"))
    assert largest_difference(tmp_path / "full", tmp_path / "mixed") < 0.01


def test_early_stopping_on_the_held_out_kl_stops(tiny_dir: Path, tmp_path: Path) -> None:
    stop = ("--trainer.callbacks=EarlyStopping", "--trainer.callbacks.monitor=val/kl/held-out")
    rest = ("--trainer.callbacks.min_delta=100", "--trainer.callbacks.patience=1")
    checks = ("--trainer.max_steps=40", "--trainer.val_check_interval=1")
    fit(tiny_dir, tmp_path / "run", *FAST, *checks, *stop, *rest)
    with open(tmp_path / "run" / "logs" / "metrics.csv", newline="") as file:
        assert len([r for r in csv.DictReader(file) if r.get("train/loss")]) < 10


def test_a_loss_that_is_not_finite_stops_at_once_and_keeps_the_last_good_alphas(
    tiny_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wild = ("--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=1e38")
    with pytest.raises(SystemExit) as stop:
        fit(tiny_dir, tmp_path / "run", *FAST, *wild, "--trainer.max_steps=30")
    assert stop.value.code == 2
    error = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(error) == 1
    assert "finite" in error[0]
    assert all(a.isfinite().all() for a in alphas(tmp_path / "run"))


@pytest.mark.parametrize("start", ["fixed", "mka", "similarity"])
def test_a_rule_that_is_not_trained_is_kept(start: str, tiny_dir: Path, tmp_path: Path) -> None:
    frozen = ("--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=0")
    layer = ("--model.alpha.granularity=layer", f"--model.alpha.start={start}")
    fit(tiny_dir, tmp_path / "rule", *FAST, *frozen, *layer)
    (share_G,) = alphas(tmp_path / "rule")
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


@pytest.mark.slow
def test_a_fit_killed_between_steps_and_resumed_learns_the_same_alphas_to_the_bit(
    tiny_dir: Path, tmp_path: Path
) -> None:
    every = ("--trainer.callbacks=ModelCheckpoint", "--trainer.callbacks.every_n_train_steps=1")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    saved = (
        "--trainer.callbacks.save_last=true",
        "--trainer.max_steps=40",
        "--model.num_positions=8",
    )
    fit(tiny_dir, whole, *FAST, "--trainer.max_steps=40", "--model.num_positions=8")
    where = f"--trainer.callbacks.dirpath={cut / 'checkpoints'}"
    with start_fit(tiny_dir, cut, *every, *saved, where) as process:
        deadline = time.monotonic() + 60
        while not (cut / "checkpoints" / "last.ckpt").is_file():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.kill()
    assert not (cut / "alphas.json").is_file()
    checkpoints = sorted((cut / "checkpoints").glob("*.ckpt"), key=lambda p: p.stat().st_mtime)
    run(
        "fit", "--config", cut / "config.yaml", f"--ckpt_path={checkpoints[-1]}", *FAST
    )  # fmt: skip
    assert largest_difference(whole, cut) == 0
