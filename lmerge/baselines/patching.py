"""Baselines that remove layers and correct what the layers after the gap see."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from scipy.linalg import hadamard
from torch import Tensor, nn

from lmerge.baselines.calibration import Calibration, Shallow, keep_layers, spread_blocks, without
from lmerge.baselines.dropping import block_influences
from lmerge.baselines.merging import check_changed, replace_layer
from lmerge.block_refits import layer_inputs
from lmerge.llama import decoder_layers, layer_tensors, run_span, span, with_layers
from lmerge.progress import track

COMP_TOKENS = 8192
"""Calibration tokens on which Prune&Comp measures influences and one scale at each removal."""

COSINE_STEPS = 1000
"""Adam steps of ReplaceMe's cosine variant."""
COSINE_BATCH = 1024
"""Tokens in each."""
COSINE_RATE = 1e-4
"""Its learning rate, that of the released code."""


def replaceme_least_squares(data: Calibration, num_removed: int) -> Shallow:
    """Fold a linear map into the down projection before the gap (arXiv:2505.02819).

    The block is that of least mean cosine distance. With M the MLP output and Y the state
    before it in the layer below the block, and L the state after the block, T minimises
    |M T + Y - L|^2 over all tokens, without a regulariser.
    """
    gap = _cosine_gap(data, num_removed)
    mlp_ND, before_ND, target_ND = _interface(data, gap, num_removed)
    gram_DD = mlp_ND.T @ mlp_ND
    # A pseudo-inverse, since fewer tokens than hidden units leave the Gram matrix singular.
    solved_DD = torch.linalg.pinv(gram_DD, hermitian=True) @ (mlp_ND.T @ (target_ND - before_ND))
    return _folded(data, gap, num_removed, solved_DD)


def replaceme_cosine(data: Calibration, num_removed: int) -> Shallow:
    """As `replaceme_least_squares`, with the map of least cosine distance (arXiv:2505.02819).

    T starts at the identity and is found by Adam over the distance of M T + Y to L. Departure: a
    fixed number of steps, since ten epochs over few calibration tokens hardly move it.
    """
    gap = _cosine_gap(data, num_removed)
    mlp_ND, before_ND, target_ND = (x.float() for x in _interface(data, gap, num_removed))
    generator = torch.Generator().manual_seed(data.seed)
    with torch.enable_grad():
        map_DD = nn.Parameter(torch.eye(mlp_ND.shape[1]))
        adam = torch.optim.Adam([map_DD], lr=COSINE_RATE)
        for _ in track(range(COSINE_STEPS), "ReplaceMe cosine", total=COSINE_STEPS):
            row_N = torch.randint(len(mlp_ND), (COSINE_BATCH,), generator=generator)
            mapped_ND = mlp_ND[row_N] @ map_DD + before_ND[row_N]
            loss = 1 - F.cosine_similarity(mapped_ND, target_ND[row_N], dim=1).mean()
            adam.zero_grad()
            loss.backward()
            adam.step()
    return _folded(data, gap, num_removed, map_DD.detach().double())


def linear_patch(data: Calibration, num_removed: int) -> Shallow:
    """Scale the channels of a rotated state at the gap (LinearPatch, arXiv:2505.24680).

    The block is that of greatest mean cosine. The state x before it becomes x H diag(s) H^T, with
    H an orthonormal Hadamard matrix and s the ratios of mean absolute values after and before the
    block. The patch is a matrix of its own: such a model is no plain Llama and cannot be exported.
    """
    gap = _cosine_gap(data, num_removed)
    rotation_DD = hadamard_matrix(data.states[0].shape[-1])
    before, after = (data.states[i].double() @ rotation_DD for i in (gap, gap + num_removed))
    ratio_BD = after.abs().mean(dim=1) / before.abs().mean(dim=1)
    patch_DD = rotation_DD @ torch.diag(ratio_BD.mean(dim=0)) @ rotation_DD.T
    shorter = _without_block(data, gap, num_removed)
    layers = list(decoder_layers(shorter.model))
    dtype, device = data.source.dtype, data.source.device
    layers[gap - 1] = PatchedLayer(layers[gap - 1], patch_DD.to(device, dtype))
    return Shallow(with_layers(shorter.model, layers, range(len(layers))), shorter.kept)


@torch.no_grad()
def prune_and_compensate(data: Calibration, num_removed: int) -> Shallow:
    """Remove one layer at a time and undo the change of scale (Prune&Comp, arXiv:2507.18212).

    Each time the layer of least block influence goes, measured on the model as it is; a is the mean
    over channels of the ratios of mean absolute values after and before it. The paper multiplies
    embedding, o and down before the gap by a. Because of the norms it is the same, up to their
    epsilon, to divide o and down after the gap by a, and the embedding may stay tied to the head.
    """
    token_BT = spread_blocks(data.token_BT, COMP_TOKENS)
    current = keep_layers(data.source, range(data.depth))
    for _ in track(range(num_removed), "Prune&Comp", total=num_removed):
        states = layer_inputs(current.model, token_BT)
        place = int(block_influences(states).argmin())
        before, after = (states[i].double().abs().mean(dim=1) for i in (place, place + 1))
        scale = float((after / before).mean())
        kept = without(len(states) - 1, [place])
        below = keep_layers(current.model, kept)
        current = Shallow(below.model, tuple(current.kept[i] for i in kept))
        for above in range(place, len(kept)):
            tensors = layer_tensors(decoder_layers(current.model)[above])
            scaled = {name: tensors[name] / scale for name in ("o_proj", "down_proj")}
            biases = {n: b / scale for n, b in tensors.items() if n in OUTPUT_BIASES}
            current = replace_layer(current, above, {**tensors, **scaled, **biases})
    return current


OUTPUT_BIASES = ("o_proj.bias", "down_proj.bias")


class PatchedLayer(nn.Module):
    """A decoder layer whose output state is multiplied by a matrix.

    Args:
        layer: The decoder layer.
        patch_DD: The matrix that rows are multiplied by from the right.
    """

    def __init__(self, layer: nn.Module, patch_DD: Tensor) -> None:
        super().__init__()
        self.layer = layer
        self.patch_DD = nn.Parameter(patch_DD, requires_grad=False)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        output = self.layer(hidden_states, *args, **kwargs)
        if isinstance(output, Tensor):
            return output @ self.patch_DD
        return (output[0] @ self.patch_DD, *output[1:])


def hadamard_matrix(order: int) -> Tensor:
    """Return an orthonormal Hadamard matrix, float64: Sylvester's times Paley's.

    Raises:
        ValueError: When the order is not a product of powers of two and of q + 1, q prime and 3
            modulo 4.
    """
    found = _hadamard(order)
    if found is None:
        raise ValueError(
            f"`linear_patch` knows no Hadamard matrix for the hidden width {order} of this model. "
            "Leave this baseline out."
        )
    return found / math.sqrt(order)


def _hadamard(order: int) -> Tensor | None:
    """Return a matrix of +-1 with orthogonal rows."""
    if order & (order - 1) == 0:
        return torch.tensor(hadamard(order), dtype=torch.float64)
    for factor in range(12, order + 1, 4):
        if order % factor == 0 and _is_prime(factor - 1):
            rest = _hadamard(order // factor)
            if rest is not None:
                return torch.kron(_paley(factor - 1), rest)
    return None


def _is_prime(number: int) -> bool:
    return all(number % i for i in range(2, int(number**0.5) + 1))


def _paley(prime: int) -> Tensor:
    """Return Paley's Hadamard matrix of order `prime` + 1, for a prime that is 3 modulo 4."""
    squares = {i * i % prime for i in range(1, prime)}
    index = torch.arange(prime)
    residue = torch.tensor([0 if i == 0 else 1 if i in squares else -1 for i in range(prime)])
    skew = torch.zeros(prime + 1, prime + 1, dtype=torch.float64)
    skew[0, 1:], skew[1:, 0] = 1, -1
    skew[1:, 1:] = residue[(index[:, None] - index[None, :]) % prime]
    return torch.eye(prime + 1, dtype=torch.float64) + skew


def _cosine_gap(data: Calibration, num_removed: int) -> int:
    """Return the first removed layer, at least 1: where states before and after are most alike."""
    starts = range(1, data.depth - num_removed)
    pairs = [(data.states[i], data.states[i + num_removed]) for i in starts]
    if not pairs:
        raise ValueError(
            f"`num_removed` must leave a layer on both sides of the gap of a model with "
            f"{data.depth} layers, got {num_removed}. Lower it."
        )
    cosines = [F.cosine_similarity(x.double(), y.double(), dim=-1).mean() for x, y in pairs]
    return 1 + int(torch.stack(cosines).argmax())


def _without_block(data: Calibration, gap: int, num_removed: int) -> Shallow:
    return keep_layers(data.source, without(data.depth, range(gap, gap + num_removed)))


@torch.no_grad()
def _interface(data: Calibration, gap: int, num_removed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return M, Y and L of ReplaceMe, (N, D) float64 each."""
    layer, one = decoder_layers(data.source)[gap - 1], span(data.source, gap - 1, gap)
    outputs: list[Tensor] = []
    handle = layer.get_submodule("mlp").register_forward_hook(
        lambda _module, _inputs, output: outputs.append(output.cpu())
    )
    try:
        for state_BTD in data.states[gap - 1].split(4):
            run_span(one, state_BTD.to(data.source.device))
    finally:
        handle.remove()
    mlp_ND = torch.cat(outputs).flatten(0, 1).double()
    after_ND, target_ND = (data.states[i].flatten(0, 1).double() for i in (gap, gap + num_removed))
    return mlp_ND, after_ND - mlp_ND, target_ND


def _folded(data: Calibration, gap: int, num_removed: int, map_DD: Tensor) -> Shallow:
    """Return the model without the block and with M T in the place of the MLP output M."""
    shorter = _without_block(data, gap, num_removed)
    tensors = layer_tensors(decoder_layers(shorter.model)[gap - 1])
    down_DF = tensors["down_proj"]
    map_DD = map_DD.to(down_DF.device)
    changed = {"down_proj": (map_DD.T @ down_DF.double()).to(down_DF.dtype)}
    if "down_proj.bias" in tensors:
        bias_D = tensors["down_proj.bias"]
        changed["down_proj.bias"] = (map_DD.T @ bias_D.double()).to(bias_D.dtype)
    return check_changed(replace_layer(shorter, gap - 1, {**tensors, **changed}), data.source)
