"""Calibration prompts, loaders of blocks, and batches on a device."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from itertools import cycle, groupby, islice
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from lmerge.data.prompts import prompt_text
from lmerge.data.records import ChoiceBatch, Question, TextBatch
from lmerge.data.tokens import encode

logger = logging.getLogger(__name__)

BatchT = TypeVar("BatchT", bound=ChoiceBatch | TextBatch)
DomainSubjects = Mapping[str, Sequence[str]]


class BlockDataset(Dataset[dict[str, Tensor]]):
    """Some of the token blocks: {"index": (), "token_BT": (T,)} before batching.

    Args:
        token_BT: All blocks.
        kept_N: Positions of the blocks to serve; `index` is such a position.
    """

    def __init__(self, token_BT: Tensor, kept_N: Tensor) -> None:
        self.token_BT = token_BT
        self.kept_N = kept_N

    def __len__(self) -> int:
        return len(self.kept_N)

    def __getitem__(self, place: int) -> dict[str, Tensor]:
        index = self.kept_N[place]
        return {"index": index, "token_BT": self.token_BT[index]}


class ShuffledOrder(DistributedSampler[int]):
    """A new order for each epoch that depends on the seed and the epoch alone.

    Being a distributed sampler, it is not replaced by Lightning. Process r of w takes every w-th
    index from r on, so that w processes with batches of b see what one sees with batches of w * b.

    Args:
        size: Number of samples; where it does not divide evenly, the first ones repeat.
        seed: Seed of all orders.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size = size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Do nothing: Lightning counts an interrupted epoch as done, so the loader counts."""

    def __len__(self) -> int:
        return -(-self.size // world()[1])

    @property
    def num_repeats(self) -> int:
        """Samples that are served twice: the last one of each of the last processes."""
        return len(self) * world()[1] - self.size

    def __iter__(self) -> Iterator[int]:
        rank, num_processes = world()
        order = permutation(self.size, self.seed * 1_000_003 + self.epoch)
        order += islice(cycle(order), self.num_repeats)
        return iter(order[rank::num_processes])


def world() -> tuple[int, int]:
    """Return the rank of this process and the number of processes."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


class ResumableLoader(DataLoader[dict[str, Tensor]]):
    """A loader with a `ShuffledOrder` that goes on where a checkpoint was written.

    Each batch gets `share`, by which its mean loss is to be multiplied so that the mean over
    processes is the mean over the different samples of the global batch: 1, but for the last batch
    of an epoch where samples repeat. Repeated samples are left out, or, where a process has nothing
    else, served with share 0.
    """

    _skip = 0
    _served = 0

    def __iter__(self) -> Iterator[dict[str, Tensor]]:  # type: ignore[override]
        skip, self._skip = self._skip, 0
        self._served = skip
        for batch in islice(super().__iter__(), skip, None):
            self._served += 1
            repeats = 0
            if self._served == len(self):
                repeats = self._order().num_repeats
                self._next_epoch()
            yield without_repeats(batch, repeats, *world())

    def _next_epoch(self) -> None:
        self._served = 0
        self._order().epoch += 1

    def _order(self) -> ShuffledOrder:
        assert isinstance(self.sampler, ShuffledOrder)
        return self.sampler

    def state_dict(self) -> dict[str, int]:
        """Return the epoch and how many of its batches were served; Lightning checkpoints this."""
        return {"epoch": self._order().epoch, "served": self._served}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on after the batches that were served before the checkpoint."""
        self._order().epoch, self._skip = state["epoch"], state["served"]


def without_repeats(
    batch: dict[str, Tensor], num_repeats: int, rank: int, num_processes: int
) -> dict[str, Tensor]:
    """Return a process's batch without its repeated sample, and with its `share`.

    Args:
        batch: As many samples as each other process has, the repeated one last.
        num_repeats: Repeated samples of the global batch, one on each of the last processes.
        rank: This process.
        num_processes: All processes.
    """
    size = len(batch["index"])
    own = size - (rank >= num_processes - num_repeats)
    share = num_processes * own / (num_processes * size - num_repeats)
    kept = {name: value[: max(own, 1)] for name, value in batch.items()}
    return {**kept, "share": torch.tensor(share)}


def in_rounds(batches: Sequence[BatchT], num_processes: int) -> list[BatchT]:
    """Return the batches with the last of each kind repeated to a multiple of `num_processes`.

    Processes that take turns then hold batches of one kind at the same time, and so make equally
    many passes through a model that is split over them. Metrics count a repeated batch once.
    """
    found: list[BatchT] = []
    for _, same in groupby(batches, key=type):
        kind = list(same)
        found += kind + kind[-1:] * (-len(kind) % num_processes)
    return found


def by_domain_language(
    questions: Sequence[Question], domain_subjects: DomainSubjects
) -> dict[tuple[str, str], list[Question]]:
    """Return the questions of each (domain, language) that has any; domains may overlap."""
    groups: dict[tuple[str, str], list[Question]] = {}
    for domain, subjects in domain_subjects.items():
        for question in questions:
            if question.subject in subjects:
                groups.setdefault((domain, question.language), []).append(question)
    return groups


def sample_prompts(
    questions: Sequence[Question],
    domain_subjects: DomainSubjects,
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_prompts: int,
    seed: int,
) -> dict[tuple[str, str], list[Tensor]]:
    """Return zero-shot letter prompts of each (domain, language), as token ids (T,).

    The sample is drawn among the ids of a domain, so that languages share the questions that both
    have, in the same order. A group with fewer than `num_prompts` questions gives all it has.
    """
    groups = by_domain_language(questions, domain_subjects)
    prompts = {}
    for (domain, language), group in groups.items():
        ids = list(
            dict.fromkeys(q.id for (name, _), g in groups.items() if name == domain for q in g)
        )
        rank = {ids[i]: position for position, i in enumerate(permutation(len(ids), seed))}
        chosen = sorted(group, key=lambda question: rank[question.id])[:num_prompts]
        if len(chosen) < num_prompts:
            message = "%s (%s): %d calibration prompts, since there are no more questions"
            logger.info(message, domain, language, len(chosen))
        texts = [prompt_text(question, [], "letter") for question in chosen]
        prompts[domain, language] = [torch.tensor(ids) for ids in encode(tokenizer, texts)]
    return prompts


def context_length(config: PretrainedConfig) -> int:
    """Return the tokens that every layer of a model can see."""
    window = getattr(config, "sliding_window", None)
    limits = [config.max_position_embeddings, window]
    return min(int(limit) for limit in limits if limit)


def to_device(batch: BatchT, device: torch.device) -> BatchT:
    """Return the batch with its tensors on a device; the fields are frozen, so it is a new one."""
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}
    moved: dict[str, Any] = {
        name: value.to(device) for name, value in values.items() if isinstance(value, Tensor)
    }
    return replace(batch, **moved)


def permutation(length: int, seed: int) -> list[int]:
    """Return the numbers below `length` in an order that `seed` decides."""
    order: list[int] = torch.randperm(
        length, generator=torch.Generator().manual_seed(seed)
    ).tolist()
    return order
