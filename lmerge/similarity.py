"""Layer similarity: layer states -> (L, L) matrices.

A new measure is one function, one name in `Measure` and one row in `MEASURES`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Measure = Literal["angular", "cosine", "cka"]


def cosine_similarity(states_LND: Tensor) -> Tensor:
    """Return the mean over prompts of the cosine between the states of two layers.

    Args:
        states_LND: States of L layers for N prompts, any scale.

    Returns:
        (L, L) float64 in [-1, 1]; 1 means equal directions on every prompt.
    """
    unit_LND = _unit(states_LND)
    return torch.einsum("lnd,mnd->lm", unit_LND, unit_LND) / states_LND.shape[1]


def angular_similarity(states_LND: Tensor) -> Tensor:
    """Return 1 minus the mean angular distance arccos(cosine) / pi (arXiv:2403.17887, eq. 7).

    Returns:
        (L, L) float64 in [0, 1]; 1 means equal directions on every prompt.
    """
    unit_LND = _unit(states_LND)
    cosine_LMN = torch.einsum("lnd,mnd->lmn", unit_LND, unit_LND).clamp(-1, 1)
    return 1 - (cosine_LMN.arccos() / torch.pi).mean(dim=-1)


def linear_cka(states_LND: Tensor) -> Tensor:
    """Return the linear CKA of every two layers (Kornblith et al. 2019, arXiv:1905.00414).

    Returns:
        (L, L) float64 in [0, 1]; 1 means equal up to rotation and scale.
    """
    centered_LND = states_LND.double() - states_LND.double().mean(dim=1, keepdim=True)
    # Gram matrices over prompts: N is small beside D.
    gram_LNN = centered_LND @ centered_LND.transpose(1, 2)
    shared_LM = torch.einsum("lij,mij->lm", gram_LNN, gram_LNN)
    norm_L = shared_LM.diagonal().sqrt()
    return shared_LM / (norm_L[:, None] * norm_L[None, :])


def _unit(states_LND: Tensor) -> Tensor:
    """Return states of length 1; NaN for a state of zeros, which has no direction."""
    states_LND = states_LND.double()
    norm_LN1: Tensor = torch.linalg.vector_norm(states_LND, dim=-1, keepdim=True)
    return states_LND / norm_LN1


MEASURES: dict[Measure, Callable[[Tensor], Tensor]] = {
    "angular": angular_similarity,
    "cosine": cosine_similarity,
    "cka": linear_cka,
}


def similarity_matrix(states_LND: Tensor, measure: Measure) -> Tensor:
    """Return the (L, L) float64 matrix of a measure.

    Raises:
        ValueError: When the states are not finite, or the measure is undefined on them.
    """
    if not states_LND.isfinite().all():
        layer = int((~states_LND.isfinite()).flatten(1).any(dim=1).nonzero()[0, 0])
        raise ValueError(
            f"layer states must be finite, but layer {layer} holds NaN or infinity. "
            "Check the weights, or load them in float32."
        )
    matrix_LM = MEASURES[measure](states_LND)
    undefined_L = ~matrix_LM.diagonal().isfinite()
    if undefined_L.any():
        layer = int(undefined_L.nonzero()[0, 0])
        raise ValueError(
            f"`{measure}` is undefined for layer {layer}: its states are zero, or equal on all "
            "prompts. Use more and different prompts, or another measure."
        )
    return matrix_LM
