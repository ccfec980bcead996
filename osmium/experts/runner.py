"""The expert runner: from expert ids and weights to the experts' output.

It assigns slots, fetches missed experts and computes, in blocks of rows small enough for the slots.
Prompts have another way (streaming.py).  A fully resident cache needs only the computation.  Every
routed expert is computed; the counters count hits and misses.  See docs/expert-cache.md.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from osmium.experts.routing import RoutingRecorder
from osmium.ops import (
    Array,
    ExpertCache,
    GroupedExperts,
    HostExperts,
    MatmulInput,
    Ops,
    PrefetchState,
    SharedExpert,
    SlotAssignment,
)
from osmium.ops.tiling import MATVEC_MAX_TOKENS, rows_bytes
from osmium.ops.types import FETCH_SEGMENT_BYTES
from osmium.quant.expert_layout import ExpertLayout

__all__ = ["ExpertCounters", "ExpertRunner", "expert_runner_bytes"]


@dataclass(frozen=True)
class ExpertCounters:
    """Counts since the runner was made.  routed = hit + missed."""

    routed: int
    """Routed pairs: one (token, expert) each."""
    hit: int
    """Routed pairs whose expert was in a slot."""
    missed: int
    """Routed pairs whose expert was not in a slot."""
    experts_copied: int
    """Experts copied to slots for misses."""
    prefetched: int = 0
    """Experts chosen for prefetch."""
    prefetch_hits: int = 0
    """Prefetched experts that their layer's router then chose."""
    prefetch_bytes: int = 0
    """Bytes of those copied before their layer's fetch."""


class ExpertRunner:
    """The routed experts of a model."""

    def __init__(
        self,
        ops: Ops,
        host_experts: HostExperts | None,
        cache: ExpertCache,
        rows: int,
        top_k: int,
        prefetch_state: PrefetchState | None = None,
    ) -> None:
        """A fully resident cache needs no `host_experts`.  `forward` takes any number of rows and
        computes at most `rows` at once.  With a `prefetch_state` one expert of the next layer is
        prefetched while the link is idle.  Raises: OutOfMemory."""
        resident = cache.capacity == cache.num_experts
        assert resident or host_experts is not None, "a partial cache needs host experts"
        self.ops = ops
        self.host_experts = None if resident else host_experts
        """None where the cache is fully resident: nothing is ever fetched."""
        self.trace: Array | None = None
        """u16 [N, L, A]: routing replayed instead of the router's choice, for benchmarks."""
        self.predicted: Array | None = None
        """u16 [N, L, A]: predictions replayed with `trace`."""
        self.recorder: RoutingRecorder | None = None
        """Collects the routing of each step where it is recorded."""
        self.max_rows = _rows_per_block(rows, cache.capacity, cache.num_experts, top_k)
        """Most rows computed at once, before layers differ in slots."""
        self.top_k = top_k
        self.set_cache(cache)
        self._prefetch_state = self._router_prefetch = None if resident else prefetch_state
        most = min(cache.num_experts, self.max_rows * top_k)
        self.inner = ops.empty_input(self.max_rows * top_k, cache.layout.inner)
        self.grouped = ops.empty_grouped(self.max_rows, top_k, cache.num_experts, cache.layout)
        """Arrays of the kernels for many tokens, or None."""
        self.experts_streamed = 0
        """Experts that prefill passes have copied (streaming.py)."""
        self.assignment = SlotAssignment(
            count=ops.empty((1,), np.int32),
            expert=ops.empty((most,), np.int32),
            slot=ops.empty((most,), np.int32),
            fetch_flags=ops.empty((most,), np.int32),
            uses=ops.empty((most,), np.int32),
            pair_slots=ops.empty((self.max_rows, top_k), np.int32),
            fetch_progress=ops.empty((2,), np.int32),
            partial_out=self._partial_out(),
        )

    def _partial_out(self) -> Array | None:
        """For kernels that compute hits and missed experts apart, on a GPU."""
        if self.inner.hi_lo is None:
            return None
        few = min(self.max_rows, MATVEC_MAX_TOKENS)
        return self.ops.empty((few, self.cache.layout.hidden), np.int64)

    def set_cache(self, cache: ExpertCache) -> None:
        """Use the slots of `cache` from now on; their total equals that of the first cache.

        No prefetch lasts from one step to the next, so none refers to the old slots.
        """
        slots_per_layer = [layer.shape[0] for layer in cache.slots]
        assert min(slots_per_layer) >= self.top_k, f"{slots_per_layer} slots, top_k {self.top_k}"
        self.cache = cache
        self.layer_rows = [
            _rows_per_block(self.max_rows, slots, cache.num_experts, self.top_k)
            for slots in slots_per_layer
        ]
        """Most rows computed at once, by layer."""

    def replay(self, trace: Array, predicted: Array | None) -> None:
        """Replay routing, and predictions, from a trace instead of the router's choice.

        Both u16 [N, L, A].  A trace has no weights, so all are 1 / A.  Without `predicted` nothing
        is prefetched.  Raises: OutOfMemory.
        """
        self.trace, self.predicted = trace, predicted
        if predicted is None:
            self._prefetch_state = self._router_prefetch = None
        elif self._prefetch_state is not None:
            weights = self._prefetch_state.weights
            self.ops.copy_h2d(weights, np.full(weights.shape, 1 / weights.shape[1], np.float32))
            # The router's own weights go to a scratch array that nothing reads.
            scratch = self.ops.empty(weights.shape, np.float32)
            self._router_prefetch = replace(self._prefetch_state, weights=scratch)

    def prefetch_state(self, tokens: int) -> PrefetchState | None:
        """The prefetch state, or None where a step of `tokens` rows has no prefetch."""
        state = self._prefetch_state
        if state is None or tokens > min(state.ids.shape[0], *self.layer_rows):
            return None
        return state

    def router_prefetch_buffers(self, tokens: int) -> PrefetchState | None:
        """The prefetch state that the next layer's router writes, or None without prefetch."""
        return None if self.prefetch_state(tokens) is None else self._router_prefetch

    @contextlib.contextmanager
    def step(self, tokens: int) -> Iterator[None]:
        """The body launches all layers of a step; the prefetch kernel runs on a side stream."""
        prefetch_state = self.prefetch_state(tokens)
        if prefetch_state is None or self.host_experts is None:
            yield
            return
        with self.ops.on_side_stream(prefetch=True):
            self.ops.prefetch_experts(self.cache, prefetch_state, self.host_experts)
        yield
        self.ops.join_side_stream(prefetch=True)

    def forward(
        self,
        x: Array,
        h: MatmulInput,
        ids: Array,
        weights: Array,
        layer: int,
        shared: SharedExpert,
        router_logits: Array,
        shared_inner: MatmulInput,
        shared_gate_up: Array,
        shared_out: Array,
        y: Array,
        norm: Array,
        l2_prefetch: Array | None = None,
    ) -> None:
        """x[t] += sum over a of weights[t, a] * expert ids[t, a] of h[t] + gated shared expert of
        h[t]; then h = norm(x).

        x f32 [T, D]    h [T, D]    ids u16 [T, A]    weights f32 [T, A]    norm f32 [D]
        router_logits f32 [T, > shared.column]: that column is the shared expert's gate
        scratch: shared_inner [T, Is], shared_gate_up f32 [T, 2 Is], shared_out and y f32 [T, D]
        l2_prefetch: weights that Ops.fetch_experts prefetches into L2
        """
        ops, cache, prefetch_state = self.ops, self.cache, self.prefetch_state(x.shape[0])
        if self.recorder is not None:
            self.recorder.add(layer, ops.copy_d2h(ids).astype(np.uint16, copy=False))
        tokens, top_k = ids.shape
        assignment = None if self.host_experts is None else self.assignment
        # Blocks of equal size: none has few rows, for which other kernels have other bits.
        blocks = -(-tokens // self.layer_rows[layer])
        for index in range(blocks):
            rows = slice(tokens * index // blocks, tokens * (index + 1) // blocks)
            block_ids = ids[rows]
            inner = self.inner[: block_ids.shape[0] * top_k]
            up = (inner, shared_inner[rows], h[rows], block_ids, assignment, cache, layer)
            down = (
                x[rows], inner, shared_inner[rows], block_ids, weights[rows], assignment, cache,
                layer,
            )  # fmt: skip
            shared_up = (shared, shared_gate_up[rows], self.grouped)
            shared_down = (
                shared, router_logits[rows], shared_out[rows], y[rows], h[rows], norm, self.grouped,
            )  # fmt: skip
            if assignment is None:
                ops.expert_up(*up, "all", *shared_up)
                ops.expert_down(*down, "all", *shared_down)
                continue
            assert self.host_experts is not None, "a slot assignment needs host experts"
            ops.assign_slots(assignment, cache, layer, block_ids, prefetch_state)
            with ops.on_side_stream():  # hits are computed while misses are fetched
                ops.expert_up(*up, "hits", *shared_up)
                ops.expert_down(*down, "hits", *shared_down)
            ops.fetch_experts(
                cache, assignment, self.host_experts, layer, l2_prefetch, prefetch_state
            )
            ops.expert_up(*up, "rest", *shared_up)
            ops.join_side_stream()
            ops.expert_down(*down, "rest", *shared_down)

    def counters(self) -> ExpertCounters:
        """Counts of routed, hit and missed pairs, copies and prefetches; synchronises.

        Asserts that every routed pair is either a hit or a miss.
        """
        values = (int(n) for n in self.ops.copy_d2h(self.cache.counters))
        routed, hit, missed, copied, prefetched, prefetch_hits, pieces = values
        if self.host_experts is None:
            hit = routed  # without slot assignment no kernel counts hits
        copied += self.experts_streamed
        assert routed == hit + missed, f"{routed} routed, but {hit} hit and {missed} missed"
        return ExpertCounters(
            routed, hit, missed, copied, prefetched, prefetch_hits,
            pieces * (FETCH_SEGMENT_BYTES // 8),
        )  # fmt: skip


def expert_runner_bytes(
    rows: int, capacity: int, experts: int, top_k: int, layout: ExpertLayout, gpu: bool
) -> int:
    """Most bytes of the runner's own arrays on a backend."""
    block = _rows_per_block(rows, capacity, experts, top_k)
    grouped = GroupedExperts.nbytes(block, top_k, experts, layout.hidden) if gpu else 0
    partial_out = 8 * min(block, MATVEC_MAX_TOKENS) * layout.hidden if gpu else 0
    return (
        grouped
        + partial_out
        + rows_bytes(block * top_k, layout.inner, False, gpu)
        + 4 * (block * top_k + 1 + 2 + 4 * min(experts, block * top_k))
    )


def _rows_per_block(rows: int, capacity: int, experts: int, top_k: int) -> int:
    """Most rows computed at once: each may route to other experts, and each expert needs a slot."""
    return rows if capacity == experts else min(rows, capacity // top_k)
