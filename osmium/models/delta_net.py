"""Gated delta net: linear attention whose state decays by a gate and learns by the delta rule.

    q, k, v, z = x Wqkvz;  a, b = x Wab;  q, k, v = silu(conv(q, k, v))
    out = (norm(delta_rule(q, k, v, decay(a), beta(b))) * silu(z)) Wout

Yang et al. 2024, arXiv:2412.06464.
"""

from osmium.config import ModelConfig
from osmium.models.state import DeltaState
from osmium.models.weights import Weights
from osmium.models.workspace import Workspace
from osmium.ops import Array, Ops, Step

__all__ = ["DeltaNet"]

_FEW = 2
"""Rows beyond one a sequence up to which the rule goes token by token.  The recurrence reads and
writes its whole state for every row, a chunk once: from three or four rows on the chunk is faster
(NumPy, both the lab model's and the 122B's heads, 2026-11; not measured on a GPU)."""


class DeltaNet:
    """The mixer of one delta-net layer."""

    def __init__(self, ops: Ops, config: ModelConfig, weights: Weights) -> None:
        hidden, heads = config.hidden, config.value_heads
        self.ops = ops
        self.eps = config.eps
        self.channels = config.channels
        width = heads * config.value_dim
        self.qkvz = weights.linear("qkvz", self.channels + width, hidden)
        self.ab = weights.linear("ab", 2 * heads, hidden)
        self.conv = weights.array("conv", self.channels, 4)
        self.a_log = weights.array("a_log", heads)
        self.dt_bias = weights.array("dt_bias", heads)
        self.norm = weights.array("gated_norm", config.value_dim)
        self.out = weights.linear("delta_out", hidden, width)

    def mix(self, x: Array, step: Step, state: DeltaState, work: Workspace, norm: Array) -> None:
        """x += the mixer of work.h; work.h = norm(x).  x f32 [T, D]    norm f32 [D]
        The sequences' states become those after the step."""
        ops, h = self.ops, work.h
        ops.linear(work.qkvz, h, self.qkvz)
        ops.conv_gates(
            work.qkv, work.decay, work.beta, work.ab, work.qkvz, h, self.conv, state.conv,
            self.ab, self.a_log, self.dt_bias, step,
        )  # fmt: skip
        # starts is on the device: the longest run of rows is known only to be at most this + 1.
        ops.delta_gated(
            work.read, work.qkv, work.decay, work.beta, state.delta, work.qkvz, self.channels,
            self.norm, self.eps, step, chunks=step.tokens - step.sequences > _FEW,
        )  # fmt: skip
        ops.linear_norm(x, work.read, self.out, h, norm)
