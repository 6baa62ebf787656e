"""One process and two give the same metrics through the program, to the bit."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_run import fit, run

pytestmark = pytest.mark.slow

# Seven questions and five blocks of text, one to a batch: neither can be shared out evenly.
UNEVEN = ("--data.domains=[clinical_knowledge]", "--data.max_questions=7", "--data.eval_tokens=1")
TWO = ("--trainer.strategy=ddp", "--trainer.devices=2", "--trainer.accelerator=cpu")


@pytest.fixture(scope="module")
def run_dir(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    text = folder / "mine.txt"
    text.write_text("The quick brown fox jumps over the lazy dog by the river. " * 5)
    options = (*UNEVEN, f"--data.eval_text={text}", "--evaluate_after=false")
    fit(tiny_dir, folder / "tiny", *options)
    return folder / "tiny"


def scores(run_dir: Path, stage: str) -> dict[str, Any]:
    """What a stage wrote, without the times."""
    found = json.loads((run_dir / "metrics.json").read_text())[stage]
    return {k: v for k, v in found.items() if k not in ("cost", "provenance")}


def in_two_processes(stage: str, run_dir: Path) -> None:
    command = [sys.executable, "-m", "lmerge", stage, "--config", str(run_dir / "config.yaml")]
    subprocess.run(
        [*command, "--gate.enforce=false", *TWO],
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        check=True,
        capture_output=True,
        timeout=240,
    )


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_two_processes_measure_what_one_measures(stage: str, run_dir: Path) -> None:
    run(stage, "--config", run_dir / "config.yaml")
    alone = scores(run_dir, stage)
    assert len(alone["questions"]) == 7
    assert len(alone["text"]["mine"]["merged"]["block_tokens"]) == 5
    (run_dir / "metrics.json").unlink()
    in_two_processes(stage, run_dir)
    assert scores(run_dir, stage) == alone
