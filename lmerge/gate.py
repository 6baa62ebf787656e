"""The gate: what a merged model must keep of its source, whatever its letter accuracy says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

EXIT_CODE = 3
"""Exit code of a run whose merged model fails the gate; 2 is a user's mistake."""


@dataclass(frozen=True, kw_only=True)
class GateConfig:
    """What a merged model must keep; null switches a check off."""

    enforce: bool = True
    """Whether a failed gate ends the program with exit code 3."""
    max_ppl_ratio: float | None = 3.0
    """Perplexity of the merged model over the source's, on each text; at least 1."""
    min_accuracy_ratio: float | None = 0.8
    """Upper end of the merged model's 95% interval over the source's accuracy, for each scoring and
    for last words; a share from 0 to 1."""
    max_kl: float | None = 1.0
    """KL from the source on each text, in nats a token; above 0."""
    min_distinct: float | None = 0.1
    """Share of distinct bigrams in the greedy continuations; from 0 to 1."""
    max_repetition: float | None = 0.5
    """Share of repeated 4-grams in the greedy continuations, beyond the source's; in [0, 1]."""

    def __post_init__(self) -> None:
        limits = {"max_ppl_ratio": (1.0, None), "max_kl": (0.0, None)}
        shares = ("min_accuracy_ratio", "min_distinct", "max_repetition")
        for name, (low, high) in {**limits, **dict.fromkeys(shares, (0.0, 1.0))}.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= (high or float("inf")):
                bound = f"at least {low:g}" if high is None else f"in [{low:g}, {high:g}]"
                raise ValueError(f"`gate.{name}` must be {bound} or null, got {value}.")


class Check(NamedTuple):
    """One condition of the gate."""

    name: str
    value: float
    limit: float
    passed: bool
    """False too where the value is not a number."""


def check_gate(results: Mapping[str, Any], config: GateConfig) -> list[Check]:
    """Return every check that applies to the results of one evaluation.

    Args:
        results: `text`, `choices` and, where known, `last_word` and `generation`, as in
            metrics.json.
        config: The limits.
    """
    checks: list[Check] = []
    for name, both in results["text"].items():
        ratio = both["merged"]["ppl"] / both["source"]["ppl"]
        checks += _at_most(f"perplexity ratio on {name} text", ratio, config.max_ppl_ratio)
        checks += _at_most(f"KL on {name} text", both["merged"]["kl"], config.max_kl)
    rates = {
        scoring: (both["source"]["micro"], both["merged"]["micro"])
        for scoring, both in results["choices"].items()
    }
    for name, both in results.get("last_word", {}).items():
        rates[f"last word, {name}"] = both["source"], both["merged"]
    for name, (source, merged) in rates.items():
        # The upper end of the interval: on few questions a loss may be chance.
        ratio = merged["high"] / source["accuracy"] if source["accuracy"] > 0 else 1.0
        checks += _at_least(f"accuracy ratio (upper end), {name}", ratio, config.min_accuracy_ratio)
    generation = results.get("generation")
    if generation:
        source, merged = generation["source"], generation["merged"]
        checks += _at_least("distinct bigrams", merged["distinct"], config.min_distinct)
        excess = merged["repetition"] - source["repetition"]
        checks += _at_most("repetition beyond the source's", excess, config.max_repetition)
    return checks


def gate_rows(checks: Sequence[Check]) -> list[tuple[str, str, str]]:
    """Return the rows of the table: what was checked, the limit, value and verdict."""
    verdicts = {True: "passed", False: "FAILED"}
    return [
        (f"gate: {c.name}", f"limit {c.limit:g}", f"{c.value:.3g} {verdicts[c.passed]}")
        for c in checks
    ]


def gate_notes(checks: Sequence[Check]) -> list[str]:
    """Return a warning for the model card if any check failed."""
    failed = [f"{c.name} {c.value:.3g} (limit {c.limit:g})" for c in checks if not c.passed]
    return [f"This model FAILED its quality gate: {'; '.join(failed)}."] if failed else []


def _at_most(name: str, value: float, limit: float | None) -> list[Check]:
    return [] if limit is None else [Check(name, value, limit, value <= limit)]


def _at_least(name: str, value: float, limit: float | None) -> list[Check]:
    return [] if limit is None else [Check(name, value, limit, value >= limit)]
