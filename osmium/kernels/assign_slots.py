"""assign_slots: gives every routed expert of a layer an expert slot, and lists what to fetch.

One thread block handles a layer.  It reads global memory at the start, with all loads in flight at
once, and works in shared memory from there on.  fetch_experts copies the bytes that the slot
assignment lists.  A second thread block selects an expert of the next layer to prefetch; it writes
the next layer's tables only.  Method: docs/expert-cache.md.

Loops are `while` loops: for a range with a step Numba emits a division for the trip count, and ten
index instructions per iteration instead of one.
"""

import math
from typing import Any

from osmium.kernels.numba_kernels import (
    atomic_add,
    cuda,
    exp2,
    float32,
    float_as_int,
    int32,
    python_kernel,
    uint32,
)

__all__ = ["ASSIGN_SLOTS"]

BLOCK_THREADS = 256
"""Threads of a block."""

STOP, DROP = 1 << 30, 1 << 29
"""As in ops.types: the layer has its slots; the predicted expert is not needed."""

PREFETCH_SCORE_BIAS = 0.02
"""As in ops.types: added to the eviction score of a predicted expert."""

INT32_MAX = (1 << 31) - 1
"""Larger than every slot, expert id and eviction score as bits."""


@python_kernel(
    "void(CPointer(int32), CPointer(int32), CPointer(int32), CPointer(int32), CPointer(int32), "
    "CPointer(int32), CPointer(int32), CPointer(int32), CPointer(int32), CPointer(float32), "
    "CPointer(float32), CPointer(int32), CPointer(int32), CPointer(int64), CPointer(uint16), "
    "CPointer(int32), CPointer(int32), CPointer(float32), CPointer(float32), CPointer(int32), "
    "CPointer(uint16), CPointer(float32), CPointer(int32), CPointer(int32), CPointer(int32), "
    "CPointer(int32), CPointer(int32), "
    "int32, int32, int32, int32, int32, int32, int32, int32, int32, int32, int32, "
    "float32, float32, float32)",
    block=BLOCK_THREADS,
    grid="blocks",
    regs=96,
)
def assign_slots(
    count: Any,
    expert: Any,
    slot: Any,
    fetch_flags: Any,
    uses: Any,
    pair_slots: Any,
    fetch_progress: Any,
    expert_to_slot: Any,
    slot_to_expert: Any,
    short_count: Any,
    long_count: Any,
    last_used: Any,
    step: Any,
    counters: Any,
    ids: Any,
    next_expert_to_slot: Any,
    next_slot_to_expert: Any,
    next_short_count: Any,
    next_long_count: Any,
    next_last_used: Any,
    prefetch_ids: Any,
    prefetch_weights: Any,
    prefetch_expert: Any,
    prefetch_slot: Any,
    prefetch_state: Any,
    prefetch_done: Any,
    start_signal: Any,
    num_pairs: int,
    num_experts: int,
    num_slots: int,
    next_num_slots: int,
    next_first_slot: int,
    max_unique: int,
    layer: int,
    is_last_layer: int,
    has_prefetch: int,
    fetch_warps: int,
    prior_steps: int,
    rate: float,
    long_rate: float,
    long_scale: float,
) -> None:
    """Kernel of Ops.assign_slots: writes the slot assignment, updates the layer's tables and the
    counters.  Arrays [shape], with E experts, S slots of the layer, U = max_unique, L layers:

    count i32 [1]; expert, slot, fetch_flags, uses i32 [U]; pair_slots i32 [num_pairs];
    fetch_progress i32 [2]: of SlotAssignment
    expert_to_slot i32 [E], slot_to_expert i32 [S], short_count, long_count f32 [E],
    last_used i32 [E]: of the layer; next_...: of the next layer, for the second block
    step i32 [1], counters i64 [7]: of ExpertCache; ids u16 [num_pairs]: routed experts
    prefetch_ids u16, prefetch_weights f32 [num_pairs]: predicted for the next layer
    prefetch_expert, prefetch_slot i32 [L], prefetch_state, start_signal i32 [L, fetch_warps / 8],
    prefetch_done i32 [L, fetch_warps]: of PrefetchState
    next_first_slot: number of the next layer's first slot among the slots of all layers
    has_prefetch: 0 launches one block, and the arrays of PrefetchState are not accessed
    num_experts E <= 1024    num_slots S <= E    is_last_layer: 1 or 0
    prior_steps, long_scale: of DecayConfig; rate = 1 / half_life; long_rate = 1 / long_half_life
    """
    use_counts = cuda.shared.array(1024, int32)  # routed pairs per expert in this call
    needed_bits = cuda.shared.array(32, uint32)  # bit e: expert e is routed in this call
    missing_bits = cuda.shared.array(32, uint32)  # bit e: and it has no slot
    num_hits = cuda.shared.array(1, int32)
    slot_table = cuda.shared.array(1024, int32)  # expert_to_slot; later the value for pair_slots
    slot_experts = cuda.shared.array(1024, int32)  # slot_to_expert
    short_table = cuda.shared.array(1024, float32)  # short_count
    long_table = cuda.shared.array(1024, float32)  # long_count
    last_table = cuda.shared.array(1024, int32)  # last_used
    scores = cuda.shared.array(1024, float32)  # eviction score per slot, decayed to this step
    eviction_order = cuda.shared.array(1024, int32)  # slots, lowest score first
    selection = cuda.shared.array(4, int32)  # prefetch: best score, lowest slot score; expert, slot
    pinned = float32(math.inf)
    thread, is_prefetch_block = cuda.threadIdx.x, cuda.blockIdx.x > 0

    # -- 1. issue all global loads
    step_now = step[0]  # incremented below: an addition here would stall before the other loads
    first_id, hit_counter, prefetched, weight = 0, 0, int32(-1), float32(0)
    if is_prefetch_block:
        expert_to_slot, slot_to_expert, short_count, long_count = (
            next_expert_to_slot, next_slot_to_expert, next_short_count, next_long_count,
        )  # fmt: skip
        last_used, ids, num_slots = next_last_used, prefetch_ids, next_num_slots
        if thread < num_pairs:
            weight = prefetch_weights[thread]
    elif has_prefetch > 0:
        prefetched = prefetch_expert[layer]
    if thread < num_pairs:
        first_id = int32(ids[thread])
    if thread < 2 and not is_prefetch_block:
        fetch_progress[thread] = 0
    if thread == 0:
        hit_counter = counters[1]
        num_hits[0] = 0
        selection[0], selection[1], selection[2], selection[3] = -1, INT32_MAX, INT32_MAX, INT32_MAX
    if thread < 32:
        needed_bits[thread] = 0
        missing_bits[thread] = 0
    e = thread
    while e < num_experts:
        expert_here = int32(-1)
        if e < num_slots:
            expert_here = slot_to_expert[e]
        slot_table[e], short_table[e], long_table[e], last_table[e] = (
            expert_to_slot[e],
            short_count[e],
            long_count[e],
            last_used[e],
        )
        slot_experts[e] = expert_here
        use_counts[e] = 0
        e += BLOCK_THREADS
    cuda.syncthreads()  # tables are loaded, counts and bit sets are zero
    step_now = int32(step_now + 1)

    # -- 2. count the uses of each expert; mark the missing ones
    i, e = thread, first_id
    while i < num_pairs:
        bit = uint32(1) << uint32(e & 31)
        cuda.atomic.add(use_counts, e, 1)
        cuda.atomic.or_(needed_bits, e >> 5, uint32(bit))
        if slot_table[e] < 0:
            cuda.atomic.or_(missing_bits, e >> 5, uint32(bit))
        else:
            cuda.atomic.add(num_hits, 0, 1)
        i += BLOCK_THREADS
        if i < num_pairs:
            e = int32(ids[i])
    cuda.syncthreads()  # counts and bit sets are complete
    any_missing = num_hits[0] < num_pairs
    short_scale = float32(1) - exp2(float32(-(step_now + prior_steps)) * long_rate)

    # -- second block: of the next layer, the best expert without a slot, and the slot for it
    if is_prefetch_block:
        i, e = thread, first_id
        while i < num_pairs:
            if slot_table[e] < 0:
                age = float32(last_table[e] - step_now)
                short = short_table[e] * exp2(age * rate)
                score = short_scale * short + long_scale * (long_table[e] * exp2(age * long_rate))
                scores[i] = weight * weight * (score + float32(PREFETCH_SCORE_BIAS))
                cuda.atomic.max(selection, 0, float_as_int(scores[i]))
            i += BLOCK_THREADS
            if i < num_pairs:
                e, weight = int32(ids[i]), prefetch_weights[i]
        s = thread
        while s < num_slots:
            e, score_bits = slot_experts[s], int32(INT32_MAX)
            if e < 0:
                score_bits = int32(s - 1024)  # free slots first, as below
            elif use_counts[e] == 0:
                age = float32(last_table[e] - step_now)
                short = short_table[e] * exp2(age * rate)
                score = short_scale * short + long_scale * (long_table[e] * exp2(age * long_rate))
                score_bits = float_as_int(score)
            eviction_order[s] = score_bits
            cuda.atomic.min(selection, 1, score_bits)
            s += BLOCK_THREADS
        cuda.syncthreads()  # the best and the lowest score are known
        i, e = thread, first_id
        while i < num_pairs:
            if slot_table[e] < 0 and float_as_int(scores[i]) == selection[0]:
                cuda.atomic.min(selection, 2, e)
            i += BLOCK_THREADS
            if i < num_pairs:
                e = int32(ids[i])
        s = thread
        while s < num_slots:
            if eviction_order[s] == selection[1]:
                cuda.atomic.min(selection, 3, s)
            s += BLOCK_THREADS
        cuda.syncthreads()  # and their expert and slot
        i = thread
        while i < fetch_warps:
            prefetch_done[(layer + 1) * fetch_warps + i] = 0
            if i < fetch_warps // 8:
                prefetch_state[(layer + 1) * (fetch_warps // 8) + i] = 0
                start_signal[(layer + 1) * (fetch_warps // 8) + i] = 16 * step_now
            i += BLOCK_THREADS
        if thread == 0:
            e, s = selection[2], selection[3]
            if selection[1] == INT32_MAX:
                e = INT32_MAX
            if e < INT32_MAX:
                evicted = slot_experts[s]
                if evicted >= 0:
                    expert_to_slot[evicted] = -1
                    slot_to_expert[s] = -1
                prefetch_slot[layer + 1] = next_first_slot + s
                prefetch_expert[layer + 1] = e
                atomic_add(counters, 4, 1)
            else:
                prefetch_expert[layer + 1] = -1
        return

    # -- was the prefetched expert of this layer routed?  If not, DROP ends its copy
    prefetch_hit = False
    if has_prefetch > 0 and thread < fetch_warps // 8:
        start_signal[layer * (fetch_warps // 8) + thread] = 16 * step_now + 15
    if prefetched >= 0:
        prefetch_hit = use_counts[prefetched] > 0 and slot_table[prefetched] < 0
        if thread < fetch_warps // 8 and not prefetch_hit:
            atomic_add(prefetch_state, layer * (fetch_warps // 8) + thread, STOP + DROP)

    # -- 3. rank the slots by eviction score: the rank is the number of slots with a lower one
    if any_missing:
        s = thread
        while s < num_slots:
            e = slot_experts[s]
            if e < 0:
                scores[s] = float32(s - 1024)  # free slots rank first, lowest number first
            elif use_counts[e] > 0:
                scores[s] = pinned  # an expert of this call is never evicted
            else:
                age = float32(last_table[e] - step_now)
                short = short_table[e] * exp2(age * rate)
                scores[s] = short_scale * short + long_scale * (
                    long_table[e] * exp2(age * long_rate)
                )
            s += BLOCK_THREADS
        cuda.syncthreads()  # all scores are written
        s = thread
        while s < num_slots:
            score = scores[s]
            if score < pinned:
                rank, ties, o = float32(0), float32(0), 0
                while o < num_slots:
                    rank += float32(scores[o] < score)
                    ties += float32(scores[o] == score)
                    o += 1
                if ties > 1:  # rare: order by last use, then by slot
                    o = 0
                    while o < num_slots:
                        if scores[o] == score:
                            older = last_table[slot_experts[o]] - last_table[slot_experts[s]]
                            rank += float32(older < 0 or (older == 0 and o < s))
                        o += 1
                eviction_order[int32(rank)] = s
            s += BLOCK_THREADS
        cuda.syncthreads()  # the order is complete

    # -- 4. entry u of the slot assignment is the u-th routed expert; the m-th missing one gets
    #    eviction_order[m].  A prefetched expert has the lowest free slot: eviction_order[0]
    e = thread
    while e < num_experts:
        use_count = use_counts[e]
        if use_count > 0:
            lower_bits = (uint32(1) << uint32(e & 31)) - uint32(1)
            u = int32(cuda.popc(uint32(needed_bits[e >> 5] & lower_bits)))
            m = int32(cuda.popc(uint32(missing_bits[e >> 5] & lower_bits)))
            w = 0
            while w < e >> 5:
                u += int32(cuda.popc(needed_bits[w]))
                m += int32(cuda.popc(missing_bits[w]))
                w += 1
            if prefetch_hit and e <= prefetched:  # it is entry 0
                u, m = u + int32(1), m + int32(1)
                if e == prefetched:
                    u, m = int32(0), int32(0)
            s = slot_table[e]
            fetch_flags[u] = 0
            if s < 0:
                fetch_flags[u] = 2 if prefetch_hit and e == prefetched else 1
                s = eviction_order[m]
                evicted = slot_experts[s]
                if evicted >= 0:
                    expert_to_slot[evicted] = -1
                expert_to_slot[e] = s
                slot_to_expert[s] = e
                slot_table[e] = ~s
            expert[u] = e
            slot[u] = s
            uses[u] = use_count
            age = float32(last_table[e] - step_now)
            short_count[e] = short_table[e] * exp2(age * rate) + float32(use_count)
            long_count[e] = long_table[e] * exp2(age * long_rate) + float32(use_count)
            last_used[e] = step_now
        e += BLOCK_THREADS
    if any_missing:
        cuda.syncthreads()  # every routed expert has its slot
    i, e = thread, first_id
    while i < num_pairs:
        pair_slots[i] = slot_table[e]
        i += BLOCK_THREADS
        if i < num_pairs:
            e = int32(ids[i])
    if prefetch_hit and thread < fetch_warps // 8:
        atomic_add(prefetch_state, layer * (fetch_warps // 8) + thread, STOP)
    if thread < max_unique:
        num_unique, w = 0, 0
        while 32 * w < num_experts:
            num_unique += cuda.popc(needed_bits[w])
            w += 1
        u = num_unique + thread
        while u < max_unique:
            expert[u] = -1
            u += BLOCK_THREADS
        if thread == 0:
            count[0] = num_unique
            counters[1] = hit_counter + num_hits[0]
            if is_last_layer > 0:
                step[0] = step_now
            if prefetched >= 0:
                prefetch_expert[layer] = -1
                if prefetch_hit:
                    atomic_add(counters, 5, 1)


ASSIGN_SLOTS = assign_slots
