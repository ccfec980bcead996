"""Gated grouped-query attention: norms on q and k, partial rotation, paged keys and values.

    q, g, k, v = x Wqgkv;  q, k = rope(norm(q)), rope(norm(k))
    out = (softmax(q k^T / sqrt(d), causal) v * sigmoid(g)) Wout

The gate, and the norms on q and k, are as in Qwen3-Next.
"""

import numpy as np
import numpy.typing as npt

from osmium.config import ModelConfig
from osmium.models.weights import Weights
from osmium.models.workspace import Workspace
from osmium.ops import Array, KeysValues, Ops, Step

__all__ = ["Attention", "rotary_frequencies"]


class Attention:
    """The mixer of one attention layer."""

    def __init__(self, ops: Ops, config: ModelConfig, weights: Weights, frequencies: Array) -> None:
        """frequencies f32 [R / 2], radians a position."""
        heads, groups, size, hidden = config.heads, config.kv_heads, config.head_dim, config.hidden
        self.ops = ops
        self.frequencies = frequencies
        self.eps = config.eps
        self.scale = size**-0.5
        self.qgkv = weights.linear("qgkv", 2 * (heads + groups) * size, hidden)
        self.first = self.qgkv
        """The matrix that is read first."""
        self.norms = weights.array("attention_norms", 2, size)
        self.out = weights.linear("attention_out", hidden, heads * size)

    def mix(self, x: Array, step: Step, state: KeysValues, work: Workspace, norm: Array) -> None:
        """x += the mixer of work.h; work.h = norm(x).  x f32 [T, D]    norm f32 [D]
        Keys and values of the step are kept before any is read."""
        ops, q, qgkv = self.ops, work.q, work.qgkv
        ops.linear(qgkv, work.h, self.qgkv)
        ops.rope_append(q, state, qgkv, self.norms, self.frequencies, step, self.eps)
        ops.gated_attention(
            x, work.h, norm, q, state, qgkv, self.out, work.attended, work.partial, step, self.scale
        )


def rotary_frequencies(config: ModelConfig) -> npt.NDArray[np.float32]:
    """theta^(-2j / R) for j < R / 2, radians a position.  f32 [R / 2]."""
    exponent = np.arange(0, config.rotary_dim, 2) / config.rotary_dim
    return (config.rope_theta**-exponent).astype(np.float32)
