"""Does a plan made on one domain serve another? Plans, refitted models, and losses by question.

One layer stands for a group of layers, refitted in closed form: what a plan costs is what remains
after the repair. Models share everything below their first group with the source, so the states of
all texts are moved up once, layer by layer, and each model starts where it differs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from lmerge.activations import batch_by_length
from lmerge.alphas import AlphaConfig
from lmerge.data.records import IGNORE
from lmerge.information import InformationConfig
from lmerge.llama import decoder_layers, embed, lm_logits, num_layers, run_span, span
from lmerge.merged import MergedLlama
from lmerge.plan import Group, MergePlan, block_groups
from lmerge.repair import RepairConfig, refit_groups
from lmerge.search import SearchMethod
from lmerge.similarity import Measure, similarity_matrix
from lmerge.transfer_data import DomainTexts

Rule = Measure | SearchMethod
"""How a plan is made: the block that a measure finds most alike, or a search by cost."""

Groups = tuple[Group, ...]
"""Disjoint groups of layers in rising order; each becomes one layer."""

MIXED = "mixed"
"""Name of the text that holds as much of every domain."""

CHUNK = 256
"""Positions whose logits exist at once."""


def mixed_texts(texts: Mapping[str, DomainTexts]) -> DomainTexts:
    """Return texts of the size of one domain that are taken from all in turn; nothing measured.

    The blocks are a part of the domains' own.
    """
    prompts = [prompt for group in texts.values() for prompt in group.prompts]
    return DomainTexts(prompts, mixed([group.blocks_BT for group in texts.values()]), [])


def mixed(blocks: Sequence[Tensor]) -> Tensor:
    """Return as many blocks as one domain has, taken from all domains in turn."""
    count = len(blocks)
    # Shifted by one each round, so that the held-out blocks are not all of one domain.
    return torch.stack([blocks[(i + i // count) % count][i] for i in range(len(blocks[0]))])


def similar_groups(
    states_LND: Tensor, measure: Measure, num_removed: int, information: InformationConfig
) -> Groups:
    """Return the block whose ends a measure finds most alike; undefined pairs are never chosen.

    Raises:
        ValueError: When the measure is undefined for every block.
    """
    matrix_LL = similarity_matrix(states_LND, measure, information, allow_undefined=True)
    ends = matrix_LL.diagonal(num_removed)
    if not ends[: max(len(ends) - 1, 1)].isfinite().any():  # `block` leaves the last layer alone
        raise ValueError(
            f"`{measure}` must be defined for some block of {num_removed + 1} layers, got none. "
            "Use more prompts, another `information.sigma`, or another measure."
        )
    return block_groups(matrix_LL.nan_to_num(nan=-math.inf), num_removed)


class Batch(NamedTuple):
    """Questions of about one length, padded on the right, where a causal model cannot see it."""

    index_B: Tensor
    """Place of each question among those of its domain."""
    target_BT: Tensor
    """Next-token ids; `IGNORE` where nothing is predicted."""


class States(NamedTuple):
    """All texts at the input of one layer of the source."""

    layer: int
    blocks: dict[str, Tensor]
    """Domain -> calibration blocks (B, T, D)."""
    questions: dict[str, list[Tensor]]
    """Domain -> batches of questions (B, T, D)."""


@torch.no_grad()
def first_states(
    source: PreTrainedModel, texts: Mapping[str, DomainTexts], *, tokens_per_batch: int = 2048
) -> tuple[States, dict[str, list[Batch]]]:
    """Return the embedded texts and the targets of the questions."""
    blocks = {name: _embedded(source, group.blocks_BT) for name, group in texts.items()}
    questions: dict[str, list[Tensor]] = {}
    batches: dict[str, list[Batch]] = {}
    for name, group in texts.items():
        lengths = [len(row_T) for row_T in group.questions]
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        for chosen in batch_by_length(order, lengths, tokens_per_batch):
            rows = [group.questions[i] for i in chosen]
            token_BT = pad_sequence(rows, batch_first=True)
            target_BT = pad_sequence(
                [F.pad(row_T[1:], (0, 1), value=IGNORE) for row_T in rows],
                batch_first=True,
                padding_value=IGNORE,
            )
            batches.setdefault(name, []).append(Batch(torch.tensor(chosen), target_BT))
            questions.setdefault(name, []).append(_embedded(source, token_BT))
    return States(0, blocks, questions), batches


def _embedded(source: PreTrainedModel, token_BT: Tensor) -> Tensor:
    return embed(source, token_BT.to(source.device)).cpu()


@torch.no_grad()
def raised(source: PreTrainedModel, states: States, layer: int) -> States:
    """Return the states at the input of a higher layer of the source."""
    part = span(source, states.layer, layer)
    if not len(decoder_layers(part)):
        return states
    return States(
        layer,
        {name: _run(part, x_BTD) for name, x_BTD in states.blocks.items()},
        {name: [_run(part, x_BTD) for x_BTD in group] for name, group in states.questions.items()},
    )


def _run(part: PreTrainedModel, state_BTD: Tensor) -> Tensor:
    return torch.cat([run_span(part, x.to(part.device)).cpu() for x in state_BTD.split(16)])


def merged_model(
    source: PreTrainedModel, groups: Groups, prefix_BTD: Tensor, held_B: Tensor
) -> PreTrainedModel:
    """Return the source with each group of layers replaced by its refitted anchor.

    Args:
        source: The source model.
        groups: The groups.
        prefix_BTD: Calibration blocks at the input of the first group.
        held_B: Which of them choose the regularisation (bool).
    """
    plan = MergePlan(num_layers=num_layers(source), groups=groups)
    merged = MergedLlama(source, plan, {}, AlphaConfig(granularity="layer"))
    refit_groups(source, merged, prefix_BTD, held_B, RepairConfig())
    return merged.plain()


@torch.no_grad()
def question_nats(
    model: PreTrainedModel, states: States, batches: Mapping[str, Sequence[Batch]]
) -> dict[str, list[float]]:
    """Return the summed negative log-likelihood (nats) of each question of each domain.

    Args:
        model: A model that equals the source below the layer of the states.
        states: The questions at the input of that layer.
        batches: Their targets.
    """
    above = span(model, states.layer, num_layers(model), final_norm=True)
    nats: dict[str, list[float]] = {}
    for name, group in batches.items():
        nats_N = torch.zeros(sum(len(batch.index_B) for batch in group), dtype=torch.float64)
        for batch, state_BTD in zip(group, states.questions[name], strict=True):
            nats_N[batch.index_B] = _row_nats(model, _run(above, state_BTD), batch.target_BT)
        nats[name] = nats_N.tolist()
    return nats


def _row_nats(model: PreTrainedModel, normed_BTD: Tensor, target_BT: Tensor) -> Tensor:
    real_BT = target_BT != IGNORE
    nll_BT = torch.zeros(target_BT.shape, dtype=torch.float64)
    parts = [
        F.cross_entropy(
            lm_logits(model, x_ND.to(model.device)).float(), y_N.to(model.device), reduction="none"
        )
        for x_ND, y_N in zip(
            normed_BTD[real_BT].split(CHUNK), target_BT[real_BT].split(CHUNK), strict=True
        )
    ]
    nll_BT[real_BT] = torch.cat(parts).double().cpu()
    return nll_BT.sum(dim=1)
