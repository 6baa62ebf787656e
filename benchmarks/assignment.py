"""Time the assignment of neurons: scipy's dense solver, `lap`, and lmerge's, on the same costs.

Run `python benchmarks/assignment.py` (`pip install lap` for the second column). Each case has a
process of its own; its peak memory is read before the other solvers run. The last line is JSON:
speedups at the largest size over the harder case (unrelated layers), solver against solver, and
the largest optimality gap and peak memory of all cases.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from lmerge.assignment import assign
from lmerge.llama import LayerTensors
from lmerge.neurons import neuron_similarity

WIDTHS = {1536: 576, 4096: 1024, 14336: 4096}
"""Neurons -> hidden width, as in SmolLM2-135M, a 0.5B and Llama-3-8B."""
KINDS = ("planted", "unrelated")


def layer(num_neurons: int, width: int, seed: int) -> LayerTensors:
    """Random weights in bfloat16 whose input directions decay like a trained layer's."""
    g = torch.Generator().manual_seed(seed)
    decay_D = torch.arange(1, width + 1).float() ** -0.25

    def matrix() -> Tensor:
        return (torch.randn(num_neurons, width, generator=g) * decay_D).bfloat16()

    return {"gate_proj": matrix(), "up_proj": matrix(), "down_proj": matrix().T}


def planted(anchor: LayerTensors, seed: int) -> LayerTensors:
    """The same layer with its neurons in another order and noise of half the weights' size."""
    g = torch.Generator().manual_seed(seed)
    order_F = torch.randperm(len(anchor["gate_proj"]), generator=g)
    member = {}
    for name, weight in anchor.items():
        row_FD = weight.T if name == "down_proj" else weight
        noise_FD = 0.5 * row_FD.float().std() * torch.randn(row_FD.shape, generator=g)
        noisy_FD = (row_FD[order_F].float() + noise_FD).bfloat16()
        member[name] = noisy_FD.T if name == "down_proj" else noisy_FD
    return member


def run_case(num_neurons: int, kind: str) -> dict[str, float | str]:
    """Time one pair of layers, from bfloat16 weights to the order."""
    anchor = layer(num_neurons, WIDTHS[num_neurons], 0)
    member = (
        planted(anchor, 1) if kind == "planted" else layer(num_neurons, anchor_width(anchor), 2)
    )
    start = time.perf_counter()
    similarity_FF = neuron_similarity(anchor, member)
    cost_s = time.perf_counter() - start
    del anchor, member
    start = time.perf_counter()
    ours = assign(similarity_FF)
    ours_s = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    case = {"F": num_neurons, "kind": kind, "cost_s": cost_s, "ours_s": ours_s, "peak_gib": peak}
    case |= {"total": ours.total, "gap": ours.gap / abs(ours.total)}
    matrix = similarity_FF.numpy()
    start = time.perf_counter()
    rows, columns = linear_sum_assignment(matrix, maximize=True)
    case["scipy_s"] = time.perf_counter() - start
    case["below_scipy"] = float(matrix[rows, columns].astype(float).sum()) - ours.total
    try:
        import lap  # optional: the bench extra
    except ImportError:
        return case
    start = time.perf_counter()
    lap.lapjv(-matrix)
    case["lap_s"] = time.perf_counter() - start
    return case


def anchor_width(anchor: LayerTensors) -> int:
    """Return the hidden width of a layer."""
    return anchor["gate_proj"].shape[1]


def main() -> None:
    """Run the cases and print one line of JSON for each, then the summary."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--case", nargs=2, metavar=("F", "KIND"), help="run one case alone")
    parser.add_argument("--sizes", nargs="+", type=int, default=list(WIDTHS), choices=list(WIDTHS))
    args = parser.parse_args()
    if args.case:
        print(json.dumps(run_case(int(args.case[0]), args.case[1])))
        return
    cases = []
    for size in args.sizes:
        for kind in KINDS:
            command = [sys.executable, __file__, "--case", str(size), kind]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            cases.append(json.loads(done.stdout.splitlines()[-1]))
            print(json.dumps(cases[-1]), flush=True)
    hard = cases[-1]
    lap_s = hard.get("lap_s")
    summary = {
        "speedup_vs_scipy": round(hard["scipy_s"] / hard["ours_s"], 2),
        "speedup_vs_lap": round(lap_s / hard["ours_s"], 2) if lap_s else None,
        "optimality_gap": max(case["gap"] for case in cases),
        "peak_gib": round(max(case["peak_gib"] for case in cases), 2),
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
