"""Matrix instructions on registers alone, to measure their rate.  No part of `Ops`."""

from typing import Any

from osmium.kernels.ptx import kernel
from osmium.ops.types import Array

__all__ = ["MMA_RATE", "ROUND_OPERATIONS", "ROUND_THREADS", "multiply_registers"]

MMA_RATE = {"s8": kernel("mma_rate_s8"), "bf16": kernel("mma_rate_bf16")}

ROUND_THREADS = 256
"""Threads of a block: 8 warps."""

ROUND_OPERATIONS = {"s8": 16 * 16 * 8 * 32 * 2, "bf16": 16 * 16 * 8 * 16 * 2}
"""Multiplications and additions of a warp in a round, by the format of its operands."""


def multiply_registers(stream: Any, out: Array, rounds: int, operands: str) -> None:
    """`rounds` rounds of mma on registers in each warp of a block per row of out.

    out [blocks, 256], i32 for the operands "s8", f32 for "bf16": sums of each thread's results
    """
    MMA_RATE[operands](stream, out.shape[0], out, rounds)
