"""`lmerge sweep`: the trials of a W&B sweep file without a server, each a `lmerge fit`."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from filelock import FileLock, Timeout
from rich.console import Console
from rich.live import Live

from lmerge.figures import save
from lmerge.history import read_history
from lmerge.sweep_figures import best_so_far_figure, importance_figure, parallel_figure
from lmerge.sweep_results import read_trials, results_table, write_results
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
from lmerge.units import duration
from lmerge.wandb_log import WandbMode
from lmerge.wandb_tables import log_trials, sweep_title, wandb_run

POLL_SECONDS = 0.5


def sweep(
    path: str,
    *,
    count: int = 20,
    jobs: int = 1,
    engine: Engine = "wandb",
    run_dir: str = "runs/sweep",
    seed: int = 0,
    options: str | None = None,
    wandb: WandbMode = "disabled",
) -> None:
    """Run a W&B sweep file without a server; a second call goes on where the first was stopped.

    Args:
        path: The sweep file, as `wandb sweep` takes it.
        count: Trials in all, failed ones too; at least 1. A grid may end before.
        jobs: Trials that run at once; at least 1.
        engine: `wandb` is W&B's own engine; `optuna` reads the same file.
        run_dir: Folder of the results and of the trials' run folders.
        seed: Seed of the proposed values.
        options: For sweeps of another LightningCLI: run the file's `program` with these options, as
            a shell reads them; {folder} is the trial's folder, and its metrics.csv must lie there.
        wandb: Whether W&B gets table, charts and figures of the sweep: `offline` writes files in
            `run_dir`, `online` sends them. The trials are not logged on their own.
    """
    for name, value in (("count", count), ("jobs", jobs)):
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")
    folder, config = Path(run_dir), read_sweep(Path(path))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / "sweep.lock", timeout=0), _stopping_like_ctrl_c():
            trials = Runner(config, folder, engine, seed, options).run(count, jobs)
        title = sweep_title(config, Path(path))
        with wandb_run(wandb, folder, title, "sweep", title) as run:
            if run is not None:
                log_trials(run, config, trials)
    except Timeout as error:
        raise ValueError(
            f"another `lmerge sweep` runs in {folder}. Choose another `--run_dir`."
        ) from error
    except KeyboardInterrupt:
        sys.stderr.write("lmerge: stopped; the same command goes on from here.\n")
        sys.exit(130)


@contextmanager
def _stopping_like_ctrl_c() -> Iterator[None]:
    """Turn SIGTERM into KeyboardInterrupt, so that the trials end with this process."""

    def stop(_signum: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class Runner:
    """Starts trials, watches them, and keeps results.json up to date.

    Args:
        config: The sweep.
        folder: Folder of the results.
        engine: Who proposes values.
        seed: Seed of the proposals.
        options: Options of each trial of another program, see `sweep`.
    """

    def __init__(
        self,
        config: SweepConfig,
        folder: Path,
        engine: Engine,
        seed: int,
        options: str | None = None,
    ) -> None:
        self.config, self.folder, self.engine, self.seed = config, folder, engine, seed
        self.options = options
        self.trials = read_trials(folder / "results.json", config)
        self.running: dict[int, subprocess.Popen[bytes]] = {}
        self.started: dict[int, float] = {}
        self.console = Console()

    def run(self, count: int, jobs: int) -> list[Trial]:
        """Run trials until there are `count`, and return those that have a metric.

        The processes end with this one, or by its error.
        """
        redo = [trial for trial in self.trials if trial.state == "running"]
        more = True
        try:
            with Live(console=self.console, auto_refresh=False) as live:
                live.update(results_table(self.config, self.trials, count, jobs))
                while redo or self.running or (more and len(self.trials) < count):
                    free = len(self.running) < jobs
                    if free and redo:
                        self._restart(redo.pop(0))
                    elif free and more and len(self.trials) < count:
                        more = self._propose()
                    else:
                        self._poll()
                        time.sleep(POLL_SECONDS)
                    live.update(results_table(self.config, self.trials, count, jobs), refresh=True)
        finally:
            for process in self.running.values():
                _kill(process)
        return self._report()

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
        args = [*trial_command(self.config, trial.params), *self._own_options(trial)]
        program = ["-m", "lmerge"] if self.options is None else [str(self.config["program"])]
        write_results(self.folder, self.config, self.trials)
        with open(self.folder / f"{trial.folder}.log", "wb") as log:
            self.running[trial.index] = subprocess.Popen(
                [sys.executable, *program, *args],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "WANDB_MODE": "disabled"},
                start_new_session=True,
            )
        self.started[trial.index] = time.monotonic()

    def _own_options(self, trial: Trial) -> list[str]:
        """Return where a trial writes, and what it shares with the others."""
        folder = self.folder / trial.folder
        if self.options is not None:
            parts = shlex.split(self.options)
            return [part.replace("{folder}", str(folder)) for part in parts]
        cache = f"--model.cache_dir={self.folder / 'cache'}"
        return [
            f"--run_dir={folder}",
            "--overwrite=true",
            "--wandb=disabled",
            "--artefacts.report=false",
            cache,
        ]

    def _poll(self) -> None:
        for index, process in list(self.running.items()):
            trial = self.trials[index]
            ended = process.poll() is not None
            for path in (self.folder / trial.folder).rglob("metrics.csv"):
                trial.history = read_history(path, metric_name(self.config))
            trial.metric = best_value(self.config, trial.history)
            trial.seconds = time.monotonic() - self.started[index]
            if ended:
                self._finish(trial, process.returncode)
        for index in to_stop(self.config, self.trials):
            if index in self.running:
                _kill(self.running[index])
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
            f"trial {trial.index} {trial.state} in {duration(trial.seconds)}: {shown}",
            markup=False,
        )

    def _report(self) -> list[Trial]:
        write_results(self.folder, self.config, self.trials)
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
        return done


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a trial with all the processes that its strategy has started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def trial_command(config: SweepConfig, params: dict[str, Any]) -> list[str]:
    """Return the arguments after the program of a trial, from the file's `command`."""
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
