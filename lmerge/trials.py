"""What a sweep tries next: sweep files in W&B's format, and the engines that read them."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml

from lmerge.files import one_line

Engine = Literal["wandb", "optuna"]
TrialState = Literal["running", "finished", "stopped", "failed"]

SweepConfig = dict[str, Any]
"""A sweep file as W&B defines it: `method`, `metric`, `parameters`, `command`, ..."""

INSTALL = "Install lmerge with its extra: pip install '.[sweep]' in its repository."


@dataclass(kw_only=True)
class Trial:
    """One set of values, and what came of it."""

    index: int
    """Number from 0."""
    params: dict[str, Any]
    """Value of each swept option."""
    folder: str
    """Name of its run folder inside the sweep's."""
    state: TrialState = "running"
    """`stopped` is early termination; it counts like `finished`."""
    metric: float | None = None
    """The best value of the sweep's metric; None where there is none."""
    history: list[float] = field(default_factory=list)
    """Each value that was logged, in order."""
    seconds: float = 0.0
    """Wall time."""
    error: str = ""
    """Last line of what a failed trial said."""

    def as_dict(self) -> dict[str, Any]:
        """Return the trial as JSON data."""
        return asdict(self)


def read_sweep(path: Path) -> SweepConfig:
    """Return a sweep file, checked by W&B's own schema.

    Raises:
        ValueError: One line with the engine's messages.
    """
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"a sweep must be a YAML file, got {path}: {one_line(error)}.") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: a sweep must be a mapping with `method` and `parameters`.")
    messages = _violations(config)
    metric = config.get("metric")
    if not messages and (not isinstance(metric, dict) or "name" not in metric):
        messages = ["`metric` with `name` and `goal` is required"]
    if messages:
        raise ValueError(f"{path} is no valid sweep: {'; '.join(messages)}. Correct it.")
    return config


def _violations(config: SweepConfig) -> list[str]:
    engine = _load_wandb()
    try:
        return list(engine.config.schema_violations_from_proposed_config(config))
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        return [one_line(error)]  # the engine compares values before it has checked their types


def _load_wandb() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pydantic 2 about the engine's old settings
            import sweeps
    except ImportError as error:
        raise ValueError(
            f"`lmerge sweep` needs W&B's engine, the package `sweeps`. {INSTALL}"
        ) from (error)
    return sweeps


def short_names(params: Mapping[str, Any]) -> dict[str, str]:
    """Return a name for each option that people recognise: its last parts, as many as it takes."""
    for num_parts in (1, 2, 3):
        short = {key: ".".join(key.split(".")[-num_parts:]) for key in params}
        readable = not any(name.isdecimal() for name in short.values())
        if readable and len(set(short.values())) == len(short):
            return short
    return {key: key for key in params}


def metric_name(config: SweepConfig) -> str:
    """Return the name under which the metric is logged."""
    return str(config["metric"]["name"])


def sign(config: SweepConfig) -> int:
    """Return 1 where a smaller metric is better, -1 where a larger one is."""
    return -1 if config["metric"].get("goal") == "maximize" else 1


def best_value(config: SweepConfig, history: Sequence[float]) -> float | None:
    """Return the best finite value; None where there is none."""
    finite = [value for value in history if math.isfinite(value)]
    return min(finite, key=lambda v: sign(config) * v, default=None)


def _wandb_runs(config: SweepConfig, trials: Sequence[Trial]) -> list[Any]:
    engine, name = _load_wandb(), metric_name(config)
    states = engine.RunState
    found = {
        "running": states.running,
        "finished": states.finished,
        "stopped": states.finished,
        "failed": states.failed,
    }
    # By alias: by field name pydantic 2 drops the values, and hyperband then stops nothing.
    return [
        engine.SweepRun(
            name=str(trial.index),
            state=found[trial.state],
            config={key: {"value": value} for key, value in trial.params.items()},
            summaryMetrics={} if trial.metric is None else {name: trial.metric},
            sampledHistory=[{name: value} for value in trial.history],
        )
        for trial in trials
    ]


def propose_wandb(config: SweepConfig, trials: Sequence[Trial], seed: int) -> dict[str, Any] | None:
    """Return the values that W&B's engine tries next; None when a grid is done."""
    engine = _load_wandb()
    # The engine draws from the global generators; equal seeds and trials give equal values.
    random.seed(seed + len(trials))
    np.random.seed((seed + len(trials)) % 2**32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn on Gaussian processes with few points
        run = engine.next_run(config, _wandb_runs(config, trials))
    if run is None:
        return None
    return {key: _plain(entry["value"]) for key, entry in run.config.items()}


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def to_stop(config: SweepConfig, trials: Sequence[Trial]) -> list[int]:
    """Return the running trials that the sweep's `early_terminate` ends."""
    if "early_terminate" not in config:
        return []
    runs = _load_wandb().stop_runs(config, _wandb_runs(config, trials))
    running = {trial.index for trial in trials if trial.state == "running"}
    return [int(run.name) for run in runs if int(run.name) in running]


def propose_optuna(
    config: SweepConfig, trials: Sequence[Trial], seed: int
) -> dict[str, Any] | None:
    """Return the values that optuna tries next for the same file: GPSampler, or random ones.

    Raises:
        ValueError: For a grid, or a distribution that optuna does not have.
    """
    try:
        import optuna
    except ImportError as error:
        raise ValueError(f"`--engine optuna` needs the package `optuna`. {INSTALL}") from error
    if config["method"] == "grid":
        raise ValueError("`--engine optuna` does not run grids; use `--engine wandb`.")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space = {key: _distribution(optuna, key, spec) for key, spec in config["parameters"].items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # experimental samplers
        samplers = optuna.samplers
        kind = samplers.RandomSampler if config["method"] == "random" else samplers.GPSampler
        study = optuna.create_study(sampler=kind(seed=seed + len(trials)))
        for trial in trials:
            if trial.metric is not None and trial.state in ("finished", "stopped"):
                value = sign(config) * trial.metric
                study.add_trial(
                    optuna.trial.create_trial(params=trial.params, distributions=space, value=value)
                )
        return dict(study.ask(space).params)


def _distribution(optuna: Any, key: str, spec: Mapping[str, Any]) -> Any:
    kinds = optuna.distributions
    if "value" in spec or "values" in spec:
        return kinds.CategoricalDistribution(spec.get("values", [spec.get("value")]))
    name = spec.get("distribution")
    if name not in (None, "uniform", "int_uniform", "log_uniform_values"):
        raise ValueError(
            f"`{key}`: optuna has no distribution {name!r}; use uniform, int_uniform or "
            "log_uniform_values, or `--engine wandb`."
        )
    low, high, log = spec["min"], spec["max"], name == "log_uniform_values"
    if isinstance(low, int) and isinstance(high, int) and name != "uniform" and not log:
        return kinds.IntDistribution(low, high)
    return kinds.FloatDistribution(float(low), float(high), log=log)


Propose = Callable[[SweepConfig, Sequence[Trial], int], "dict[str, Any] | None"]

ENGINES: dict[Engine, Propose] = {"wandb": propose_wandb, "optuna": propose_optuna}
