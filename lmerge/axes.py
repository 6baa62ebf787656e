"""Which axis of which matrix of a layer an alpha, a norm or a symmetry moves.

Short names of the tensors are those of `llama.PATHS`.
"""

from __future__ import annotations

from lmerge.llama import MATRICES

ALPHA_AXIS: dict[str, int] = {
    "q_proj": 0,
    "k_proj": 0,
    "v_proj": 0,
    "o_proj": 1,
    "gate_proj": 0,
    "up_proj": 0,
    "down_proj": 1,
}
"""Axis along which a neuron or head alpha runs: the inner side of the attention and of the MLP."""

COMPANION: dict[str, str] = {
    **{f"{name}.bias": name for name in MATRICES},
    "q_norm": "q_proj",
    "k_norm": "k_proj",
}
"""Vectors that are merged with the alphas of a matrix."""

FOLDS_INTO: dict[str, tuple[str, ...]] = {
    "input_layernorm": ("q_proj", "k_proj", "v_proj"),
    "post_attention_layernorm": ("gate_proj", "up_proj"),
}
"""RMSNorm -> the matrices whose input it scales."""

NEURON_AXIS: dict[str, int] = {
    "gate_proj": 0,
    "up_proj": 0,
    "down_proj": 1,
    "gate_proj.bias": 0,
    "up_proj.bias": 0,
}
"""Axis that a permutation of the MLP neurons moves."""

NEURON_SCALE: dict[str, int] = {"up_proj": 1, "up_proj.bias": 1, "down_proj": -1}
"""Power of c by which a matrix is multiplied when a neuron's up row is scaled by c."""

QUERY_AXIS: dict[str, int] = {"q_proj": 0, "q_proj.bias": 0, "o_proj": 1}
"""Axis that a permutation of the query heads moves."""

GROUP_AXIS: dict[str, int] = {"k_proj": 0, "k_proj.bias": 0, "v_proj": 0, "v_proj.bias": 0}
"""Axis that a permutation of the key/value heads moves; their query heads go with them."""

VALUE_BASIS: dict[str, int] = {"v_proj": 1, "v_proj.bias": 1, "o_proj": -1}
"""Where a change of the value basis acts (1), and where its inverse does (-1)."""

ROTARY_SCALE: dict[str, int] = {"q_proj": 1, "q_proj.bias": 1, "k_proj": -1, "k_proj.bias": -1}
"""Power of the scale of a rotary pair; all four turn by the same angle."""
