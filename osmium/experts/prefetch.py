"""Room for guesses: the expert of each layer that is fetched before the layer is placed."""

import math

import numpy as np

from osmium.ops import Ops, PrefetchState
from osmium.ops.types import FETCH_BLOCKS, FETCH_WARPS, ROUTER_BARRIER_SHAPE

__all__ = ["MIN_BULK_COPY_CC", "guess_bytes", "make_prefetch_state"]

MIN_BULK_COPY_CC = (9, 0)
"""Compute capability from which kernels copy in bulk, as prefetch_experts does."""

ROWS = ROUTER_BARRIER_SHAPE[0]
"""Rows of a step up to which there are guesses: those of few sequences, decoded."""


def make_prefetch_state(ops: Ops, layers: int, experts: int, top_k: int) -> PrefetchState:
    """A state without a prefetched expert.  Raises: OutOfMemory."""
    made = PrefetchState(
        ids=ops.empty((ROWS, top_k), np.uint16),
        weights=ops.empty((ROWS, top_k), np.float32),
        router_logits=ops.empty((ROWS, experts + 1), np.float32),
        counters=ops.empty((4,), np.int64),
        barrier=ops.empty(ROUTER_BARRIER_SHAPE, np.int32),
        expert=ops.empty((layers,), np.int32),
        slot=ops.empty((layers,), np.int32),
        state=ops.empty((layers, FETCH_BLOCKS), np.int32),
        segments_done=ops.empty((layers, FETCH_WARPS), np.int32),
        start_signal=ops.empty((layers, FETCH_BLOCKS), np.int32),
    )
    ops.memset(made.expert, 0xFF)  # -1
    for zero in (
        made.counters,
        made.barrier,
        made.slot,
        made.state,
        made.segments_done,
        made.start_signal,
    ):
        ops.memset(zero, 0)
    return made


def guess_bytes(layers: int, experts: int, top_k: int) -> int:
    """Bytes of these arrays."""
    scratch = ROWS * (6 * top_k + 4 * (experts + 1)) + 32 + 4 * math.prod(ROUTER_BARRIER_SHAPE)
    return scratch + layers * (8 + 4 * (FETCH_WARPS + 2 * FETCH_BLOCKS))
