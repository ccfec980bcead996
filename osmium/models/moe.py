"""Mixture of experts: a router, its top-k experts through the expert runner, and a shared expert.

    out = sum over the top k of w_e expert_e(x) + sigmoid(x gate) shared(x)
    expert(x) = (silu(x Wgate) * x Wup) Wdown

Every routed expert is computed; none is dropped or approximated.
"""

import numpy as np

from osmium.config import ModelConfig
from osmium.experts.routing import predict_experts
from osmium.experts.runner import ExpertRunner
from osmium.models.weights import WeightView
from osmium.models.workspace import Workspace
from osmium.ops import Array, LinearWeight, Ops, PrefetchState, SharedExpert, StepInputs

__all__ = ["MoeBlock"]


class MoeBlock:
    """The router and the experts of one layer."""

    def __init__(
        self,
        ops: Ops,
        config: ModelConfig,
        weights: WeightView,
        expert_runner: ExpertRunner,
        layer: int,
    ) -> None:
        hidden, inner = config.hidden_size, config.shared_intermediate_size
        self.ops, self.expert_runner = ops, expert_runner
        self.layer, self.num_experts = layer, config.num_experts
        self.router = weights.linear("router", config.num_experts + 1, hidden)
        self.shared = SharedExpert(
            up=weights.linear("shared_up", 2 * inner, hidden),
            down=weights.linear("shared_down", hidden, inner),
            gate_column=config.num_experts,
        )
        self.next_router: LinearWeight | None = None
        """The next layer's router, for prefetch; None in the last layer."""

    def forward(
        self,
        x: Array,
        step: StepInputs,
        work: Workspace,
        norm: Array,
        l2_prefetch: Array | None = None,
    ) -> None:
        """x += experts(work.h); work.h = norm(x).  x f32 [T, D]    norm f32 [D]

        l2_prefetch: the weights that the next layer reads first.
        """
        runner, next_router = self.expert_runner, self.next_router
        prefetch = None if next_router is None else runner.router_prefetch_buffers(step.tokens)
        self._route(step, work, prefetch)
        runner.forward(
            x, work.h, work.ids, work.weights, self.layer, self.shared, work.router_logits,
            work.shared_inner, work.shared_gate_up, work.shared_out, work.y, norm, l2_prefetch,
        )  # fmt: skip

    def route(self, step: StepInputs, work: Workspace) -> None:
        """work.ids and work.weights = the experts of work.h; also work.router_logits."""
        self._route(step, work, None)
        if self.expert_runner.recorder is not None:
            ids = self.ops.copy_d2h(work.ids).astype(np.uint16, copy=False)
            self.expert_runner.recorder.add(self.layer, ids)

    def add_shared(self, work: Workspace) -> None:
        """work.x += the gated shared expert of work.h, after `route`."""
        ops, shared = self.ops, self.shared
        ops.gate_up_silu(work.shared_inner, work.h, shared, work.shared_gate_up)
        ops.linear(work.shared_out, work.shared_inner, shared.down)
        ops.add_sigmoid_gated(work.x, work.shared_out, work.router_logits, shared.gate_column)

    def _route(self, step: StepInputs, work: Workspace, prefetch: PrefetchState | None) -> None:
        runner, next_router = self.expert_runner, self.next_router
        self.ops.router(
            work.ids, work.weights, work.router_logits, work.h, self.router, self.num_experts,
            runner.cache.counters, work.router_barrier, runner.trace, self.layer, step.positions,
            prefetch, next_router, runner.predicted,
        )  # fmt: skip
        if runner.recorder is not None and runner.trace is None and next_router is not None:
            top_k = work.ids.shape[1]
            predicted, weights = predict_experts(
                self.ops, work.h, next_router, self.num_experts, top_k
            )
            runner.recorder.add_predicted(self.layer + 1, predicted, weights)
