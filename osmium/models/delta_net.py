"""Gated delta net: linear attention whose state decays by a gate and learns by the delta rule.

    q, k, v, z = x Wqkvz;  a, b = x Wab;  q, k, v = silu(conv(q, k, v))
    out = (norm(delta_rule(q, k, v, decay(a), beta(b))) * silu(z)) Wout

Yang et al. 2024, arXiv:2412.06464.
"""

from osmium.config import ModelConfig
from osmium.models.state import DeltaState
from osmium.models.weights import WeightView
from osmium.models.workspace import Workspace
from osmium.ops import Array, DeltaNetWorkspace, DeltaWeights, Ops, StepInputs

__all__ = ["DeltaNet"]

MAX_EXTRA_RECURRENT_ROWS = 2
"""Rows beyond one a sequence up to which the rule goes token by token.  The recurrence reads and
writes its whole state for every row, a chunk once: from three or four rows on the chunk is faster
(NumPy, both the lab model's and the 122B's heads, 2026-11; not measured on a GPU)."""


class DeltaNet:
    """The mixer of one delta-net layer."""

    def __init__(self, ops: Ops, config: ModelConfig, weights: WeightView) -> None:
        hidden, heads = config.hidden_size, config.value_heads
        self.ops = ops
        width = heads * config.value_dim
        self.qkvz = weights.linear("qkvz", config.channels + width, hidden)
        self.first_weight = self.qkvz
        """The matrix that is read first."""
        self.weights = DeltaWeights(
            conv=weights.array("conv", config.channels, 4),
            ab=weights.linear("ab", 2 * heads, hidden),
            a_log=weights.array("a_log", heads),
            dt_bias=weights.array("dt_bias", heads),
            norm=weights.array("gated_norm", config.value_dim),
            out=weights.linear("delta_out", hidden, width),
            eps=config.eps,
        )

    def forward(
        self, x: Array, step: StepInputs, state: DeltaState, work: Workspace, norm: Array
    ) -> None:
        """x += the mixer of work.h; work.h = norm(x).  x f32 [T, D]    norm f32 [D]
        The sequences' states become those after the step."""
        ops, h = self.ops, work.h
        ops.linear(work.qkvz, h, self.qkvz)
        workspace = DeltaNetWorkspace(work.qkv, work.ab, work.decay, work.beta, work.delta_out)
        # starts is on the device: the longest run of rows is known only to be at most this + 1.
        chunks = step.tokens - step.sequences > MAX_EXTRA_RECURRENT_ROWS
        ops.delta_net(
            x, h, norm, work.qkvz, self.weights, state.conv, state.delta, workspace, step, chunks
        )
