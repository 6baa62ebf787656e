"""The LightningModule: a partially merged Llama whose alphas are its only trainable parameters."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from lmerge.activations import Pooling, layer_states
from lmerge.alpha_files import load_alphas
from lmerge.alphas import NEEDS_SIMILARITY, AlphaConfig, Alphas
from lmerge.cache import StateCache, keep_states
from lmerge.data.module import MMLUDataModule
from lmerge.data.records import ChoiceBatch, TextBatch
from lmerge.evaluate import Evaluation
from lmerge.gate import Check, GateConfig
from lmerge.llama import num_layers
from lmerge.losses import LossConfig, letter_prompts
from lmerge.merged import MergedLlama
from lmerge.objective import Objective
from lmerge.plan import (
    PLAN_METHODS,
    MergePlan,
    PlanMethod,
    check_num_removed,
    check_plan,
    layers_of_budget,
    make_plan,
)
from lmerge.runs import (
    RunState,
    checkpoint_state,
    read_checkpoint,
    read_plan,
    read_run,
    with_refits_of,
)
from lmerge.search import Candidate, SearchMethod, search_plan
from lmerge.similarity import Measure, similarity_matrix
from lmerge.source import Dtype, load_model, model_fingerprint

logger = logging.getLogger(__name__)


class AlphaModule(LightningModule):
    """Learns alphas by KL to the source, and evaluates source and merged model side by side.

    Args:
        source: Model to compress: hub id, local folder, GGUF file or the alias `smollm2-135m`.
        num_removed: Layers to remove; from 0 to the number of layers minus 1.
        budget: Share of the layers to remove, such as 20%; it takes the place of `num_removed`.
        plan: A plan.json that replaces the similarity and plan stages.
        plan_method: How the layers to merge are chosen: `block` (most similar ends), `tail` (the
            last layers, as MKA released it), `block_repaired` (the block of least KL after a refit)
            or `groups_repaired` (one or several groups of least KL after a refit).
        measure: Layer similarity that the plan is made on.
        pooling: Which token's state stands for a calibration prompt.
        alpha: What the alphas can express and where they start.
        loss: What the alphas are trained on.
        num_positions: Positions of each calibration block that the KL loss looks at; 0 is all.
        cache_dir: Folder where the source's states on the calibration blocks are kept on disk, for
            other runs too; null for the run's own.
        cache_memory: States up to this size stay in memory, larger ones are mapped from disk; in
            GiB, at least 0. With `cache_dir` they are always on disk.
        dtype: Dtype of the weights; `auto` keeps the checkpoint's.
        optimizer: Optimiser of the alphas.
        lr_scheduler: Learning-rate scheduler, stepped after each optimiser step.
        run_dir: Folder of the run's artefacts.
        seed: Seed of the positions that the loss looks at.
    """

    strict_loading = False  # a checkpoint holds the alphas, not the frozen weights

    def __init__(
        self,
        source: str = "smollm2-135m",
        num_removed: int = 3,
        budget: str | None = None,
        plan: str | None = None,
        plan_method: PlanMethod | SearchMethod = "block_repaired",
        measure: Measure = "angular",
        pooling: Pooling = "last",
        alpha: AlphaConfig = AlphaConfig(),  # noqa: B008 - frozen
        loss: LossConfig = LossConfig(),  # noqa: B008 - frozen
        num_positions: int = 64,
        cache_dir: str | None = None,
        cache_memory: float = 8.0,
        dtype: Dtype = "auto",
        optimizer: OptimizerCallable = torch.optim.Adam,
        lr_scheduler: LRSchedulerCallable | None = None,
        run_dir: str = "runs/default",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if num_positions < 0:
            raise ValueError(f"`num_positions` must be at least 0, got {num_positions}.")
        if not cache_memory >= 0:
            raise ValueError(f"`cache_memory` must be at least 0 GiB, got {cache_memory}. Try 8.")
        self.source_name = source
        self.num_removed = num_removed
        self.budget = budget
        self.plan_path = Path(plan) if plan else None
        self.plan_method = plan_method
        self.measure = measure
        self.pooling = pooling
        self.alpha = alpha
        self.loss = loss
        self.num_positions = num_positions
        self.cache_dir = Path(cache_dir) if cache_dir else None
        self.cache_memory = cache_memory
        self.dtype_name = dtype
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.run_dir = Path(run_dir)
        self.seed = seed
        self.results: dict[str, Any] = {}
        self.gate = GateConfig()
        self.checks: list[Check] = []
        self.similarity_LL: dict[str, Tensor] = {}
        self.candidates: list[Candidate] = []
        self.state: RunState | None = None
        self._ready = False
        self._cache: StateCache | None = None
        self._objective: Objective | None = None
        self.last_good: list[Alphas] | None = None

    # Preparation: source, plan, then (in the callback) orders.

    def check(self, stage: str, ckpt_path: str | None) -> None:
        """Load the source and what is saved of the merged model, and check that they fit.

        Args:
            stage: `fit`, `validate` or `test`.
            ckpt_path: Checkpoint that the stage starts from.

        Raises:
            ValueError: One line on a bad source, plan or setting; nothing has been written then.
        """
        self.source = load_model(self.source_name, self.dtype_name)
        depth, fingerprint = num_layers(self.source), model_fingerprint(self.source)
        if self.budget is not None:
            self.num_removed = layers_of_budget(self.budget, depth)
        if stage == "fit" and not ckpt_path and self.plan_path is None:
            check_num_removed(self.num_removed, depth)
            return
        self.state = self._saved_state(stage, ckpt_path)
        check_plan(self.state.plan, depth, fingerprint, self.plan_path or self.run_dir)
        self.state.plan = replace(self.state.plan, source=fingerprint)

    def _saved_state(self, stage: str, ckpt_path: str | None) -> RunState:
        if stage == "fit" and not ckpt_path:
            assert self.plan_path is not None
            return RunState(plan=read_plan(self.plan_path))
        saved = (
            read_checkpoint(Path(ckpt_path)) if ckpt_path and Path(ckpt_path).is_file() else None
        )
        if stage == "fit":
            # Alphas come from the checkpoint; refits of an earlier end of training do not.
            return saved or replace(read_run(self.run_dir), refits=None, kept_refits={})
        if saved is None:
            state = read_run(self.run_dir)
            if state.alphas is None:
                raise ValueError(
                    f"run folder {self.run_dir} holds no alphas.json: its fit did not finish. "
                    "Resume it with `lmerge fit --ckpt_path`, or give `--ckpt_path` here."
                )
            return state
        return with_refits_of(self.run_dir, saved)

    def prepare(self) -> RunState:
        """Return plan, orders and alphas, made at the first call; callbacks may call it early."""
        if not hasattr(self, "source"):
            self.check(str(self.trainer.state.fn), cast("str | None", self.trainer.ckpt_path))
        if self.state is None or not self._ready:
            cast(nn.Module, self.source).to(self.trainer.strategy.root_device)
            self.state = self.state or self._planned()
            self._ready = True
        return self.state

    def setup(self, stage: str) -> None:
        state = self.prepare()
        if stage == "fit" and not state.plan.groups:
            self.trainer.limit_train_batches = 0  # nothing merges, so nothing is to be learned

    def _planned(self) -> RunState:
        made = self._make_plan() if self.trainer.is_global_zero else None
        return RunState(plan=cast(MergePlan, self.trainer.strategy.broadcast(made)))

    def _make_plan(self) -> MergePlan:
        data = self.data()
        self._measure_similarity()
        provenance = {
            "source": model_fingerprint(self.source),
            "calibration": data.fingerprints["val"],
        }
        if self.plan_method in PLAN_METHODS or not self.num_removed:
            method: PlanMethod = "tail" if self.plan_method == "tail" else "block"
            return make_plan(self.similarity_LL["all"], self.num_removed, method, **provenance)
        blocks_BT, held_B = data.calibration_blocks(), data.held_out()
        self.candidates = search_plan(
            self.source, blocks_BT, held_B, self.num_removed, cast(SearchMethod, self.plan_method)
        )
        return MergePlan(
            num_layers=num_layers(self.source),
            groups=self.candidates[0].groups,
            method=self.plan_method,
            **provenance,
        )

    def _measure_similarity(self) -> None:
        states = {
            "/".join(key): layer_states(
                self.source, prompts, pooling=self.pooling, description=f"states {'/'.join(key)}"
            )
            for key, prompts in self.data().calibration_prompts().items()
        }
        self.similarity_LL = {
            name: similarity_matrix(states_LND, self.measure) for name, states_LND in states.items()
        }
        everything_LND = torch.cat(list(states.values()), dim=1)
        self.similarity_LL["all"] = similarity_matrix(everything_LND, self.measure)

    def _start_similarity(self) -> Tensor | None:
        """Return the similarity that the alphas start from, equal on all processes."""
        if self.alpha.start not in NEEDS_SIMILARITY or self.prepare().alphas is not None:
            return None
        if self.trainer.is_global_zero and not self.similarity_LL:
            self._measure_similarity()
        return self.trainer.strategy.broadcast(self.similarity_LL.get("all"))

    def data(self) -> MMLUDataModule:
        """Return the trainer's data module."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, MMLUDataModule)
        return data

    def configure_model(self) -> None:
        if hasattr(self, "merged"):
            return
        state = self.prepare()
        similarity_LL = self._start_similarity()
        merged = MergedLlama(self.source, state.plan, state.orders, self.alpha, similarity_LL)
        self.merged = merged
        if state.alphas is not None:
            self.merged.set_alphas(state.alphas)
        elif self.alpha.path is not None:
            self.merged.spread_alphas(load_alphas(Path(self.alpha.path), state.plan))
        if state.refits is not None:
            self.merged.set_refits(state.refits)
        for position, tensors in state.kept_refits.items():
            self.merged.refit_layer(position, tensors)

    # Training.

    def configure_optimizers(self) -> Any:
        parameters = list(self.merged.alpha_parameters().values())
        if not parameters:
            return []  # a plan that merges nothing
        optimizer = self.optimizer(parameters)
        if self.lr_scheduler is None:
            return optimizer
        schedule = {"scheduler": self.lr_scheduler(optimizer), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def on_fit_start(self) -> None:
        data, letters = self.data(), None
        if self.loss.answer:
            letters = letter_prompts(data.questions, data.tokenizer)
        self._objective = Objective(
            self.source,
            self.merged,
            self.cache(),
            self.loss,
            num_positions=self.num_positions,
            seed=self.seed,
            letters=letters,
        )

    def cache(self) -> StateCache:
        """Return the source's states on the calibration blocks, computed at the first call."""
        if self._cache is None:
            self._cache = keep_states(
                self.source,
                self.data().calibration_blocks(),
                self.merged.first_merged,
                folder=self.cache_dir or self.run_dir / "cache",
                memory=0.0 if self.cache_dir else self.cache_memory,
            )
        return self._cache

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the weighted sum of the losses.

        Raises:
            ValueError: When it is not finite; `last_good` are the alphas before.
        """
        assert self._objective is not None
        parts = self._objective(batch["index"].cpu(), self.global_step)
        for name, value in parts.items():
            self.log(
                f"train/{name}", value, prog_bar=name == "loss", batch_size=len(batch["index"])
            )
        if not parts["loss"].isfinite():
            raise ValueError(
                f"the loss must be finite, got {parts['loss'].item()} in step {self.global_step}. "
                "The last good alphas are kept in alphas.json; lower the learning rate."
            )
        self.last_good = self.merged.alphas()
        return parts["loss"]

    def on_train_epoch_end(self) -> None:
        for parameter in self.merged.alpha_parameters().values():
            if not parameter.isfinite().all():
                raise ValueError(
                    "the alphas became NaN or infinite in training. Lower the learning rate, or "
                    "resume from the last checkpoint."
                )

    # Checkpoints: alphas, plan and orders, not the frozen weights.

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        alphas = {f"merged.{name}" for name in self.merged.alpha_parameters()}
        checkpoint["state_dict"] = {
            name: value for name, value in checkpoint["state_dict"].items() if name in alphas
        }
        checkpoint["lmerge"] = checkpoint_state(self.prepare(), self.merged.alphas())

    # Evaluation: source and merged on the same batches.

    def on_validation_epoch_start(self) -> None:
        self._start_evaluation()

    def on_test_epoch_start(self) -> None:
        self._start_evaluation()

    def _start_evaluation(self) -> None:
        data = self.data()
        scorings = () if self.trainer.state.fn == "fit" else data.scorings
        self.evaluation = Evaluation(data.text_bytes, scorings, device=self.device)

    def validation_step(self, batch: TextBatch | ChoiceBatch, batch_idx: int) -> None:
        self.evaluation.update(self.source, self.merged.causal_lm, batch)

    def test_step(self, batch: TextBatch | ChoiceBatch, batch_idx: int) -> None:
        self.evaluation.update(self.source, self.merged.causal_lm, batch)

    def on_validation_epoch_end(self) -> None:
        self._finish_evaluation("val")

    def on_test_epoch_end(self) -> None:
        self._finish_evaluation("test")

    def _finish_evaluation(self, stage: str) -> None:
        data = self.data()
        self.results = self.evaluation.results(data.questions, data.domain_subjects)
        for name, models in self.results["text"].items():
            for key in ("loss", "ppl", "kl"):
                # Equal on every process: the mean over them is the value itself.
                self.log(f"{stage}/{key}/{name}", models["merged"][key], sync_dist=True)
        for scoring, models in self.results["choices"].items():
            for domain, rate in models["merged"]["by_domain"].items():
                name = f"{stage}/{scoring}_accuracy/{domain}"
                self.log(name, rate["accuracy"], sync_dist=True)
        del self.evaluation
