"""Decoder layers with something to train: factors of rows and columns, or whole matrices."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lmerge.llama import MATRICES, LayerTensors, by_path, layer_tensors, with_matrices

WARMUP = 5
"""Steps in which the learning rate rises."""


def learning_rate_share(step: int, num_steps: int) -> float:
    """Return the share of the learning rate: a linear rise, then a cosine down to a twentieth."""
    rise = min(1.0, (step + 1) / WARMUP)
    return rise * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / num_steps)))


class ScaledLinear(nn.Module):
    """A matrix with a factor for each row and each column, applied to its output and input.

    That is the same as scaling the matrix, without a gradient of its size.

    Args:
        linear: The matrix, frozen.
    """

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear
        weight: Tensor = linear.weight  # type: ignore[assignment]
        self.row = nn.Parameter(_zeros(weight, 0))
        self.column = nn.Parameter(_zeros(weight, 1))

    def weight(self) -> Tensor:
        """Return the scaled matrix."""
        weight: Tensor = self.linear.weight  # type: ignore[assignment]
        return (weight.float() * (1 + self.row)[:, None] * (1 + self.column)).to(weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        weight: Tensor = self.linear.weight  # type: ignore[assignment]
        bias: Tensor | None = self.linear.bias  # type: ignore[assignment]
        output = nn.functional.linear(x * (1 + self.column).to(x.dtype), weight)
        output = output * (1 + self.row).to(x.dtype)
        return output if bias is None else output + bias


class ScaledLayer(nn.Module):
    """A decoder layer whose seven matrices are `ScaledLinear`.

    Args:
        template: The decoder layer; it is left as it is.
    """

    def __init__(self, template: nn.Module) -> None:
        super().__init__()
        self.base = layer_tensors(template)
        self.scaled = nn.ModuleDict()
        self.inner = with_matrices(template, self._wrap)

    def _wrap(self, name: str, matrix: nn.Module) -> nn.Module:
        self.scaled[name] = ScaledLinear(matrix)
        return self.scaled[name]

    def tensors(self) -> LayerTensors:
        """Return the tensors that the layer has now."""
        scaled = {name: cast(ScaledLinear, self.scaled[name]).weight() for name in MATRICES}
        return {**self.base, **scaled}

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.inner(hidden_states, *args, **kwargs)


class FreeLayer(nn.Module):
    """A decoder layer whose matrices are trained.

    Args:
        template: The decoder layer; its code runs, and its weights stay as they are.
    """

    def __init__(self, template: nn.Module) -> None:
        super().__init__()
        self.template = template
        base = layer_tensors(template)
        self.free = nn.ParameterDict({n: nn.Parameter(base[n].float().clone()) for n in MATRICES})

    def tensors(self) -> LayerTensors:
        """Return the tensors that the layer has now."""
        base = layer_tensors(self.template)
        return {**base, **{n: weight.to(base[n].dtype) for n, weight in self.free.items()}}

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return functional_call(
            self.template, by_path(self.tensors()), (hidden_states, *args), kwargs
        )


def _zeros(weight: Tensor, axis: int) -> Tensor:
    return torch.zeros(weight.shape[axis], dtype=torch.float32, device=weight.device)
