"""count_uses: use counts and counters of a layer for a step of many tokens.

One block has one or several threads per expert.  A thread adds up its rows of the expert's tiles in
order, then one thread adds the sums of all.  So the order of sums is the same in every run.
"""

from typing import Any

from osmium.kernels.numba_kernels import cuda, exp2, float32, int32, python_kernel, uint32

__all__ = ["COUNT_USES"]

BLOCK_THREADS = 1024
"""Threads of the block: at least one per expert, of at most 1,024."""


@python_kernel(
    "void(CPointer(float32), CPointer(float32), CPointer(int32), CPointer(int32), CPointer(int64), "
    "CPointer(int32), CPointer(int32), CPointer(int32), int32, int32, int32, int32, "
    "float32, float32)",
    block=BLOCK_THREADS,
    grid="1",
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
    is_last_layer: int,
    rate: float,
    long_rate: float,
) -> None:
    """Kernel of Ops.count_uses.

    short_count, long_count f32 [E], last_used i32 [E], of the layer; step i32 [1]; counters
    i64 [7]: of ExpertCache
    tiles i32 [max_tiles, 4], num_tiles i32 [1], order i32 [num_tokens * top_k]: of ExpertGroups
    num_experts E <= 1024    is_last_layer: 1 or 0    rate = 1 / half_life; long_rate likewise
    """
    short_sums = cuda.shared.array(1024, float32)  # [parts, num_experts]
    long_sums = cuda.shared.array(1024, float32)
    uses = cuda.shared.array(1024, int32)  # Pairs of each expert.
    pairs = cuda.shared.array(2, int32)  # Hits, misses.
    thread, num_threads = cuda.threadIdx.x, cuda.blockDim.x
    step_now, count = step[0] + 1, num_tiles[0]
    if thread < 2:
        pairs[thread] = 0
    cuda.syncthreads()  # the sums are zero

    parts = max(int32(1), int32(uint32(num_threads) // uint32(num_experts)))
    newest = num_tokens - 1
    i = thread
    while i < num_experts * parts:
        part = int32(uint32(i) // uint32(num_experts))
        e = i - part * num_experts
        t, end = int32(0), int32(count)
        while t < end:  # the expert's first tile
            middle = (t + end) >> 1
            if tiles[4 * middle + 3] < e:
                t = middle + 1
            else:
                end = middle
        short, long, total = float32(0), float32(0), int32(0)
        while t < count and tiles[4 * t + 3] == e:
            first, rows = tiles[4 * t + 1], tiles[4 * t + 2]
            row = part
            while row < rows:
                token = int32(uint32(order[first + row]) // uint32(top_k))
                age = float32(token - newest)
                short += exp2(age * rate)
                long += exp2(age * long_rate)
                row += parts
            if part == 0:
                total += rows
                missed = int32(0)
                if tiles[4 * t] < 0:
                    missed = int32(1)
                cuda.atomic.add(pairs, missed, rows)
            t += 1
        short_sums[i] = short
        long_sums[i] = long
        if part == 0:
            uses[e] = total
        i += num_threads
    cuda.syncthreads()  # the sums of all threads are stored, and the step is read

    e = thread
    while e < num_experts:
        age = float32(-newest)
        if uses[e] > 0:
            age = float32(last_used[e] - step_now - newest)
            last_used[e] = step_now
        short, long = short_count[e] * exp2(age * rate), long_count[e] * exp2(age * long_rate)
        part = int32(0)
        while part < parts:
            short += short_sums[part * num_experts + e]
            long += long_sums[part * num_experts + e]
            part += 1
        short_count[e] = short
        long_count[e] = long
        e += num_threads
    if thread == 0:
        counters[1] += pairs[0]
        counters[2] += pairs[1]
        if is_last_layer > 0:
            step[0] = step_now


COUNT_USES = count_uses
