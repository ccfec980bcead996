"""count_uses: use counts and counters of a layer for a step of many tokens.

A block has eight experts, with several threads each.  A thread adds up every so many of an expert's
rows in order, then one thread adds these sums in order.  So the result is the same in every run.
"""

from typing import Any

from osmium.kernels.numba_kernels import (
    atomic_add,
    cuda,
    exp2,
    float32,
    int32,
    int64,
    python_kernel,
    uint32,
)

__all__ = ["COUNT_STEP", "COUNT_USES", "EXPERTS_PER_BLOCK"]

EXPERTS_PER_BLOCK = 8
"""Experts of a thread block; its threads are divided among them."""

LOADS_IN_FLIGHT = 8
"""Rows that a thread loads before it adds the first."""


@python_kernel(
    "void(CPointer(float32), CPointer(float32), CPointer(int32), CPointer(int32), CPointer(int64), "
    "CPointer(int32), CPointer(int32), CPointer(int32), int32, int32, int32, float32, float32)",
    block=256,
    grid="ceil(num_experts / 8)",
    regs=64,
)
def count_uses(
    short_count: Any,
    long_count: Any,
    last_used: Any,
    step: Any,
    counters: Any,
    tiles: Any,
    num_tiles: Any,
    order: Any,
    num_tokens: int,
    top_k: int,
    num_experts: int,
    rate: float,
    long_rate: float,
) -> None:
    """Kernel of Ops.count_uses.

    short_count, long_count f32 [E], last_used i32 [E], of the layer; step i32 [1]; counters
    i64 [7]: of ExpertCache
    tiles i32 [max_tiles, 4], num_tiles i32 [1], order i32 [num_tokens * top_k]: of ExpertGroups
    num_experts E    rate = 1 / half_life; long_rate likewise
    """
    short_sums = cuda.shared.array(256, float32)  # A sum per thread.
    long_sums = cuda.shared.array(256, float32)
    loaded = cuda.local.array(8, int32)
    thread, count = cuda.threadIdx.x, num_tiles[0]
    parts = int32(uint32(cuda.blockDim.x) // uint32(EXPERTS_PER_BLOCK))
    of_block = int32(uint32(thread) // uint32(parts))
    part = thread - of_block * parts
    e = cuda.blockIdx.x * EXPERTS_PER_BLOCK + of_block
    newest = num_tokens - 1

    # -- the expert's tiles are [t, other): both searches at once.  Their rows follow each other
    t, end, other, other_end = int32(0), int32(count), int32(0), int32(count)
    while t < end or other < other_end:
        middle, other_middle = (t + end) >> 1, (other + other_end) >> 1
        if t < end:
            if tiles[4 * middle + 3] < e:
                t = middle + 1
            else:
                end = middle
        if other < other_end:
            if tiles[4 * other_middle + 3] <= e:
                other = other_middle + 1
            else:
                other_end = other_middle
    row, last = int32(0), int32(0)
    if t < other:
        row = tiles[4 * t + 1]
        last = tiles[4 * other - 3] + tiles[4 * other - 2]
    uses = last - row

    short, long = float32(0), float32(0)
    row += part
    while row < last:
        for u in range(LOADS_IN_FLIGHT):
            loaded[u] = 0
            if row + u * parts < last:
                loaded[u] = order[row + u * parts]
        for u in range(LOADS_IN_FLIGHT):
            if row + u * parts < last:
                token = int32(uint32(loaded[u]) // uint32(top_k))
                age = float32(token - newest)
                short += exp2(age * rate)
                long += exp2(age * long_rate)
        row += LOADS_IN_FLIGHT * parts
    short_sums[thread] = short
    long_sums[thread] = long
    cuda.syncthreads()  # the sums of all threads are stored

    if part == 0 and e < num_experts:
        age = float32(-newest)
        if uses > 0:
            step_now = step[0] + 1
            age = float32(last_used[e] - step_now - newest)
            last_used[e] = step_now
            missed = int32(0)
            if tiles[4 * t] < 0:
                missed = int32(1)
            atomic_add(counters, 1 + missed, int64(uses))
        short, long = short_count[e] * exp2(age * rate), long_count[e] * exp2(age * long_rate)
        i = thread
        while i < thread + parts:
            short += short_sums[i]
            long += long_sums[i]
            i += 1
        short_count[e] = short
        long_count[e] = long


@python_kernel("void(CPointer(int32))", block=32, grid="1", regs=16)
def count_step(step: Any) -> None:
    """Add one to step i32 [1] of ExpertCache, after `count_uses` of the last layer."""
    if cuda.threadIdx.x == 0:
        step[0] += 1


COUNT_STEP, COUNT_USES = count_step, count_uses
