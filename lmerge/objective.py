"""The training objective: losses on calibration blocks, from cached states of the source."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lmerge.cache import StateCache
from lmerge.llama import decoder_layers, lm_logits, num_layers, run_span, span
from lmerge.losses import (
    LOSS_NAMES,
    GroupStates,
    LetterPrompts,
    LossConfig,
    TopLogits,
    answer_loss,
    exact_kl,
    group_states,
    relative_error,
    top_logits,
    truncated_kl,
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
        merged_BPV = lm_logits(self.source, states_BTD[:, place_P.to(device)])
        if self.top is not None:
            rows = self.top.rows((index_B[:, None], place_P))
            return truncated_kl(TopLogits(*(part.to(device) for part in rows)), merged_BPV)
        with torch.no_grad():
            final_BPD = self.cache.final_BTD[index_B][:, place_P].to(device)
            source_BPV = lm_logits(self.source, final_BPD)
        return exact_kl(source_BPV, merged_BPV)

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
