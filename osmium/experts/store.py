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
            pairs=ops.empty((self.block, top_k), np.int32),
        )

    def mlp(
        self,
        out: Array,
        x: Array,
        ids: Array,
        weights: Array,
        layer: int,
        shared: Array,
        scores: Array,
        column: int,
        y: Array,
    ) -> None:
        """out[t] += sum over a of weights[t, a] * expert ids[t, a] of x[t], and the shared expert
        times its gate; ends what was launched beside.

        out, x, shared f32 [T, D]    ids u16 [T, A]    weights f32 [T, A]
        scores f32 [T, >= column + 1]    y f32 [T, D], scratch
        """
        ops, cache = self.ops, self.cache
        if self.recorder is not None:
            self.recorder.add(layer, ops.copy_out(ids).astype(np.uint16, copy=False))
        tokens = x.shape[0]
        plan = None if self.arena is None else self.plan
        for start in range(0, tokens, self.block):
            part = slice(start, min(start + self.block, tokens))
            some, read = ids[part], x[part]
            inner = self.inner[: part.stop - start]
            up = (inner, read, some, plan, cache, layer)
            if plan is None:
                ops.expert_up(*up, "all")
            else:
                assert self.arena is not None, "what is placed is fetched from somewhere"
                ops.place(plan, cache, layer, some)
                with ops.beside():
                    ops.expert_up(*up, "there")
                ops.fetch(cache, plan, self.arena, layer)
            ops.join()
            if plan is not None:
                ops.expert_up(*up, "rest")
            ops.expert_down(
                out[part], inner, some, weights[part], plan, cache, layer, shared[part],
                scores[part], column, y[part],
            )  # fmt: skip

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
    return 4 * (block * top_k * (inner + 1) + 1 + 4 * min(experts, block * top_k))


def _block(rows: int, capacity: int, experts: int, top_k: int) -> int:
    """Rows at once: all of them may ask for different experts, and each needs a slot."""
    return rows if capacity == experts else min(rows, capacity // top_k)
