"""The store: from token and expert ids to the experts' output, wherever their bytes are.

Place, fetch, compute, in blocks of rows small enough for the slots; where every expert has its
slot, compute alone.  Every routed expert is computed; the counters say from where.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from osmium.experts.routing import RoutingRecorder
from osmium.ops import (
    Array,
    ExpertCache,
    HostExperts,
    MatmulInput,
    Ops,
    PrefetchState,
    SharedExpert,
    SlotAssignment,
)
from osmium.ops.types import FETCH_SEGMENT_BYTES, rows_bytes

__all__ = ["ExpertCounters", "ExpertRunner", "store_bytes"]


@dataclass(frozen=True)
class ExpertCounters:
    """Since the store was made, in pairs of a token and an expert; copied is in records, and so are
    prefetched, what was to be fetched before it was asked for, and right, what then was."""

    routed: int
    hit: int
    missed: int
    experts_copied: int
    prefetched: int = 0
    prefetch_hits: int = 0
    prefetch_bytes: int = 0
    """Bytes of right ones that had come before they were asked for."""


class ExpertRunner:
    """The routed experts of a model."""

    def __init__(
        self,
        ops: Ops,
        host_experts: HostExperts | None,
        cache: ExpertCache,
        rows: int,
        top_k: int,
        prefetch: PrefetchState | None = None,
    ) -> None:
        """`arena` may be None where the cache is wholly resident; `mlp` takes any number of rows,
        at most `rows` at once.  With room for a guess an expert of the next layer is fetched while
        the link has nothing else to do.  Raises: OutOfMemory."""
        resident = cache.capacity == cache.num_experts
        assert resident or host_experts is not None, "experts that are not resident need an arena"
        self.ops = ops
        self.host_experts = None if resident else host_experts  # nothing is ever fetched
        self.trace: Array | None = None
        """u16 [N, L, A]: routing that is replayed instead of the router's, for benchmarks."""
        self.predicted: Array | None = None
        """u16 [N, L, A]: what is replayed of the routing that was guessed."""
        self.recorder: RoutingRecorder | None = None
        """Collects which experts are asked for, where somebody wants to know."""
        self.block = _block(rows, cache.capacity, cache.num_experts, top_k)
        self.top_k = top_k
        self.set_cache(cache)
        self._guess = self._asked = None if resident else prefetch
        most = min(cache.num_experts, self.block * top_k)
        self.inner = ops.empty_input(self.block * top_k, cache.layout.inner)
        self.plan = SlotAssignment(
            count=ops.empty((1,), np.int32),
            expert=ops.empty((most,), np.int32),
            slot=ops.empty((most,), np.int32),
            fetch_flags=ops.empty((most,), np.int32),
            uses=ops.empty((most,), np.int32),
            pair_slots=ops.empty((self.block, top_k), np.int32),
            fetch_progress=ops.empty((2,), np.int32),
        )

    def set_cache(self, cache: ExpertCache) -> None:
        """From now on use the slots of this cache: as many in all as there are room and plans for.
        No guess lasts from one step to the next, so none is of other slots."""
        each = [layer.shape[0] for layer in cache.slots]
        assert min(each) >= self.top_k, f"{each} slots for a row's {self.top_k} experts"
        self.cache = cache
        self.blocks = [_block(self.block, slots, cache.num_experts, self.top_k) for slots in each]
        """Rows at once of each layer."""

    def replay(self, trace: Array, predicted: Array | None) -> None:
        """From now on routing is that of a trace, and so is what is guessed: its weights are all
        alike, as a trace has none.  Both u16 [N, L, A].  Raises: OutOfMemory."""
        self.trace, self.predicted = trace, predicted
        if predicted is None:
            self._guess = self._asked = None
        elif self._guess is not None:
            alike = self._guess.weights
            self.ops.copy_h2d(alike, np.full(alike.shape, 1 / alike.shape[1], np.float32))
            room = self.ops.empty(alike.shape, np.float32)
            self._asked = replace(self._guess, weights=room)

    def guess(self, tokens: int) -> PrefetchState | None:
        """Room for guesses, if a step of so many rows has them."""
        guess = self._guess
        if guess is None or tokens > min(guess.ids.shape[0], *self.blocks):
            return None
        return guess

    def router_prefetch_buffers(self, tokens: int) -> PrefetchState | None:
        """The same for the next layer's router to write."""
        return None if self.guess(tokens) is None else self._asked

    @contextlib.contextmanager
    def step(self, tokens: int) -> Iterator[None]:
        """All layers of a step of so many rows: what they guess is fetched beside them."""
        guess = self.guess(tokens)
        if guess is None or self.host_experts is None:
            yield
            return
        with self.ops.on_side_stream(prefetch=True):
            self.ops.prefetch_experts(self.cache, guess, self.host_experts)
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
        gate_up: Array,
        shared_out: Array,
        y: Array,
        norm: Array,
        l2_prefetch: Array | None = None,
    ) -> None:
        """x[t] += sum over a of weights[t, a] * expert ids[t, a] of h[t], and the shared expert
        times its gate; h = norm(x).

        x f32 [T, D]    h [T, D]    ids u16 [T, A]    weights f32 [T, A]    norm f32 [D]
        scores f32 [T, > shared.column]    shared_inner [T, Is], both f32 [T, 2 Is],
        said, y f32 [T, D], scratch    ahead: what is read next, as of Ops.fetch_experts
        """
        ops, cache, prefetch = self.ops, self.cache, self.guess(x.shape[0])
        if self.recorder is not None:
            self.recorder.add(layer, ops.copy_d2h(ids).astype(np.uint16, copy=False))
        tokens, top_k = ids.shape
        plan = None if self.host_experts is None else self.plan
        block = self.blocks[layer]
        for start in range(0, tokens, block):
            rows = slice(start, min(start + block, tokens))
            some = ids[rows]
            pairs, own = self.inner[: some.shape[0] * top_k], shared_inner[rows]
            up = (pairs, own, h[rows], some, plan, cache, layer)
            down = (x[rows], pairs, own, some, weights[rows], plan, cache, layer)
            with_up = (shared, gate_up[rows])
            with_down = (shared, router_logits[rows], shared_out[rows], y[rows], h[rows], norm)
            if plan is None:
                ops.expert_up(*up, "all", *with_up)
                ops.expert_down(*down, "all", *with_down)
                continue
            assert self.host_experts is not None, "what is placed is fetched from somewhere"
            ops.assign_slots(plan, cache, layer, some, prefetch)
            with ops.on_side_stream():  # what was there, while the others are fetched
                ops.expert_up(*up, "hits", *with_up)
                ops.expert_down(*down, "hits", *with_down)
            ops.fetch_experts(cache, plan, self.host_experts, layer, l2_prefetch, prefetch)
            ops.expert_up(*up, "rest", *with_up)
            ops.join_side_stream()
            ops.expert_down(*down, "rest", *with_down)

    def counters(self) -> ExpertCounters:
        """What was routed, hit, fetched and copied so far; waits for what was launched.

        Asserts that every routed pair was either hit or fetched.
        """
        found = (int(n) for n in self.ops.copy_d2h(self.cache.counters))
        routed, hit, fetched, copied, guessed, right, pieces = found
        if self.host_experts is None:
            hit = routed  # nothing is placed, so nobody counts
        assert routed == hit + fetched, f"{routed} routed, but {hit} hit and {fetched} fetched"
        return ExpertCounters(
            routed, hit, fetched, copied, guessed, right, pieces * (FETCH_SEGMENT_BYTES // 8)
        )


def store_bytes(rows: int, capacity: int, experts: int, top_k: int, inner: int, gpu: bool) -> int:
    """Bytes of a store's own arrays on a backend; `inner` is I."""
    block = _block(rows, capacity, experts, top_k)
    return rows_bytes(block * top_k, inner, False, gpu) + 4 * (
        block * top_k + 1 + 2 + 4 * min(experts, block * top_k)
    )


def _block(rows: int, capacity: int, experts: int, top_k: int) -> int:
    """Rows at once: all of them may ask for different experts, and each needs a slot."""
    return rows if capacity == experts else min(rows, capacity // top_k)
