"""What the alphas are trained on: a weighted sum of losses, each a function of tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lmerge.data.prompts import prompt_text
from lmerge.data.records import Question
from lmerge.data.tokens import encode, letter_ids
from lmerge.divergence import wide
from lmerge.llama import embed, lm_logits, run_span, span
from lmerge.plan import MergePlan
from lmerge.progress import track

LossName = Literal["kl", "state", "answer"]

LOSS_NAMES: tuple[LossName, ...] = ("kl", "state", "answer")


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights of the losses whose sum the alphas minimise; 0 leaves one out, and its cost."""

    kl: float = 1.0
    """KL from the source's next-token distribution, in nats a token; needs no labels."""
    state: float = 0.0
    """Relative squared error of each group's output state, given the source's own input; local,
    so the layers above are not run."""
    answer: float = 0.0
    """Cross-entropy on the answer letter of validation questions, in nats. Accuracy on those
    questions then says nothing; measure it on others."""
    num_top: int = 0
    """Most probable tokens of the source that `kl` compares one by one, the others as one
    remainder; 0 compares all. The truncated KL is at most the exact one."""
    num_questions: int = 4
    """Questions that `answer` looks at in a step; at least 1."""

    def __post_init__(self) -> None:
        weights = [getattr(self, name) for name in LOSS_NAMES]
        if not all(math.isfinite(w) and w >= 0 for w in weights) or not any(weights):
            raise ValueError(
                f"the weights `loss.kl`, `loss.state` and `loss.answer` must be finite and at "
                f"least 0, and one above 0, got {weights}. Use kl 1 alone to start with."
            )
        if self.num_top < 0 or self.num_questions < 1:
            raise ValueError(
                f"`loss.num_top` must be at least 0 and `loss.num_questions` at least 1, got "
                f"{self.num_top} and {self.num_questions}. Raise them."
            )


def relative_error(output_BTD: Tensor, target_BTD: Tensor) -> Tensor:
    """Return the squared error relative to the target's square, mean over positions.

    Relative at each position, since a few tokens with massive activations otherwise decide all.
    """
    target_BTD = wide(target_BTD)
    error_BT = (wide(output_BTD) - target_BTD).square().sum(dim=-1)
    return (error_BT / target_BTD.square().sum(dim=-1).clamp_min(1e-12)).mean()


class GroupStates(NamedTuple):
    """The source's states around one group on the calibration blocks, on the CPU."""

    input_BTD: Tensor
    output_BTD: Tensor


@torch.no_grad()
def group_states(
    source: PreTrainedModel, prefix_BTD: Tensor, plan: MergePlan, *, batch_size: int = 4
) -> list[GroupStates]:
    """Return the source's states before and after each group.

    Args:
        source: The source model.
        prefix_BTD: Input of the first group's first layer.
        plan: The groups.
        batch_size: Blocks in one forward pass.
    """
    states, found, start = prefix_BTD, [], plan.groups[0].start
    for group in track(plan.groups, "group states"):
        before = _run(source, states, start, group.start, batch_size)
        states, start = _run(source, before, group.start, group.stop, batch_size), group.stop
        found.append(GroupStates(before, states))
    return found


def _run(
    source: PreTrainedModel, states_BTD: Tensor, start: int, stop: int, batch_size: int
) -> Tensor:
    if start == stop:
        return states_BTD
    part = span(source, start, stop)
    parts = [run_span(part, s.to(source.device)).cpu() for s in states_BTD.split(batch_size)]
    return torch.cat(parts)


class LetterPrompts(NamedTuple):
    """Zero-shot letter prompts of questions, unpadded, since their lengths differ."""

    prompts: list[Tensor]
    """Token ids of each prompt (T,)."""
    answer_N: Tensor
    """Index of the right choice (int64)."""
    letter_4: Tensor
    """Token ids of the letters (int64)."""


def letter_prompts(questions: list[Question], tokenizer: PreTrainedTokenizerBase) -> LetterPrompts:
    """Return the prompts that `answer_loss` is computed on."""
    texts = [prompt_text(question, [], "letter") for question in questions]
    return LetterPrompts(
        [torch.tensor(ids) for ids in encode(tokenizer, texts)],
        torch.tensor([question.answer for question in questions]),
        torch.tensor(letter_ids(tokenizer)),
    )


def answer_loss(model: PreTrainedModel, letters: LetterPrompts, index_B: list[int]) -> Tensor:
    """Return the cross-entropy of the right letter among all tokens, in nats a question.

    Each prompt runs alone, so that no padding can reach its states.
    """
    losses = []
    for i in index_B:
        states_BTD = _last_state(model, letters.prompts[i].to(model.device)[None])
        target = letters.letter_4[letters.answer_N[i]].to(model.device)
        logits_BV = wide(lm_logits(model, states_BTD[:, -1]))
        losses.append(torch.nn.functional.cross_entropy(logits_BV, target[None]))
    return torch.stack(losses).mean()


def _last_state(model: PreTrainedModel, token_BT: Tensor) -> Tensor:
    states: Tensor = model.model(
        inputs_embeds=embed(model, token_BT), use_cache=False
    ).last_hidden_state
    return states
