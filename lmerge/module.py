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
from transformers import PreTrainedModel

from lmerge.activations import Pooling, layer_states
from lmerge.alphas import AlphaConfig
from lmerge.cache import StateCache, cache_states
from lmerge.data.module import MMLUDataModule
from lmerge.data.records import ChoiceBatch, TextBatch
from lmerge.evaluate import Evaluation
from lmerge.gate import Check, GateConfig
from lmerge.llama import lm_logits, num_layers, run_span, span
from lmerge.merged import MergedLlama
from lmerge.plan import MergePlan, PlanMethod, check_num_removed, check_plan, make_plan
from lmerge.runs import (
    RunState,
    checkpoint_state,
    read_checkpoint,
    read_plan,
    read_run,
    with_refits_of,
)
from lmerge.similarity import Measure, similarity_matrix
from lmerge.source import Dtype, load_model, model_fingerprint

logger = logging.getLogger(__name__)


class AlphaModule(LightningModule):
    """Learns alphas by KL to the source, and evaluates source and merged model side by side.

    Args:
        source: Model to compress: hub id, local folder, GGUF file or the alias `smollm2-135m`.
        num_removed: Layers to remove; from 0 to the number of layers minus 1.
        plan: A plan.json that replaces the similarity and plan stages.
        plan_method: How the layers to merge are chosen.
        measure: Layer similarity that the plan is made on.
        pooling: Which token's state stands for a calibration prompt.
        alpha: What the alphas can express and where they start.
        num_positions: Positions of each calibration block that the KL loss looks at; 0 is all.
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
        plan: str | None = None,
        plan_method: PlanMethod = "block",
        measure: Measure = "angular",
        pooling: Pooling = "last",
        alpha: AlphaConfig = AlphaConfig(),  # noqa: B008 - frozen
        num_positions: int = 64,
        dtype: Dtype = "auto",
        optimizer: OptimizerCallable = torch.optim.Adam,
        lr_scheduler: LRSchedulerCallable | None = None,
        run_dir: str = "runs/default",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if num_positions < 0:
            raise ValueError(f"`num_positions` must be at least 0, got {num_positions}.")
        self.source_name = source
        self.num_removed = num_removed
        self.plan_path = Path(plan) if plan else None
        self.plan_method = plan_method
        self.measure = measure
        self.pooling = pooling
        self.alpha = alpha
        self.num_positions = num_positions
        self.dtype_name = dtype
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.run_dir = Path(run_dir)
        self.seed = seed
        self.results: dict[str, Any] = {}
        self.gate = GateConfig()
        self.checks: list[Check] = []
        self.similarity_LL: dict[str, Tensor] = {}
        self.state: RunState | None = None
        self._ready = False
        self._cache: StateCache | None = None
        self._suffix: tuple[PreTrainedModel, ...] = ()

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
            return saved or replace(read_run(self.run_dir), refits=None)
        if saved is None:
            return read_run(self.run_dir)
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
        states = {
            "/".join(key): layer_states(
                self.source, prompts, pooling=self.pooling, description=f"states {'/'.join(key)}"
            )
            for key, prompts in data.calibration_prompts().items()
        }
        self.similarity_LL = {
            name: similarity_matrix(states_LND, self.measure) for name, states_LND in states.items()
        }
        everything_LND = torch.cat(list(states.values()), dim=1)
        self.similarity_LL["all"] = similarity_matrix(everything_LND, self.measure)
        return make_plan(
            self.similarity_LL["all"],
            self.num_removed,
            self.plan_method,
            source=model_fingerprint(self.source),
            calibration=data.fingerprints["val"],
        )

    def data(self) -> MMLUDataModule:
        """Return the trainer's data module."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, MMLUDataModule)
        return data

    def configure_model(self) -> None:
        if hasattr(self, "merged"):
            return
        state = self.prepare()
        self.merged = MergedLlama(self.source, state.plan, state.orders, self.alpha)
        if state.alphas is not None:
            self.merged.set_alphas(state.alphas)
        if state.refits is not None:
            self.merged.set_refits(state.refits)

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
        self.cache()
        top = num_layers(self.merged.causal_lm)
        # In a tuple, so that its shared modules are not registered a second time.
        self._suffix = (
            span(self.merged.causal_lm, self.merged.first_merged, top, final_norm=True),
        )

    def cache(self) -> StateCache:
        """Return the source's states on the calibration blocks, computed at the first call."""
        if self._cache is None:
            blocks_BT = self.data().calibration_blocks()
            self._cache = cache_states(self.source, blocks_BT, self.merged.first_merged)
        return self._cache

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return KL(source || merged) in nats a token, over sampled positions of the blocks."""
        cache, index_B = self.cache(), batch["index"].cpu()
        states_BTD = run_span(self._suffix[0], cache.prefix_BTD[index_B].to(self.device))
        final_BTD = cache.final_BTD[index_B].to(self.device)
        place_P = self._positions(states_BTD.shape[1])
        with torch.no_grad():
            logp = lm_logits(self.source, final_BTD[:, place_P]).float().log_softmax(dim=-1)
        logq = lm_logits(self.source, states_BTD[:, place_P]).float().log_softmax(dim=-1)
        loss = (logp.exp() * (logp - logq)).sum(dim=-1).mean()
        self.log("train/kl", loss, prog_bar=True, batch_size=len(index_B))
        return loss

    def _positions(self, length: int) -> Tensor:
        if not 0 < self.num_positions < length:
            return torch.arange(length, device=self.device)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.global_step)
        return torch.randperm(length, generator=generator)[: self.num_positions].to(self.device)

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
