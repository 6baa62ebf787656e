"""How much faster layer similarity is than the published procedure, on the same prompts.

    python benchmarks/similarity.py

Published: one forward pass for each layer (a few are timed and scaled; `--passes 0` times all),
then a float64 double loop over pairs of layers with scikit-learn. Ours: one forward pass for all
layers, then all pairs at once. Both order pairs both ways and average, so that the matrices must
agree; the largest difference is printed. SmolLM2-135M, 40 prompts of the bundled bank; 15
neighbours for the entropy, since 50 need more than 50 prompts.
Needs scikit-learn (in the extra `dev`). Ends with one JSON object.
"""

import argparse
import json
import time

import numpy as np
import torch
from scipy.spatial.distance import cdist
from sklearn.feature_selection import mutual_info_regression
from sklearn.neighbors import NearestNeighbors

from lmerge.activations import layer_states
from lmerge.data.batching import sample_prompts
from lmerge.data.questions import load_questions
from lmerge.information import InformationConfig, npib
from lmerge.source import load_model, load_tokenizer

SIGMA, NEIGHBORS, ENTROPY_NEIGHBORS, SEED = 8.0, 5, 15, 0


def published_states(model, prompts, layers):
    """Return the last token's state (N, D) of some layers, from one pass a layer and prompt."""
    states = []
    for layer in layers:
        rows = []

        def keep(_module, _inputs, output, rows=rows):
            hidden = output if isinstance(output, torch.Tensor) else output[0]
            rows.append(hidden[0, -1].double().numpy())

        handle = layer.register_forward_hook(keep)
        with torch.no_grad():
            for prompt in prompts:
                model.model(input_ids=prompt[None], use_cache=False)
        handle.remove()
        states.append(np.stack(rows))
    return states


def published_map(states):
    """Return one layer's diffusion map as ranks / N, straight from the paper's formulas."""
    kernel = np.exp(-np.sqrt(cdist(states, states) / SIGMA))
    p = kernel.sum(axis=1)
    kernel = kernel / np.outer(p, p) ** 0.5
    v = np.sqrt(kernel.sum(axis=1))
    u, _, _ = np.linalg.svd(kernel / np.outer(v, v))
    y = u[:, 1:3] / u[:, :1]
    return (y.argsort(axis=0).argsort(axis=0) + 1.0) / len(y)


def published_entropy(y):
    """Return the nearest-neighbour entropy without its constant terms."""
    rho = NearestNeighbors(n_neighbors=ENTROPY_NEIGHBORS).fit(y).kneighbors()[0][:, -1]
    return -np.mean(np.log(ENTROPY_NEIGHBORS / (len(y) * rho ** y.shape[1])))


def published_npib(states):
    """Return the matrix by a double loop over the ordered pairs of layers."""
    maps = [published_map(x) for x in states]
    matrix = np.full((len(maps), len(maps)), np.nan)
    for i, x in enumerate(maps):
        for j, y in enumerate(maps):
            information = np.mean(
                [
                    mutual_info_regression(
                        x, y[:, c], n_neighbors=NEIGHBORS, random_state=SEED
                    ).mean()
                    for c in range(y.shape[1])
                ]
            )
            product = published_entropy(x) * published_entropy(y)
            if product > 0:
                matrix[i, j] = information / np.sqrt(product)
    matrix = (matrix + matrix.T) / 2
    np.fill_diagonal(matrix, 1)
    return matrix


def timed(function, repeats=1):
    """Return the function's value and the median of its times in seconds."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        value = function()
        times.append(time.perf_counter() - start)
    return value, float(np.median(times))


def main():
    """Run both and compare."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--source", default="smollm2-135m", help="Model to run.")
    parser.add_argument("--num_prompts", type=int, default=40, help="Prompts.")
    parser.add_argument("--passes", type=int, default=5, help="Published passes timed; 0 all.")
    arguments = parser.parse_args()
    model, tokenizer = load_model(arguments.source), load_tokenizer(arguments.source)
    bank = load_questions("bank", "val")
    subjects = {"all": sorted({question.subject for question in bank})}
    sampled = sample_prompts(
        bank, subjects, tokenizer, num_prompts=arguments.num_prompts, seed=SEED
    )
    prompts = sampled["all", "en"]
    config = InformationConfig(sigma=SIGMA, entropy_neighbors=ENTROPY_NEIGHBORS, seed=SEED)

    @torch.no_grad()
    def one_forward():
        for prompt in prompts:
            model.model(input_ids=prompt[None], use_cache=False)

    one_forward()  # warm up
    _, forward_s = timed(one_forward, 2)
    states, states_s = timed(lambda: layer_states(model, prompts), 2)
    matrix, npib_s = timed(lambda: npib(states, config), 5)
    layers = list(model.model.layers)
    chosen = list(range(len(layers)))[:: max(1, len(layers) // (arguments.passes or len(layers)))]
    slow_states, passes_s = timed(
        lambda: published_states(model, prompts, [layers[i] for i in chosen])
    )
    # Every pass runs the whole model, so the passes that were not made take as long.
    slow_states_s = passes_s * len(layers) / len(chosen)
    # The two ways round differently, so the same states go into both matrices.
    slow_matrix, slow_npib_s = timed(lambda: published_npib(states.double().numpy()))
    print(f"{len(prompts)} prompts of {sum(map(len, prompts))} tokens, {len(states)} layers")
    wrong = np.abs(states[chosen].numpy() - np.stack(slow_states)).max()
    print(f"largest difference of states: {wrong:.2e} of {np.abs(slow_states).max():.0f}")
    difference = np.nanmax(np.abs(matrix.numpy() - slow_matrix))
    undefined = int(np.isnan(slow_matrix).sum()), int(matrix.isnan().sum())
    print(f"largest difference of npib: {difference:.2e}; undefined cells: {undefined}")
    print(f"states: {len(chosen)} passes of the published way timed, all {len(layers)} counted")
    print(f"states: published {slow_states_s:.2f} s, ours {states_s:.2f} s, once {forward_s:.2f} s")
    print(f"npib: published {slow_npib_s:.2f} s, ours {npib_s:.3f} s (both orders of each pair)")
    result = {
        "speedup_end_to_end": (slow_states_s + slow_npib_s) / (states_s + npib_s),
        "speedup_npib": slow_npib_s / npib_s,
        "vs_one_forward": (states_s + npib_s) / forward_s,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
