"""Mixture of experts: a router, the experts it chooses through a store, and a shared expert.

    out = sum over the top k of w_e expert_e(x) + sigmoid(x gate) shared(x)
    expert(x) = (silu(x Wgate) * x Wup) Wdown

Every routed expert is computed, always.
"""

from osmium.config import ModelConfig
from osmium.experts.store import Store
from osmium.models.weights import Weights
from osmium.models.workspace import Workspace
from osmium.ops import Array, Ops, Step

__all__ = ["Moe"]


class Moe:
    """The experts of one layer."""

    def __init__(
        self, ops: Ops, config: ModelConfig, weights: Weights, store: Store, layer: int
    ) -> None:
        hidden, inner = config.hidden, config.shared_size
        self.ops, self.store, self.layer = ops, store, layer
        self.experts, self.eps = config.experts, config.eps
        self.moe_norm = weights.array("moe_norm", hidden)
        self.router = weights.linear("router", config.experts + 1, hidden)
        self.shared_up = weights.linear("shared_up", 2 * inner, hidden)
        self.shared_down = weights.linear("shared_down", hidden, inner)

    def forward(self, x: Array, step: Step, work: Workspace) -> None:
        """x += the experts of norm(x); x f32 [T, D]."""
        ops, store, h = self.ops, self.store, work.h
        ops.norm_linear(work.scores, h, x, self.moe_norm, self.router, self.eps)
        with ops.beside():  # the shared expert needs no route
            ops.gated_up(work.shared_inner, h, self.shared_up, work.shared_both)
            ops.linear(work.shared, work.shared_inner, self.shared_down)
        ops.route(work.ids, work.weights, work.scores, self.experts, store.cache.counters)
        if store.trace is not None:
            ops.replay(work.ids, store.trace, self.layer, step.positions)
        store.mlp(
            x, h, work.ids, work.weights, self.layer, work.shared, work.scores, self.experts,
            work.y,
        )  # fmt: skip
