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
"""A step with at most this many rows more than sequences uses the recurrent form of the delta rule.

The recurrent form reads and writes the whole state for every row, the chunked form once.  From
three or four rows on the chunked form is faster (NumPy, the test model's and the 122B's heads,
2026-11; not measured on a GPU)."""


class DeltaNet:
    """The gated delta net of one layer."""

    def __init__(self, ops: Ops, config: ModelConfig, weights: WeightView) -> None:
        hidden, heads = config.hidden_size, config.value_heads
        width = heads * config.value_dim
        self.ops = ops
        self.qkvz = weights.linear("qkvz", config.channels + width, hidden)
        self.first_weight = self.qkvz
        """The first matrix that `forward` reads; the previous layer prefetches it into L2."""
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
        """x += delta_net(work.h); work.h = norm(x).  x f32 [T, D]    norm f32 [D]

        Updates the recurrent state of every sequence of the step.
        """
        ops, h = self.ops, work.h
        ops.linear(work.qkvz, h, self.qkvz)
        workspace = DeltaNetWorkspace(
            work.qkv, work.ab, work.decay, work.beta, work.delta_out, work.chunk_scratch
        )
        # query_start_loc is on the device.  The host only bounds the rows of a sequence:
        # at most tokens - sequences + 1.
        use_chunks = step.tokens - step.sequences > MAX_EXTRA_RECURRENT_ROWS
        ops.delta_net(
            x, h, norm, work.qkvz, self.weights, state.conv, state.delta, workspace, step,
            use_chunks,
        )  # fmt: skip
