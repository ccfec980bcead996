"""The rate of matrix instructions: what a kernel on tensor cores can reach at most.

Eight launches are timed at once, nine times; the median counts.  See ptx/mma_rate.ptx.
"""

import statistics
from typing import Any

import numpy as np

from osmium.cuda.stream import Event
from osmium.ops import Ops
from osmium.ops.gpu import GpuOps
from osmium.ops.mma_rate import ROUND_OPERATIONS, ROUND_THREADS, multiply_registers

__all__ = ["mma_rates"]

ROUNDS = 2048
"""Rounds of a launch: half a millisecond on an H200."""

LAUNCHES, SAMPLES = 8, 9

BLOCKS_PER_SM = 2


def mma_rates(ops: Ops) -> dict[str, float]:
    """Tera-operations per second of s8 and of bf16 mma, as mma_s8_tops and mma_bf16_tflops.

    A multiplication and an addition are two operations.  Both are 0 on a CPU.
    """
    if not isinstance(ops, GpuOps):
        return {"mma_s8_tops": 0.0, "mma_bf16_tflops": 0.0}
    return {"mma_s8_tops": _rate(ops, "s8"), "mma_bf16_tflops": _rate(ops, "bf16")}


def _rate(ops: GpuOps, operands: str) -> float:
    machine: Any = ops.runtime
    blocks = BLOCKS_PER_SM * machine.sm_count
    out = ops.empty((blocks, ROUND_THREADS), np.int32 if operands == "s8" else np.float32)
    times = []
    for _ in range(SAMPLES + 1):  # the first one loads the kernel and raises the clock
        start = Event(machine.device).record(machine.stream)
        for _ in range(LAUNCHES):
            multiply_registers(machine.stream, out, ROUNDS, operands)
        end = Event(machine.device).record(machine.stream)
        times.append((end - start) / LAUNCHES)
        start.close()
        end.close()
    operations = blocks * (ROUND_THREADS // 32) * ROUNDS * ROUND_OPERATIONS[operands]
    return float(operations / statistics.median(times[1:]) / 1e9)
