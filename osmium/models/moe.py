"""Mixture of experts: a router, the experts it chooses through a store, and a shared expert.

    out = sum over the top k of w_e expert_e(x) + sigmoid(x gate) shared(x)
    expert(x) = (silu(x Wgate) * x Wup) Wdown

Every routed expert is computed, always.
"""

from osmium.config import ModelConfig
from osmium.experts.routing import predict
from osmium.experts.store import Store
from osmium.models.weights import Weights
from osmium.models.workspace import Workspace
from osmium.ops import Array, Linear, Ops, SharedExpert, Step

__all__ = ["Moe"]


class Moe:
    """The experts of one layer."""

    def __init__(
        self, ops: Ops, config: ModelConfig, weights: Weights, store: Store, layer: int
    ) -> None:
        hidden, inner = config.hidden_size, config.shared_intermediate_size
        self.ops, self.store, self.layer, self.experts = ops, store, layer, config.num_experts
        self.router = weights.linear("router", config.num_experts + 1, hidden)
        self.shared = SharedExpert(
            up=weights.linear("shared_up", 2 * inner, hidden),
            down=weights.linear("shared_down", hidden, inner),
            column=config.num_experts,
        )
        self.after: Linear | None = None
        """The next layer's router."""

    def forward(self, x: Array, step: Step, work: Workspace, norm: Array, ahead: Array) -> None:
        """x += the experts of work.h; work.h = norm(x).  x f32 [T, D]    norm f32 [D]
        ahead: the weights that are read next"""
        store = self.store
        guess = None if self.after is None else store.asked(step.tokens)
        self.ops.router(
            work.ids, work.weights, work.scores, work.h, self.router, self.experts,
            store.cache.counters, work.arrived, store.trace, self.layer, step.positions,
            guess, self.after, store.predicted,
        )  # fmt: skip
        if store.recorder is not None and store.trace is None and self.after is not None:
            top_k = work.ids.shape[1]
            predicted, weights = predict(self.ops, work.h, self.after, self.experts, top_k)
            store.recorder.expect(self.layer + 1, predicted, weights)
        store.mlp(
            x, work.h, work.ids, work.weights, self.layer, self.shared, work.scores,
            work.shared_inner, work.shared_both, work.shared, work.y, norm, ahead,
        )  # fmt: skip
