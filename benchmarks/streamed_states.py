"""Layer states of an 8B model beside one layer of it: peak memory, exactness, time.

    python benchmarks/streamed_states.py

Checks the streamed states of SmolLM2-135M against the resident mode. Then writes a checkpoint of
Llama-3-8B's shape with random bfloat16 weights (16 GB) to a temporary folder, streams the states of
a few prompts in a process of its own, whose peak resident memory is measured, times one reading of
the same files, and deletes them. Ends with one JSON object; `vs_reading_once` is the time of the
streamed pass over that of reading every byte once.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from lmerge.activations import layer_states
from lmerge.source import load_model
from lmerge.streamed import streamed_states

NEEDED_BYTES = 20 * 2**30
SHARD_LAYERS = 4


def write_checkpoint(folder, num_layers):
    """Write random bfloat16 weights of Llama-3-8B's shape, four layers a shard."""
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=num_layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        tie_word_embeddings=False,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {
            name: value.shape
            for name, value in AutoModelForCausalLM.from_config(config).state_dict().items()
        }
    torch.manual_seed(0)
    # Slices of one pool from random places: drawing 8 billion numbers would take minutes.
    pool = (0.02 * torch.randn(2**26)).bfloat16()
    shards = {}
    for name in shapes:
        part = name.split(".")
        place = f"layers-{int(part[2]) // SHARD_LAYERS}" if part[1] == "layers" else part[-2]
        shards.setdefault(f"model-{place}.safetensors", []).append(name)
    for file, names in shards.items():
        save_file({name: random_weight(name, shapes[name], pool) for name in names}, folder / file)
    weight_map = {name: file for file, names in shards.items() for name in names}
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def random_weight(name, shape, pool):
    """Return a norm of ones, or random numbers from the pool."""
    if "norm" in name:
        return torch.ones(shape, dtype=torch.bfloat16)
    shift = int(torch.randint(len(pool), ()))
    repeats = -(-(shape.numel() + shift) // len(pool))
    return pool.repeat(repeats)[shift : shift + shape.numel()].reshape(shape).clone()


def difference_on(source):
    """Return the largest difference between streamed and resident states."""
    model = load_model(source, "float32")
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(1000, (n,), generator=generator) for n in (5, 30, 17, 60)]
    wanted = layer_states(model, prompts)
    with tempfile.TemporaryDirectory() as name:
        model.save_pretrained(name, max_shard_size="100MB")
        found = streamed_states(Path(name), prompts)
    return float((found - wanted).abs().max())


def stream(folder, num_prompts, num_tokens):
    """Stream the states; print seconds and the peak resident memory of this process in GiB."""
    generator = torch.Generator().manual_seed(1)
    prompts = [
        torch.randint(128000, (num_tokens,), generator=generator) for _ in range(num_prompts)
    ]
    start = time.perf_counter()
    states = streamed_states(folder, prompts, dtype=torch.bfloat16)
    seconds = time.perf_counter() - start
    assert states.isfinite().all()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({"seconds": seconds, "peak_gib": peak, "shape": list(states.shape)}))


def read_once(folder):
    """Return the seconds that reading every byte of the layers once takes."""
    start = time.perf_counter()
    for path in sorted(folder.glob("model-layers-*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                file.get_tensor(name).clone()
    return time.perf_counter() - start


def main():
    """Write, stream, read, delete, report."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--num_layers", type=int, default=32, help="Layers of the checkpoint.")
    parser.add_argument("--num_prompts", type=int, default=8, help="Prompts.")
    parser.add_argument("--num_tokens", type=int, default=16, help="Tokens in a prompt.")
    parser.add_argument("--child", type=Path, default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        stream(arguments.child, arguments.num_prompts, arguments.num_tokens)
        return
    free = shutil.disk_usage(tempfile.gettempdir()).free
    if free < NEEDED_BYTES:
        sys.exit(f"needs {NEEDED_BYTES / 2**30:.0f} GiB of free disk, got {free / 2**30:.0f}")
    difference = difference_on("smollm2-135m")
    print(f"SmolLM2-135M, streamed against resident: largest difference {difference:.1e}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        start = time.perf_counter()
        write_checkpoint(folder, arguments.num_layers)
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        print(f"wrote {size / 2**30:.1f} GiB in {time.perf_counter() - start:.0f} s", flush=True)
        reading = read_once(folder)
        command = [sys.executable, __file__, "--child", name]
        command += ["--num_prompts", str(arguments.num_prompts)]
        command += ["--num_tokens", str(arguments.num_tokens)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr)
        found = json.loads(done.stdout.splitlines()[-1])
    print(f"streamed {found['shape']} in {found['seconds']:.1f} s; reading alone {reading:.1f} s")
    result = {
        "peak_gib": found["peak_gib"],
        "max_difference": difference,
        "vs_reading_once": found["seconds"] / reading,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
