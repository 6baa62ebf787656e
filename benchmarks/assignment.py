"""Time the alignment of one pair of MLPs: scipy's dense solver, `lap`, and lmerge's.

Run `python benchmarks/assignment.py` (`pip install lap` for its column). From bfloat16 weights to
the order of the neurons, so with the cost: scipy and `lap` get the float32 similarity, lmerge its
8-bit sketch where that pays. Each case has a process of its own, whose peak memory is read before
the other solvers run. Three kinds of pairs: `planted` (the same layer in another order, with noise:
each row's best column is its partner), `related` (each neuron keeps a share of 0 to 0.3 of its
partner, as in neighbouring layers), `unrelated` (nothing in common).

The last line is one JSON object on the largest size: the speedups, cost included, are those of the
`related` pair, which is what merging meets; gap and memory are the largest of the three kinds.

`--parallel 2` measures instead two related pairs in two processes beside this one.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from lmerge.alignment_jobs import Method, Task, align_tasks
from lmerge.assignment import Assignment, assign
from lmerge.llama import HeadSpec, LayerTensors
from lmerge.neurons import neuron_similarity
from lmerge.sketch import best_similarity

WIDTHS = {1536: 576, 4096: 1024, 14336: 4096}
"""Neurons -> hidden width, as in SmolLM2-135M, a 0.5B and Llama-3-8B."""
KINDS = ("planted", "related", "unrelated")


def layer(num_neurons: int, width: int, seed: int) -> LayerTensors:
    """Random weights in bfloat16 whose input directions decay like a trained layer's."""
    g = torch.Generator().manual_seed(seed)
    decay_D = torch.arange(1, width + 1).float() ** -0.25

    def matrix() -> Tensor:
        return (torch.randn(num_neurons, width, generator=g) * decay_D).bfloat16()

    return {"gate_proj": matrix(), "up_proj": matrix(), "down_proj": matrix().T}


def partner(anchor: LayerTensors, kind: str, seed: int) -> LayerTensors:
    """The other layer of a pair."""
    num_neurons, width = anchor["gate_proj"].shape
    fresh = layer(num_neurons, width, seed)
    if kind == "unrelated":
        return fresh
    g = torch.Generator().manual_seed(seed)
    order_F = torch.randperm(num_neurons, generator=g)
    share_F1 = 0.3 * torch.rand(num_neurons, 1, generator=g)
    if kind == "planted":
        share_F1 = torch.full((num_neurons, 1), 0.9)
    other_F1 = (1 - share_F1.square()).sqrt()
    for name, weight in fresh.items():
        old = anchor[name].T if name == "down_proj" else anchor[name]
        new = weight.T if name == "down_proj" else weight
        for rows in torch.arange(num_neurons).split(1024):
            mixed = share_F1[rows] * old[order_F[rows]] + other_F1[rows] * new[rows]
            new[rows] = mixed.bfloat16()
    return fresh


def timed(function: Callable[..., Any], *args: Any) -> tuple[Any, float]:
    """Return what a function returns, and the seconds it took."""
    start = time.perf_counter()
    found = function(*args)
    return found, time.perf_counter() - start


def run_case(num_neurons: int, kind: str) -> dict[str, Any]:
    """Time one pair of layers, from bfloat16 weights to the order."""
    anchor = layer(num_neurons, WIDTHS[num_neurons], 0)
    member = partner(anchor, kind, 1)
    similarity, ours_cost_s = timed(best_similarity, anchor, member)
    ours, ours_s = timed(assign, similarity)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    case = {"F": num_neurons, "kind": kind, "peak_gib": peak}
    case |= {"ours_cost_s": ours_cost_s, "ours_s": ours_s, "proven_gap": ours.gap / ours.total}
    dense = isinstance(similarity, Tensor)
    del similarity
    similarity_FF, case["cost_s"] = timed(neuron_similarity, anchor, member)
    if not dense:
        case["ours_on_float32_s"] = timed(assign, similarity_FF)[1]
    return case | other_solvers(similarity_FF, ours)


def other_solvers(similarity_FF: Tensor, ours: Assignment) -> dict[str, float]:
    """Time the dense solvers, and compare the totals on the float32 similarity."""
    matrix = similarity_FF.numpy()
    (rows, columns), scipy_s = timed(lambda: linear_sum_assignment(matrix, maximize=True))
    best = float(matrix[rows, columns].astype(float).sum())
    total = float(matrix[rows, ours.order_F.numpy()].astype(float).sum())
    found = {"scipy_s": scipy_s, "below_scipy": (best - total) / best}
    try:
        import lap  # optional: the bench extra
    except ImportError:
        return found
    cost = -matrix
    return found | {"lap_s": timed(lap.lapjv, cost)[1]}


def speedup(case: dict[str, Any], solver: str) -> float:
    """Return how much faster lmerge is, with the cost of either side."""
    other: float = case["cost_s"] + case[f"{solver}_s"]
    return other / (case["ours_cost_s"] + case["ours_s"])


def resident() -> float:
    """Return the memory of this process and its children in GiB, shared pages counted once."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    total = 0
    for pid in ("self", *children):
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue  # it has ended
        total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total / 2**20


def run_parallel(num_neurons: int, num_jobs: int) -> dict[str, float]:
    """Align as many related pairs as processes, and watch their memory."""
    anchor = layer(num_neurons, WIDTHS[num_neurons], 0)
    members = {i: partner(anchor, "related", i) for i in range(1, num_jobs + 1)}
    spec, peaks, done = HeadSpec(1, 1, 2), [resident()], threading.Event()

    def watch() -> None:
        while not done.wait(0.1):
            peaks.append(resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    tasks = [Task(0, {0: anchor, **members})]
    method = Method(aligner="weights", spec=spec)
    _found, seconds = timed(lambda: list(align_tasks(tasks, method, num_jobs=num_jobs)))
    done.set()
    watcher.join()
    return {"jobs": num_jobs, "seconds": seconds, "peak_gib": max(peaks), "before_gib": peaks[0]}


def main() -> None:
    """Run the cases and print one line of JSON for each, then the summary."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--case", nargs=2, metavar=("F", "KIND"), help="run one case alone")
    parser.add_argument("--sizes", nargs="+", type=int, default=list(WIDTHS), choices=list(WIDTHS))
    parser.add_argument("--parallel", type=int, help="pairs and processes, at the largest size")
    args = parser.parse_args()
    if args.case:
        print(json.dumps(run_case(int(args.case[0]), args.case[1])))
        return
    if args.parallel:
        print(json.dumps(run_parallel(max(args.sizes), args.parallel)))
        return
    cases = []
    for size in args.sizes:
        for kind in KINDS:
            command = [sys.executable, __file__, "--case", str(size), kind]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            case = json.loads(done.stdout.splitlines()[-1])
            solvers = [name for name in ("scipy", "lap") if f"{name}_s" in case]
            cases.append(case | {f"speedup_vs_{name}": speedup(case, name) for name in solvers})
            print(json.dumps({k: shown(v) for k, v in cases[-1].items()}), flush=True)
    largest = [case for case in cases if case["F"] == max(args.sizes)]
    gaps = [max(case["proven_gap"], case["below_scipy"]) for case in largest]
    related = next(case for case in largest if case["kind"] == "related")
    summary = {
        "speedup_vs_scipy": shown(related["speedup_vs_scipy"]),
        "speedup_vs_lap": shown(related.get("speedup_vs_lap")),
        "optimality_gap": shown(max(gaps)),
        "peak_gib": shown(max(case["peak_gib"] for case in largest)),
    }
    print(json.dumps(summary))


def shown(value: Any) -> Any:
    """Return a number with three digits."""
    return float(f"{value:.3g}") if isinstance(value, float) else value


if __name__ == "__main__":
    main()
