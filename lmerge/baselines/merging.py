"""Baselines that merge the weights of several layers into one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from lmerge.alphas import AlphaConfig, mka_start
from lmerge.baselines.calibration import Calibration, Shallow, keep_layers
from lmerge.llama import (
    MATRICES,
    LayerTensors,
    decoder_layers,
    layer_tensors,
    num_layers,
    with_layer_index,
    with_layers,
    with_tensors,
)
from lmerge.plan import Group
from lmerge.similarity import similarity_matrix

LACO_LAYERS = 4
"""C of LaCo: layers that one merge makes one of (arXiv:2402.11187)."""
LACO_INTERVAL = 2
"""I of LaCo: layers that the pointer goes down after a merge that was accepted."""
LACO_THRESHOLDS = tuple(0.95 - 0.05 * i for i in range(20))
"""T of LaCo, tried from the strictest on until enough layers are gone."""
LACO_SAMPLES = (5, 32)
"""Sentences and tokens in each that LaCo compares outputs on; the released code has five."""


def check_changed(shallow: Shallow, source: PreTrainedModel) -> Shallow:
    """Return the model, or raise when a merge only threw layers away.

    Raises:
        ValueError: When every layer is bit for bit a layer of the source.
    """
    layers = decoder_layers(shallow.model)
    for layer, origin in zip(layers, shallow.kept, strict=True):
        old, new = layer_tensors(decoder_layers(source)[origin]), layer_tensors(layer)
        if any(not torch.equal(old[name], new[name]) for name in old):
            return shallow
    raise ValueError(
        f"a merge must change at least one weight, but all {len(layers)} layers are the source's "
        "own: this only removes layers. Check the alphas, or use a plain removal such as `last`."
    )


def merge_mka(data: Calibration, num_removed: int) -> Shallow:
    """Merge the last two layers into one, n times, as MKA states it (arXiv:2406.16330).

    W = a W_i + (1 - a) W_j for the seven matrices, a by the rule of `alphas.mka_start` on the
    `npib` similarity of the last tokens' states; the norms are those of the lower layer, and are
    not folded. Shares of repeated merges multiply.
    """
    start = data.depth - num_removed - 1
    group = Group(members=tuple(range(start, data.depth)), anchor=start)
    last_LBD = torch.stack([state_BTD[:, -1] for state_BTD in data.states[1:]])
    share_G = mka_start(group, AlphaConfig(), similarity_matrix(last_LBD, "npib"))
    layers = [layer_tensors(decoder_layers(data.source)[i]) for i in group.members]
    merged = dict(layers[0])
    for name in MATRICES:
        stacked_GOI = torch.stack([layer[name].float() for layer in layers])
        merged[name] = torch.einsum("g,goi->oi", share_G.to(stacked_GOI), stacked_GOI)
        merged[name] = merged[name].to(layers[0][name].dtype)
    kept = keep_layers(data.source, range(start + 1))
    return check_changed(replace_layer(kept, start, merged), data.source)


def merge_laco(data: Calibration, num_removed: int) -> Shallow:
    """Collapse layers into the one below as LaCo states it (arXiv:2402.11187).

    theta_l becomes theta_l + sum_k (theta_l+k - theta_l) over the C - 1 layers above, which go. The
    pointer l starts C layers below the top and goes down; a merge stays when the mean cosine of the
    last states with the source's is above a threshold, which is lowered until enough layers are
    gone. Departure: a merge that would remove too many layers takes fewer.
    """
    return _collapse_until(data, num_removed, released=False)


def merge_laco_released(data: Calibration, num_removed: int) -> Shallow:
    """Collapse layers as LaCo's released code does.

    It takes the differences to the weights as already changed, so that they telescope: what is left
    are the matrices of the uppermost layer of the group, under the norms of the lowest.
    """
    return _collapse_until(data, num_removed, released=True)


def collapse(shallow: Shallow, place: int, num_above: int, *, released: bool) -> Shallow:
    """Return the model with `num_above` layers collapsed into the one at `place`."""
    layers = list(decoder_layers(shallow.model))
    base = layer_tensors(layers[place])
    above = [layer_tensors(layer) for layer in layers[place + 1 : place + 1 + num_above]]
    merged = dict(base)
    for name in MATRICES:
        if released:
            merged[name] = above[-1][name]
        else:
            merged[name] = base[name] + sum(upper[name] - base[name] for upper in above)
    kept = [i for i in range(len(layers)) if not place < i <= place + num_above]
    below = keep_layers(shallow.model, kept)
    shorter = Shallow(below.model, tuple(shallow.kept[i] for i in kept))
    return replace_layer(shorter, place, merged)


def replace_layer(shallow: Shallow, place: int, tensors: LayerTensors) -> Shallow:
    """Return the model with other weights in one layer."""
    layers = list(decoder_layers(shallow.model))
    layers[place] = with_tensors(with_layer_index(layers[place], place), tensors)
    model = with_layers(shallow.model, layers, range(len(layers)))
    return Shallow(model, shallow.kept)


@torch.no_grad()
def _collapse_until(data: Calibration, num_removed: int, *, released: bool) -> Shallow:
    num_samples, length = LACO_SAMPLES
    token_BT = data.token_BT[:num_samples, :length].to(data.source.device)
    target_BTD = _last_states(data.source, token_BT)
    for threshold in (*LACO_THRESHOLDS, -1.0):
        found = _laco_pass(data.source, token_BT, target_BTD, threshold, num_removed, released)
        if data.depth - num_layers(found.model) == num_removed:
            return check_changed(found, data.source)
    raise ValueError(
        f"LaCo removes at most {data.depth - num_layers(found.model)} layers in one pass, got "
        f"`num_removed` {num_removed}. Lower it."
    )


def _laco_pass(
    source: PreTrainedModel,
    token_BT: Tensor,
    target_BTD: Tensor,
    threshold: float,
    num_removed: int,
    released: bool,
) -> Shallow:
    current = keep_layers(source, range(num_layers(source)))
    place = num_layers(source) - LACO_LAYERS
    while place >= 0:
        depth = num_layers(current.model)
        left = num_removed - (num_layers(source) - depth)
        num_above = min(LACO_LAYERS - 1, depth - place - 1, left)
        if left == 0:
            break
        if num_above == 0:
            place -= 1
            continue
        tried = collapse(current, place, num_above, released=released)
        states_BTD = _last_states(tried.model, token_BT)
        cosine_B = F.cosine_similarity(states_BTD.flatten(1), target_BTD.flatten(1), dim=1)
        if float(cosine_B.mean()) > threshold:
            current = tried
            place = min(place - LACO_INTERVAL, num_layers(current.model) - LACO_LAYERS)
        else:
            place -= 1
    return current


def _last_states(model: PreTrainedModel, token_BT: Tensor) -> Tensor:
    states: Tensor = model.model(input_ids=token_BT, use_cache=False).last_hidden_state
    return states.float()
