"""The command line's story in Python: find a plan, compress a model, evaluate it again.

Each function runs a command of `lmerge` in this process, with the same options and the same code,
so that what it returns is what the command would leave in its run folder.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from contextlib import ExitStack, redirect_stdout
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from shutil import rmtree
from tempfile import TemporaryDirectory, mkdtemp
from typing import TYPE_CHECKING, Any
from weakref import finalize

from lmerge.artefacts import card
from lmerge.callbacks import export_merged
from lmerge.commands import UsageError
from lmerge.gate import gate_rows
from lmerge.lightning_cli import CLI, run_cli
from lmerge.plan import MergePlan
from lmerge.results import Row, table_rows
from lmerge.runs import write_plan
from lmerge.verbosity import library_call
from lmerge.yaml_files import check_yaml, with_shipped_configs

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lmerge.gate import Check

PathOrStr = str | PathLike[str]
Options = Mapping[str, object]


@dataclass(frozen=True, kw_only=True)
class Compressed:
    """What `compress` returns."""

    model: PreTrainedModel
    """The merged model, an ordinary model of transformers; it shares weights with the source."""
    tokenizer: PreTrainedTokenizerBase
    """The source's tokenizer."""
    plan: MergePlan
    """Which source layers became one."""
    results: dict[str, Any]
    """Scores of source and merged model as in metrics.json; empty without an evaluation."""
    checks: tuple[Check, ...]
    """The limits of the gate, and whether each was kept."""
    run_dir: Path
    """Folder of the run; a temporary one unless it was asked for."""
    _module: Any = field(repr=False)

    @property
    def rows(self) -> list[Row]:
        """What it cost: (what, source, merged), with 95% intervals, and the gate's limits."""
        return table_rows(self.results) + gate_rows(list(self.checks)) if self.results else []

    @property
    def report(self) -> str:
        """What it cost, as a table in Markdown."""
        lines = ["| what | source | merged |", "|---|---|---|"]
        return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in self.rows)])

    @property
    def passed(self) -> bool:
        """Whether all limits of the gate were kept."""
        return all(check.passed for check in self.checks)

    def save(self, folder: PathOrStr, *, overwrite: bool = False) -> Path:
        """Write an ordinary Hugging Face checkpoint with its tokenizer and model card.

        Args:
            folder: Where to; it is made.
            overwrite: Whether an older export there may be replaced.
        """
        text = card(self._module, self.rows)
        export_merged(self._module, Path(folder), text=text, overwrite=overwrite)
        return Path(folder)


def compress(
    source: PathOrStr | None = None,
    *,
    num_removed: int | None = None,
    budget: str | None = None,
    plan: MergePlan | PathOrStr | None = None,
    config: PathOrStr = "best",
    evaluate: bool = True,
    run_dir: PathOrStr | None = None,
    overwrite: bool = False,
    options: Options | None = None,
    verbose: bool = False,
) -> Compressed:
    """Merge layers of a model as `lmerge fit` does, and say what it cost.

    Runs in one process; for several take the command line. It seeds Python, NumPy and torch.

    Args:
        source: Model: hub id, local folder, GGUF file or alias; None is the config's.
        num_removed: Layers to remove; None is the config's number.
        budget: Share of the layers to remove instead, such as 20%.
        plan: The groups to merge, instead of a search: a plan or the path of a plan.json.
        config: A YAML file of options, or the name of one that comes with lmerge.
        evaluate: Whether source and merged model are measured at the end.
        run_dir: Folder for what `fit` leaves; None for a temporary one.
        overwrite: Whether an older run in `run_dir` may be replaced.
        options: Further options by their names on the command line, such as
            {"data.num_calibration_tokens": 16384, "repair.config.method": "deep"}.
        verbose: Whether to print what the command would.

    Raises:
        ValueError: One line on whatever the command would refuse.
    """
    if num_removed is not None and budget is not None:
        raise ValueError(f"give `num_removed` or `budget`, got {num_removed} and {budget!r}.")
    folder = Path(run_dir or mkdtemp(prefix="lmerge-"))
    with ExitStack() as files, ExitStack() as stack:
        if run_dir is None:
            stack.callback(rmtree, folder, ignore_errors=True)
        if isinstance(plan, MergePlan):
            made = Path(files.enter_context(TemporaryDirectory(prefix="lmerge-")))
            write_plan(made, plan)
            plan = made / "plan.json"
        given: dict[str, object] = {
            "run_dir": folder,
            "overwrite": overwrite,
            "evaluate_after": evaluate,
            "wandb": "disabled",
            "export.enabled": run_dir is not None,
            "model.source": source,
            "model.num_removed": num_removed,
            "model.budget": budget,
            "model.plan": plan,
        }
        cli = _run("fit", config, {**given, **(options or {})}, verbose=verbose)
        stack.pop_all()
    module = cli.model
    result = Compressed(
        model=module.merged.plain(),
        tokenizer=cli.datamodule.tokenizer,
        plan=module.merged.plan,
        results=module.results if evaluate else {},
        checks=tuple(module.checks),
        run_dir=folder,
        _module=module,
    )
    if run_dir is None:
        finalize(result, rmtree, folder, ignore_errors=True)
    return result


def find_plan(
    source: PathOrStr | None = None,
    *,
    num_removed: int | None = None,
    budget: str | None = None,
    config: PathOrStr = "best",
    options: Options | None = None,
    verbose: bool = False,
) -> MergePlan:
    """Choose the layers to merge as `lmerge plan` does; the arguments are those of `compress`."""
    given = {"model.source": source, "model.num_removed": num_removed, "model.budget": budget}
    cli = _run("plan", config, {**given, **(options or {})}, verbose=verbose)
    plan: MergePlan = cli.model.prepare().plan
    return plan


def validate(
    run_dir: PathOrStr, *, options: Options | None = None, verbose: bool = False
) -> dict[str, Any]:
    """Measure source and merged model of a run again as `lmerge validate` does.

    Args:
        run_dir: Folder of a finished run.
        options: Options that differ from the run's, such as {"data.num_shots": 0}.
        verbose: Whether to print what the command would.

    Returns:
        The results as in metrics.json.
    """
    given: dict[str, object] = {"run_dir": run_dir, "wandb": "disabled"}
    cli = _run("validate", Path(run_dir) / "config.yaml", {**given, **(options or {})}, verbose)
    results: dict[str, Any] = cli.model.results
    return results


def _run(command: str, config: PathOrStr, options: Options, verbose: bool) -> CLI:
    """Run a command; its mistakes are ValueErrors here."""
    args = [command, f"--config={config}"]
    args += [f"--{name}={_text(value)}" for name, value in options.items() if value is not None]
    args, paths = with_shipped_configs(args)
    for path in paths:
        check_yaml(path)
    with ExitStack() as stack:
        stack.enter_context(library_call(verbose=verbose))
        if not verbose:
            stack.enter_context(redirect_stdout(io.StringIO()))
        try:
            return run_cli(args)
        except UsageError as error:
            raise ValueError(error.message) from None


def _text(value: object) -> str:
    """Return a value as the command line takes it; JSON is YAML."""
    return str(value) if isinstance(value, str | PathLike) else json.dumps(value)
