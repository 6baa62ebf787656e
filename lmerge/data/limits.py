"""Bounds of the data module's options, checked before anything is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

LEAST = {
    "num_shots": 0,
    "seed": 0,
    "num_workers": 0,
    "num_prompts": 1,
    "batch_size": 1,
    "eval_tokens": 1,
    "max_questions": 1,
    "block_size": 2,
}
"""Option -> its least value; an option that is null has none."""


def check_options(options: Mapping[str, Any]) -> None:
    """Raise ValueError when an option of `MMLUDataModule` is out of its range.

    Args:
        options: The options by name; other entries are not looked at.
    """
    for name, least in LEAST.items():
        if options[name] is not None:
            _check_at_least(least, name, options[name])
    block_size, stride, holdout = (options[name] for name in ("block_size", "stride", "holdout"))
    _check_at_least(block_size, "num_calibration_tokens", options["num_calibration_tokens"])
    if stride is not None and not 1 <= stride <= block_size:
        raise ValueError(
            f"`stride` must be between 1 and the `block_size` of {block_size}, got {stride}; "
            "lower it."
        )
    if not 0 < holdout <= 0.5:
        raise ValueError(f"`holdout` must be above 0 and at most 0.5, got {holdout}; try 0.15.")
    if not any(options[name] for name in ("scorings", "eval_text", "last_word")):
        raise ValueError(
            "`scorings` must not be empty without `eval_text` and `last_word`; give one of them."
        )


def _check_at_least(least: int, name: str, value: int) -> None:
    if value < least:
        raise ValueError(f"`{name}` must be at least {least}, got {value}; raise it.")
