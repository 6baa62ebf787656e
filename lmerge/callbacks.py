"""Callbacks: when alignment, repair, artefacts and export happen; the functions decide what."""

from __future__ import annotations

import logging
from typing import cast

import numpy as np
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from matplotlib.figure import Figure
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lmerge.activations import neuron_activations
from lmerge.align import (
    BY_ACTIVATIONS,
    Aligner,
    Orders,
    Reference,
    align_group,
    matched_similarity,
    matrix_similarity,
    move,
)
from lmerge.cost import measure_costs
from lmerge.data.tokens import encode
from lmerge.export import export_model, model_card, verify_export, write_card
from lmerge.figures import (
    matching_figure,
    matrices_figure,
    save,
    search_figure,
    similarity_figure,
)
from lmerge.files import provenance, write_json
from lmerge.gate import check_gate, gate_notes, gate_rows
from lmerge.generation import NUM_TOKENS, PROMPTS, generation_sanity, greedy
from lmerge.llama import LayerTensors, decoder_layers, head_spec, layer_tensors
from lmerge.merged import members_in_one_frame
from lmerge.module import AlphaModule
from lmerge.plan import Group
from lmerge.progress import track
from lmerge.repair import RepairConfig, refit_groups
from lmerge.results import Row, print_table, table_rows, write_metrics
from lmerge.runs import (
    alignment_key,
    read_orders,
    write_alphas,
    write_orders,
    write_plan,
    write_refits,
)
from lmerge.source import model_fingerprint

logger = logging.getLogger(__name__)


def _module(pl_module: LightningModule) -> AlphaModule:
    assert isinstance(pl_module, AlphaModule)
    return pl_module


class HungarianAlignment(Callback):
    """Aligns every group's members to its anchor before the module merges them.

    What was found is kept in the run folder under `alignment_cache/`, by source, plan, method and
    calibration blocks, so that a later run with the same ones does not solve again.

    Args:
        method: `weights`, `activations` (their correlation on calibration tokens) or `both` match
            MLP neurons; `full` matches neurons by weights, and attention heads and their bases too;
            `rowwise` is the published procedure, which changes the function; `none` does nothing.
        reference: In groups of three and more, whether neurons are matched to the `anchor` or to
            all other members at once (`joint`).
        num_blocks: Calibration blocks for `activations` and `both`; at least 1.
    """

    def __init__(
        self, method: Aligner = "weights", reference: Reference = "anchor", num_blocks: int = 32
    ) -> None:
        if num_blocks < 1:
            raise ValueError(f"`num_blocks` must be at least 1, got {num_blocks}.")
        self.method = method
        self.reference = reference
        self.num_blocks = num_blocks
        self.similarity: dict[str, dict[int, Tensor]] = {"before": {}, "after": {}}
        self.matrices: dict[str, dict[int, dict[str, float]]] = {"before": {}, "after": {}}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        module = _module(pl_module)
        state = module.prepare()
        if stage == "fit" and not trainer.ckpt_path:
            solved = self._align(module) if trainer.is_global_zero else None
            state.orders = cast(Orders, trainer.strategy.broadcast(solved))

    def _align(self, module: AlphaModule) -> Orders:
        assert module.state is not None
        blocks_BT = self._blocks(module)
        path = module.run_dir / "alignment_cache" / f"{self._key(module, blocks_BT)}.safetensors"
        orders: Orders = read_orders(path) if path.is_file() else {}
        if orders:
            logger.info("alignment read from %s", path)
        for group in track(module.state.plan.groups, "alignment"):
            layers = members(module, group)
            if group.anchor not in orders:
                orders |= self._solve(module, group, layers, blocks_BT)
            self._measure(group, layers, orders)
        if orders and not path.is_file():
            write_orders(module.run_dir, orders, path)
        return orders

    def _blocks(self, module: AlphaModule) -> Tensor | None:
        if self.method not in BY_ACTIVATIONS:
            return None
        return module.data().calibration_blocks()[: self.num_blocks]

    def _key(self, module: AlphaModule, blocks_BT: Tensor | None) -> str:
        assert module.state is not None
        return alignment_key(
            model_fingerprint(module.source),
            module.state.plan,
            (self.method, self.reference),
            blocks_BT,
        )

    def _solve(
        self,
        module: AlphaModule,
        group: Group,
        layers: dict[int, LayerTensors],
        blocks_BT: Tensor | None,
    ) -> Orders:
        known = None
        if blocks_BT is not None:
            known = neuron_activations(module.source, group.members, blocks_BT)
        spec = head_spec(module.source.config)
        return align_group(
            group, layers, self.method, spec, reference=self.reference, activations=known
        )

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

    def _cosines(self, layer: int) -> str:
        before, after = (self.matrices[when][layer] for when in ("before", "after"))
        return ", ".join(f"{name} {before[name]:.3f} -> {after[name]:.3f}" for name in before)


def members(module: AlphaModule, group: Group) -> dict[int, LayerTensors]:
    """Return a group's layers in one frame of norms, by source layer."""
    layers = [layer_tensors(decoder_layers(module.source)[i]) for i in group.members]
    framed = members_in_one_frame(layers, [None] * len(layers), group.anchor_position)
    return dict(zip(group.members, framed, strict=True))


class Repair(Callback):
    """Refits the merged layers in closed form when training ends.

    Args:
        config: Method and regularisation.
    """

    def __init__(self, config: RepairConfig = RepairConfig()) -> None:  # noqa: B008 - frozen
        self.config = config

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module = _module(pl_module)
        if trainer.is_global_zero:
            states_BTD, held_B = module.cache().prefix_BTD, module.data().held_out()
            refit_groups(module.source, module.merged, states_BTD, held_B, self.config)
        module.merged.set_refits(trainer.strategy.broadcast(module.merged.refits()))


class Artefacts(Callback):
    """Writes what a run leaves behind: plan, orders, alphas, figures, metrics and the table."""

    @rank_zero_only
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module = _module(pl_module)
        assert module.state is not None
        write_plan(module.run_dir, module.state.plan)
        write_orders(module.run_dir, module.state.orders)
        write_similarity(trainer, module)
        write_search(trainer, module)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, HungarianAlignment) and callback.similarity["after"]:
                figure = matching_figure(**callback.similarity)
                log_figure(trainer, module, figure, "alignment/neurons")
                figure = matrices_figure(**callback.matrices)
                log_figure(trainer, module, figure, "alignment/matrices")
                write_json(
                    module.run_dir / "alignment" / "similarity.json",
                    {"method": callback.method, **_text_keys(callback.matrices)},
                    schema=1,
                )

    @rank_zero_only
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module = _module(pl_module)
        alphas, refits = module.merged.alphas(), module.merged.refits()
        write_alphas(module.run_dir, module.merged.plan, alphas)
        if any(refits):
            write_refits(module.run_dir, refits, alphas)

    @rank_zero_only
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        module = _module(pl_module)
        if module.last_good is not None and isinstance(exception, ValueError):
            write_alphas(module.run_dir, module.merged.plan, module.last_good)

    @rank_zero_only
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "validate":
            finish_evaluation(trainer, _module(pl_module), "validate")

    @rank_zero_only
    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        finish_evaluation(trainer, _module(pl_module), "test")


def _text_keys(matrices: dict[str, dict[int, dict[str, float]]]) -> dict[str, dict[str, object]]:
    return {when: {str(i): dict(v) for i, v in found.items()} for when, found in matrices.items()}


def write_similarity(trainer: Trainer, module: AlphaModule) -> None:
    """Write the similarity matrices of the plan stage and their figure."""
    matrices = module.similarity_LL
    if not matrices:
        return
    assert module.state is not None
    folder = module.run_dir / "similarity"
    folder.mkdir(parents=True, exist_ok=True)
    for name, matrix_LL in matrices.items():
        np.save(folder / f"{name.replace('/', '_')}.npy", matrix_LL.numpy(), allow_pickle=False)
    data = {"measure": module.measure, "pooling": module.pooling, "matrices": list(matrices)}
    write_json(folder / "similarity.json", {**data, "provenance": provenance()}, schema=1)
    figure = similarity_figure(matrices, module.measure, module.state.plan)
    log_figure(trainer, module, figure, "similarity/layers")


def write_search(trainer: Trainer, module: AlphaModule) -> None:
    """Write what the candidates of the plan search cost, and their figure."""
    if not module.candidates:
        return
    costs = [{"members": list(c.group.members), "kl": c.kl} for c in module.candidates]
    data = {"method": module.plan_method, "candidates": costs, "provenance": provenance()}
    write_json(module.run_dir / "plan" / "search.json", data, schema=1)
    log_figure(trainer, module, search_figure(module.candidates), "plan/search")


def log_figure(trainer: Trainer, module: AlphaModule, figure: Figure, name: str) -> None:
    """Save a figure in the run folder and show it in W&B."""
    path = module.run_dir / f"{name}.png"
    save(figure, path)
    for wandb_logger in trainer.loggers:
        if isinstance(wandb_logger, WandbLogger):
            wandb_logger.log_image(name, [str(path)])


def finish_evaluation(trainer: Trainer, module: AlphaModule, stage: str) -> None:
    """Measure costs, write metrics.json, print the table and bring the model card up to date."""
    data = module.data()
    models = {"source": module.source, "merged": module.merged.plain()}
    module.results["cost"] = measure_costs(models)
    module.results["generation"] = {
        name: write_on(model, data.tokenizer)
        for name, model in track(models.items(), "generation", total=2)
    }
    module.checks = check_gate(module.results, module.gate)
    module.results["gate"] = [check._asdict() for check in module.checks]
    write_metrics(
        module.run_dir,
        stage,
        {"source": module.source_name, "fingerprints": data.fingerprints, **module.results},
    )
    if module.journal is not None:
        module.journal.remove()
    rows = table_rows(module.results) + gate_rows(module.checks)
    print_table(rows, f"{module.source_name}: {stage} of source and merged model")
    for wandb_logger in trainer.loggers:
        if isinstance(wandb_logger, WandbLogger):
            wandb_logger.log_table(
                f"{stage}/results", ["what", "source", "merged"], [list(row) for row in rows]
            )
    if (module.run_dir / "model" / "config.json").is_file():
        write_card(module.run_dir / "model", card(module, rows))


def write_on(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, object]:
    """Return what a model writes after each of the prompts, and how much it repeats itself."""
    texts = greedy(model, [torch.tensor(ids) for ids in encode(tokenizer, PROMPTS)], NUM_TOKENS)
    written = {prompt: tokenizer.decode(ids) for prompt, ids in zip(PROMPTS, texts, strict=True)}
    return {**generation_sanity(texts), "texts": written}


def card(module: AlphaModule, rows: list[Row]) -> str:
    """Return the model card of the exported model."""
    plan = module.merged.plan
    return model_card(
        source=module.source_name,
        num_source_layers=plan.num_layers,
        num_layers=plan.num_layers - plan.num_removed,
        groups=[list(group.members) for group in plan.groups],
        table=rows,
        command=None,
        provenance=provenance(),
        notes=gate_notes(module.checks),
    )


class ExportCheckpoint(Callback):
    """Writes the merged model as a plain Hugging Face checkpoint when fitting ends.

    Args:
        enabled: Whether to write `model/` in the run folder.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled

    @rank_zero_only
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.enabled:
            return
        module = _module(pl_module)
        data, folder = module.data(), module.run_dir / "model"
        plain = module.merged.plain()
        export_model(plain, data.tokenizer, folder, card=card(module, []), overwrite=True)
        difference = verify_export(folder, plain, data.calibration_blocks()[:1])
        logger.info("exported to %s; reloaded logits differ by at most %.1e", folder, difference)
