"""Streaming export of an 8B model: memory, time against copying the bytes, and against mergekit.

    python benchmarks/export.py --work /big/disk [--mergekit /other/venv/bin/mergekit-yaml]

Writes a checkpoint of Llama-3-8B's shape with random bfloat16 weights (16 GB) and a run that drops
five of its 32 layers, as mergekit's `passthrough` does. In one process each, with the source not in
the page cache: a plain copy of the source, `lmerge export`, mergekit on the same layers, and
`lmerge export` of a run that truly merges them (neuron alphas, neuron orders). All end with the
files on the disk (fsync). Checks that lmerge's and mergekit's weights are equal, deletes
everything, and ends with one JSON object; `vs_copy` is the time per written byte over that of the
copy.
"""

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch
import yaml
from streamed_states import write_checkpoint

from lmerge.alpha_files import write_alphas
from lmerge.plan import Group, MergePlan
from lmerge.runs import write_orders, write_plan
from lmerge.shards import stored_tensors

NEEDED_BYTES = 42 * 2**30
"""The source and two exports of it."""
SLOTS = {"q_proj": 4096, "k_proj": 1024, "v_proj": 1024, "o_proj": 4096}
SLOTS |= dict.fromkeys(("gate_proj", "up_proj", "down_proj"), 14336)
# A small process in between: a child's peak counts the memory of the one that started it.
WATCH = """\
import os, subprocess, sys
child = subprocess.Popen(sys.argv[1:], stdout=sys.stderr)
_, status, usage = os.wait4(child.pid, 0)
print(usage.ru_maxrss)
sys.exit(bool(status))
"""
PASSTHROUGH = """\
merge_method: passthrough
dtype: bfloat16
slices:
- sources: [{{model: {source}, layer_range: [0, {first}]}}]
- sources: [{{model: {source}, layer_range: [{stop}, {num_layers}]}}]
"""


class Measured(NamedTuple):
    """What a process took."""

    seconds: float
    peak_gib: float


def write_run(run_dir, source, num_layers, num_removed, *, merged):
    """Write a run that turns a block of layers into its first one, or truly merges them."""
    first = num_layers // 2
    members = tuple(range(first, first + num_removed + 1))
    plan = MergePlan(num_layers=num_layers, groups=(Group(members=members, anchor=first),))
    generator, alphas = torch.Generator().manual_seed(0), {}
    for name, slots in SLOTS.items():
        alphas[name] = torch.zeros(len(members), slots)
        alphas[name][0] = 1
        if merged:
            alphas[name] += 0.1 * torch.randn(len(members), slots, generator=generator)
    orders = {i: torch.randperm(14336, generator=generator) for i in members[1:] if merged}
    write_plan(run_dir, plan)
    write_alphas(run_dir, plan, [alphas])
    write_orders(run_dir, orders)
    settings = {"model": {"source": str(source), "dtype": "auto"}}
    (run_dir / "config.yaml").write_text(yaml.safe_dump(settings))


def measure(command, source, out):
    """Run a command on a source that is not in memory, until its files are on the disk."""
    for path in source.glob("*.safetensors"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with tempfile.TemporaryFile("w+") as log:
        start = time.perf_counter()
        watched = [sys.executable, "-c", WATCH, *command]
        done = subprocess.run(watched, stdout=subprocess.PIPE, stderr=log, text=True)
        for path in out.glob("*"):
            with path.open("rb") as file:
                os.fsync(file.fileno())
        seconds = time.perf_counter() - start
        if done.returncode:
            log.seek(0)
            sys.exit(f"{command[0]} failed:\n{log.read()[-3000:]}")
    return Measured(seconds, float(done.stdout) / 2**20)


def size(folder):
    """Return the bytes of the weights in a folder."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def same_weights(one, other):
    """Whether two checkpoints hold the same tensors, bit for bit; one is read at a time."""
    left, right = stored_tensors(one), stored_tensors(other)
    return left.keys() == right.keys() and all(
        torch.equal(left[name].read(), right[name].read()) for name in left
    )


def say(name, found, written):
    """Print one line of the result."""
    rate = written / found.seconds / 1e9
    print(
        f"{name}: {found.seconds:.1f} s, {rate:.2f} GB/s written, peak {found.peak_gib:.2f} GiB",
        flush=True,
    )


def compare(work, arguments):
    """Write the source, measure everything, and return the last line."""
    source, out, theirs = arguments.source or work / "source", work / "out", work / "theirs"
    if not (source / "config.json").exists():
        start = time.perf_counter()
        source.mkdir()
        write_checkpoint(source, arguments.num_layers)
        print(f"wrote the source in {time.perf_counter() - start:.0f} s", flush=True)
    total = size(source)
    print(f"source: {total / 1e9:.1f} GB", flush=True)
    for name in ("dropped", "merged"):
        write_run(
            work / name,
            source,
            arguments.num_layers,
            arguments.num_removed,
            merged=name == "merged",
        )
    os.sync()
    copied = work / "copied"
    copying = measure(["cp", "-r", "--reflink=never", str(source), str(copied)], source, copied)
    say("cp", copying, total)
    shutil.rmtree(copied)
    export = [sys.executable, "-m", "lmerge", "export"]
    ours = measure([*export, str(work / "dropped"), "--out", str(out)], source, out)
    written = size(out)
    say("lmerge export, layers dropped", ours, written)
    vs_copy = (ours.seconds / written) / (copying.seconds / total)
    result = {"vs_copy": vs_copy, "speedup_vs_mergekit": None, "peak_gib": ours.peak_gib}
    if arguments.mergekit:
        first = arguments.num_layers // 2
        config = work / "passthrough.yaml"
        config.write_text(
            PASSTHROUGH.format(
                source=source,
                first=first + 1,
                stop=first + 1 + arguments.num_removed,
                num_layers=arguments.num_layers,
            )
        )
        command = [arguments.mergekit, str(config), str(theirs), *arguments.mergekit_options]
        other = measure(command, source, theirs)
        say("mergekit, layers dropped", other, size(theirs))
        print(f"equal weights: {same_weights(out, theirs)}", flush=True)
        shutil.rmtree(theirs)
        result["speedup_vs_mergekit"] = other.seconds / ours.seconds
        result["mergekit_peak_gib"] = other.peak_gib
    shutil.rmtree(out)
    if not arguments.merged:
        return result
    merging = measure([*export, str(work / "merged"), "--out", str(out)], source, out)
    say("lmerge export, layers merged", merging, written)
    result["peak_gib"] = max(ours.peak_gib, merging.peak_gib)
    return result


def main():
    """Make room, compare, clean up, report."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()), help="Folder.")
    parser.add_argument("--source", type=Path, help="Where the source stays for another time.")
    parser.add_argument("--merged", type=int, default=1, help="0 leaves the true merge out.")
    parser.add_argument("--num_layers", type=int, default=32, help="Layers of the checkpoint.")
    parser.add_argument("--num_removed", type=int, default=5, help="Layers that are dropped.")
    parser.add_argument("--mergekit", default=shutil.which("mergekit-yaml"), help="Its command.")
    parser.add_argument(
        "--mergekit_options", nargs="*", default=["--lazy-unpickle"], help="For it."
    )
    arguments = parser.parse_args()
    free = shutil.disk_usage(arguments.work).free
    needed = NEEDED_BYTES - (size(arguments.source) if arguments.source else 0)
    if free < needed:
        sys.exit(f"needs {needed / 2**30:.0f} GiB of free disk, got {free / 2**30:.0f}")
    with contextlib.ExitStack() as stack:
        name = stack.enter_context(tempfile.TemporaryDirectory(dir=arguments.work))
        result = compare(Path(name), arguments)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
