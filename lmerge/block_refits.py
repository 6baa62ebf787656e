"""What plan searches share: the source's states, refits of one layer to any depth, their KL."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lmerge.llama import (
    capture_down_input,
    decoder_layers,
    embed,
    layer_tensors,
    lm_logits,
    num_layers,
    run_span,
    span,
    with_layers,
    with_tensors,
)
from lmerge.normal_equations import position_weights
from lmerge.progress import track

RIDGE = 0.1
"""Regularisation of the refits in the search, as a share of the mean diagonal."""

POSITIONS = 64
"""Positions of each held-out block whose predictions are compared."""


def spread_places(place_B: Tensor, count: int) -> Tensor:
    """Return `count` of the places, evenly spread; all where there are fewer."""
    count = min(count, len(place_B))
    return place_B[((torch.arange(count) + 0.5) * len(place_B) / count).long()]


def layer_inputs(source: PreTrainedModel, token_BT: Tensor) -> list[Tensor]:
    """Return the input of every layer, and the output of the last, each (B, T, D) on the CPU."""
    states = [torch.cat([embed(source, t.to(source.device)).cpu() for t in token_BT.split(4)])]
    for layer in track(range(num_layers(source)), "layer states", total=num_layers(source)):
        states.append(run_part(span(source, layer, layer + 1), states[-1]))
    return states


def run_part(part: PreTrainedModel, state_BTD: Tensor) -> Tensor:
    """Return states (B, T, D) after a part of a model, on the CPU."""
    return torch.cat([run_span(part, s.to(part.device)).cpu() for s in state_BTD.split(4)])


def normed_output(source: PreTrainedModel, state_BTD: Tensor, at: int) -> Tensor:
    """Return the states after the layers from `at` up and the final norm."""
    return run_part(span(source, at, num_layers(source), final_norm=True), state_BTD)


def log_probabilities(source: PreTrainedModel, normed_BTD: Tensor) -> Tensor:
    """Return next-token log-probabilities at evenly spaced positions, (N, V) float32."""
    length = normed_BTD.shape[1]
    place_P = torch.linspace(0, length - 1, min(POSITIONS, length)).long()
    normed_ND = normed_BTD[:, place_P].flatten(0, 1).to(source.device)
    return lm_logits(source, normed_ND).float().log_softmax(dim=-1)


def kl_of(source: PreTrainedModel, normed_BTD: Tensor, logp_NV: Tensor) -> float:
    """Return the KL in nats a token from `log_probabilities` of the source."""
    logq_NV = log_probabilities(source, normed_BTD)
    return float((logp_NV.exp() * (logp_NV - logq_NV)).sum(dim=-1).mean())


def layers_above(
    source: PreTrainedModel, layer: nn.Module, first: int, stop: int
) -> PreTrainedModel:
    """Return the model from a merged layer up; it stands for layers `first` to `stop` - 1."""
    layers = [layer, *decoder_layers(source)[stop:]]
    return with_layers(source, layers, [first, *range(stop, num_layers(source))])


class BlockRefits:
    """Refits of one layer's down projection to any states; what they share is computed once.

    Args:
        source: The source model.
        first: The layer.
        input_BTD: Its input states.
    """

    def __init__(self, source: PreTrainedModel, first: int, input_BTD: Tensor) -> None:
        self.layer = decoder_layers(source)[first]
        one = span(source, first, first + 1)
        with capture_down_input(self.layer) as neurons:
            parts = [run_span(one, x.to(one.device)).float() for x in input_BTD.split(4)]
        self.output_ND = torch.cat(parts).flatten(0, 1)
        self.a_NF = torch.cat(neurons).flatten(0, 1).float()
        weighted_NF = self.a_NF * position_weights(self.output_ND).to(self.a_NF)[:, None]
        gram_FF = (weighted_NF.T @ self.a_NF).double()
        shift = RIDGE * gram_FF.diagonal().mean().clamp_min(1e-200)
        eye_FF = torch.eye(len(gram_FF), dtype=torch.float64, device=gram_FF.device)
        self.factor_FF = torch.linalg.cholesky(gram_FF + shift * eye_FF)
        self.weighted_NF = weighted_NF

    def toward(self, target_BTD: Tensor) -> nn.Module:
        """Return the layer refitted to other output states."""
        residual_ND = target_BTD.flatten(0, 1).to(self.output_ND) - self.output_ND
        cross_FD = (self.weighted_NF.T @ residual_ND).double()
        change_DF = torch.cholesky_solve(cross_FD, self.factor_FF).T
        weights = layer_tensors(self.layer)
        down_DF = weights["down_proj"]
        changed_DF = (down_DF.double() + change_DF).to(down_DF.dtype)
        return with_tensors(self.layer, {**weights, "down_proj": changed_DF})
