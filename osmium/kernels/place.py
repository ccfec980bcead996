"""place: which slot every needed expert has, who must leave for it, and what to fetch.

One thread block does a layer; its threads take experts, slots and pairs in turns.  Knows nothing of
bytes: `fetch` copies what the plan says.
"""

import math
from typing import Any

from osmium.kernels.python import cuda, exp2, float32, int32, python_kernel, uint32

__all__ = ["PLACE"]


@python_kernel(
    "void(CPointer(int32), CPointer(int32), CPointer(int32), CPointer(int32), CPointer(int32), "
    "CPointer(int32), CPointer(int32), CPointer(int32), CPointer(float32), CPointer(int32), "
    "CPointer(int32), CPointer(int64), CPointer(uint16), int32, int32, int32, int32, int32, "
    "float32)",
    block=256,
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
    slot_of: Any,
    expert_in: Any,
    heat: Any,
    stamp: Any,
    step: Any,
    counters: Any,
    ids: Any,
    pairs: int,
    experts: int,
    capacity: int,
    entries: int,
    first: int,
    rate: float,
) -> None:
    """Ops.place: the plan is written, the layer's tables and the counters are brought up to date.

    count i32 [1], expert, slot, fetch, uses i32 [entries], pair i32 [pairs]    the plan
    slot_of i32 [E], expert_in i32 [S], heat f32 [E], stamp i32 [E]    of the layer
    step i32 [1], counters i64 [4]    of the cache    ids u16 [pairs]
    experts E <= 1024    capacity S <= E    first: 1 at layer 0, else 0    rate = 1 / half_life
    """
    tally = cuda.shared.array(1024, int32)  # uses of each expert by this call
    needed = cuda.shared.array(32, uint32)  # bit e: this call uses expert e
    absent = cuda.shared.array(32, uint32)  # bit e: and it is in no slot
    hits = cuda.shared.array(1, int32)
    warmth = cuda.shared.array(1024, float32)  # of a slot: its expert's heat as of now
    age = cuda.shared.array(1024, int32)  # of a slot: its expert's stamp
    given = cuda.shared.array(1024, int32)  # slots in the order in which they are given away
    free, kept = float32(-1), float32(math.inf)
    me = cuda.threadIdx.x
    width = cuda.blockDim.x

    # -- 1. how often is each expert used?
    for e in range(me, experts, width):
        tally[e] = 0
    for w in range(me, 32, width):
        needed[w] = 0
        absent[w] = 0
    if me == 0:
        hits[0] = 0
        step[0] += first
    cuda.syncthreads()  # zeros before sums; the step before anyone reads it
    now = step[0]
    for i in range(me, pairs, width):
        cuda.atomic.add(tally, int32(ids[i]), 1)
    cuda.syncthreads()  # the tally is whole

    # -- 2. who is needed, who of them is not here, and how warm is every slot?
    for e in range(me, experts, width):
        if tally[e] > 0:
            bit = uint32(1) << uint32(e & 31)
            cuda.atomic.or_(needed, e >> 5, uint32(bit))
            if slot_of[e] < 0:
                cuda.atomic.or_(absent, e >> 5, uint32(bit))
            else:
                cuda.atomic.add(hits, 0, tally[e])
    for s in range(me, capacity, width):
        e = expert_in[s]
        age[s] = 0
        if e < 0:
            warmth[s] = free  # free slots go first, from the lowest up
        elif tally[e] > 0:
            warmth[s] = kept  # an expert of this call never goes
        else:
            warmth[s] = heat[e] * exp2(float32(stamp[e] - now) * rate)
            age[s] = stamp[e]
    cuda.syncthreads()  # both sets of bits and all warmths are whole

    unique = 0
    missing = 0
    for w in range(32):
        unique += cuda.popc(needed[w])
        missing += cuda.popc(absent[w])

    # -- 3. a slot's place in the order is the number of slots before it
    if missing > 0:
        for s in range(me, capacity, width):
            if warmth[s] < kept:
                before = 0
                for o in range(capacity):
                    if warmth[o] < warmth[s]:
                        before += 1
                    elif warmth[o] == warmth[s]:
                        if age[o] < age[s] or (age[o] == age[s] and o < s):
                            before += 1
                if before < missing:
                    given[before] = s
        cuda.syncthreads()  # the order is whole before it is used

    # -- 4. entry u of the plan is the u-th needed expert; the m-th absent one takes given[m]
    for e in range(me, experts, width):
        if tally[e] > 0:
            below = (uint32(1) << uint32(e & 31)) - uint32(1)
            u = cuda.popc(uint32(needed[e >> 5] & below))
            m = cuda.popc(uint32(absent[e >> 5] & below))
            for w in range(e >> 5):
                u += cuda.popc(needed[w])
                m += cuda.popc(absent[w])
            wanted = (absent[e >> 5] >> uint32(e & 31)) & uint32(1)
            if wanted:
                s = given[m]
                gone = expert_in[s]
                if gone >= 0:
                    slot_of[gone] = -1
                slot_of[e] = s
                expert_in[s] = e
            expert[u] = e
            slot[u] = slot_of[e]
            fetch[u] = wanted
            uses[u] = tally[e]
            heat[e] = heat[e] * exp2(float32(stamp[e] - now) * rate) + float32(tally[e])
            stamp[e] = now
    for u in range(unique + me, entries, width):
        expert[u] = -1
    cuda.syncthreads()  # every needed expert has its slot
    for i in range(me, pairs, width):
        e = int32(ids[i])
        wanted = (absent[e >> 5] >> uint32(e & 31)) & uint32(1)
        pair[i] = ~slot_of[e] if wanted else slot_of[e]
    if me == 0:
        count[0] = unique
        counters[1] += hits[0]


PLACE = place
