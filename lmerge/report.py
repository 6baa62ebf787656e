"""`lmerge report`: one self-contained page of a run, or of several side by side."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup
from rich.console import Console

from lmerge import __version__
from lmerge.diff import Stage
from lmerge.files import write_text
from lmerge.generation import NUM_TOKENS
from lmerge.report_pictures import (
    Figures,
    alignment_items,
    heatmap_section,
    plan_items,
    subject_items,
    training_items,
)
from lmerge.report_run import RunRecord, choose_stage, read_record, unique_names
from lmerge.report_sections import (
    cost_section,
    missing_items,
    pair_items,
    reproduce_items,
    run_items,
    text_items,
)
from lmerge.svg import themed

FILE_NAME = "report.html"

SECTIONS = {
    "cost": "Cost",
    "pairs": "Run against run",
    "plans": "Plan",
    "heatmaps": "Similarity",
    "alignment": "Neurons",
    "training": "Learning",
    "subjects": "Subjects",
    "texts": "Texts",
    "reproduce": "Reproduce",
    "missing": "Not here",
}
"""What the template knows -> its name in the list of sections."""

IDS = {"plans": "plan", "heatmaps": "similarity"}
"""Sections whose id on the page differs."""


def report(
    runs: list[Path],
    out: Path | None = None,
    similarity: Path | None = None,
    stage: Stage | None = None,
) -> None:
    """Write one self-contained HTML page about a run, or several runs side by side.

    Args:
        runs: Run folders, one or more; the first is what others are compared with.
        out: The page; null for report.html in the run folder, or here where there are several.
        similarity: Folder of `lmerge similarity` whose matrices are shown too.
        stage: Whose results are shown; null for `test` where all runs have it, else `validate`.
    """
    path = out or (runs[0] / FILE_NAME if len(runs) == 1 else Path(FILE_NAME))
    write_report(runs, path, similarity=similarity, stage=stage)
    Console(soft_wrap=True).print(f"written to {path}", markup=False, highlight=False)


def write_report(
    runs: Sequence[Path],
    path: Path,
    *,
    similarity: Path | None = None,
    stage: Stage | None = None,
) -> None:
    """Write the page of one or more run folders.

    Raises:
        ValueError: One line on a folder that is no run, or a damaged file.
    """
    names = unique_names(runs)
    records = [read_record(run, name, similarity) for run, name in zip(runs, names, strict=True)]
    write_text(path, render(records, choose_stage(records, stage)))


def render(records: Sequence[RunRecord], stage: Stage) -> str:
    """Return the page of some runs; it loads nothing from anywhere."""
    figures = Figures()
    context: dict[str, Any] = {"runs": run_items(records, stage)}
    context["cost"] = cost_section(records, stage)
    context["pairs"] = pair_items(records, stage)
    context["texts"] = text_items(records, stage)
    context["reproduce"] = reproduce_items(records, stage)
    with themed():
        context["plans"] = plan_items(records, figures)
        context["heatmaps"] = heatmap_section(records, figures)
        context["alignment"] = alignment_items(records, figures)
        context["training"] = training_items(records, figures)
        context["subjects"] = subject_items(records, stage, figures)
    context["missing"] = missing_items(records, stage)
    shown = [(IDS.get(key, key), name) for key, name in SECTIONS.items() if context[key]]
    page: str = _template().render(
        **context,
        title=_title(records),
        sections=shown,
        version=__version__,
        num_tokens=NUM_TOKENS,
        css=Markup(_resource("report.css")),
        js=Markup(_resource("report.js")),
    )
    return page


def _title(records: Sequence[RunRecord]) -> str:
    if len(records) == 1:
        plan = records[0].plan
        left = plan.num_layers - plan.num_removed
        return f"{records[0].source}: {plan.num_layers} layers merged into {left}"
    sources = ", ".join(dict.fromkeys(record.source for record in records))
    return f"{sources}: {len(records)} runs side by side"


def _parts(text: str) -> list[str]:
    """Return the parts of a cell that should not break: number, interval, p-value."""
    return re.split(r" (?=\[|p =)", text)


def _resource(name: str) -> str:
    return (files("lmerge") / "templates" / name).read_text(encoding="utf-8")


@cache
def _template() -> Any:
    environment = Environment(
        loader=FunctionLoader(_resource),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["parts"] = _parts
    return environment.get_template(FILE_NAME)
