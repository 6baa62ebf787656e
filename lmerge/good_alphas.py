"""Alphas of the last step whose loss was finite, for a training that fails later."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class GoodAlphas:
    """Remembers the alphas of the last good step."""

    def __init__(self) -> None:
        self._kept: list[Tensor] = []

    def __bool__(self) -> bool:
        """Whether a good step is remembered."""
        return bool(self._kept)

    def check(self, loss: Tensor, step: int) -> None:
        """Raise ValueError when a step's loss is not finite."""
        if not loss.isfinite():
            raise ValueError(
                f"the loss must be finite, got {loss.item()} in step {step}. "
                "The last good alphas are kept in alphas.json; lower the learning rate."
            )

    def keep(self, parameters: Iterable[nn.Parameter]) -> None:
        """Remember the alphas; on their device, since a copy would wait for it in every step."""
        self._kept = [parameter.detach().clone() for parameter in parameters]

    def restore(self, parameters: Iterable[nn.Parameter]) -> bool:
        """Put the remembered alphas back; returns whether there are any."""
        if not self:
            return False
        with torch.no_grad():
            for parameter, kept in zip(parameters, self._kept, strict=True):
                parameter.copy_(kept)
        return True


def check_alphas_finite(parameters: Iterable[nn.Parameter]) -> None:
    """Raise ValueError when training has made alphas NaN or infinite."""
    if not all(bool(parameter.isfinite().all()) for parameter in parameters):
        raise ValueError("the alphas became NaN or infinite in training. Lower the learning rate.")
