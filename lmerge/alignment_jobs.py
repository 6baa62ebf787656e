"""Alignment of many pairs of layers, one after the other or in processes beside this one.

A process beside this one reads its layers from a file that it maps, and leaves its answer in
another: nothing is pickled but names and numbers, and no more files than processes exist at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from torch import Tensor

from lmerge.align import Aligner, Orders, Reference
from lmerge.files import read_tensors, write_tensors
from lmerge.groups import align_members, is_joint
from lmerge.llama import HeadSpec, LayerTensors
from lmerge.runs import read_orders, write_orders
from lmerge.soft import TEMPERATURE


@dataclass(frozen=True, kw_only=True)
class Method:
    """How layers are aligned; plain values, which other processes can be sent."""

    aligner: Aligner
    """What is matched, and by what."""
    spec: HeadSpec
    """How the attention is cut into heads."""
    reference: Reference = "anchor"
    """Whether neurons are matched to the anchor's, or to all other members'."""
    temperature: float = TEMPERATURE
    """Of the aligner `soft`; above 0."""


class Task(NamedTuple):
    """Members of a group that are aligned together."""

    anchor: int
    layers: Mapping[int, LayerTensors]
    """The members in one frame of norms, by source layer."""
    activations: Mapping[int, Tensor] | None = None
    """Neuron activations (N, F) of each member, for some aligners."""


def align_tasks(tasks: Iterable[Task], method: Method, *, num_jobs: int = 1) -> Iterator[Orders]:
    """Yield how the members of the tasks are moved, pair by pair where that is possible.

    Args:
        tasks: Taken one by one, when a process is free for them.
        method: How they are aligned.
        num_jobs: Processes; 1 works in this one. Each needs room for one pair of layers at a time.
    """
    if num_jobs == 1:
        yield from (solve(pair, method) for pair in _pairs(tasks, method))
        return
    threads = max(1, torch.get_num_threads() // num_jobs)
    # A forked process could wait for ever on a thread that it did not inherit.
    with (
        TemporaryDirectory(prefix="lmerge-") as folder,
        ProcessPoolExecutor(
            num_jobs,
            mp_context=get_context("spawn"),
            initializer=torch.set_num_threads,
            initargs=(threads,),
        ) as pool,
    ):
        waiting: deque[tuple[Path, Future[None]]] = deque()
        for number, task in enumerate(_pairs(tasks, method)):
            if len(waiting) == num_jobs:
                yield _answer(*waiting.popleft())
            path = Path(folder) / str(number)
            write_tensors(path, _flat(task), {})
            waiting.append((path, pool.submit(_solve_file, path, task.anchor, method)))
        while waiting:
            yield _answer(*waiting.popleft())


def solve(task: Task, method: Method) -> Orders:
    """Return how the members of a task are moved; the anchor is left as it is."""
    return align_members(
        task.anchor,
        task.layers,
        method.aligner,
        method.spec,
        reference=method.reference,
        activations=task.activations,
        temperature=method.temperature,
    )


def _pairs(tasks: Iterable[Task], method: Method) -> Iterator[Task]:
    """Cut the tasks whose members are aligned to the anchor alone into pairs."""
    for anchor, layers, activations in tasks:
        if is_joint(tuple(layers), method.aligner, method.reference):
            yield Task(anchor, layers, activations)
            continue
        for i in layers:
            if i != anchor:
                pair = (anchor, i)
                known = activations and {j: activations[j] for j in pair}
                yield Task(anchor, {j: layers[j] for j in pair}, known)


def _flat(task: Task) -> dict[str, Tensor]:
    tensors = {
        f"{i}/{name}": tensor for i, layer in task.layers.items() for name, tensor in layer.items()
    }
    return tensors | {f"{i}/activations": act for i, act in (task.activations or {}).items()}


def _solve_file(path: Path, anchor: int, method: Method) -> None:
    """Solve the task in a file and leave the answer beside it (in another process)."""
    tensors, _ = read_tensors(path)
    layers: dict[int, LayerTensors] = {}
    activations = {}
    for key, tensor in tensors.items():
        layer, _slash, name = key.partition("/")
        if name == "activations":
            activations[int(layer)] = tensor
        else:
            layers.setdefault(int(layer), {})[name] = tensor
    orders = solve(Task(anchor, layers, activations or None), method)
    write_orders(path.parent, orders, path.with_suffix(".answer"))


def _answer(path: Path, future: Future[None]) -> Orders:
    future.result()
    answer = path.with_suffix(".answer")
    orders = read_orders(answer)
    for file_path in (path, answer):
        file_path.unlink()
    return orders
