"""Room for guesses: the expert of each layer that is fetched before the layer is placed."""

import math

import numpy as np

from osmium.ops import ExpertGuess, Ops
from osmium.ops.values import ARRIVED, FETCH_BLOCKS, FETCH_WARPS

__all__ = ["MIN_BULK_COPY_CC", "guess_bytes", "make_guess"]

MIN_BULK_COPY_CC = (9, 0)
"""Compute capability from which kernels copy in bulk, as fetch_early does."""

ROWS = ARRIVED[0]
"""Rows of a step up to which there are guesses: those of few sequences, decoded."""


def make_guess(ops: Ops, layers: int, experts: int, top_k: int) -> ExpertGuess:
    """Nobody is guessed yet.  Raises: OutOfMemory."""
    made = ExpertGuess(
        ids=ops.empty((ROWS, top_k), np.uint16),
        weights=ops.empty((ROWS, top_k), np.float32),
        scores=ops.empty((ROWS, experts + 1), np.float32),
        counters=ops.empty((4,), np.int64),
        arrived=ops.empty(ARRIVED, np.int32),
        expert=ops.empty((layers,), np.int32),
        slot=ops.empty((layers,), np.int32),
        state=ops.empty((layers, FETCH_BLOCKS), np.int32),
        done=ops.empty((layers, FETCH_WARPS), np.int32),
        go=ops.empty((layers, FETCH_BLOCKS), np.int32),
    )
    ops.fill(made.expert, 0xFF)  # -1
    for zero in (made.counters, made.arrived, made.slot, made.state, made.done, made.go):
        ops.fill(zero, 0)
    return made


def guess_bytes(layers: int, experts: int, top_k: int) -> int:
    """Bytes of these arrays."""
    scratch = ROWS * (6 * top_k + 4 * (experts + 1)) + 32 + 4 * math.prod(ARRIVED)
    return scratch + layers * (8 + 4 * (FETCH_WARPS + 2 * FETCH_BLOCKS))
