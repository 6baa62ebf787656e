"""`lmerge compare`: methods times budgets, one JSON file a cell, one table."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path

from lmerge.bench import Bench, CompareData
from lmerge.compare_table import write_tables
from lmerge.compose import MethodConfig
from lmerge.llama import num_layers
from lmerge.plan import check_num_removed
from lmerge.source import load_model
from lmerge.wandb_log import WandbMode
from lmerge.wandb_tables import log_cells, wandb_run

logger = logging.getLogger(__name__)


def compare(
    methods: list[MethodConfig],
    source: str = "smollm2-135m",
    budgets: list[int] = [3, 6, 10],  # noqa: B006 - jsonargparse shows it as the default
    data: CompareData = CompareData(),  # noqa: B008 - frozen
    run_dir: Path = Path("runs/compare"),
    only: list[str] | None = None,
    max_minutes: float | None = None,
    seed: int = 0,
    wandb: WandbMode = "disabled",
) -> None:
    """Compare methods at several budgets on the same texts and questions.

    Each cell (a method at a budget) leaves a JSON file in `cells/` of the run folder and is not
    computed again by the same command; tables and figure are made from all cells that there are.

    Args:
        methods: Rows of the table.
        source: Model to compress: hub id, local folder, GGUF file or alias.
        budgets: Layers to remove.
        data: What is calibrated and measured on.
        run_dir: Folder of cells, tables and figure.
        only: Names of the rows to compute now; null for all. The tables show all there are.
        max_minutes: No new cell starts after this many minutes; null for no limit.
        seed: Seed of whatever a method draws.
        wandb: Whether W&B gets table, chart and figure of all cells: `offline` writes files in
            `run_dir`, `online` sends them.
    """
    _check(methods, budgets, only)
    start = time.monotonic()
    bench = Bench(load_model(source), source, data, run_dir, seed, most_removed=max(budgets))
    for num_removed in budgets:
        check_num_removed(num_removed, num_layers(bench.source))
    wanted = [(method, n) for n in budgets for method in methods]
    missing = [
        (method, n)
        for method, n in wanted
        if not bench.has(method, n) and (only is None or method.title in only)
    ]
    logger.info("%d of %d cells are to be computed", len(missing), len(wanted))
    for done, (method, num_removed) in enumerate(missing):
        minutes = (time.monotonic() - start) / 60
        if max_minutes is not None and minutes > max_minutes:
            logger.info("%d cells are left for another call", len(missing) - done)
            break
        logger.info(
            "%s, %d layers removed (%.0f minutes so far)", method.title, num_removed, minutes
        )
        bench.compute(method, num_removed)
    cells = [bench.cell(method, n) for method, n in wanted if bench.has(method, n)]
    if cells:
        rows = write_tables(run_dir, cells, [method.title for method in methods])
        group = Path(source).name
        with wandb_run(wandb, run_dir, f"{group} compare", "compare", group) as run:
            if run is not None:
                log_cells(run, rows, cells)


def _check(
    methods: Sequence[MethodConfig], budgets: Sequence[int], only: Sequence[str] | None
) -> None:
    titles = [method.title for method in methods]
    repeated = [title for title in titles if titles.count(title) > 1]
    if repeated or not methods:
        raise ValueError(
            f"`methods` must have at least one row and different names, got {titles}. "
            "Give compositions a `name`."
        )
    if not budgets or min(budgets) < 1:
        raise ValueError(f"`budgets` must be numbers of layers of at least 1, got {budgets}.")
    unknown = set(only or ()) - set(titles)
    if unknown:
        raise ValueError(f"`only` must name some of {', '.join(titles)}, got {min(unknown)!r}.")
