"""The pattern that docs/sweeps.md gives to other programs works as it is written there."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("sweeps")
ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "sweeps.md").read_text()


def block(language: str) -> str:
    """The page's only code block in a language, without its indentation."""
    (text,) = re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.S)
    return str(text)


@pytest.mark.slow
def test_the_page_sweeps_an_independent_lightning_cli(tmp_path: Path) -> None:
    (tmp_path / "cli.py").write_text(block("python"))
    (tmp_path / "sweep.yaml").write_text(block("yaml"))
    command = shlex.split(block("sh").replace("\\\n", " "))
    command[command.index("--count") + 1] = "2"
    assert command[0] == "lmerge"
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    args = [sys.executable, "-m", *command]
    done = subprocess.run(args, cwd=tmp_path, env=env, timeout=120, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    trials = json.loads((tmp_path / "runs" / "sweep" / "results.json").read_text())["trials"]
    assert [trial["state"] for trial in trials] == ["finished", "finished"]
    assert all(len(trial["history"]) == 3 for trial in trials)
    assert trials[0]["params"] != trials[1]["params"]
