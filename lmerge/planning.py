"""`lmerge plan`: the plan of a config without training, and the memory that a fit would take."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import nn

from lmerge.callbacks import ExportCheckpoint, Repair
from lmerge.data.module import MMLUDataModule
from lmerge.memory import SETUPS, Job, Setup, expected_bytes, sizes_of
from lmerge.module import AlphaModule
from lmerge.plan import MergePlan, check_num_removed
from lmerge.runs import read_plan, write_plan
from lmerge.search import SEARCHES
from lmerge.source import load_config
from lmerge.tables import print_columns

TITLES: dict[Setup, str] = {
    "cpu": "CPU, 1 process",
    "gpu": "1 GPU",
    "ddp": "DDP, each GPU",
    "fsdp2": "FSDP2, each of {} GPUs",
}
PEAKS = ("plan", "training", "repair", "evaluation", "export", "peak", "host")


class PlanningTrainer(Trainer):
    """A Trainer that can also make a plan, or tell the memory of a fit, without training."""

    def plan(
        self,
        model: LightningModule,
        datamodule: LightningDataModule,
        output: str | None = None,
        memory: bool = False,
        num_processes: int = 8,
    ) -> None:
        """Make and print the plan of a config, or tell what memory its fit takes.

        Args:
            model: The module of a fit.
            datamodule: The data of a fit.
            output: File for the plan, to be given as `--model.plan`.
            memory: Whether to tell the expected memory instead; loads no weights.
            num_processes: Processes that FSDP2 splits the layers over, for `memory`.
        """
        assert isinstance(model, AlphaModule)
        assert isinstance(datamodule, MMLUDataModule)
        if memory:
            print_memory(self, model, datamodule, num_processes)
            return
        self.datamodule = datamodule
        model.trainer = self
        plan = model.prepare().plan
        print_plan(plan, model.candidates[0].kl if model.candidates else None)
        if output is not None:
            write_plan(Path(output).parent, plan, Path(output))
            Console().print(f"written to {output}", markup=False)


def print_plan(plan: MergePlan, kl: float | None = None) -> None:
    """Print the groups of a plan, and its KL after a refit where a search has measured it."""
    title = f"{plan.num_layers} layers, {plan.num_removed} removed, by {plan.method or 'hand'}"
    if kl is not None:
        title += f"; KL after a refit {kl:.4f}"
    table = Table(title=escape(title), title_justify="left")
    for name in ("layers", "anchor"):
        table.add_column(name)
    for group in plan.groups:
        table.add_row(f"{group.members[0]} to {group.members[-1]}", str(group.anchor))
    Console().print(table)


def print_memory(
    trainer: Trainer, model: AlphaModule, data: MMLUDataModule, num_processes: int
) -> None:
    """Print the expected memory of a fit for each setup, in GiB."""
    job, sizes = job_of(trainer, model, data), sizes_of(load_config(model.source_name))
    found = {setup: expected_bytes(sizes, job, setup, num_processes) for setup in SETUPS}
    title = (
        f"{model.source_name}: expected memory of a process in GiB; groups of "
        f"{', '.join(map(str, job.group_sizes))} layers from layer {job.first_merged} on"
    )
    lines, peaks = [], list(found["cpu"]).index(PEAKS[0])
    for name in found["cpu"]:
        label = {"host": "memory of the host, a process"}.get(name, name)
        label = f"peak: {name}" if name in PEAKS[:5] else label
        cells = (found[setup][name] for setup in SETUPS)
        lines.append([label, *(f"{cell / 2**30:.2f}" if cell else "" for cell in cells)])
    heading = ["", *(TITLES[setup].format(num_processes) for setup in SETUPS)]
    print_columns(title, heading, lines, sections=[peaks])


def job_of(
    trainer: Trainer, model: AlphaModule, data: MMLUDataModule, plan: MergePlan | None = None
) -> Job:
    """Return what decides the memory of a fit with these options.

    A plan that is not made yet is taken to start in the middle of the model.
    """
    config = load_config(model.source_name)
    depth = config.num_hidden_layers
    if model.plan_path is not None:
        plan = read_plan(model.plan_path)
    if plan is not None:
        sizes = tuple(len(group.members) for group in plan.groups)
        first = plan.groups[0].start if sizes else depth
    else:
        check_num_removed(model.num_removed, depth)
        sizes = (model.num_removed + 1,) if model.num_removed else ()
        first = min(depth // 2, depth - model.num_removed - 1)
    job = Job(
        itemsize=_itemsize(model.dtype_name, getattr(config, "dtype", None)),
        group_sizes=sizes,
        first_merged=first,
        granularity=model.alpha.granularity,
        num_states=_num_states(model),
        block_size=data.block_size,
        batch_size=data.batch_size,
        num_positions=model.num_positions,
        num_calibration_tokens=data.num_calibration_tokens,
        eval_tokens=data.eval_tokens,
        searches=model.plan_path is None and model.plan_method in SEARCHES,
    )
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, Repair):
            repair = callback.config
            job = replace(job, repairs=repair.method != "none", pools=repair.pools)
        if isinstance(callback, ExportCheckpoint):
            job = replace(job, exports=callback.enabled)
    return job


def _itemsize(dtype: str, saved: torch.dtype | None) -> int:
    known = saved if dtype == "auto" else getattr(torch, dtype)
    return cast(torch.dtype, known or torch.float32).itemsize


def _num_states(model: AlphaModule) -> int:
    """Return how many numbers the optimiser keeps for each parameter, by a step on one."""
    parameter = nn.Parameter(torch.zeros(2))
    optimizer = model.optimizer([parameter])
    parameter.grad = torch.ones(2)
    optimizer.step()
    kept = optimizer.state[parameter].values()
    return sum(isinstance(x, torch.Tensor) and x.shape == parameter.shape for x in kept)
