"""place: which slot every needed expert has, who must leave for it, and what to fetch.

One thread block does a layer; its threads take experts, slots and pairs in turns.  Memory is read
at the start and no load waits for another; from there on all is in shared memory.  Knows nothing of
bytes: `fetch` copies what the plan says.  A second block looks meanwhile for an expert of the next
layer that is worth fetching before it is asked for; what it reads and writes is that layer's.

Loops say `while`: for a range with a step Numba divides to count its turns, and keeps its index by
ten instructions where one does.
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
"""As of ops.values: the layer is placed; and the guess was wrong."""

PREFETCH_BONUS = 0.02
"""As of ops.values: added to the warmth of who is guessed."""

INT32_MAX = (1 << 31) - 1
"""Past every slot, expert, and warmth as bits."""


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
    fetch: Any,
    uses: Any,
    pair: Any,
    arrived: Any,
    slot_of: Any,
    expert_in: Any,
    heat: Any,
    long_heat: Any,
    stamp: Any,
    step: Any,
    counters: Any,
    ids: Any,
    next_slot_of: Any,
    next_expert_in: Any,
    next_heat: Any,
    next_long_heat: Any,
    next_stamp: Any,
    guess_ids: Any,
    guess_weights: Any,
    guess_expert: Any,
    guess_slot: Any,
    guess_state: Any,
    guess_done: Any,
    guess_go: Any,
    pairs: int,
    experts: int,
    capacity: int,
    next_capacity: int,
    next_first: int,
    entries: int,
    layer: int,
    last: int,
    guessing: int,
    warps: int,
    earlier: int,
    rate: float,
    long_rate: float,
    share: float,
) -> None:
    """Ops.place: the plan is written, the layer's tables and the counters are brought up to date.

    count i32 [1], expert, slot, fetch, uses i32 [entries], pair i32 [pairs], arrived i32 [2]
    slot_of i32 [E], expert_in i32 [S], heat, long_heat f32 [E], stamp i32 [E]    of the layer
    step i32 [1], counters i64 [7]    of the cache    ids u16 [pairs]
    next_...: the same of the next layer, for the second block; next_first: the number of its first
    slot among all layers'    last: 1 at the last layer, else 0
    guess_ids u16, guess_weights f32 [pairs]
    guess_expert, guess_slot i32 [L], guess_state, guess_go i32 [L, warps / 8], guess_done i32
    [L, warps]
    guessing: 1 with a guess, 0 without: then there is one block, and those are never looked at
    experts E <= 1024    capacity S <= E
    earlier, share: of values.Fading    rate = 1 / half_life    long_rate = 1 / long_half_life
    """
    tally = cuda.shared.array(1024, int32)  # uses of each expert by this call
    needed = cuda.shared.array(32, uint32)  # bit e: this call uses expert e
    absent = cuda.shared.array(32, uint32)  # bit e: and it is in no slot
    hits = cuda.shared.array(1, int32)
    place_of = cuda.shared.array(1024, int32)  # slot_of; then what pairs say of an expert
    inside = cuda.shared.array(1024, int32)  # expert_in
    recent = cuda.shared.array(1024, float32)  # heat
    lasting = cuda.shared.array(1024, float32)  # long_heat
    used = cuda.shared.array(1024, int32)  # stamp
    warmth = cuda.shared.array(1024, float32)  # of a slot: its expert's as of now
    given = cuda.shared.array(1024, int32)  # slots in the order in which they are given away
    best = cuda.shared.array(4, int32)  # of a guess: likeliest, coldest; who, and which slot
    kept = float32(math.inf)
    me, looks_on = cuda.threadIdx.x, cuda.blockIdx.x > 0

    # -- 1. all that is read of memory, on its way at once
    now = step[0]  # raised below: a sum here would wait for it before the others are asked for
    mine, counted, guessed, weight = 0, 0, int32(-1), float32(0)
    if looks_on:
        slot_of, expert_in, heat, long_heat = (
            next_slot_of, next_expert_in, next_heat, next_long_heat,
        )  # fmt: skip
        stamp, ids, capacity = next_stamp, guess_ids, next_capacity
        if me < pairs:
            weight = guess_weights[me]
    elif guessing > 0:
        guessed = guess_expert[layer]
    if me < pairs:
        mine = int32(ids[me])
    if me < 2 and not looks_on:
        arrived[me] = 0
    if me == 0:
        counted = counters[1]
        hits[0] = 0
        best[0], best[1], best[2], best[3] = -1, INT32_MAX, INT32_MAX, INT32_MAX
    if me < 32:
        needed[me] = 0
        absent[me] = 0
    e = me
    while e < experts:
        held = int32(-1)
        if e < capacity:
            held = expert_in[e]
        place_of[e], recent[e], lasting[e], used[e] = slot_of[e], heat[e], long_heat[e], stamp[e]
        inside[e] = held
        tally[e] = 0
        e += BLOCK_THREADS
    cuda.syncthreads()  # the tables are here, the sums and sets are empty
    now = int32(now + 1)

    # -- 2. who is used how often, and who of them is not here?
    i, e = me, mine
    while i < pairs:
        bit = uint32(1) << uint32(e & 31)
        cuda.atomic.add(tally, e, 1)
        cuda.atomic.or_(needed, e >> 5, uint32(bit))
        if place_of[e] < 0:
            cuda.atomic.or_(absent, e >> 5, uint32(bit))
        else:
            cuda.atomic.add(hits, 0, 1)
        i += BLOCK_THREADS
        if i < pairs:
            e = int32(ids[i])
    cuda.syncthreads()  # the tally and both sets are whole
    missing = hits[0] < pairs
    grown = float32(1) - exp2(float32(-(now + earlier)) * long_rate)

    # -- for the next layer: the likeliest of those that have no slot, and the slot that it gets
    if looks_on:
        i, e = me, mine
        while i < pairs:
            if place_of[e] < 0:
                age = float32(used[e] - now)
                short = recent[e] * exp2(age * rate)
                warm = grown * short + share * (lasting[e] * exp2(age * long_rate))
                warmth[i] = weight * weight * (warm + float32(PREFETCH_BONUS))
                cuda.atomic.max(best, 0, float_as_int(warmth[i]))
            i += BLOCK_THREADS
            if i < pairs:
                e, weight = int32(ids[i]), guess_weights[i]
        s = me
        while s < capacity:
            e, worth = inside[s], int32(INT32_MAX)
            if e < 0:
                worth = int32(s - 1024)  # as below
            elif tally[e] == 0:
                age = float32(used[e] - now)
                short = recent[e] * exp2(age * rate)
                warm = grown * short + share * (lasting[e] * exp2(age * long_rate))
                worth = float_as_int(warm)
            given[s] = worth
            cuda.atomic.min(best, 1, worth)
            s += BLOCK_THREADS
        cuda.syncthreads()  # what the likeliest and the coldest have is known
        i, e = me, mine
        while i < pairs:
            if place_of[e] < 0 and float_as_int(warmth[i]) == best[0]:
                cuda.atomic.min(best, 2, e)
            i += BLOCK_THREADS
            if i < pairs:
                e = int32(ids[i])
        s = me
        while s < capacity:
            if given[s] == best[1]:
                cuda.atomic.min(best, 3, s)
            s += BLOCK_THREADS
        cuda.syncthreads()  # and who they are
        i = me
        while i < warps:
            guess_done[(layer + 1) * warps + i] = 0
            if i < warps // 8:
                guess_state[(layer + 1) * (warps // 8) + i] = 0
                guess_go[(layer + 1) * (warps // 8) + i] = 16 * now
            i += BLOCK_THREADS
        if me == 0:
            e, s = best[2], best[3]
            if best[1] == INT32_MAX:
                e = INT32_MAX
            if e < INT32_MAX:
                gone = inside[s]
                if gone >= 0:
                    slot_of[gone] = -1
                    expert_in[s] = -1
                guess_slot[layer + 1] = next_first + s
                guess_expert[layer + 1] = e
                atomic_add(counters, 4, 1)
            else:
                guess_expert[layer + 1] = -1
        return

    # -- and of this one: was the guess right?  If not, nobody need copy it any more
    right = False
    if guessing > 0 and me < warps // 8:
        guess_go[layer * (warps // 8) + me] = 16 * now + 15
    if guessed >= 0:
        right = tally[guessed] > 0 and place_of[guessed] < 0
        if me < warps // 8 and not right:
            atomic_add(guess_state, layer * (warps // 8) + me, STOP + DROP)

    # -- 3. how warm is every slot?  Its place in the order is the number of slots before it
    if missing:
        s = me
        while s < capacity:
            e = inside[s]
            if e < 0:
                warmth[s] = float32(s - 1024)  # free slots go first, from the lowest up
            elif tally[e] > 0:
                warmth[s] = kept  # an expert of this call never goes
            else:
                age = float32(used[e] - now)
                short = recent[e] * exp2(age * rate)
                warmth[s] = grown * short + share * (lasting[e] * exp2(age * long_rate))
            s += BLOCK_THREADS
        cuda.syncthreads()  # all warmths are whole
        s = me
        while s < capacity:
            warm = warmth[s]
            if warm < kept:
                before, alike, o = float32(0), float32(0), 0
                while o < capacity:
                    before += float32(warmth[o] < warm)
                    alike += float32(warmth[o] == warm)
                    o += 1
                if alike > 1:  # seldom: then by stamp, then by slot
                    o = 0
                    while o < capacity:
                        if warmth[o] == warm:
                            older = used[inside[o]] - used[inside[s]]
                            before += float32(older < 0 or (older == 0 and o < s))
                        o += 1
                given[int32(before)] = s
            s += BLOCK_THREADS
        cuda.syncthreads()  # the order is whole before it is used

    # -- 4. entry u of the plan is the u-th needed expert; the m-th absent one takes given[m].  The
    #    slot that a guess has is the lowest of the free ones: given[0]
    e = me
    while e < experts:
        times = tally[e]
        if times > 0:
            below = (uint32(1) << uint32(e & 31)) - uint32(1)
            u = int32(cuda.popc(uint32(needed[e >> 5] & below)))
            m = int32(cuda.popc(uint32(absent[e >> 5] & below)))
            w = 0
            while w < e >> 5:
                u += int32(cuda.popc(needed[w]))
                m += int32(cuda.popc(absent[w]))
                w += 1
            if right and e <= guessed:  # it comes first
                u, m = u + int32(1), m + int32(1)
                if e == guessed:
                    u, m = int32(0), int32(0)
            s = place_of[e]
            fetch[u] = 0
            if s < 0:
                fetch[u] = 2 if right and e == guessed else 1
                s = given[m]
                gone = inside[s]
                if gone >= 0:
                    slot_of[gone] = -1
                slot_of[e] = s
                expert_in[s] = e
                place_of[e] = ~s
            expert[u] = e
            slot[u] = s
            uses[u] = times
            age = float32(used[e] - now)
            heat[e] = recent[e] * exp2(age * rate) + float32(times)
            long_heat[e] = lasting[e] * exp2(age * long_rate) + float32(times)
            stamp[e] = now
        e += BLOCK_THREADS
    if missing:
        cuda.syncthreads()  # every needed expert has its slot
    i, e = me, mine
    while i < pairs:
        pair[i] = place_of[e]
        i += BLOCK_THREADS
        if i < pairs:
            e = int32(ids[i])
    if right and me < warps // 8:
        atomic_add(guess_state, layer * (warps // 8) + me, STOP)
    if me < entries:
        unique, w = 0, 0
        while 32 * w < experts:
            unique += cuda.popc(needed[w])
            w += 1
        u = unique + me
        while u < entries:
            expert[u] = -1
            u += BLOCK_THREADS
        if me == 0:
            count[0] = unique
            counters[1] = counted + hits[0]
            if last > 0:
                step[0] = now
            if guessed >= 0:
                guess_expert[layer] = -1
                if right:
                    atomic_add(counters, 5, 1)


ASSIGN_SLOTS = assign_slots
