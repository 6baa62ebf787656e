"""What a sweep leaves behind: results.json, results.csv, and the table of its trials."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from lmerge.files import provenance, read_json, write_json, write_text
from lmerge.trials import SweepConfig, Trial, metric_name, short_names, sign
from lmerge.units import duration

SCHEMA = 1


def read_trials(path: Path, config: SweepConfig) -> list[Trial]:
    """Return the trials of an earlier call; none where there was none.

    Raises:
        ValueError: When they belong to another sweep.
    """
    if not path.is_file():
        return []
    data = read_json(path, schema=SCHEMA)
    if data.get("sweep") != json.loads(json.dumps(config)):
        raise ValueError(
            f"{path} holds the trials of another sweep. Choose another `--run_dir`, or remove it."
        )
    return [Trial(**trial) for trial in data["trials"]]


def write_results(folder: Path, config: SweepConfig, trials: Sequence[Trial]) -> None:
    """Write results.json and results.csv."""
    data = {"sweep": config, "trials": [t.as_dict() for t in trials], "provenance": provenance()}
    write_json(folder / "results.json", data, schema=SCHEMA)
    names = sorted({key for trial in trials for key in trial.params})
    lines = [["trial", "state", "seconds", metric_name(config), *names]]
    for trial in trials:
        values = [json.dumps(trial.params.get(name)) for name in names]
        metric = "" if trial.metric is None else repr(trial.metric)
        lines.append([str(trial.index), trial.state, f"{trial.seconds:.1f}", metric, *values])
    write_text(folder / "results.csv", "".join(",".join(map(_cell, line)) + "\n" for line in lines))


def _cell(value: str) -> str:
    return '"' + value.replace('"', '""') + '"' if set(value) & set(',"\n') else value


def results_table(config: SweepConfig, trials: Sequence[Trial], count: int, jobs: int) -> Table:
    """Return the trials, the best first, under a line that says how far the sweep is."""
    table = Table(title=_progress(trials, count, jobs), title_justify="left")
    for name in ("trial", metric_name(config), "state", "time", "values"):
        table.add_column(name)

    def rank(trial: Trial) -> float:
        failed = trial.metric is None or trial.state == "failed"
        return float("inf") if failed else sign(config) * float(trial.metric or 0)

    for trial in sorted(trials, key=rank)[:20]:
        metric = "" if trial.metric is None else f"{trial.metric:.6g}"
        short = short_names(trial.params)
        values = ", ".join(f"{short[key]} {_shown(v)}" for key, v in trial.params.items())
        table.add_row(str(trial.index), metric, trial.state, duration(trial.seconds), values)
    return table


def _shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _progress(trials: Sequence[Trial], count: int, jobs: int) -> str:
    ended = [trial for trial in trials if trial.state != "running"]
    text = f"{len(ended)} of {count} trials, the best first"
    left = max(0, count - len(ended))
    if not ended or not left:
        return text
    seconds = left / jobs * sum(trial.seconds for trial in ended) / len(ended)
    return f"{text}; at most {duration(seconds)} left"
