"""The store: from token and expert ids to the experts' output, wherever their bytes are.

Place, fetch, compute, in blocks of rows small enough for the slots; where every expert has its
slot, compute alone.  Every routed expert is computed; the counters say from where.
"""

from dataclasses import dataclass

import numpy as np

from osmium.experts.routing import Recorder
from osmium.ops import Array, ExpertArena, ExpertCache, ExpertPlan, Ops

__all__ = ["Counters", "Store", "store_bytes"]


@dataclass(frozen=True)
class Counters:
    """Since the store was made, in pairs of a token and an expert; copied is in records."""

    routed: int
    hit: int
    fetched: int
    copied: int


class Store:
    """The routed experts of a model."""

    def __init__(
        self, ops: Ops, arena: ExpertArena | None, cache: ExpertCache, rows: int, top_k: int
    ) -> None:
        """`arena` may be None where the cache is wholly resident; `mlp` takes any number of rows,
        at most `rows` at once.  Raises: OutOfMemory."""
        assert cache.capacity >= top_k, f"{cache.capacity} slots for a row's {top_k} experts"
        resident = cache.capacity == cache.experts
        assert resident or arena is not None, "experts that are not resident need an arena"
        self.ops, self.cache = ops, cache
        self.arena = None if resident else arena  # nothing is ever fetched
        self.trace: Array | None = None
        """u16 [N, L, A]: routing that is replayed instead of the router's, for benchmarks."""
        self.recorder: Recorder | None = None
        """Collects which experts are asked for, where somebody wants to know."""
        self.block = _block(rows, cache.capacity, cache.experts, top_k)
        most = min(cache.experts, self.block * top_k)
        self.inner = ops.empty((self.block, top_k, cache.record.inner), np.float32)
        self.plan = ExpertPlan(
            count=ops.empty((1,), np.int32),
            expert=ops.empty((most,), np.int32),
            slot=ops.empty((most,), np.int32),
            fetch=ops.empty((most,), np.int32),
            uses=ops.empty((most,), np.int32),
        )

    def mlp(self, out: Array, x: Array, ids: Array, weights: Array, layer: int) -> None:
        """out[t] = sum over a of weights[t, a] * expert ids[t, a] of x[t].

        out, x f32 [T, D]    ids u16 [T, A]    weights f32 [T, A]
        """
        ops, cache, plan = self.ops, self.cache, self.plan
        if self.recorder is not None:
            self.recorder.add(layer, ops.copy_out(ids).astype(np.uint16, copy=False))
        tokens = x.shape[0]
        for start in range(0, tokens, self.block):
            end = min(start + self.block, tokens)
            some, inner = ids[start:end], self.inner[: end - start]
            if self.arena is not None:
                ops.place(plan, cache, layer, some)
                ops.fetch(cache, plan, self.arena, layer)
            ops.expert_mlp(
                out[start:end], inner, x[start:end], some, weights[start:end], cache, layer
            )

    def counters(self) -> Counters:
        """What was routed, hit, fetched and copied so far; waits for what was launched.

        Asserts that every routed pair was either hit or fetched.
        """
        routed, hit, fetched, copied = (int(n) for n in self.ops.copy_out(self.cache.counters))
        if self.arena is None:
            hit = routed  # nothing is placed, so nobody counts
        assert routed == hit + fetched, f"{routed} routed, but {hit} hit and {fetched} fetched"
        return Counters(routed, hit, fetched, copied)


def store_bytes(rows: int, capacity: int, experts: int, top_k: int, inner: int) -> int:
    """Bytes of a store's own arrays; `inner` is I."""
    block = _block(rows, capacity, experts, top_k)
    return 4 * (block * top_k * inner + 1 + 4 * min(experts, block * top_k))


def _block(rows: int, capacity: int, experts: int, top_k: int) -> int:
    """Rows at once: all of them may ask for different experts, and each needs a slot."""
    return rows if capacity == experts else min(rows, capacity // top_k)
