"""The LightningModule: a partially merged Llama whose alphas are its only trainable parameters."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from lmerge.activations import Pooling
from lmerge.alphas import NEEDS_SIMILARITY, AlphaConfig
from lmerge.cache import StateCache, keep_states
from lmerge.checkpoints import checkpoint_state
from lmerge.good_alphas import GoodAlphas, check_alphas_finite
from lmerge.information import InformationConfig
from lmerge.kept import kept_plan
from lmerge.llama import num_layers
from lmerge.losses import LossConfig, letter_prompts
from lmerge.merged import MergedLlama
from lmerge.objective import Objective
from lmerge.plan import (
    MergePlan,
    PlanMethod,
    check_num_removed,
    check_plan,
    layers_of_budget,
)
from lmerge.preparation import (
    alphas_of_file,
    check_fits,
    choose_plan,
    saved_state,
    similarity_by_domain,
)
from lmerge.runs import RunState
from lmerge.search import Candidate, SearchMethod
from lmerge.sharding import shard_layers
from lmerge.side_by_side import SideBySide
from lmerge.similarity import Measure
from lmerge.source import Dtype, load_model, model_fingerprint


class AlphaModule(SideBySide):
    """Learns alphas by KL to the source; `SideBySide` evaluates what comes out.

    Args:
        source: Model to compress: hub id, local folder, GGUF file or the alias `smollm2-135m`.
        num_removed: Layers to remove; from 0 to the number of layers minus 1.
        budget: Share of the layers to remove, such as 20%; it takes the place of `num_removed`.
        plan: A plan.json that replaces the similarity and plan stages.
        plan_method: How the layers to merge are chosen: `block` (most similar ends), `tail` (the
            last layers, as MKA released it), `block_repaired` (the block of least KL after a refit)
            or `groups_repaired` (one or several groups of least KL after a refit).
        measure: Layer similarity that the plan is made on.
        information: Options of the measures `npib`, `gaussian_nmi` and `gaussian_nmi_bounded`.
        pooling: Which token's state stands for a calibration prompt.
        alpha: What the alphas can express and where they start.
        loss: What the alphas are trained on.
        num_positions: Positions of each calibration block that the KL loss looks at; 0 is all.
        cache_dir: Folder where the plan, the neuron orders and the source's states on the
            calibration blocks are kept, for other runs too; null for the run's own.
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
        information: InformationConfig = InformationConfig(),  # noqa: B008 - frozen
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
        self.information = information
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
        self.similarity_LL: dict[str, Tensor] = {}
        self.candidates: list[Candidate] = []
        self.state: RunState | None = None
        self._ready = False
        self._cache: StateCache | None = None
        self._objective: Objective | None = None
        self._good = GoodAlphas()

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
        self.state = saved_state(stage, ckpt_path, run_dir=self.run_dir, plan_path=self.plan_path)
        if self.state is not None:
            check_plan(self.state.plan, depth, fingerprint, self.plan_path or self.run_dir)
            check_fits(self.state, self.source)
        if stage == "fit" and not ckpt_path and self.alpha.path is not None:
            self.state = alphas_of_file(self.state, self.alpha, self.source)
        if self.state is None:
            check_num_removed(self.num_removed, depth)
        else:
            self.state.plan = replace(self.state.plan, source=fingerprint)

    def prepare(self) -> RunState:
        """Return plan, orders and alphas, made at the first call; callbacks may call it early."""
        if not hasattr(self, "source"):
            self.check(str(self.trainer.state.fn), cast("str | None", self.trainer.ckpt_path))
        if self.state is None or not self._ready:
            if not self.is_sharded:  # a model that is to be split may not fit whole
                cast(nn.Module, self.source).to(self.trainer.strategy.root_device)
            self.state = self.state or self._planned()
            self._ready = True
        return self.state

    def setup(self, stage: str) -> None:
        state = self.prepare()
        if stage == "fit" and not state.plan.groups:
            self.trainer.limit_train_batches = 0  # nothing merges, so nothing is to be learned

    def _planned(self) -> RunState:
        made = self._kept_plan() if self.trainer.is_global_zero else None
        return RunState(plan=cast(MergePlan, self.trainer.strategy.broadcast(made)))

    def _kept_plan(self) -> MergePlan:
        if self.cache_dir is None:
            return self._make_plan()
        how = (self.num_removed, self.plan_method, self.measure, self.information, self.pooling)
        prompts = [p for prompts in self.data().calibration_prompts().values() for p in prompts]
        tokens = (*prompts, self.data().calibration_blocks(), self.data().held_out())
        return kept_plan(
            self.cache_dir, model_fingerprint(self.source), how, tokens, self._make_plan
        )

    def _make_plan(self) -> MergePlan:
        self._measure_similarity()
        source, data, similarity_LL = self.source, self.data(), self.similarity_LL["all"]
        plan, self.candidates = choose_plan(
            source, data, self.num_removed, self.plan_method, similarity_LL
        )
        return plan

    def _measure_similarity(self) -> None:
        self.similarity_LL = similarity_by_domain(
            self.source, self.data(), self.measure, self.pooling, self.information
        )

    def _start_similarity(self) -> Tensor | None:
        """Return the similarity that the alphas start from, equal on all processes."""
        if self.alpha.start not in NEEDS_SIMILARITY or self.prepare().alphas is not None:
            return None
        if self.trainer.is_global_zero and not self.similarity_LL:
            self._measure_similarity()
        return self.trainer.strategy.broadcast(self.similarity_LL.get("all"))

    def configure_model(self) -> None:
        if hasattr(self, "merged"):
            return
        state = self.prepare()
        similarity_LL = self._start_similarity()
        self.merged = MergedLlama(self.source, state.plan, state.orders, self.alpha, similarity_LL)
        if state.alphas is not None:
            self.merged.set_alphas(state.alphas)
        self.merged.set_refits(state.refits, state.kept_refits)
        if self.device_mesh is not None:
            shard_layers(self.source, self.merged, self.device_mesh)

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
            memory = 0.0 if self.cache_dir else self.cache_memory
            self._cache = keep_states(
                self.source,
                self.data().calibration_blocks(),
                self.merged.first_merged,
                folder=self.cache_dir or self.run_dir / "cache",
                # Split layers run on all processes at once: none can wait for another's file.
                memory=math.inf if self.is_sharded else memory,
            )
        return self._cache

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the weighted sum of the losses.

        Raises:
            ValueError: When it is not finite; `restore_good` brings back the alphas before.
        """
        assert self._objective is not None
        parts = self._objective(batch["index"].cpu(), self.global_step)
        for name, value in parts.items():
            self.log(
                f"train/{name}", value, prog_bar=name == "loss", batch_size=len(batch["index"])
            )
        self._good.check(parts["loss"], self.global_step)
        self._good.keep(self.merged.alpha_parameters().values())
        return parts["loss"] * batch["share"]

    def on_after_backward(self) -> None:
        """Average the gradients over processes where no strategy does it: alphas are not split."""
        if self.is_sharded:
            for parameter in self.merged.alpha_parameters().values():
                assert parameter.grad is not None
                self.trainer.strategy.reduce(parameter.grad, reduce_op="mean")

    def restore_good(self) -> bool:
        """Go back to the last alphas with a finite loss; returns whether there are any."""
        # A fit that failed before the model was put together has no alphas.
        return bool(self._good) and self._good.restore(self.merged.alpha_parameters().values())

    def on_train_epoch_end(self) -> None:
        check_alphas_finite(self.merged.alpha_parameters().values())

    # Checkpoints: alphas, plan and orders, not the frozen weights.

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Return the alphas alone."""
        parameters = self.merged.alpha_parameters().items()
        return {f"merged.{name}": parameter.detach() for name, parameter in parameters}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["lmerge"] = checkpoint_state(self.prepare(), self.merged.alphas())
