"""expert_histogram and group_by_expert: a stable counting sort of routed pairs by expert.

A block of each kernel handles `block_pairs` consecutive pairs.  The first kernel counts a block's
pairs of each expert.  A block of the second adds up all these counts, so it needs no other block.
Then it ranks its pairs of each expert: in a bitmap with a bit per pair, the rank is the number of
bits before the pair's own.  All sums are of integers: their order does not change the result.
"""

from typing import Any

from osmium.kernels.numba_kernels import cuda, int32, python_kernel, uint16, uint32

__all__ = ["EXPERT_HISTOGRAM", "GROUP_BY_EXPERT", "MAX_BLOCKS", "MAX_EXPERTS", "TILE_ROWS"]

MAX_EXPERTS = 1024
"""Most experts: the size of the tables in shared memory."""

TILE_ROWS = 64
"""Most rows of a tile."""

MAX_BLOCKS = 128
"""Most blocks of both kernels: each block of the second reads the counts of all."""

BITMAP_WORDS = 4096
"""Words of the bitmaps of all experts in shared memory; a word has the bits of 32 pairs."""

LOADS_IN_FLIGHT = 16
"""Counts that a thread loads before it adds the first."""


@python_kernel(
    "void(CPointer(uint16), CPointer(uint16), int32, int32, int32)",
    block=512,
    grid="ceil(num_pairs / block_pairs)",
    regs=32,
)
def expert_histogram(
    block_counts: Any, ids: Any, num_pairs: int, num_experts: int, block_pairs: int
) -> None:
    """Pairs of each expert among `block_pairs` consecutive pairs.

    block_counts u16 [blocks, num_experts]    ids u16 [num_pairs]
    num_experts <= MAX_EXPERTS    block_pairs < 65536
    """
    counts = cuda.shared.array(1024, int32)
    thread, num_threads = cuda.threadIdx.x, cuda.blockDim.x
    e = thread
    while e < num_experts:
        counts[e] = 0
        e += num_threads
    cuda.syncthreads()  # all counts are zero
    first = cuda.blockIdx.x * block_pairs
    end = min(first + block_pairs, num_pairs)
    i = first + thread
    while i < end:
        cuda.atomic.add(counts, int32(ids[i]), int32(1))
        i += num_threads
    cuda.syncthreads()  # all pairs are counted
    e = thread
    while e < num_experts:
        block_counts[cuda.blockIdx.x * num_experts + e] = uint16(counts[e])
        e += num_threads


@python_kernel(
    "void(CPointer(int32), CPointer(int32), CPointer(int32), CPointer(int32), CPointer(uint16), "
    "CPointer(uint16), CPointer(int32), int32, int32, int32, int32)",
    block=512,
    grid="ceil(num_pairs / block_pairs)",
    regs=96,
)
def group_by_expert(
    order: Any,
    position: Any,
    tiles: Any,
    num_tiles: Any,
    block_counts: Any,
    ids: Any,
    expert_to_slot: Any,
    num_pairs: int,
    num_experts: int,
    block_pairs: int,
    has_slots: int,
) -> None:
    """Kernel of Ops.group_by_expert, after `expert_histogram` with the same sizes.

    order, position i32 [num_pairs]; tiles i32 [max_tiles, 4]; num_tiles i32 [1]: of ExpertGroups
    block_counts u16 [blocks, num_experts]: of `expert_histogram`    ids u16 [num_pairs]
    expert_to_slot i32 [num_experts]: not read if has_slots is 0, for slot e of expert e
    num_experts <= MAX_EXPERTS
    """
    bitmap = cuda.shared.array(4096, uint32)  # [words, num_experts]: a bit per pair of a round.
    totals = cuda.shared.array(1024, int32)  # Pairs per expert, of all blocks.
    starts = cuda.shared.array(1024, int32)  # Sorted position of the expert's first pair,
    next_position = cuda.shared.array(1024, int32)  # and of its next pair in this block.
    first_tile = cuda.shared.array(1024, int32)  # Tiles of the experts before.
    group_pairs = cuda.shared.array(32, int32)  # Pairs per 32 experts,
    group_tiles = cuda.shared.array(32, int32)  # and their tiles
    tile_count = cuda.shared.array(1, int32)
    loaded = cuda.local.array(16, int32)
    thread, num_threads = cuda.threadIdx.x, cuda.blockDim.x
    block, num_blocks = cuda.blockIdx.x, cuda.gridDim.x

    # -- 1. add up the counts: of all blocks, and of the blocks before this one
    e = thread
    while e < num_experts:
        totals[e] = 0
        next_position[e] = 0
        e += num_threads
    if thread < 32:
        group_pairs[thread] = 0
        group_tiles[thread] = 0
    i = thread
    while i < BITMAP_WORDS:
        bitmap[i] = uint32(0)
        i += num_threads
    cuda.syncthreads()  # tables and bitmaps are zero
    # an expert's counts are divided among `parts` threads
    parts = max(int32(1), int32(uint32(num_threads) // uint32(num_experts)))
    i = thread
    while i < num_experts * parts:
        part = int32(uint32(i) // uint32(num_experts))
        e = i - part * num_experts
        total, before = int32(0), int32(0)
        b = part
        while b < num_blocks:
            for u in range(LOADS_IN_FLIGHT):
                loaded[u] = 0
                if b + u * parts < num_blocks:
                    loaded[u] = int32(block_counts[(b + u * parts) * num_experts + e])
            for u in range(LOADS_IN_FLIGHT):
                total += loaded[u]
                if b + u * parts < block:
                    before += loaded[u]
            b += LOADS_IN_FLIGHT * parts
        cuda.atomic.add(totals, e, total)
        cuda.atomic.add(next_position, e, before)
        i += num_threads
    cuda.syncthreads()  # the counts are added up
    e = thread
    while e < num_experts:
        cuda.atomic.add(group_pairs, e >> 5, totals[e])
        cuda.atomic.add(group_tiles, e >> 5, int32((totals[e] + TILE_ROWS - 1) // TILE_ROWS))
        e += num_threads
    cuda.syncthreads()  # the sums of 32 experts are complete

    # -- 2. where each expert's pairs and tiles begin
    e = thread
    while e < num_experts:
        start, tile = int32(0), int32(0)
        other = int32(0)
        while other < e >> 5:
            start += group_pairs[other]
            tile += group_tiles[other]
            other += 1
        other = e >> 5 << 5
        while other < e:
            start += totals[other]
            tile += int32((totals[other] + TILE_ROWS - 1) // TILE_ROWS)
            other += 1
        starts[e] = start
        next_position[e] += start
        first_tile[e] = tile
        if e == num_experts - 1:
            tile += int32((totals[e] + TILE_ROWS - 1) // TILE_ROWS)
            tile_count[0] = tile
            if block == 0:
                num_tiles[0] = tile
        e += num_threads
    cuda.syncthreads()  # the tables are complete

    # -- 3. the tiles, divided among all threads; a tile's expert is the last that begins before it
    t = block * num_threads + thread
    while t < tile_count[0]:
        e, end = int32(0), int32(num_experts)
        while end - e > 1:
            middle = (e + end) >> 1
            if first_tile[middle] <= t:
                e = middle
            else:
                end = middle
        row = (t - first_tile[e]) * TILE_ROWS
        slot = e
        if has_slots > 0:
            slot = expert_to_slot[e]
        tiles[4 * t] = slot
        tiles[4 * t + 1] = starts[e] + row
        tiles[4 * t + 2] = min(totals[e] - row, TILE_ROWS)
        tiles[4 * t + 3] = e
        t += num_blocks * num_threads

    # -- 4. the pairs, in rounds of at most one per thread and 32 per word of an expert's bitmap
    words = int32(uint32(BITMAP_WORDS) // uint32(num_experts))
    words = max(int32(1), min(words, int32(num_threads >> 5)))
    first = block * block_pairs
    end = min(first + block_pairs, num_pairs)
    while first < end:
        i = first + thread
        is_pair = thread < 32 * words and i < end
        word = thread >> 5
        bit = uint32(1) << uint32(thread & 31)
        e = int32(0)
        if is_pair:
            e = int32(ids[i])
            cuda.atomic.or_(bitmap, word * num_experts + e, uint32(bit))
        cuda.syncthreads()  # the round's bitmaps are complete
        if is_pair:
            at = next_position[e]
            before = int32(0)
            while before < word:
                at += int32(cuda.popc(bitmap[before * num_experts + e]))
                before += 1
            at += int32(cuda.popc(uint32(bitmap[word * num_experts + e] & (bit - uint32(1)))))
            position[i] = at
            order[at] = i
        cuda.syncthreads()  # all ranks are computed, before the bitmaps change
        if is_pair:
            bitmap[word * num_experts + e] = uint32(0)
            cuda.atomic.add(next_position, e, int32(1))
        cuda.syncthreads()  # the next round starts with empty bitmaps
        first += 32 * words


EXPERT_HISTOGRAM, GROUP_BY_EXPERT = expert_histogram, group_by_expert
