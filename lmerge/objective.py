"""The training objective: losses on calibration blocks, from cached states of the source."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lmerge.cache import StateCache
from lmerge.divergence import (
    Targets,
    TopLogits,
    exact_kl,
    head_kl,
    source_targets,
    top_logits,
    truncated_kl,
)
from lmerge.llama import decoder_layers, head_weight, lm_logits, num_layers, run_span, span
from lmerge.losses import (
    LOSS_NAMES,
    GroupStates,
    LetterPrompts,
    LossConfig,
    answer_loss,
    group_states,
    relative_error,
)
from lmerge.merged import MergedLlama
from lmerge.progress import track


class Objective:
    """Losses of a merged model on given calibration blocks; all that is constant is kept.

    Args:
        source: The source model.
        merged: The merged model.
        cache: The source's states on the calibration blocks.
        config: Weights of the losses.
        num_positions: Positions of each block that `kl` looks at; 0 is all.
        seed: Seed of the positions and of the questions.
        letters: Prompts of `answer`; needed where its weight is not 0.
    """

    def __init__(
        self,
        source: PreTrainedModel,
        merged: MergedLlama,
        cache: StateCache,
        config: LossConfig,
        *,
        num_positions: int = 0,
        seed: int = 0,
        letters: LetterPrompts | None = None,
    ) -> None:
        self.source, self.merged, self.cache, self.config = source, merged, cache, config
        self.num_positions, self.seed, self.letters = num_positions, seed, letters
        top = num_layers(merged.causal_lm)
        self.suffix = span(merged.causal_lm, merged.first_merged, top, final_norm=True)
        self.layers = [
            span(merged.causal_lm, i, i + 1) for i in map(merged.plan.position, merged.plan.groups)
        ]
        self.groups: list[GroupStates] = []
        if config.state and merged.plan.groups:
            self.groups = group_states(source, cache.prefix_BTD, merged.plan)
        self.top = self._top_logits() if config.kl and config.num_top else None
        self.kept: Targets | None = None
        self.is_kept_B = torch.zeros(len(cache.final_BTD), dtype=torch.bool)

    @torch.no_grad()
    def _top_logits(self) -> TopLogits:
        parts = [
            top_logits(lm_logits(self.source, s_TD.to(self.source.device)), self.config.num_top)
            for s_TD in track(self.cache.final_BTD, "source logits")
        ]
        return TopLogits(*(torch.stack(part).cpu() for part in zip(*parts, strict=True)))

    def __call__(self, index_B: Tensor, step: int) -> dict[str, Tensor]:
        """Return each loss that has a weight, and `loss`, their weighted sum.

        Args:
            index_B: Calibration blocks, on the CPU.
            step: Optimiser step, which decides on positions and questions.
        """
        parts: dict[str, Tensor] = {}
        if self.config.kl:
            parts["kl"] = self._kl(index_B, step)
        if self.config.state:
            parts["state"] = self._state(index_B)
        if self.config.answer:
            parts["answer"] = self._answer(step)
        weighted = [getattr(self.config, n) * parts[n] for n in LOSS_NAMES if n in parts]
        return {**parts, "loss": torch.stack(weighted).sum() if len(weighted) > 1 else weighted[0]}

    def _kl(self, index_B: Tensor, step: int) -> Tensor:
        device = self.source.device
        states_BTD = run_span(self.suffix, self.cache.prefix_BTD[index_B].to(device))
        place_P = self.positions(states_BTD.shape[1], step)
        merged_ND = states_BTD[:, place_P.to(device)].flatten(0, 1)
        head_VD = head_weight(self.source)
        if self.top is not None:
            rows = self.top.rows((index_B[:, None], place_P))
            top = TopLogits(*(part.to(device).flatten(0, 1) for part in rows))
            return truncated_kl(top, lm_logits(self.source, merged_ND))
        if head_VD is not None and self._keeps_targets(len(place_P), head_VD):
            return head_kl(merged_ND, self._targets(index_B, head_VD), head_VD)
        final_ND = self.cache.final_BTD[index_B][:, place_P].to(device).flatten(0, 1)
        if head_VD is not None:
            return head_kl(merged_ND, final_ND, head_VD)
        with torch.no_grad():
            source_NV = lm_logits(self.source, final_ND)
        return exact_kl(source_NV, lm_logits(self.source, merged_ND))

    def _keeps_targets(self, num_positions: int, head_VD: Tensor) -> bool:
        """Whether the targets of whole blocks are computed once: they cost two logits a position.

        A sample of positions comes back too seldom for that, and 16 bits are too few.
        """
        whole = num_positions == self.cache.final_BTD.shape[1]
        mixed = torch.is_autocast_enabled(self.source.device.type)
        return whole and not mixed and head_VD.dtype in (torch.float32, torch.float64)

    def _targets(self, index_B: Tensor, head_VD: Tensor) -> Targets:
        """Return the targets of whole blocks; those of a block are computed at its first visit."""
        final_BTD = self.cache.final_BTD
        if self.kept is None:
            plogp_BT = torch.empty(final_BTD.shape[:2], dtype=head_VD.dtype)
            self.kept = Targets(self.cache.room(head_VD.dtype), plogp_BT)
        for i in index_B[~self.is_kept_B[index_B]].unique().tolist():
            for kept, found in zip(
                self.kept, source_targets(final_BTD[i].to(head_VD.device), head_VD), strict=True
            ):
                kept[i] = found
            self.is_kept_B[i] = True
        return Targets(*(kept[index_B].to(head_VD.device).flatten(0, 1) for kept in self.kept))

    def _state(self, index_B: Tensor) -> Tensor:
        device, errors = self.source.device, []
        for layer, states in zip(self.layers, self.groups, strict=True):
            assert len(decoder_layers(layer)) == 1
            output_BTD = run_span(layer, states.input_BTD[index_B].to(device))
            errors.append(relative_error(output_BTD, states.output_BTD[index_B].to(device)))
        return torch.stack(errors).mean()

    def _answer(self, step: int) -> Tensor:
        assert self.letters is not None
        order = self._random(len(self.letters.prompts), step)
        return answer_loss(
            self.merged.causal_lm, self.letters, order[: self.config.num_questions].tolist()
        )

    def positions(self, length: int, step: int) -> Tensor:
        """Return the positions of a block that `kl` looks at in a step, on the CPU."""
        if not 0 < self.num_positions < length:
            return torch.arange(length)
        return self._random(length, step)[: self.num_positions]

    def _random(self, length: int, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        return torch.randperm(length, generator=generator)
