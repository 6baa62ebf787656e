"""How much faster layer similarity is than the published procedure, on the same prompts.

    python benchmarks/similarity.py

Published, as MKA's released code does it: for each prompt and each layer one forward pass of the
whole model, then a float64 loop over the pairs of layers i <= j, each with scikit-learn's
`mutual_info_regression` and two nearest-neighbour entropies. Ours: one forward pass a batch for all
layers, then all pairs at once, each in both orders. SmolLM2-135M, 40 prompts of the bundled bank;
15 neighbours for the entropy, since the published 50 need more than 50 prompts.

The values must agree: states to 1e-3 of their largest number (batches round otherwise), `npib` to
1e-6 on the same states and seed. `--passes 3` times 3 of the published passes and scales them.
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
from torch.nn.utils.rnn import pad_sequence

from lmerge.activations import batch_by_length, layer_states
from lmerge.data.batching import sample_prompts
from lmerge.data.questions import load_questions
from lmerge.diffusion import distances, rank_map
from lmerge.information import InformationConfig, npib
from lmerge.source import load_model, load_tokenizer

SIGMA, NEIGHBORS, ENTROPY_NEIGHBORS, SEED = 8.0, 5, 15, 0


@torch.no_grad()
def published_states(model, prompts, layers):
    """Return the last token's state (L, N, D) of some layers, from one pass a layer and prompt."""
    states = np.empty((len(layers), len(prompts), model.config.hidden_size))
    for row, layer in enumerate(layers):
        kept = []
        handle = model.model.layers[layer].register_forward_hook(
            lambda _module, _inputs, output, kept=kept: kept.append(output)
        )
        for column, prompt in enumerate(prompts):
            model(input_ids=prompt[None], use_cache=False)
            output = kept.pop()
            hidden = output if isinstance(output, torch.Tensor) else output[0]
            states[row, column] = hidden[0, -1].numpy()
        handle.remove()
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


def published_cell(x, y):
    """Return the normalised information of two maps; NaN where it has no value."""
    information = np.mean(
        [
            mutual_info_regression(x, y[:, c], n_neighbors=NEIGHBORS, random_state=SEED)
            for c in range(y.shape[1])
        ]
    )
    product = published_entropy(x) * published_entropy(y)
    return information / np.sqrt(product) if product > 0 else np.nan


def published_npib(states):
    """Return the matrix, one order of each pair, and the maps."""
    maps = [published_map(x) for x in states]
    matrix = np.zeros((len(maps), len(maps)))
    for i, x in enumerate(maps):
        for j, y in enumerate(maps[i:], start=i):
            matrix[i, j] = matrix[j, i] = published_cell(x, y)
    return matrix, maps


def check_npib(matrix, maps, states):
    """Return the largest difference of ours from the published cells, both orders averaged.

    An eigenvector has no sign, and a rank map turned round breaks its ties otherwise; so the
    published maps are turned to ours first, and nothing else of them may differ.
    """
    ours = rank_map(distances(states), SIGMA).numpy()
    turned = []
    for x, y in zip(maps, ours, strict=True):
        same = np.abs(x - y).max(axis=0) < 1e-9
        turned.append(np.where(same, x, 1 + 1 / len(x) - x))
        assert np.abs(turned[-1] - y).max() < 1e-9, "the maps differ"
    wanted = np.array([[published_cell(x, y) for y in turned] for x in turned])
    wanted = (wanted + wanted.T) / 2
    np.fill_diagonal(wanted, 1)
    assert np.array_equal(np.isnan(wanted), np.isnan(matrix)), "other cells are undefined"
    return np.nanmax(np.abs(matrix - wanted))


def batched_forward(model, prompts):
    """Return a function that runs the model once over all prompts, in the batches of ours."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    batches = []
    for batch in batch_by_length(order, [len(p) for p in prompts], 2048):
        token_BT = pad_sequence([prompts[i] for i in batch], batch_first=True)
        length_B = torch.tensor([len(prompts[i]) for i in batch])
        batches.append((token_BT, torch.arange(token_BT.shape[1]) < length_B[:, None]))

    @torch.no_grad()
    def run():
        for token_BT, real_BT in batches:
            model.model(input_ids=token_BT, attention_mask=real_BT.long(), use_cache=False)

    return run


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
    parser.add_argument("--passes", type=int, default=0, help="Published passes timed; 0 all.")
    arguments = parser.parse_args()
    model, tokenizer = load_model(arguments.source), load_tokenizer(arguments.source)
    bank = load_questions("bank", "val")
    subjects = {"all": sorted({question.subject for question in bank})}
    prompts = sample_prompts(
        bank, subjects, tokenizer, num_prompts=arguments.num_prompts, seed=SEED
    )["all", "en"]
    config = InformationConfig(sigma=SIGMA, entropy_neighbors=ENTROPY_NEIGHBORS, seed=SEED)
    layers = list(range(model.config.num_hidden_layers))
    chosen = layers[:: -(-len(layers) // (arguments.passes or len(layers)))]
    forward = batched_forward(model, prompts)

    forward()  # warm up
    _, forward_s = timed(forward, 3)
    states, states_s = timed(lambda: layer_states(model, prompts), 3)
    matrix, npib_s = timed(lambda: npib(states, config), 5)
    slow_states, passes_s = timed(lambda: published_states(model, prompts, chosen))
    # Every pass runs the whole model, so a pass that is not made takes as long as one that is.
    slow_states_s = passes_s * len(layers) / len(chosen)
    # The same states go into both: they round otherwise in a batch, and ranks would turn that into
    # other neighbours.
    (_, maps), slow_npib_s = timed(lambda: published_npib(states.double().numpy()), 3)

    wrong = np.abs(states[chosen].numpy() - slow_states).max() / np.abs(slow_states).max()
    difference = check_npib(matrix.numpy(), maps, states)
    print(f"{len(prompts)} prompts of {sum(map(len, prompts))} tokens, {len(layers)} layers")
    print(f"published passes timed: {len(chosen)} of {len(layers)}")
    print(f"largest difference: states {wrong:.1e} of the largest number, npib {difference:.1e}")
    assert wrong < 1e-3, "the states differ"
    assert difference < 1e-6, "npib differs"
    slow_s, fast_s = slow_states_s + slow_npib_s, states_s + npib_s
    print("| seconds | published | ours | ratio |\n|---|---|---|---|")
    for name, slow, fast in (
        ("end to end", slow_s, fast_s),
        ("states of all layers", slow_states_s, states_s),
        ("`npib` matrix alone", slow_npib_s, npib_s),
    ):
        print(f"| {name} | {slow:.2f} | {fast:.3f} | {slow / fast:.1f} |")
    print(f"| one forward pass, nothing kept | | {forward_s:.3f} | {fast_s / forward_s:.2f} |")
    result = {
        "speedup_end_to_end": slow_s / fast_s,
        "speedup_npib": slow_npib_s / npib_s,
        "vs_one_forward": fast_s / forward_s,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
