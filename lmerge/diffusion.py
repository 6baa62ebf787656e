"""Diffusion maps: the states of one layer -> two coordinates for each prompt.

All layers are mapped at once. A layer whose map is not determined gets NaN in every coordinate: a
layer that is (nearly) the same on all prompts, or whose prompts all look equally far apart, has no
second and third direction that stand out.
"""

from __future__ import annotations

import torch
from torch import Tensor

NUM_COORDINATES = 2
"""Width C of a map, as published."""

MIN_GAP = 1e-9
"""Eigenvalues, in units of the largest, closer than this count as equal."""


def distances(states_LND: Tensor) -> Tensor:
    """Return the Euclidean distances (L, N, N) between the prompts of each layer, float64."""
    states_LND = states_LND.double()
    # Not through a matrix product: near prompts would lose their distance to rounding.
    exact = "donot_use_mm_for_euclid_dist"
    return torch.cdist(states_LND, states_LND, compute_mode=exact)


def bandwidths(distance_LNN: Tensor, sigma: float) -> Tensor:
    """Return `sigma` for every layer, or a layer's median distance where `sigma` is 0."""
    if sigma > 0:
        return torch.full((len(distance_LNN),), sigma, dtype=torch.float64)
    upper = torch.triu_indices(distance_LNN.shape[1], distance_LNN.shape[1], 1)
    return distance_LNN[:, upper[0], upper[1]].median(dim=1).values


def rank_map(distance_LNN: Tensor, sigma: float) -> Tensor:
    """Return MKA's diffusion map, each coordinate replaced by its rank / N (arXiv:2406.16330).

    K_ij = exp(-sqrt(d_ij / sigma)); K / (p p^T)^0.5 with p = K 1; A = K / (v v^T) with
    v = sqrt(K 1); the map is U[:, 1:3] / U[:, 0] of the SVD of A.

    Args:
        distance_LNN: Distances between prompts.
        sigma: Bandwidth in the unit of the states; 0 takes a layer's median distance.

    Returns:
        (L, N, C) float64 in (0, 1]; NaN for a layer whose map is not determined.
    """
    sigma_L11 = bandwidths(distance_LNN, sigma)[:, None, None]
    kernel_LNN = torch.exp(-(distance_LNN / sigma_L11).sqrt())
    mass_LN = kernel_LNN.sum(dim=2)
    kernel_LNN = kernel_LNN / (mass_LN[:, :, None] * mass_LN[:, None, :]).sqrt()
    root_LN = kernel_LNN.sum(dim=2).sqrt()
    value_LC, vector_LNC = _leading(kernel_LNN / (root_LN[:, :, None] * root_LN[:, None, :]))
    map_LNC = vector_LNC[..., 1 : 1 + NUM_COORDINATES] / vector_LNC[..., :1]
    rank_LNC = map_LNC.argsort(dim=1).argsort(dim=1).double() + 1
    # Two prompts at one place have no order, so ranks would be made of rounding.
    place = torch.eye(distance_LNN.shape[1], dtype=torch.bool)
    twin_L = ((distance_LNN == 0) & ~place).flatten(1).any(dim=1)
    return _marked(rank_LNC / map_LNC.shape[1], ~_determined(value_LC) | twin_L)


def spectral_map(distance_LNN: Tensor, sigma: float) -> Tensor:
    """Return the map of the task and language study: eigenvectors 2 and 3 of a random walk.

    W = exp(-d^2 / (2 sigma^2)), P = W / rowsum; the right eigenvectors of P, of unit length, times
    the square root of their eigenvalue.

    Returns:
        (L, N, C) float64, each coordinate up to its sign; NaN for a layer whose map is not
        determined.
    """
    sigma_L11 = bandwidths(distance_LNN, sigma)[:, None, None]
    kernel_LNN = torch.exp(-distance_LNN.square() / (2 * sigma_L11.square()))
    root_LN = kernel_LNN.sum(dim=2).sqrt()
    # P is similar to a symmetric matrix, whose eigenvectors divided by `root` are those of P.
    value_LC, vector_LNC = _leading(kernel_LNN / (root_LN[:, :, None] * root_LN[:, None, :]))
    vector_LNC = vector_LNC / root_LN[:, :, None]
    vector_LNC = vector_LNC / torch.linalg.vector_norm(vector_LNC, dim=1, keepdim=True)
    chosen = slice(1, 1 + NUM_COORDINATES)
    map_LNC = vector_LNC[..., chosen] * value_LC[:, None, chosen].sqrt()
    return _marked(map_LNC, ~_determined(value_LC))


def _leading(matrix_LNN: Tensor) -> tuple[Tensor, Tensor]:
    """Return the eigenvalues by falling size, without sign, and the eigenvectors as columns."""
    finite_L = matrix_LNN.isfinite().flatten(1).all(dim=1)
    # A median distance of 0 gives NaN; zeros in its place fail the test of gaps.
    matrix_LNN = torch.where(finite_L[:, None, None], matrix_LNN, torch.zeros_like(matrix_LNN))
    value_LN, vector_LNN = torch.linalg.eigh(matrix_LNN)
    value_LN, order_LN = value_LN.abs().sort(dim=1, descending=True)
    return value_LN, vector_LNN.gather(2, order_LN[:, None, :].expand_as(vector_LNN))


def _determined(value_LN: Tensor) -> Tensor:
    """Return for which layers (L,) the first C + 1 eigenvalues differ and are not 0 (bool)."""
    head_LC = torch.nn.functional.pad(value_LN, (0, NUM_COORDINATES + 2))[:, : NUM_COORDINATES + 2]
    gap_LC = -head_LC.diff(dim=1)
    return (gap_LC > MIN_GAP * head_LC[:, :1]).all(dim=1) & (head_LC[:, 0] > 0)


def _marked(map_LNC: Tensor, undefined_L: Tensor) -> Tensor:
    return torch.where(undefined_L[:, None, None], torch.nan, map_LNC)
