"""How much a command says: `-q`, `-v`, and what the libraries below may print."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

Verbosity = Literal["quiet", "normal", "verbose"]

VARIABLE = "LMERGE_VERBOSITY"
"""Environment variable that hands the choice to processes that a strategy or a sweep starts."""

FLAGS: dict[str, Verbosity] = {
    "-q": "quiet",
    "--quiet": "quiet",
    "-v": "verbose",
    "--verbose": "verbose",
}

QUIET = {"WANDB_SILENT": "true", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1"}
"""What keeps other libraries quiet; read when they are imported."""

LOGGERS = ("lmerge", "lightning.pytorch", "lightning.fabric")
"""Loggers that have something to say in every run."""

NOISE = (
    ".*does not have many workers.*",
    ".*Using `DistributedSampler` with.*",  # repeats are dropped
    ".*heckpoint directory .* exists and is not empty.*",  # resumed
    ".*in eval mode at the start of training.*",  # as it must be
    ".*LeafSpec.*",
    ".*jsonargparse.*",
)
"""Warnings that a user cannot act on."""


def verbosity() -> Verbosity:
    """Return how much is to be said."""
    value = os.environ.get(VARIABLE)
    return "quiet" if value == "quiet" else "verbose" if value == "verbose" else "normal"


def take_flags(args: list[str]) -> tuple[list[str], Verbosity | None]:
    """Return the arguments without `-q` and `-v`, and the last of these; None if there is none."""
    found = [FLAGS[arg] for arg in args if arg in FLAGS]
    return [arg for arg in args if arg not in FLAGS], found[-1] if found else None


@contextmanager
def speaking(level: Verbosity | None) -> Iterator[None]:
    """Say as much as `level`, here and in processes that start from here; None changes nothing."""
    wanted: dict[str, str] = {} if level is None else {VARIABLE: level}
    if (level or verbosity()) == "quiet":
        wanted |= {name: value for name, value in QUIET.items() if name not in os.environ}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def set_up_logging() -> None:
    """Keep to what a user can act on, or say everything where that is asked for."""
    level = verbosity()
    if level == "verbose":
        form = "%(asctime)s %(name)s: %(message)s"
        logging.basicConfig(level=logging.INFO, format=form, datefmt="%H:%M:%S")
        logging.getLogger("lmerge").setLevel(logging.DEBUG)
        return
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    quiet = level == "quiet"
    logging.getLogger("lmerge").setLevel(logging.WARNING if quiet else logging.INFO)
    quiet_lightning()
    ignore_noise()


def quiet_lightning() -> None:
    """Let Lightning say no more than is asked for, and once; its import undoes that."""
    logging.getLogger("lightning").handlers.clear()  # whose lines reach the root's handler too
    for name in LOGGERS[1:] if verbosity() != "verbose" else ():
        logging.getLogger(name).setLevel(logging.WARNING)


def ignore_noise() -> None:
    """Leave out warnings that a user cannot act on."""
    for pattern in NOISE:
        warnings.filterwarnings("ignore", pattern)


@contextmanager
def library_call(*, verbose: bool) -> Iterator[None]:
    """Say little, and leave the caller's settings of logs and warnings as they were."""
    loggers = [logging.getLogger(name) for name in LOGGERS]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), speaking("normal" if verbose else "quiet"):
        ignore_noise()
        try:
            for logger in loggers if not verbose else ():
                logger.setLevel(logging.WARNING)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
