"""The callback that aligns the members of every group before the module merges them."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from filelock import FileLock
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lmerge.activations import neuron_activations
from lmerge.align import BY_ACTIVATIONS, WITHOUT_ORDER, Aligner, Orders, Reference, move
from lmerge.alignment_jobs import Method, Task, align_tasks
from lmerge.frames import members_in_one_frame
from lmerge.groups import is_joint
from lmerge.llama import LayerTensors, decoder_layers, head_spec, layer_tensors
from lmerge.module import AlphaModule
from lmerge.neurons import matched_similarity, matrix_similarity
from lmerge.plan import Group
from lmerge.progress import track
from lmerge.runs import alignment_key, read_orders, write_orders
from lmerge.soft import TEMPERATURE, check_temperature, load_pot
from lmerge.source import model_fingerprint

logger = logging.getLogger(__name__)


class HungarianAlignment(Callback):
    """Aligns every group's members to its anchor before the module merges them.

    What was found is kept in `model.cache_dir`, or in the run folder under `alignment_cache/`, by
    source, plan, method and calibration blocks, so that another run with the same ones does not
    solve again. A run that is killed in between keeps the layers that it has aligned.

    Args:
        method: `weights`, `activations` (their correlation on calibration tokens) or `both` match
            MLP neurons; `full` matches neurons by weights, and attention heads and their bases too;
            `soft` blends neurons by entropic optimal transport, which changes the function a
            little (needs the extra `soft`); `rowwise` is the published procedure, which changes
            the function; `none` does nothing.
        reference: In groups of three and more, whether neurons are matched to the `anchor` or to
            all other members at once (`joint`).
        num_blocks: Calibration blocks for `activations` and `both`; at least 1.
        temperature: Of `soft`, in units of the neuron similarity; above 0, near 0 is `weights`.
        num_jobs: Pairs that are aligned at the same time, in processes; at least 1. Each needs
            memory for one pair: for 14,336 neurons by weights 1 GiB beside the weights.
    """

    def __init__(
        self,
        method: Aligner = "weights",
        reference: Reference = "anchor",
        num_blocks: int = 32,
        temperature: float = TEMPERATURE,
        num_jobs: int = 1,
    ) -> None:
        for name, count in {"num_blocks": num_blocks, "num_jobs": num_jobs}.items():
            if count < 1:
                raise ValueError(f"`alignment.{name}` must be at least 1, got {count}.")
        check_temperature(temperature)
        if method == "soft":
            load_pot()
        if reference == "joint" and method in WITHOUT_ORDER:
            logger.warning("`alignment.reference` joint is ignored by the method `%s`", method)
        self.method = method
        self.reference = reference
        self.num_blocks = num_blocks
        self.temperature = temperature
        self.num_jobs = num_jobs
        self.similarity: dict[str, dict[int, Tensor]] = {"before": {}, "after": {}}
        self.matrices: dict[str, dict[int, dict[str, float]]] = {"before": {}, "after": {}}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        assert isinstance(pl_module, AlphaModule)
        state = pl_module.prepare()
        if stage == "fit" and not trainer.ckpt_path:
            solved = self._align(pl_module) if trainer.is_global_zero else None
            state.orders = cast(Orders, trainer.strategy.broadcast(solved))

    def _align(self, module: AlphaModule) -> Orders:
        assert module.state is not None
        groups = module.state.plan.groups
        blocks_BT = self._blocks(module)
        folder = module.cache_dir or module.run_dir / "alignment_cache"
        path = folder / f"{self._key(module, blocks_BT)}.safetensors"
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):  # the trials of a sweep come at the same time
            orders: Orders = read_orders(path) if path.is_file() else {}
            if orders:
                logger.info("alignment read from %s", path)
            else:
                parts = path.with_suffix(".parts")
                orders = self._solve(module, groups, blocks_BT, parts)
                if orders:
                    write_orders(module.run_dir, orders, path)
                shutil.rmtree(parts, ignore_errors=True)
        for group in track(groups, "matched similarity"):
            self._measure(group, members(module, group), orders)
        return orders

    def _blocks(self, module: AlphaModule) -> Tensor | None:
        if self.method not in BY_ACTIVATIONS:
            return None
        return module.data().calibration_blocks()[: self.num_blocks]

    def _key(self, module: AlphaModule, blocks_BT: Tensor | None) -> str:
        assert module.state is not None
        method: tuple[str, ...] = (self.method, self.reference)
        if self.method == "soft":
            method += (repr(self.temperature),)
        fingerprint = model_fingerprint(module.source)
        return alignment_key(fingerprint, module.state.plan, method, blocks_BT)

    def _solve(
        self, module: AlphaModule, groups: Sequence[Group], blocks_BT: Tensor | None, parts: Path
    ) -> Orders:
        """Align all groups; what is found is kept in `parts`, where a killed run left off."""
        method = Method(
            aligner=self.method,
            spec=head_spec(module.source.config),
            reference=self.reference,
            temperature=self.temperature,
        )
        orders: Orders = {}
        for part in sorted(parts.glob("*.safetensors")):
            orders |= read_orders(part)
        if orders:
            logger.info("%d layers were aligned before", len(orders))
        left = {group: _left(group, orders) for group in groups}
        tasks = (self._task(module, g, layers, blocks_BT) for g, layers in left.items() if layers)
        num_pairs = sum(
            1 if is_joint(group.members, self.method, self.reference) else len(layers)
            for group, layers in left.items()
            if layers
        )
        solved = align_tasks(tasks, method, num_jobs=self.num_jobs)
        for found in track(solved, "alignment", total=num_pairs):
            if found:
                write_orders(module.run_dir, found, parts / f"{min(found)}.safetensors")
            orders |= found
        return orders

    def _task(
        self, module: AlphaModule, group: Group, left: Sequence[int], blocks_BT: Tensor | None
    ) -> Task:
        known = None
        if blocks_BT is not None:
            known = neuron_activations(module.source, group.members, blocks_BT)
        wanted = {group.anchor, *left}
        framed = {i: layer for i, layer in members(module, group).items() if i in wanted}
        return Task(group.anchor, framed, known)

    def _measure(self, group: Group, layers: dict[int, LayerTensors], orders: Orders) -> None:
        anchor, same = layers[group.anchor], torch.arange(len(layers[group.anchor]["gate_proj"]))
        for i in group.members:
            if i == group.anchor:
                continue
            moved = move(layers[i], orders[i])
            for when, layer in {"before": layers[i], "after": moved}.items():
                self.similarity[when][i] = matched_similarity(anchor, layer, same)
                self.matrices[when][i] = matrix_similarity(anchor, layer)
            before, after = (self.similarity[when][i].mean() for when in ("before", "after"))
            logger.info(
                "layer %d aligned to %d: mean neuron similarity %.3f -> %.3f; cosine %s",
                *(i, group.anchor, before, after, self._cosines(i)),
            )

    def means(self) -> dict[str, float]:
        """Return the means over all aligned layers, as `alignment/before/q_proj`.

        `neurons` is the similarity of paired neurons; the others are cosines with the anchor's
        matrices.
        """
        found = {}
        for when, layers in self.matrices.items():
            neurons = torch.cat(list(self.similarity[when].values()))
            found[f"alignment/{when}/neurons"] = float(neurons.mean())
            for name in next(iter(layers.values())):
                cosines = [layer[name] for layer in layers.values()]
                found[f"alignment/{when}/{name}"] = sum(cosines) / len(cosines)
        return found

    def _cosines(self, layer: int) -> str:
        before, after = (self.matrices[when][layer] for when in ("before", "after"))
        return ", ".join(f"{name} {before[name]:.3f} -> {after[name]:.3f}" for name in before)


def _left(group: Group, orders: Orders) -> list[int]:
    return [i for i in group.members if i != group.anchor and i not in orders]


def members(module: AlphaModule, group: Group) -> dict[int, LayerTensors]:
    """Return a group's layers in one frame of norms, by source layer."""
    layers = [layer_tensors(decoder_layers(module.source)[i]) for i in group.members]
    framed = members_in_one_frame(layers, [None] * len(layers), group.anchor_position)
    return dict(zip(group.members, framed, strict=True))
