"""place: which slot every needed expert has, who must leave for it, and what to fetch.

One thread block does a layer; its threads take experts, slots and pairs in turns.  Memory is read
at the start and no load waits for another; from there on all is in shared memory.  Knows nothing of
bytes: `fetch` copies what the plan says.

Loops say `while`: for a range with a step Numba divides to count its turns, and keeps its index by
ten instructions where one does.
"""

import math
from typing import Any

from osmium.kernels.python import cuda, exp2, float32, int32, python_kernel, uint32

__all__ = ["PLACE"]

WIDTH = 256
"""Threads of the block."""


@python_kernel(
    "void(CPointer(int32), CPointer(int32), CPointer(int32), CPointer(int32), CPointer(int32), "
    "CPointer(int32), CPointer(int32), CPointer(int32), CPointer(int32), CPointer(float32), "
    "CPointer(float32), CPointer(int32), CPointer(int32), CPointer(int64), CPointer(uint16), "
    "int32, int32, int32, int32, int32, int32, float32, float32, float32)",
    block=WIDTH,
    grid="1",
    regs=96,
)
def place(
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
    pairs: int,
    experts: int,
    capacity: int,
    entries: int,
    first: int,
    earlier: int,
    rate: float,
    long_rate: float,
    share: float,
) -> None:
    """Ops.place: the plan is written, the layer's tables and the counters are brought up to date.

    count i32 [1], expert, slot, fetch, uses i32 [entries], pair i32 [pairs], arrived i32 [2]
    slot_of i32 [E], expert_in i32 [S], heat, long_heat f32 [E], stamp i32 [E]    of the layer
    step i32 [1], counters i64 [4]    of the cache    ids u16 [pairs]
    experts E <= 1024    capacity S <= E    first: 1 at layer 0, else 0
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
    kept = float32(math.inf)
    me = cuda.threadIdx.x

    # -- 1. all that is read of memory, on its way at once
    now = step[0]  # raised below: a sum here would wait for it before the others are asked for
    mine, counted = 0, 0
    if me < pairs:
        mine = int32(ids[me])
    if me < 2:
        arrived[me] = 0
    if me == 0:
        counted = counters[1]
        hits[0] = 0
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
        e += WIDTH
    cuda.syncthreads()  # the tables are here, the sums and sets are empty
    now = int32(now + first)

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
        i += WIDTH
        if i < pairs:
            e = int32(ids[i])
    cuda.syncthreads()  # the tally and both sets are whole
    missing = hits[0] < pairs

    # -- 3. how warm is every slot?  Its place in the order is the number of slots before it
    if missing:
        grown = float32(1) - exp2(float32(-(now + earlier)) * long_rate)
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
            s += WIDTH
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
            s += WIDTH
        cuda.syncthreads()  # the order is whole before it is used

    # -- 4. entry u of the plan is the u-th needed expert; the m-th absent one takes given[m]
    e = me
    while e < experts:
        times = tally[e]
        if times > 0:
            below = (uint32(1) << uint32(e & 31)) - uint32(1)
            u = cuda.popc(uint32(needed[e >> 5] & below))
            m = cuda.popc(uint32(absent[e >> 5] & below))
            w = 0
            while w < e >> 5:
                u += cuda.popc(needed[w])
                m += cuda.popc(absent[w])
                w += 1
            s = place_of[e]
            fetch[u] = s < 0
            if s < 0:
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
        e += WIDTH
    if missing:
        cuda.syncthreads()  # every needed expert has its slot
    i, e = me, mine
    while i < pairs:
        pair[i] = place_of[e]
        i += WIDTH
        if i < pairs:
            e = int32(ids[i])
    if me < entries:
        unique, w = 0, 0
        while 32 * w < experts:
            unique += cuda.popc(needed[w])
            w += 1
        u = unique + me
        while u < entries:
            expert[u] = -1
            u += WIDTH
        if me == 0:
            count[0] = unique
            counters[1] = counted + hits[0]
            step[0] = now


PLACE = place
