"""A stop that reaches the first process alone ends all of them."""

import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from test_training import start_fit

from lmerge.history import read_history


def start_two(tiny_dir: Path, run_dir: Path) -> subprocess.Popen[bytes]:
    """Start a long fit on two processes with DDP, and wait until it trains."""
    long = ("--trainer.max_steps=100000", "--trainer.max_epochs=100000", "--model.num_positions=8")
    two = ("--trainer.strategy=ddp", "--trainer.devices=2", "--data.batch_size=1")
    process = start_fit(tiny_dir, run_dir, *long, *two)
    deadline = time.monotonic() + 240
    while not read_history(run_dir / "logs" / "metrics.csv", "train/loss"):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.1)
    return process


@pytest.mark.slow
def test_a_stop_of_the_first_process_ends_both(tiny_dir: Path, tmp_path: Path) -> None:
    process = start_two(tiny_dir, tmp_path / "run")
    both = [psutil.Process(process.pid), *psutil.Process(process.pid).children()]
    assert len(both) == 2
    process.send_signal(signal.SIGTERM)
    _, alive = psutil.wait_procs(both, timeout=60)
    for left in alive:
        left.kill()
    assert alive == []
