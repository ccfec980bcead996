"""The rate of matrix instructions: what a kernel on tensor cores can reach at most.

Eight launches are timed at once, nine times; the median counts.  See ptx/mma_rate.ptx.
"""

import math
import statistics
from typing import Any

import numpy as np
import numpy.typing as npt

from osmium.cuda.stream import Event
from osmium.ops import Array, Ops
from osmium.ops.gpu import GpuOps
from osmium.ops.mma_rate import ROUND_OPERATIONS, ROUND_THREADS, multiply_registers

__all__ = ["mma_rates"]

ROUNDS = 2048
"""Rounds of a launch: half a millisecond on an H200."""

LAUNCHES, SAMPLES = 8, 9

BLOCKS_PER_SM = 2


def mma_rates(ops: Ops, out: Array | None = None) -> dict[str, float]:
    """Tera-operations per second of s8 and of bf16 mma, as mma_s8_tops and mma_bf16_tflops.

    A multiplication and an addition are two operations.  Both are 0 on a CPU.
    `out`: an array that is overwritten, where nothing can be allocated.  Raises: OutOfMemory.
    """
    if not isinstance(ops, GpuOps):
        return {"mma_s8_tops": 0.0, "mma_bf16_tflops": 0.0}
    if out is None:
        out = ops.empty((BLOCKS_PER_SM * ops.runtime.sm_count, ROUND_THREADS), np.int32)
    return {
        "mma_s8_tops": _rate(ops, "s8", _sums(ops, out, np.int32)),
        "mma_bf16_tflops": _rate(ops, "bf16", _sums(ops, out, np.float32)),
    }


def _sums(ops: GpuOps, out: Array, dtype: npt.DTypeLike) -> Array:
    """The first bytes of `out` as an array for `multiply_registers`."""
    blocks = min(BLOCKS_PER_SM * ops.runtime.sm_count, out.nbytes // (4 * ROUND_THREADS))
    flat = out.reshape(math.prod(out.shape)).view(dtype)
    sums: Array = flat[: blocks * ROUND_THREADS].reshape(blocks, ROUND_THREADS)
    return sums


def _rate(ops: GpuOps, operands: str, out: Array) -> float:
    machine: Any = ops.runtime
    times = []
    for _ in range(SAMPLES + 1):  # the first one loads the kernel and raises the clock
        start = Event(machine.device).record(machine.stream)
        for _ in range(LAUNCHES):
            multiply_registers(machine.stream, out, ROUNDS, operands)
        end = Event(machine.device).record(machine.stream)
        times.append((end - start) / LAUNCHES)
        start.close()
        end.close()
    operations = out.shape[0] * (ROUND_THREADS // 32) * ROUNDS * ROUND_OPERATIONS[operands]
    return float(operations / statistics.median(times[1:]) / 1e9)
