"""What lmerge tells W&B: names that make a project page readable, goals, tables, charts, models.

W&B itself is imported when a run is there to be told something.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.loggers import Logger, WandbLogger
from matplotlib.figure import Figure

from lmerge.files import provenance
from lmerge.plan import MergePlan
from lmerge.report_figures import Change
from lmerge.report_table import cost_groups, subject_changes
from lmerge.search import Candidate

WandbMode = Literal["offline", "online", "disabled"]

PROJECT = "lmerge"

GOALS = {"loss": "min", "ppl": "min", "kl": "min", "accuracy": "max"}
"""How the second part of a metric's name ends -> which of its values is the best."""

TRAINING = ("train/loss", "train/kl")


def run_title(config: Mapping[str, Any], stage: str) -> str:
    """Return a run's name from its options: source, layers removed, method, repair, seed.

    Such as `smollm2-135m -6 block_repaired deep seed0`; other stages than fit stand at the end.
    """
    model, repair = config.get("model", {}), config.get("repair", {})
    how = Path(model["plan"]).stem if model.get("plan") else model.get("plan_method")
    refit, healing = (repair.get(key, {}).get("method", "none") for key in ("config", "heal"))
    parts = [run_group(config), how, refit, healing if healing == "none" else f"heal-{healing}"]
    seed = config.get("seed_everything", 0)
    parts += [f"seed{seed}", stage]
    return " ".join(str(part) for part in parts if part not in (None, "none", "fit"))


def run_group(config: Mapping[str, Any]) -> str:
    """Return what runs are grouped by: the source and how much of it goes."""
    model = config.get("model", {})
    if model.get("plan"):
        removed = f"plan {Path(model['plan']).stem}"
    else:
        removed = f"-{model.get('budget') or model.get('num_removed', '?')}"
    return f"{_short(str(model.get('source', 'source')))} {removed}"


def _short(source: str) -> str:
    return Path(source).name.removesuffix(".gguf") or source


def fit_logger(
    config: Mapping[str, Any], stage: str, run_dir: Path, *, offline: bool
) -> WandbLogger:
    """Return W&B's logger of a stage, named and grouped by the options.

    A W&B agent's run keeps its agent's config, since the sweep's options are its columns.
    """
    in_sweep = "WANDB_SWEEP_ID" in os.environ
    title = run_title(config, stage)
    tags = [config.get("model", {}).get("plan_method"), config.get("alignment", {}).get("method")]
    return WandbLogger(
        f"{title} {run_dir.name}" if in_sweep else title,  # whose trials differ in a value alone
        run_dir,
        offline=offline,
        project=PROJECT,
        group=run_group(config),
        job_type=stage,
        tags=sorted({str(tag) for tag in tags if tag}),
        **({} if in_sweep else {"config": _plain(config)}),
    )


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, int | float | str | bool | None) else str(value)


def wandb_loggers(loggers: Iterable[Logger]) -> list[WandbLogger]:
    """Return those of a trainer's loggers that are W&B's."""
    return [logger for logger in loggers if isinstance(logger, WandbLogger)]


def evaluation_metrics(
    stage: str, texts: Iterable[str], words: Iterable[str], scorings: Iterable[str], domains: Any
) -> list[str]:
    """Return the names under which an evaluation may log, as `val/loss/en`.

    Args:
        stage: `val` or `test`.
        texts: Names of the texts.
        words: Names of the files whose last words are guessed.
        scorings: Ways of scoring choices.
        domains: Names of the domains.
    """
    names = [f"{stage}/{kind}/{name}" for name in texts for kind in ("loss", "ppl", "kl")]
    names += [f"{stage}/last_word_accuracy/{name}" for name in words]
    return names + [f"{stage}/{s}_accuracy/{domain}" for s in scorings for domain in domains]


def define_goals(loggers: Iterable[Logger], names: Iterable[str]) -> None:
    """Tell W&B which value of a metric is the best, so that the summary holds it and the last.

    Not in a sweep, whose engine wants plain numbers. Names are exact: Lightning defines the glob
    `*`, and of two globs that fit a name W&B takes either.
    """
    if "WANDB_SWEEP_ID" in os.environ:
        return
    for logger in wandb_loggers(loggers):
        for name in names:
            goal = GOALS[name.split("/")[1].rpartition("_")[2]]
            logger.experiment.define_metric(
                name, step_metric="trainer/global_step", summary=f"{goal},last"
            )


def log_plan(loggers: Iterable[Logger], plan: MergePlan, candidates: Sequence[Candidate]) -> None:
    """Log the plan as a table, and what the candidates of its search cost as a chart."""
    head = ["source layers", "anchor", "merged layer"]
    rows: list[list[Any]] = [
        [f"{g.start} to {g.members[-1]}", g.anchor, plan.position(g)] for g in plan.groups
    ]
    costs: list[list[Any]] = [[str(c.groups[0].start), c.kl] for c in candidates if c.groups]
    for logger in wandb_loggers(loggers):
        if rows:
            logger.log_table("plan/groups", head, rows)
        if costs:
            title = "KL from the source after a refit, by first merged layer"
            _bars(logger.experiment, "plan/candidates", ["first layer", "KL"], costs, title)


def log_evaluation(loggers: Iterable[Logger], stage: str, results: Mapping[str, Any]) -> None:
    """Log the tables, the chart of subjects and the summary of one evaluation."""
    costs = [list(row) for rows in cost_groups(results).values() for row in rows]
    for logger in wandb_loggers(loggers):
        run = logger.experiment
        logger.log_table(f"{stage}/results", ["what", "source", "merged", "change"], costs)
        texts = _text_rows(results.get("generation", {}))
        if texts:
            logger.log_table(f"{stage}/texts", ["prompt", "source", "merged"], texts)
        for scoring in results["choices"]:
            changes = subject_changes(results, scoring)
            head = list(Change._fields)
            title = f"{scoring}: merged minus source, percentage points"
            _bars(run, f"{stage}/subjects_{scoring}", head, [list(c) for c in changes], title)
        run.summary.update({f"{stage}/{k}": v for k, v in summary_of(results).items()})


def log_images(loggers: Iterable[Logger], figures: Mapping[str, Figure]) -> None:
    """Log figures as images."""
    for logger in wandb_loggers(loggers):
        for name, figure in figures.items():
            logger.log_image(name, [figure])


def _text_rows(generation: Mapping[str, Any]) -> list[list[Any]]:
    before, after = (generation.get(m, {}).get("texts", {}) for m in ("source", "merged"))
    return [[prompt, text, after.get(prompt, "")] for prompt, text in before.items()]


def _bars(run: Any, key: str, head: Sequence[str], rows: list[list[Any]], title: str) -> None:
    """Log a table and a bar chart of its first two columns."""
    import wandb

    table = wandb.Table(columns=list(head), data=rows)
    run.log({key: wandb.plot.bar(table, head[0], head[1], title=title)})


def summary_of(results: Mapping[str, Any]) -> dict[str, float | int | bool]:
    """Return the numbers of an evaluation that runs are compared by."""
    found: dict[str, float | int | bool] = {}
    for name, both in results["text"].items():
        found[f"loss_increase/{name}"] = both["merged"]["loss"] - both["source"]["loss"]
    for scoring, both in results["choices"].items():
        found[f"accuracy_change/{scoring}"] = both["difference"]["value"]
    cost = results.get("cost")
    if cost:
        before, after = cost["source"], cost["merged"]
        found["layers"] = after["layers"]
        found["parameters"] = after["parameters"]
        found["parameters_kept"] = after["parameters"] / before["parameters"]
        found["speedup"] = after["prefill_tokens_per_s"] / before["prefill_tokens_per_s"]
    checks = results.get("gate", ())
    return {**found, "gate_passed": all(check["passed"] for check in checks)}


def log_page(loggers: Iterable[Logger], path: Path) -> None:
    """Log the HTML report as a panel of the run."""
    for logger in wandb_loggers(loggers):
        import wandb

        page = path.read_text(encoding="utf-8")
        logger.experiment.log({"report": wandb.Html(page, inject=False)})


def log_model(loggers: Iterable[Logger], folder: Path, plan: MergePlan) -> None:
    """Log an exported model as an artifact that is named after the run."""
    for logger in wandb_loggers(loggers):
        import wandb

        run = logger.experiment
        name = re.sub(r"[^\w.-]+", "-", run.name or "model").strip("-")
        facts = {"num_removed": plan.num_removed, "plan": plan.method, "source": plan.source}
        artifact = wandb.Artifact(name, type="model", metadata={**facts, **provenance()})
        artifact.add_dir(str(folder))
        run.log_artifact(artifact)
