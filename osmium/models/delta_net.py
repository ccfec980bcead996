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
        self.width = heads * config.value_dim
        self.mixer_norm = weights.array("mixer_norm", hidden)
        self.qkvz = weights.linear("qkvz", self.channels + self.width, hidden)
        self.ab = weights.linear("ab", 2 * heads, hidden)
        self.conv = weights.array("conv", self.channels, 4)
        self.a_log = weights.array("a_log", heads)
        self.dt_bias = weights.array("dt_bias", heads)
        self.norm = weights.array("gated_norm", config.value_dim)
        self.out = weights.linear("delta_out", hidden, self.width)

    def mix(self, x: Array, step: Step, state: DeltaState, work: Workspace) -> None:
        """x += the mixer of norm(x); x f32 [T, D].  The sequences' states become those after the
        step."""
        ops, h = self.ops, work.h
        ops.norm_linear(work.qkvz, h, x, self.mixer_norm, self.qkvz, self.eps)
        ops.conv_gates(
            work.qkv, work.decay, work.beta, work.ab, work.qkvz, h, self.conv, state.conv,
            self.ab, self.a_log, self.dt_bias, step,
        )  # fmt: skip
        rule = (work.qkv, work.decay, work.beta, state.delta)
        norm = (work.qkvz, self.channels, self.norm, self.eps)
        # starts is on the device: the longest run of rows is known only to be at most this + 1.
        if step.tokens - step.sequences > _FEW:
            ops.delta_chunk(work.read, *rule, step)
            ops.gated_norm(work.read, work.read, *norm)
        else:
            ops.delta_step_gated(work.read, *rule, *norm, step)
        ops.linear_add(x, work.read.reshape(step.tokens, self.width), self.out)
