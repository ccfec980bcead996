"""Prefetch state: the expert of each layer that is copied before slot assignment.

Only allocates the arrays; Ops.router writes predictions and Ops.prefetch_experts copies.  See
docs/prefetch.md.
"""

import math

import numpy as np

from osmium.ops import Ops, PrefetchState
from osmium.ops.types import FETCH_BLOCKS, FETCH_WARPS, ROUTER_BARRIER_SHAPE

__all__ = ["MIN_BULK_COPY_CC", "make_prefetch_state", "prefetch_state_bytes"]

MIN_BULK_COPY_CC = (9, 0)
"""Lowest compute capability with bulk copies (cp.async.bulk), which prefetch_experts uses."""

MAX_PREFETCH_ROWS = ROUTER_BARRIER_SHAPE[0]
"""Most rows of a step with prefetch: decode steps of few sequences."""


def make_prefetch_state(ops: Ops, layers: int, experts: int, top_k: int) -> PrefetchState:
    """A state in which no layer has a prefetched expert.  Raises: OutOfMemory."""
    state = PrefetchState(
        ids=ops.empty((MAX_PREFETCH_ROWS, top_k), np.uint16),
        weights=ops.empty((MAX_PREFETCH_ROWS, top_k), np.float32),
        router_logits=ops.empty((MAX_PREFETCH_ROWS, experts + 1), np.float32),
        counters=ops.empty((4,), np.int64),
        barrier=ops.empty(ROUTER_BARRIER_SHAPE, np.int32),
        expert=ops.empty((layers,), np.int32),
        slot=ops.empty((layers,), np.int32),
        state=ops.empty((layers, FETCH_BLOCKS), np.int32),
        segments_done=ops.empty((layers, FETCH_WARPS), np.int32),
        start_signal=ops.empty((layers, FETCH_BLOCKS), np.int32),
    )
    ops.memset(state.expert, 0xFF)  # -1
    for array in (
        state.counters,
        state.barrier,
        state.slot,
        state.state,
        state.segments_done,
        state.start_signal,
    ):
        ops.memset(array, 0)
    return state


def prefetch_state_bytes(layers: int, experts: int, top_k: int) -> int:
    """Bytes that make_prefetch_state allocates."""
    scratch = (
        MAX_PREFETCH_ROWS * (6 * top_k + 4 * (experts + 1))
        + 32
        + 4 * math.prod(ROUTER_BARRIER_SHAPE)
    )
    return scratch + layers * (8 + 4 * (FETCH_WARPS + 2 * FETCH_BLOCKS))
