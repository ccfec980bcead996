"""Mixture of experts: a router, the experts it chooses through a store, and a shared expert.

    out = sum over the top k of w_e expert_e(x) + sigmoid(x gate) shared(x)
    expert(x) = (silu(x Wgate) * x Wup) Wdown

Every routed expert is computed, always.
"""

from osmium.config import ModelConfig
from osmium.experts.routing import predict_experts
from osmium.experts.runner import ExpertRunner
from osmium.models.weights import WeightView
from osmium.models.workspace import Workspace
from osmium.ops import Array, LinearWeight, Ops, SharedExpert, StepInputs

__all__ = ["MoeBlock"]


class MoeBlock:
    """The experts of one layer."""

    def __init__(
        self, ops: Ops, config: ModelConfig, weights: WeightView, store: ExpertRunner, layer: int
    ) -> None:
        hidden, inner = config.hidden_size, config.shared_intermediate_size
        self.ops, self.store, self.layer, self.experts = ops, store, layer, config.num_experts
        self.router = weights.linear("router", config.num_experts + 1, hidden)
        self.shared = SharedExpert(
            up=weights.linear("shared_up", 2 * inner, hidden),
            down=weights.linear("shared_down", hidden, inner),
            gate_column=config.num_experts,
        )
        self.next_router: LinearWeight | None = None
        """The next layer's router."""

    def forward(
        self, x: Array, step: StepInputs, work: Workspace, norm: Array, l2_prefetch: Array
    ) -> None:
        """x += the experts of work.h; work.h = norm(x).  x f32 [T, D]    norm f32 [D]
        ahead: the weights that are read next"""
        store = self.store
        prefetch = None if self.next_router is None else store.router_prefetch_buffers(step.tokens)
        self.ops.router(
            work.ids, work.weights, work.router_logits, work.h, self.router, self.experts,
            store.cache.counters, work.router_barrier, store.trace, self.layer, step.positions,
            prefetch, self.next_router, store.predicted,
        )  # fmt: skip
        if store.recorder is not None and store.trace is None and self.next_router is not None:
            top_k = work.ids.shape[1]
            predicted, weights = predict_experts(
                self.ops, work.h, self.next_router, self.experts, top_k
            )
            store.recorder.add_predicted(self.layer + 1, predicted, weights)
        store.forward(
            x, work.h, work.ids, work.weights, self.layer, self.shared, work.router_logits,
            work.shared_inner, work.shared_gate_up, work.shared_out, work.y, norm, l2_prefetch,
        )  # fmt: skip
