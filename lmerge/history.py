"""What a fit logged: the columns of Lightning's metrics.csv."""

from __future__ import annotations

import csv
import math
from pathlib import Path

Series = list[tuple[int, float]]
"""(step, value) of one logged metric, in order."""


def read_history(path: Path, name: str) -> list[float]:
    """Return the values of a column of Lightning's metrics.csv, without the empty cells."""
    return [float(row[name]) for row in _rows(path) if row.get(name)]


def read_series(run_dir: Path) -> dict[str, Series]:
    """Return every finite value that a run's fits logged, by metric; a resumed fit adds to it."""
    found: dict[str, Series] = {}
    folders = [run_dir / "logs", *sorted(run_dir.glob("logs-*"), key=_number)]
    for row in (row for folder in folders for row in _rows(folder / "metrics.csv")):
        for name, value in row.items():
            if name not in ("step", "epoch") and value and math.isfinite(float(value)):
                found.setdefault(name, []).append((int(row["step"]), float(value)))
    return found


def _number(folder: Path) -> int:
    digits = folder.name.removeprefix("logs-")
    return int(digits) if digits.isdecimal() else 0


def _rows(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]  # the last row may be half written
    return list(csv.DictReader(whole.splitlines()))
