"""Measures of similarity that ask how much one layer's map of the prompts tells of another's.

A cell whose value does not exist is NaN: a layer without a determined map (see diffusion.py), or
entropies whose product is not positive, under whose root a normalisation would divide.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lmerge.diffusion import NUM_COORDINATES, distances, rank_map, spectral_map
from lmerge.ksg import knn_entropy, ksg_information

RIDGE = 1e-6
"""Added to the diagonal of every covariance, as published."""


@dataclass(frozen=True, kw_only=True)
class InformationConfig:
    """How information between layers is estimated."""

    sigma: float = 8.0
    """Bandwidth of the kernels in the unit of the states; 0 takes a layer's median distance."""
    num_neighbors: int = 5
    """Neighbours of the KSG estimator (`npib`); at least 1, and below the number of prompts."""
    entropy_neighbors: int = 50
    """Neighbours of the entropy (`npib`); at least 1, and below the number of prompts."""
    seed: int = 0
    """Seed of the noise of 1e-10 that breaks ties (`npib`); at least 0."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.sigma) and self.sigma >= 0):
            raise ValueError(f"`sigma` must be finite and at least 0, got {self.sigma}; try 8.")
        for name, low in {"num_neighbors": 1, "entropy_neighbors": 1, "seed": 0}.items():
            if getattr(self, name) < low:
                raise ValueError(f"`{name}` must be at least {low}, got {getattr(self, name)}.")


def npib(states_LND: Tensor, config: InformationConfig | None = None) -> Tensor:
    """Return MKA's normalised information MI / sqrt(H_i H_j) (arXiv:2406.16330).

    The information of two maps is the mean over their pairs of coordinates. The noise that breaks
    ties differs between the two places of a pair, so both orders are averaged: the matrix is
    symmetric, where the published one depends on the order of the layers.

    Returns:
        (L, L) float64, at least 0, not bounded by 1; the diagonal is 1 by definition; NaN where
        H_i H_j <= 0 or a map is not determined.

    Raises:
        ValueError: When there are too few prompts for the neighbours.
    """
    config = config or InformationConfig()
    _check_neighbors(states_LND.shape[1], config)
    map_LNC = rank_map(distances(states_LND), config.sigma)
    known_L = map_LNC.isfinite().flatten(1).all(dim=1)
    map_LNC = map_LNC.nan_to_num()
    information_LMCE = ksg_information(
        map_LNC, map_LNC, num_neighbors=config.num_neighbors, seed=config.seed
    )
    information_LM = information_LMCE.mean(dim=(2, 3))
    entropy_L = knn_entropy(map_LNC, num_neighbors=config.entropy_neighbors)
    return _normalised((information_LM + information_LM.T) / 2, entropy_L, known_L)


def gaussian_nmi(states_LND: Tensor, config: InformationConfig | None = None) -> Tensor:
    """Return the task and language study's I / sqrt(H_i H_j) under Gaussian maps.

    I = (logdet S_i + logdet S_j - logdet S_ij) / 2 and H = logdet(2 pi e S) / 2.

    Returns:
        (L, L) float64, at least 0, not bounded by 1, since differential entropies may be near 0;
        the diagonal is 1 by definition; NaN where H_i H_j <= 0 or a map is not determined.
    """
    information_LM, logdet_L = _gaussian(states_LND, config or InformationConfig())
    entropy_L = (logdet_L + NUM_COORDINATES * math.log(2 * math.pi * math.e)) / 2
    return _normalised(information_LM, entropy_L, logdet_L.isfinite())


def gaussian_nmi_bounded(states_LND: Tensor, config: InformationConfig | None = None) -> Tensor:
    """Return sqrt(1 - exp(-2 I)) of the Gaussian information: a correlation.

    Returns:
        (L, L) float64 in [0, 1]; the diagonal is 1, its limit without the ridge; NaN where a map
        is not determined.
    """
    information_LM, logdet_L = _gaussian(states_LND, config or InformationConfig())
    return _with_ones((-torch.expm1(-2 * information_LM)).sqrt(), logdet_L.isfinite())


def _gaussian(states_LND: Tensor, config: InformationConfig) -> tuple[Tensor, Tensor]:
    """Return the information (L, L) and logdet S (L,); NaN for a map that is not determined."""
    map_LNC = spectral_map(distances(states_LND), config.sigma)
    undefined_L = ~map_LNC.isfinite().flatten(1).all(dim=1)
    centered_LNC = (map_LNC - map_LNC.mean(dim=1, keepdim=True)).nan_to_num()
    size = max(1, centered_LNC.shape[1] - 1)
    cross_LMCE = torch.einsum("lnc,mne->lmce", centered_LNC, centered_LNC) / size
    own_LCC = cross_LMCE.diagonal().permute(2, 0, 1) + RIDGE * torch.eye(NUM_COORDINATES).double()
    num_layers = len(own_LCC)
    shape = (num_layers, num_layers, NUM_COORDINATES, NUM_COORDINATES)
    upper = torch.cat([own_LCC[:, None].expand(shape), cross_LMCE], dim=3)
    lower = torch.cat([cross_LMCE.transpose(2, 3), own_LCC[None].expand(shape)], dim=3)
    logdet_L = torch.logdet(own_LCC).masked_fill(undefined_L, torch.nan)
    joint_LM = torch.logdet(torch.cat([upper, lower], dim=2))
    information_LM = (logdet_L[:, None] + logdet_L[None, :] - joint_LM) / 2
    # The two orders of a pair differ in the last place.
    return ((information_LM + information_LM.T) / 2).clamp(min=0), logdet_L


def _normalised(information_LM: Tensor, entropy_L: Tensor, known_L: Tensor) -> Tensor:
    product_LM = entropy_L[:, None] * entropy_L[None, :]
    exists_LM = product_LM > 0  # not where it is NaN, either
    ratio_LM = information_LM / torch.where(exists_LM, product_LM, 1.0).sqrt()
    return _with_ones(ratio_LM.masked_fill(~exists_LM, torch.nan), known_L)


def _with_ones(matrix_LM: Tensor, known_L: Tensor) -> Tensor:
    """Return the matrix with a diagonal of 1; NaN in the rows of layers without a map."""
    matrix_LM = matrix_LM.clone()
    matrix_LM.fill_diagonal_(1)
    unknown_LM = ~(known_L[:, None] & known_L[None, :])
    return matrix_LM.masked_fill(unknown_LM, torch.nan)


def _check_neighbors(num_prompts: int, config: InformationConfig) -> None:
    for name in ("num_neighbors", "entropy_neighbors"):
        wanted = getattr(config, name)
        if num_prompts <= wanted:
            raise ValueError(
                f"`npib` needs more than `{name}` = {wanted} prompts, got {num_prompts}. Raise "
                f"`num_prompts`, or lower `{name}`."
            )
