"""What a report knows of a run: its artefacts, each None or empty where the run has none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from lmerge.alpha_files import read_alphas
from lmerge.alphas import Alphas
from lmerge.diff import Stage
from lmerge.files import one_line, read_json
from lmerge.history import Series, read_series
from lmerge.plan import Group, MergePlan
from lmerge.results import SCHEMA, restored
from lmerge.runs import read_plan
from lmerge.search import Candidate

STUDY = "similarity.json"


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """A run folder as plain data."""

    name: str
    """What the run is called on the page; no other run of the page has it."""
    run_dir: Path
    """The folder."""
    plan: MergePlan
    """Which layers became one."""
    config_text: str = ""
    """config.yaml as it stands; empty without one."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """The same, parsed."""
    alphas: Sequence[Alphas] | None = None
    """Alphas of each group; None before they exist."""
    stages: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Results of `validate` and `test`."""
    similarity: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    """Measure -> `domain/language` -> (L, L)."""
    alignment: Mapping[str, Any] = field(default_factory=dict)
    """What alignment/similarity.json holds."""
    series: Mapping[str, Series] = field(default_factory=dict)
    """What the fit logged, by metric."""
    candidates: Sequence[Candidate] = ()
    """What each plan cost that a search tried."""

    @property
    def source(self) -> str:
        """The source as it was given, without the folders it lies in."""
        named = [results["source"] for results in self.stages.values() if "source" in results]
        given = self.config.get("model", {}).get("source") or (named or ["the source"])[0]
        path = Path(str(given))
        return path.name if path.is_absolute() or path.exists() else str(given)


def read_record(run_dir: Path, name: str, study: Path | None = None) -> RunRecord:
    """Read a run folder, finished or not.

    Args:
        run_dir: The folder.
        name: What the run is called on the page.
        study: Folder of `lmerge similarity` whose matrices are shown beside the run's own.

    Raises:
        ValueError: One line when it holds no plan.json, or a file in it is damaged.
    """
    if not (run_dir / "plan.json").is_file():
        raise ValueError(
            f"run folder {run_dir} holds no plan.json. Run `lmerge fit` first, or give the folder "
            "of a run."
        )
    plan, text = read_plan(run_dir / "plan.json"), _text(run_dir / "config.yaml")
    alphas_path = run_dir / "alphas.json"
    metrics = _optional(run_dir / "metrics.json")
    folders = [run_dir / "similarity", *([study] if study else [])]
    return RunRecord(
        name=name,
        run_dir=run_dir,
        plan=plan,
        config_text=text,
        config=_parsed(run_dir / "config.yaml", text),
        alphas=read_alphas(alphas_path, plan) if alphas_path.is_file() else None,
        stages={name: _results(data) for name, data in metrics.items()},
        similarity={m: found for folder in folders for m, found in read_similarity(folder).items()},
        alignment=_optional(run_dir / "alignment" / STUDY),
        series=read_series(run_dir),
        candidates=_candidates(_optional(run_dir / "plan" / "search.json")),
    )


def read_similarity(folder: Path) -> dict[str, dict[str, Tensor]]:
    """Return the matrices of a run's or a study's folder: measure -> `domain/language` -> (L, L).

    Raises:
        ValueError: One line when a matrix is missing or damaged.
    """
    data = _optional(folder / STUDY)
    if "matrices" in data:  # of a fit
        paths = {name: folder / f"{name.replace('/', '_')}.npy" for name in data["matrices"]}
        return {data["measure"]: {name: _matrix(path) for name, path in paths.items()}}
    return {
        measure: {
            name: _matrix(folder / measure / f"{name.replace('/', '-')}.npy")
            for name in data["num_prompts"]
        }
        for measure in data.get("undefined_cells", ())
    }


def _matrix(path: Path) -> Tensor:
    try:
        matrix_LL = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(
            f"{path} must be a matrix in NumPy's format, got: {one_line(error)}. Make it again."
        ) from error
    return torch.from_numpy(matrix_LL)


def choose_stage(records: Sequence[RunRecord], stage: Stage | None) -> Stage:
    """Return the stage that is shown: `test` where all runs have it, else `validate`."""
    return stage or ("test" if all("test" in record.stages for record in records) else "validate")


def unique_names(run_dirs: Sequence[Path]) -> list[str]:
    """Return the shortest end of each path, at least one part, that tells the runs apart."""
    parts = [run_dir.absolute().parts for run_dir in run_dirs]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{run_dir} ({i + 1})" for i, run_dir in enumerate(run_dirs)]


def _results(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the results of a stage, in which only a measured null is no number."""
    options = {name: data[name] for name in ("settings", "seeds", "provenance") if name in data}
    return {**restored(data), **options}


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path, schema=SCHEMA) if path.is_file() else {}


def _candidates(data: Mapping[str, Any]) -> list[Candidate]:
    return [
        Candidate(tuple(Group(members=tuple(g), anchor=g[0]) for g in found["groups"]), found["kl"])
        for found in data.get("candidates", ())
        if "groups" in found  # an earlier version wrote other keys
    ]


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _parsed(path: Path, text: str) -> dict[str, Any]:
    try:
        found = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ValueError(
            f"{path} must be valid YAML, got: {one_line(error)}. Correct it."
        ) from None
    return found if isinstance(found, dict) else {}
