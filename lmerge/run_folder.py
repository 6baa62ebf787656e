"""The run folder at the start of a fit: whether it may be made, and what an older run left."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from lightning.fabric.utilities.rank_zero import rank_zero_only

from lmerge.folders import check_apart
from lmerge.source import resolve_source

OWN_FILES = (
    "config.yaml",
    "plan.json",
    "plan",
    "orders.safetensors",
    "alphas.json",
    "repair.safetensors",
    "metrics.json",
    "report.html",
    "similarity",
    "alignment",
    "checkpoints",
    "logs",
    "model",
    "cache",
    "journal",
)
"""What a run leaves in its folder; a new run in the same folder starts by removing it."""


@rank_zero_only
def prepare_run_dir(run_dir: Path, *, overwrite: bool) -> None:
    """Check that a run folder can be made.

    Raises:
        ValueError: When it exists and may not be replaced, or cannot be written.
    """
    parent = next(p for p in (run_dir, *run_dir.parents) if p.exists() or p == run_dir.parents[-1])
    dead_link = run_dir.is_symlink() and not run_dir.exists()
    if dead_link or not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ValueError(
            f"`--run_dir` must lie in a folder that can be written, got {run_dir}. "
            "Choose another folder."
        )
    if run_dir.exists() and any(run_dir.iterdir()) and not overwrite:
        raise ValueError(
            f"run folder {run_dir} exists already. Choose another `--run_dir`, replace it with "
            "`--overwrite=true`, or resume with `--ckpt_path`."
        )


@rank_zero_only
def remove_run(run_dir: Path, source: str) -> None:
    """Delete the artefacts of an earlier run, and nothing that lmerge did not write.

    Raises:
        ValueError: When the source lies in one of them; nothing is deleted then.
    """
    origin = resolve_source(source)
    if isinstance(origin, Path):
        for name in OWN_FILES:
            check_apart(run_dir / name, origin)
    for name in OWN_FILES:
        path = run_dir / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
