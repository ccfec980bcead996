"""Gated grouped-query attention: norms on q and k, partial RoPE, paged keys and values.

    q, g, k, v = x Wqgkv;  q, k = rope(norm(q)), rope(norm(k))
    out = (softmax(q k^T / sqrt(d), causal) v * sigmoid(g)) Wout

The gate, and the norms on q and k, are as in Qwen3-Next.
"""

import numpy as np
import numpy.typing as npt

from osmium.config import ModelConfig
from osmium.models.weights import WeightView
from osmium.models.workspace import Workspace
from osmium.ops import Array, AttentionWeights, AttentionWorkspace, Ops, PagedKV, StepInputs

__all__ = ["Attention", "rotary_frequencies"]


class Attention:
    """Gated attention of one layer."""

    def __init__(
        self, ops: Ops, config: ModelConfig, weights: WeightView, frequencies: Array
    ) -> None:
        """frequencies f32 [R / 2], radians per position."""
        heads, kv_heads, head_dim, hidden = (
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            config.hidden_size,
        )
        self.ops = ops
        self.qgkv = weights.linear("qgkv", 2 * (heads + kv_heads) * head_dim, hidden)
        self.first_weight = self.qgkv
        """The first matrix that `forward` reads; the previous layer prefetches it into L2."""
        self.weights = AttentionWeights(
            norms=_norms(ops, config, weights.array("attention_norms", 2, head_dim)),
            frequencies=frequencies,
            out=weights.linear("attention_out", hidden, heads * head_dim),
            eps=config.eps,
            scale=head_dim**-0.5,
        )

    def forward(
        self, x: Array, step: StepInputs, state: PagedKV, work: Workspace, norm: Array
    ) -> None:
        """x += attention(work.h); work.h = norm(x).  x f32 [T, D]    norm f32 [D]

        The step's keys and values are written to their pages before attention reads them.
        """
        ops, h = self.ops, work.h
        ops.linear(work.qgkv, h, self.qgkv)
        workspace = AttentionWorkspace(
            work.q, work.attn_out, work.partial, work.context_turns, work.context_sums,
            work.split_counters,
        )  # fmt: skip
        ops.gated_attention(x, h, norm, work.qgkv, self.weights, state, workspace, step)


def rotary_frequencies(config: ModelConfig) -> npt.NDArray[np.float32]:
    """Radians per position of each rotated pair.  f32 [R / 2]."""
    return np.array(config.rope_frequencies, np.float32)


def _norms(ops: Ops, config: ModelConfig, norms: Array) -> Array:
    """The norm weights of q and k, f32 [2, d], with YaRN's factor of the rotated values.

    A rotation is linear, so the factor may as well come before it.  A norm multiplies by 1 + w.
    """
    if config.rope_factor == 1:
        return norms
    scaled = ops.copy_d2h(norms).astype(np.float64)
    scaled[:, : config.rotary_dim] = (1 + scaled[:, : config.rotary_dim]) * config.rope_factor - 1
    return ops.to_device(scaled.astype(np.float32))
