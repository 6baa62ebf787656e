"""Mutual information and entropy from nearest neighbours, for all pairs of layers at once."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

NOISE = 1e-10
"""Noise that breaks ties, in units of a standard deviation, as in scikit-learn."""


def ksg_information(x_LNC: Tensor, y_LNC: Tensor, *, num_neighbors: int, seed: int) -> Tensor:
    """Return the mutual information of every coordinate of x with every one of y, in nats.

    The first estimator of Kraskov et al. (2004, arXiv:cond-mat/0305641), with scikit-learn's
    conventions: columns have standard deviation 1, noise of 1e-10 breaks ties, distances are
    Chebyshev's, a negative estimate is 0. Entry [l, m, c, e] is
    `mutual_info_regression(x[l], y[m, :, e], n_neighbors=num_neighbors, random_state=seed)[c]`.

    Args:
        x_LNC: Coordinates of L layers for N prompts.
        y_LNC: Coordinates of other layers for the same prompts, or the same layers.
        num_neighbors: Neighbours k; at least 1 and below N.
        seed: Seed of the noise.

    Returns:
        (L, M, C, E) float64, at least 0.
    """
    size, num_x, num_y = x_LNC.shape[1], x_LNC.shape[2], y_LNC.shape[2]
    random = np.random.RandomState(seed)
    x_PN = _columns(x_LNC.cpu(), torch.from_numpy(random.standard_normal((size, num_x))))
    noise_N = torch.from_numpy(random.standard_normal(size))
    y_QN = _columns(y_LNC.cpu(), noise_N[:, None].expand(size, num_y))
    y_QNN = _gaps(y_QN)
    # The sum of digamma(count + 1) comes from a table: counts lie in 0 to N - 1.
    digamma_N = torch.special.digamma(torch.arange(1, size + 1, dtype=torch.float64))
    sorted_QNN = torch.from_numpy(np.sort(y_QNN.numpy(), axis=2)).contiguous()
    sums_PQ = torch.stack(
        [_digamma_sums(x_N, y_QNN, sorted_QNN, num_neighbors, digamma_N) for x_N in x_PN]
    )
    whole = digamma_N[size - 1] + digamma_N[num_neighbors - 1]
    information_PQ = (whole - sums_PQ).clamp(min=0)
    information_LCME: Tensor = information_PQ.reshape(-1, num_x, len(y_LNC), num_y)
    return information_LCME.transpose(1, 2)


def knn_entropy(x_LNC: Tensor, *, num_neighbors: int) -> Tensor:
    """Return MKA's entropy -mean log(k / (N rho^C)), rho the distance to the k-th neighbour.

    The constant terms of the estimator (Kozachenko and Leonenko 1987) are left out, as published
    (arXiv:2406.16330), so the value can have either sign.

    Args:
        x_LNC: Coordinates of L layers for N prompts.
        num_neighbors: Neighbours k, the prompt itself not counted; at least 1 and below N.

    Returns:
        (L,) float64 in nats.
    """
    size, width = x_LNC.shape[1:]
    distance_LNN = torch.cdist(x_LNC, x_LNC, compute_mode="donot_use_mm_for_euclid_dist")
    rho_LN = distance_LNN.kthvalue(num_neighbors + 1, dim=2).values  # the first is itself
    return -(num_neighbors / (size * rho_LN**width)).log().mean(dim=1)


def _columns(x_LNC: Tensor, noise_NC: Tensor) -> Tensor:
    """Return each column (P, N), P = L C, with standard deviation 1 and its noise."""
    x_LNC = x_LNC.double()
    spread_L1C = x_LNC.std(dim=1, keepdim=True, correction=0)
    x_LNC = x_LNC / torch.where(spread_L1C == 0, 1.0, spread_L1C)
    size_L1C = x_LNC.abs().mean(dim=1, keepdim=True).clamp(min=1)
    return (x_LNC + NOISE * size_L1C * noise_NC).transpose(1, 2).flatten(0, 1)


def _gaps(x_PN: Tensor) -> Tensor:
    return (x_PN[:, :, None] - x_PN[:, None, :]).abs()


def _digamma_sums(
    x_N: Tensor, y_QNN: Tensor, sorted_QNN: Tensor, num_neighbors: int, digamma_N: Tensor
) -> Tensor:
    """Return the means over prompts of digamma(nx + 1) + digamma(ny + 1) (Q,)."""
    x_1NN = _gaps(x_N[None])
    joint_QNN = torch.maximum(x_1NN, y_QNN).numpy()
    # The prompt itself, at distance 0, is the first. NumPy's partition is five times as fast as
    # torch's `kthvalue` on rows of some forty.
    nearest_QNN = np.partition(joint_QNN, num_neighbors, axis=2)
    radius_QN = torch.from_numpy(nearest_QNN[..., num_neighbors].copy())
    radius_QN1 = torch.nextafter(radius_QN, torch.zeros(()).double())[..., None]
    # The same distances of x for every y: one sorted row a prompt answers for all of them.
    sorted_NN = x_1NN[0].sort(dim=1).values.contiguous()
    x_QN = torch.searchsorted(sorted_NN, radius_QN1[..., 0].T.contiguous(), right=True).T - 1
    y_QN = torch.searchsorted(sorted_QNN, radius_QN1, right=True)[..., 0] - 1
    return (digamma_N[x_QN] + digamma_N[y_QN]).mean(dim=1)
