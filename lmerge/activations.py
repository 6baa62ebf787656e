"""Layer states: what each layer of the source puts out on calibration prompts, in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from lmerge.llama import (
    capture_down_input,
    capture_outputs,
    decoder_layers,
    embed,
    run_span,
    span,
)
from lmerge.progress import track

Pooling = Literal["last", "mean"]


@torch.no_grad()
def layer_states(
    model: PreTrainedModel,
    prompts: Sequence[Tensor],
    *,
    pooling: Pooling = "last",
    tokens_per_batch: int = 2048,
    description: str = "layer states",
) -> Tensor:
    """Return the output state of every layer for every prompt, from one forward pass a batch.

    The state of layer l is what l adds up to: the input of layer l + 1, before any norm.

    Args:
        model: The source.
        prompts: Token ids (T,), of any lengths; padding never counts.
        pooling: `last` takes the last token of a prompt, `mean` averages its tokens.
        tokens_per_batch: Bound on the padded tokens of one forward pass.
        description: Text of the progress bar.

    Returns:
        (L, N, D) float32 on the CPU, prompts in the given order.

    Raises:
        ValueError: When there is no prompt, or an empty one.
    """
    check_prompts(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    batches = batch_by_length(order, [len(p) for p in prompts], tokens_per_batch)
    pooled = [
        _pooled_states(model, [prompts[i] for i in batch], pooling)
        for batch in track(batches, description, total=len(batches))
    ]
    states_LND = torch.cat(pooled, dim=1)
    return states_LND[:, torch.argsort(torch.tensor(order))]


def check_prompts(prompts: Sequence[Tensor]) -> None:
    """Raise ValueError when there is no prompt, or an empty one."""
    empty = [i for i, prompt in enumerate(prompts) if len(prompt) == 0]
    if not prompts or empty:
        raise ValueError(
            "`prompts` must hold at least one prompt and no empty one, got "
            f"{f'an empty one at place {empty[0]}' if empty else 'none'}. Use more questions."
        )


def batch_by_length(
    order: Sequence[int], lengths: Sequence[int], tokens_per_batch: int
) -> list[list[int]]:
    """Cut prompts in rising length into batches of bounded padded size."""
    batches: list[list[int]] = [[]]
    for i in order:
        if batches[-1] and (len(batches[-1]) + 1) * lengths[i] > tokens_per_batch:
            batches.append([])
        batches[-1].append(i)
    return batches


def _pooled_states(model: PreTrainedModel, prompts: list[Tensor], pooling: Pooling) -> Tensor:
    length_B = torch.tensor([len(p) for p in prompts])
    token_BT = pad_sequence(prompts, batch_first=True)
    real_BT = torch.arange(token_BT.shape[1]) < length_B[:, None]
    states: list[Tensor] = []
    with capture_outputs(model, states):
        model.model(
            input_ids=token_BT.to(model.device),
            attention_mask=real_BT.long().to(model.device),
            use_cache=False,
        )
    return torch.stack([pool(s_BTD, real_BT, pooling) for s_BTD in states])


def pool(state_BTD: Tensor, real_BT: Tensor, pooling: Pooling) -> Tensor:
    """Return one float32 state (B, D) on the CPU for each prompt; padding does not count."""
    state_BTD, real_BT = state_BTD.float(), real_BT.to(state_BTD.device)
    if pooling == "mean":
        total_BD = (state_BTD * real_BT[..., None]).sum(dim=1)
        return (total_BD / real_BT.sum(dim=1, keepdim=True)).cpu()
    last_B = real_BT.sum(dim=1) - 1
    return state_BTD[torch.arange(len(state_BTD)), last_B].cpu()


@torch.no_grad()
def neuron_activations(
    model: PreTrainedModel, layers: Sequence[int], token_BT: Tensor
) -> dict[int, Tensor]:
    """Return the MLP neuron activations of some layers at every position, in one pass.

    Args:
        model: The source model.
        layers: Which layers.
        token_BT: Calibration blocks, unpadded.

    Returns:
        Layer -> (N, F), float32, on the CPU; positions of all blocks in order.
    """
    kept: dict[int, list[Tensor]] = {i: [] for i in layers}
    part = span(model, 0, max(layers) + 1)
    for block_BT in track(token_BT.split(4), "neuron activations", total=-(-len(token_BT) // 4)):
        with ExitStack() as stack:
            hooks = {
                i: stack.enter_context(capture_down_input(decoder_layers(model)[i])) for i in layers
            }
            run_span(part, embed(model, block_BT.to(model.device)))
        for i, (activation_BTF,) in hooks.items():
            kept[i].append(activation_BTF.flatten(0, 1).float().cpu())
    return {i: torch.cat(parts) for i, parts in kept.items()}
