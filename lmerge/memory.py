"""Expected memory of a fit on one process, from the numbers in a model's config.

Nothing is loaded. Peaks are told by stage; what a stage has freed does not count in the next.
docs/memory.md compares them with what was measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from transformers import PretrainedConfig

from lmerge.alphas import Granularity
from lmerge.divergence import CHUNK_SIZE as TRAIN_CHUNK
from lmerge.llama import HeadSpec, head_spec
from lmerge.neuron_pool import room_of
from lmerge.score import CHUNK_SIZE as EVAL_CHUNK

Setup = Literal["cpu", "gpu", "ddp", "fsdp2"]

SETUPS: tuple[Setup, ...] = ("cpu", "gpu", "ddp", "fsdp2")

FLOAT, DOUBLE = 4, 8
OTHER = 150 * 2**20
"""What a process without a GPU takes beside tensors and beyond its imports: libraries that load
late, texts, buffers of the matrix products; measured."""
STATES_BATCH = 4
"""Blocks in a pass that computes states, in the cache and in the repair."""
SEARCH_TOKENS = 6144 + 1024
"""Calibration tokens that a plan search looks at."""
SEARCH_POSITIONS = 4 * 64
"""Positions whose logits it compares."""


class Sizes(NamedTuple):
    """Numbers of a model."""

    num_layers: int
    width: int
    num_neurons: int
    num_tokens: int
    """Of the vocabulary."""
    heads: HeadSpec
    is_tied: bool

    @property
    def layer(self) -> int:
        """Parameters of a layer."""
        inner = self.heads.num_heads * self.heads.head_dim
        attention = 2 * self.width * (inner + self.heads.num_kv_heads * self.heads.head_dim)
        return attention + 3 * self.width * self.num_neurons + 2 * self.width

    @property
    def ends(self) -> int:
        """Parameters of embedding, final norm and head."""
        return self.num_tokens * self.width * (1 if self.is_tied else 2) + self.width


def sizes_of(config: PretrainedConfig) -> Sizes:
    """Return the numbers of a model from its config."""
    return Sizes(
        num_layers=config.num_hidden_layers,
        width=config.hidden_size,
        num_neurons=config.intermediate_size,
        num_tokens=config.vocab_size,
        heads=head_spec(config),
        is_tied=bool(config.tie_word_embeddings),
    )


@dataclass(frozen=True, kw_only=True)
class Job:
    """What of a run decides how much memory it takes."""

    itemsize: int
    """Bytes of a weight."""
    group_sizes: tuple[int, ...]
    """Layers of each group."""
    first_merged: int
    """Index of the first merged layer."""
    granularity: Granularity = "neuron"
    """Granularity of the alphas."""
    num_states: int = 2
    """Tensors that the optimiser keeps for each alpha."""
    block_size: int = 256
    """Tokens in a block."""
    batch_size: int = 4
    """Blocks in a training batch of one process."""
    num_positions: int = 64
    """Positions of each block that the KL looks at; 0 is all."""
    num_calibration_tokens: int = 16_384
    """Tokens whose states are kept."""
    eval_tokens: int = 2048
    """Tokens in an evaluation batch."""
    searches: bool = True
    """Whether the plan is made by a search that runs the model."""
    repairs: bool = True
    """Whether the merged layers are refitted."""
    pools: bool = False
    """Whether the neurons of the merged layers are chosen among those of all members."""
    exports: bool = True
    """Whether the merged model is exported, and loaded again to check it."""


def expected_bytes(sizes: Sizes, job: Job, setup: Setup, num_processes: int = 8) -> dict[str, int]:
    """Return the bytes of each part and the peak of each stage, on one process of a setup.

    Args:
        sizes: Numbers of the model.
        job: The run.
        setup: `cpu` is one process without a GPU; the others tell the memory of one GPU, and of
            the process that drives it as `host`.
        num_processes: Processes that `fsdp2` splits the layers over.
    """
    split = num_processes if setup == "fsdp2" else 1
    layer = sizes.layer * job.itemsize
    weights = sizes.ends * job.itemsize + sizes.num_layers * layer // split
    members = sum(job.group_sizes) * layer // split
    states = _states(sizes, job)
    parts = {
        "source weights": weights,
        "members of the groups": members,
        "layers put together": max(job.group_sizes, default=1) * layer if split > 1 else 0,
        "merged weights, their gradients": 2 * len(job.group_sizes) * layer,
        "alphas, gradients, optimiser": (3 + job.num_states) * FLOAT * _num_alphas(sizes, job),
        "activations": _activations(sizes, job),
        "logits": _train_logits(sizes, job),
        "states of the source": states if setup == "cpu" else 0,
        "other": OTHER if setup == "cpu" else 0,
    }
    kept = weights + members + parts["layers put together"] + parts["states of the source"]
    kept += parts["alphas, gradients, optimiser"] + parts["other"]
    whole = sizes.ends * job.itemsize + sizes.num_layers * layer
    merged = whole - (sum(job.group_sizes) - len(job.group_sizes)) * layer
    # Split layers are planned, repaired and exported by other commands on one process.
    alone = split == 1
    peaks = {
        "plan": weights + parts["other"] + _search(sizes, job, setup)
        if job.searches and alone
        else 0,
        "training": sum(parts.values()),
        "repair": kept + _repair(sizes, job) if job.repairs and alone else 0,
        "evaluation": kept + len(job.group_sizes) * layer + _evaluation(sizes, job),
        "export": kept + merged + _check(sizes, job) if job.exports and alone else 0,
    }
    host = 0 if setup == "cpu" else whole + sum(job.group_sizes) * layer * (split > 1) + states
    return {**parts, **peaks, "peak": max(peaks.values()), "host": host}


def _num_alphas(sizes: Sizes, job: Job) -> int:
    """Return the alphas of all groups."""
    heads = sizes.heads
    inner, keys = heads.num_heads * heads.head_dim, heads.num_kv_heads * heads.head_dim
    each = {
        "layer": 1,
        "tensor": 7,
        "head": 2 * heads.num_heads + 2 * heads.num_kv_heads + 3,
        "neuron": 2 * inner + 2 * keys + 3 * sizes.num_neurons,
    }[job.granularity]
    return sum(job.group_sizes) * each


def _states(sizes: Sizes, job: Job) -> int:
    """Return the bytes of the states below the merge and above the model on all blocks."""
    tokens = job.num_calibration_tokens * sizes.width
    targets = FLOAT * tokens if job.num_positions == 0 and job.itemsize == FLOAT else 0
    return 2 * tokens * job.itemsize + targets


def _activations(sizes: Sizes, job: Job) -> int:
    """Return the bytes that a training step keeps for its way back.

    Frozen matrices need no inputs: what counts are norms, attention and the gated product. A
    merged layer keeps the inputs of its matrices too. The way back holds about a layer more.
    """
    heads = sizes.heads
    inner = heads.num_heads * heads.head_dim
    norms = 2 * sizes.width * FLOAT
    plain = norms + job.itemsize * (4 * inner + 3 * sizes.num_neurons)
    merged = plain + job.itemsize * (2 * sizes.width + sizes.num_neurons)
    removed = sum(job.group_sizes) - len(job.group_sizes)
    above = sizes.num_layers - removed - job.first_merged
    layers = (above + 1) * plain + len(job.group_sizes) * (merged - plain)
    return job.batch_size * job.block_size * layers


def _train_logits(sizes: Sizes, job: Job) -> int:
    """Return the bytes of the logits that exist at once: of both models, and what is summed."""
    positions = job.batch_size * (job.num_positions or job.block_size)
    return 5 * min(positions, TRAIN_CHUNK) * sizes.num_tokens * FLOAT


def _pass(sizes: Sizes, tokens: int, itemsize: int) -> int:
    """Return the bytes of a layer's work on some tokens where nothing is kept."""
    inner = sizes.heads.num_heads * sizes.heads.head_dim
    return tokens * itemsize * (3 * sizes.num_neurons + 2 * inner + 3 * sizes.width)


def _evaluation(sizes: Sizes, job: Job) -> int:
    """Return the bytes of scoring a batch with both models."""
    logits = 6 * min(EVAL_CHUNK, job.eval_tokens) * sizes.num_tokens * FLOAT
    final = 2 * job.eval_tokens * sizes.width * job.itemsize
    return max(_pass(sizes, job.eval_tokens, job.itemsize), logits + final)


def _repair(sizes: Sizes, job: Job) -> int:
    """Return the bytes of the normal equations in float64, of a batch of rows and all states."""
    pool = max(job.group_sizes, default=1) * sizes.num_neurons
    features = min(pool, room_of(sizes.num_neurons)) if job.pools else sizes.num_neurons
    rows = STATES_BATCH * job.block_size * DOUBLE * (3 * features + 4 * sizes.width)
    lists = 4 * job.num_calibration_tokens * sizes.width * job.itemsize
    return 5 * features**2 * DOUBLE + rows + lists


def _check(sizes: Sizes, job: Job) -> int:
    """Return the bytes of the logits of a block under the exported model and the one in memory."""
    return 4 * job.block_size * sizes.num_tokens * DOUBLE


def _search(sizes: Sizes, job: Job, setup: Setup) -> int:
    """Return the bytes of a plan search: equations, and the states between all layers on a CPU."""
    tokens = min(SEARCH_TOKENS, job.num_calibration_tokens)
    states = (sizes.num_layers + 2) * tokens * sizes.width * job.itemsize
    gram = sizes.num_neurons**2 * DOUBLE
    logits = 6 * SEARCH_POSITIONS * sizes.num_tokens * FLOAT
    return max(4 * gram, logits) + (states if setup == "cpu" else 0)
