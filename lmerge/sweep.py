"""`lmerge sweep`: the trials of a W&B sweep file without a server, each a `lmerge fit`."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from rich.console import Console
from rich.table import Table

from lmerge.figures import save
from lmerge.files import provenance, read_json, write_json, write_text
from lmerge.sweep_figures import best_so_far_figure, importance_figure, parallel_figure
from lmerge.trials import (
    ENGINES,
    Engine,
    SweepConfig,
    Trial,
    best_value,
    metric_name,
    read_sweep,
    sign,
    to_stop,
)

SCHEMA = 1
POLL_SECONDS = 0.5
PLAN_OPTIONS = (
    "data.",
    "model.plan",
    "model.num_removed",
    "model.measure",
    "model.information",
    "model.pooling",
    "model.source",
    "model.dtype",
    "seed_everything",
)
"""Options that a plan depends on; where one is swept, the trials cannot share a plan."""


def sweep(
    path: str,
    *,
    count: int = 20,
    jobs: int = 1,
    engine: Engine = "wandb",
    run_dir: str = "runs/sweep",
    seed: int = 0,
) -> None:
    """Run a W&B sweep file without a server; a second call goes on where the first was stopped.

    Args:
        path: The sweep file, as `wandb sweep` takes it.
        count: Trials in all, failed ones too; at least 1. A grid may end before.
        jobs: Trials that run at once; at least 1.
        engine: `wandb` is W&B's own engine; `optuna` reads the same file.
        run_dir: Folder of the results and of the trials' run folders.
        seed: Seed of the proposed values.
    """
    for name, value in (("count", count), ("jobs", jobs)):
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")
    folder, options = Path(run_dir), read_sweep(Path(path))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / "sweep.lock", timeout=0):
            runner = Runner(options, folder, engine, seed)
            runner.run(count, jobs)
    except Timeout as error:
        raise ValueError(
            f"another `lmerge sweep` runs in {folder}. Choose another `--run_dir`."
        ) from error


class Runner:
    """Starts trials, watches them, and keeps results.json up to date.

    Args:
        config: The sweep.
        folder: Folder of the results.
        engine: Who proposes values.
        seed: Seed of the proposals.
    """

    def __init__(self, config: SweepConfig, folder: Path, engine: Engine, seed: int) -> None:
        self.config, self.folder, self.engine, self.seed = config, folder, engine, seed
        self.trials = read_trials(folder / "results.json", config)
        self.running: dict[int, subprocess.Popen[bytes]] = {}
        self.started: dict[int, float] = {}
        self.console = Console()

    def run(self, count: int, jobs: int) -> None:
        """Run trials until there are `count`; the processes end with this one, or by its error."""
        redo = [trial for trial in self.trials if trial.state == "running"]
        more = True
        try:
            while redo or self.running or (more and len(self.trials) < count):
                free = len(self.running) < jobs and self._may_start()
                if free and redo:
                    self._restart(redo.pop(0))
                elif free and more and len(self.trials) < count:
                    more = self._propose()
                else:
                    self._poll()
                    time.sleep(POLL_SECONDS)
        finally:
            for process in self.running.values():
                process.kill()
        self._report(count)

    def _may_start(self) -> bool:
        """Let the others wait for the first trial's plan, where all share it."""
        return not self.running or not shares_plan(self.config) or self._plan() is not None

    def _plan(self) -> Path | None:
        paths = [self.folder / trial.folder / "plan.json" for trial in self.trials]
        return next((path for path in paths if path.is_file()), None)

    def _propose(self) -> bool:
        params = ENGINES[self.engine](self.config, self.trials, self.seed)
        if params is None:
            return False
        index = len(self.trials)
        self.trials.append(Trial(index=index, params=params, folder=f"trial-{index:03d}"))
        self._start(self.trials[-1])
        return True

    def _restart(self, trial: Trial) -> None:
        # A new folder: the process of a killed sweep may still write into the old one.
        trial.folder += "-again"
        self._start(trial)

    def _start(self, trial: Trial) -> None:
        run_dir = self.folder / trial.folder
        args = trial_command(self.config, trial.params)
        args += [f"--run_dir={run_dir}", "--overwrite=true", "--wandb=disabled"]
        if "--model.cache_dir" not in " ".join(args):
            args.append(f"--model.cache_dir={self.folder / 'cache'}")
        plan = self._plan()
        if plan is not None and shares_plan(self.config) and "--model.plan=" not in " ".join(args):
            args.append(f"--model.plan={plan}")
        write_results(self.folder, self.config, self.trials)
        with open(self.folder / f"{trial.folder}.log", "wb") as log:
            self.running[trial.index] = subprocess.Popen(
                [sys.executable, "-m", "lmerge", *args],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "WANDB_MODE": "disabled"},
            )
        self.started[trial.index] = time.monotonic()

    def _poll(self) -> None:
        for index, process in list(self.running.items()):
            trial = self.trials[index]
            ended = process.poll() is not None
            csv_path = self.folder / trial.folder / "logs" / "metrics.csv"
            trial.history = read_history(csv_path, metric_name(self.config))
            trial.metric = best_value(self.config, trial.history)
            trial.seconds = time.monotonic() - self.started[index]
            if ended:
                self._finish(trial, process.returncode)
        for index in to_stop(self.config, self.trials):
            if index in self.running:
                self.running[index].kill()
                self.running[index].wait()
                self._finish(self.trials[index], 0, stopped=True)

    def _finish(self, trial: Trial, code: int, *, stopped: bool = False) -> None:
        del self.running[trial.index]
        trial.state = "stopped" if stopped else "finished"
        if code or trial.metric is None:
            trial.state = "failed"
            log = (self.folder / f"{trial.folder}.log").read_text(errors="replace").strip()
            last = log.splitlines()[-1] if log else ""
            missing = f"logged no finite {metric_name(self.config)}"
            trial.error = (last or f"exit code {code}") if code else missing
        write_results(self.folder, self.config, self.trials)
        shown = trial.error if trial.state == "failed" else f"{trial.metric:.6g}"
        self.console.print(
            f"trial {trial.index} {trial.state} in {trial.seconds:.0f} s: {shown}", markup=False
        )

    def _report(self, count: int) -> None:
        write_results(self.folder, self.config, self.trials)
        self.console.print(results_table(self.config, self.trials))
        done = [t for t in self.trials if t.metric is not None and t.state != "failed"]
        if not done:
            raise ValueError(
                f"none of the {len(self.trials)} trials succeeded: {self.trials[-1].error} "
                f"See the .log files in {self.folder}."
            )
        name, minimise = metric_name(self.config), sign(self.config) > 0
        save(best_so_far_figure(done, name, minimise=minimise), self.folder / "best_so_far.png")
        save(parallel_figure(done, name), self.folder / "parallel.png")
        save(importance_figure(done, name), self.folder / "importance.png")


def shares_plan(config: SweepConfig) -> bool:
    """Return whether no swept option changes the plan."""
    return not any(key.startswith(PLAN_OPTIONS) for key in config["parameters"])


def trial_command(config: SweepConfig, params: dict[str, Any]) -> list[str]:
    """Return the arguments after `lmerge` of a trial, from the file's `command`."""
    args = [f"--{key}={_option(value)}" for key, value in params.items()]
    command = config.get("command", ["${env}", "${interpreter}", "${program}", "fit", "${args}"])
    found: list[str] = []
    for part in command:
        if part == "${args}":
            found += args
        elif part not in ("${env}", "${interpreter}", "${program}"):
            found.append(str(part))
    return found


def _option(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def read_history(path: Path, name: str) -> list[float]:
    """Return the values of a column of Lightning's metrics.csv, without the empty cells."""
    if not path.is_file():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        rows = [row.get(name) for row in csv.DictReader(file)]
    return [float(value) for value in rows if value]


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


def results_table(config: SweepConfig, trials: Sequence[Trial]) -> Table:
    """Return the trials, the best first."""
    table = Table(title=f"best of {len(trials)} trials first", title_justify="left")
    for name in ("trial", metric_name(config), "state", "seconds", "values"):
        table.add_column(name)

    def rank(trial: Trial) -> float:
        failed = trial.metric is None or trial.state == "failed"
        return float("inf") if failed else sign(config) * float(trial.metric or 0)

    for trial in sorted(trials, key=rank)[:20]:
        metric = "" if trial.metric is None else f"{trial.metric:.6g}"
        values = ", ".join(f"{key.rpartition('.')[2]} {v}" for key, v in trial.params.items())
        table.add_row(str(trial.index), metric, trial.state, f"{trial.seconds:.0f}", values)
    return table
