"""Layer similarity: layer states -> (L, L) matrices.

A new measure is one function, one name in `Measure` and one row in `MEASURES`.
A cell that is NaN is undefined: the docstring of its measure says when that happens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from lmerge.information import InformationConfig, gaussian_nmi, gaussian_nmi_bounded, npib

Measure = Literal[
    "angular",
    "cosine",
    "cka",
    "block_influence",
    "npib",
    "gaussian_nmi",
    "gaussian_nmi_bounded",
]


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


def block_influence(states_LND: Tensor) -> Tensor:
    """Return 1 minus the block influences summed on the way from one layer to another.

    The influence of layer l is 1 - cos(h_l-1, h_l), averaged over prompts (ShortGPT,
    arXiv:2403.03853, eq. 1); a matrix of it is ours. Neighbours have their cosine; a block is as
    alike as what its layers change, one after the other, is small, even where they undo each other.

    Returns:
        (L, L) float64, at most 1; below -1 where layers far apart change much.
    """
    unit_LND = _unit(states_LND)
    influence_L = 1 - (unit_LND[1:] * unit_LND[:-1]).sum(dim=2).mean(dim=1)
    path_L = torch.nn.functional.pad(influence_L.cumsum(dim=0), (1, 0))
    matrix_LM = 1 - (path_L[:, None] - path_L[None, :]).abs()
    # What goes through a layer without a direction is undefined, also for that layer itself.
    known_L = unit_LND.isfinite().flatten(1).all(dim=1)
    return matrix_LM.masked_fill(~(known_L[:, None] & known_L[None, :]), torch.nan)


def _unit(states_LND: Tensor) -> Tensor:
    """Return states of length 1; NaN for a state of zeros, which has no direction."""
    states_LND = states_LND.double()
    norm_LN1: Tensor = torch.linalg.vector_norm(states_LND, dim=-1, keepdim=True)
    return states_LND / norm_LN1


MEASURES: dict[Measure, Callable[[Tensor], Tensor]] = {
    "angular": angular_similarity,
    "cosine": cosine_similarity,
    "cka": linear_cka,
    "block_influence": block_influence,
    "npib": npib,
    "gaussian_nmi": gaussian_nmi,
    "gaussian_nmi_bounded": gaussian_nmi_bounded,
}

INFORMATION: dict[Measure, Callable[[Tensor, InformationConfig], Tensor]] = {
    "npib": npib,
    "gaussian_nmi": gaussian_nmi,
    "gaussian_nmi_bounded": gaussian_nmi_bounded,
}
"""The measures that take an `InformationConfig`."""


def similarity_matrix(
    states_LND: Tensor,
    measure: Measure,
    config: InformationConfig | None = None,
    *,
    allow_undefined: bool = False,
) -> Tensor:
    """Return the (L, L) float64 matrix of a measure.

    Args:
        states_LND: States of L layers for N prompts.
        measure: A row of `MEASURES`.
        config: Options of the measures of information.
        allow_undefined: Whether undefined cells may come back as NaN instead of an error.

    Raises:
        ValueError: When the states are not finite, or the measure is undefined on them.
    """
    if not states_LND.isfinite().all():
        layer = int((~states_LND.isfinite()).flatten(1).any(dim=1).nonzero()[0, 0])
        raise ValueError(
            f"layer states must be finite, but layer {layer} holds NaN or infinity. "
            "Check the weights, or load them in float32."
        )
    if measure in INFORMATION:
        matrix_LM = INFORMATION[measure](states_LND, config or InformationConfig())
    else:
        matrix_LM = MEASURES[measure](states_LND)
    if not allow_undefined:
        _check_defined(matrix_LM, measure)
    return matrix_LM


def _check_defined(matrix_LM: Tensor, measure: Measure) -> None:
    undefined_L = ~matrix_LM.diagonal().isfinite()
    if undefined_L.any():
        layer = int(undefined_L.nonzero()[0, 0])
        more = " or no two directions of them stand out" if measure in INFORMATION else ""
        raise ValueError(
            f"`{measure}` is undefined for layer {layer}: its states are zero, or equal on all "
            f"prompts{', on two of them,' * (measure == 'npib')}{more}. Use more and different "
            f"prompts,{' another `sigma`,' * (measure in INFORMATION)} or another measure."
        )
    undefined_LM = ~matrix_LM.isfinite()
    if undefined_LM.any():
        i, j = undefined_LM.nonzero()[0].tolist()
        raise ValueError(
            f"`{measure}` is undefined for layers {i} and {j}: the product of their entropies is "
            "not positive. Use more prompts, or another measure such as `gaussian_nmi_bounded`."
        )
