"""sample_token and advance_step: from rows of logits to tokens, and on to the next step, without the host.

`slice_max` finds the largest logit of each slice of a row; `logit_histogram` sorts each slice's tokens into bins
and adds the slices up; `sample_token`, one thread block a row, draws a token from what temperature, top-k,
top-p and min-p leave; `advance_step` writes the tokens where the next step reads its own, and tells the
host.

What top-k, top-p and min-p keep is always a prefix of the tokens in order of their logits, so a
token is found by walking down that order until enough tokens, or enough probability, lie behind.
The walk goes by bins of equal width below the largest logit and then token by token; where a bin
has too many tokens to be put in order, by finer bins inside it.  Running sums over bins and over
tokens make each walk one comparison a thread.  Probabilities are integers, in 2^-40 of the largest,
so that sums come out the same in any order of the threads.
"""

from typing import Any

from osmium.kernels.logit_histogram import (
    BINS,
    FINITE_LIMIT,
    FIXED_POINT_ONE,
    LOADS_IN_FLIGHT,
    WINDOW,
    block_argmax,
    block_inclusive_scan,
)
from osmium.kernels.numba_kernels import (
    cuda,
    device_function,
    exp2,
    float32,
    float64,
    int32,
    python_kernel,
    uint32,
    uint64,
)

__all__ = ["ADVANCE_STEP", "SAMPLE_TOKEN"]

MAX_CANDIDATES = 512
"""Tokens that are put in order: each thread of `sample_token` has one."""

LEVELS = 3
"""Of bins: a finest one is 2^-27 of the window wide, and its tokens are equal but for rounding."""


@device_function
def load_candidates(
    index: Any, found: Any, value: Any, logits: Any, order: Any, base: Any, size: Any, start: Any,
    until: Any, s: Any, slices: Any, e: Any,
) -> None:  # fmt: skip
    """index[u], value[u]: element e of the span of slice s + u * warps, u below LOADS_IN_FLIGHT, and its
    logit; index -1 where there is none, for which some other one is loaded: without branches all
    are on their way at once."""
    warps = cuda.blockDim.x // 32
    for u in range(LOADS_IN_FLIGHT):
        of = min(int32(s + u * warps), int32(slices - 1))
        some = s + u * warps < slices and int32(start[of] + e) < until[of]
        index[u] = int32(of * size + start[of] + e) if some else int32(-1)
    for u in range(LOADS_IN_FLIGHT):
        found[u] = int32(order[int32(base + max(index[u], int32(0)))])
    for u in range(LOADS_IN_FLIGHT):
        if index[u] >= 0:
            index[u] = int32((s + u * warps) * size + found[u])
        value[u] = logits[int32(base + max(index[u], int32(0)))]


@device_function
def max_span(start: Any, until: Any, s: Any, slices: Any) -> Any:
    """Elements of the max_span of the spans that `load_candidates` goes over."""
    most = int32(0)
    for u in range(LOADS_IN_FLIGHT):
        of = s + u * (cuda.blockDim.x // 32)
        if of < slices:
            most = max(most, int32(until[of] - start[of]))
    return most


@python_kernel(
    "void(CPointer(int32), CPointer(float32), CPointer(float32), CPointer(float32), "
    "CPointer(float64), CPointer(int32), CPointer(uint32), CPointer(uint64), CPointer(uint16), "
    "CPointer(uint16), int32, int32, int32)",
    block=512,
    grid="rows",
    regs=128,
)
def sample_token(
    token: Any,
    logits: Any,
    best: Any,
    settings: Any,
    chance: Any,
    turn: Any,
    counts: Any,
    masses: Any,
    ends: Any,
    order: Any,
    vocab: int,
    slices: int,
    ring: int,
) -> None:
    """token i32 [rows]: drawn, in rows where `logit_histogram` has not written it.

    logits f32 [rows, vocab]    best f32 [rows, slices]: what `slice_max` found; slices <= 512
    settings f32 [rows, 4]: temperature, top-k, top-p, min-p
    chance f64 [ring, rows], in [0, 1); row turn % ring of it is used    turn i32 [1]
    counts u32 [rows, BINS], masses u64 [rows, BINS + 1], ends u16 [rows, slices, BINS],
    order u16 [rows, vocab]: what `logit_histogram` found
    """
    n_upto = cuda.shared.array(1536, uint32)  # a level after the other: tokens up to each bin
    w_upto = cuda.shared.array(1536, uint64)  # and their probability
    sums = cuda.shared.array(1024, uint64)
    start = cuda.shared.array(512, int32)  # of each slice: which of its tokens in order are looked
    until = cuda.shared.array(512, int32)  # at, first and end
    ids = cuda.shared.array(512, int32)  # the tokens that are listed, as they came
    values = cuda.shared.array(512, float32)
    ranked = cuda.shared.array(512, int32)  # where in `ids` the next block_argmax is
    l_upto = cuda.shared.array(512, uint64)  # the probability of the listed up to it
    entries = cuda.shared.array(1, uint32)
    found = cuda.shared.array(8, uint64)
    index = cuda.local.array(8, int32)
    place = cuda.local.array(8, int32)
    value = cuda.local.array(8, float32)
    me, width = cuda.threadIdx.x, cuda.blockDim.x
    warp, lane, warps = me // 32, me % 32, cuda.blockDim.x // 32
    row = cuda.blockIdx.x
    size = int32(uint32(vocab + slices - 1) // uint32(slices))
    base = int32(row * vocab)

    # -- 1. all that is needed at once; the chance is in host memory, far away
    temperature = settings[row * 4]
    if temperature == float32(0):
        return
    top_k, top_p, least = settings[row * 4 + 1], settings[row * 4 + 2], settings[row * 4 + 3]
    n_bin = uint64(counts[row * BINS + me])
    w_bin = masses[row * (BINS + 1) + me]
    likely = masses[row * (BINS + 1) + BINS]
    largest = float32(-FINITE_LIMIT)
    if me < slices:
        largest = best[row * slices + me]
    lot = float64(0)
    if me == 0:
        lot = chance[int32(uint32(turn[0]) % uint32(ring)) * cuda.gridDim.x + row]
    block_argmax(values, ids, largest, int32(0))
    largest = values[0]
    if not (largest < float32(FINITE_LIMIT) and largest > float32(-FINITE_LIMIT)):
        return
    steep = min(float32(1.4426950408889634) / temperature, float32(1e30))
    per_bin = min(float32(BINS / WINDOW) / temperature, float32(1e30))
    n_upto[me] = uint32(block_inclusive_scan(sums, n_bin))
    cuda.syncthreads()  # `sums` is free
    w_upto[me] = block_inclusive_scan(sums, w_bin)
    cuda.syncthreads()  # the block_inclusive_scan sums are whole
    kept = w_upto[BINS - 1]

    # -- 2. three walks: over top-k tokens; over top-p of what they weigh; up to the draw
    finer_of = int32(-1)  # the bins whose finer bins are in levels 1 and 2
    finest_of = int32(-1)
    list_level = int32(-1)  # what is listed: the bins from list_from to list_to of a level
    list_from = int32(0)
    list_to = int32(0)
    list_n = uint64(0)  # tokens before the list
    list_w = uint64(0)
    listed = int32(0)
    for goal in range(3):
        target = uint64(0)  # the walk ends with the token that brings it there
        if goal == 0:
            if top_k < float32(1) or float32(n_upto[BINS - 1]) <= top_k:
                continue  # all are kept
            target = uint64(top_k)
        elif goal == 1:
            if top_p >= float32(1):
                continue
            target = max(uint64(float64(kept) * float64(top_p)), uint64(1))
        else:
            if least > float32(0):
                kept = min(kept, likely)
            if me == 0:
                target = min(uint64(float64(kept) * lot) + uint64(1), kept)
                found[0] = max(target, uint64(1))
            cuda.syncthreads()  # the target is there
            target = found[0]

        # -- 2a. the bin where the walk ends; if it has many tokens, the finer bin inside it
        n = uint64(0)  # tokens before the bin
        w = uint64(0)  # and their probability
        inside = uint64(0)  # tokens of the bin
        weight = uint64(0)
        b0 = int32(0)  # the bin of level 0
        bin_ = int32(0)  # the bin, counted from the largest logit on in bins of its level
        level = int32(0)
        scale = float32(1)  # bins of the level in one of level 0
        while True:
            of = level * BINS + me
            known = level == 0 or (bin_ == finer_of if level == 1 else bin_ == finest_of)
            if not known:
                if level == 1:
                    finer_of = bin_
                    finest_of = int32(-1)
                else:
                    finest_of = bin_
                n_upto[of] = uint32(0)
                w_upto[of] = uint64(0)
                if me < slices:
                    at_end = int32((row * slices + me) * BINS + b0)
                    start[me] = int32(ends[at_end - 1]) if b0 > 0 else int32(0)
                    until[me] = int32(ends[at_end])
                cuda.syncthreads()  # zeros before sums, and the spans are whole
                last = int32(-1)
                some = uint32(0)  # tokens, one after another, of bin `last`
                w_some = uint64(0)
                s = int32(warp)
                while s < slices:
                    most = max_span(start, until, s, slices)
                    e = int32(lane)
                    while e < most:
                        load_candidates(
                            index, place, value, logits, order, base, size, start, until, s,
                            slices, e,
                        )  # fmt: skip
                        for u in range(LOADS_IN_FLIGHT):
                            below = largest - value[u]
                            b = int32(-1)
                            if index[u] >= 0:
                                b = int32(below * per_bin * scale) - bin_ * int32(BINS)
                            if b >= 0 and b < BINS:
                                if b != last:
                                    if some > 0:
                                        cuda.atomic.add(n_upto, level * BINS + last, some)
                                        cuda.atomic.add(w_upto, level * BINS + last, w_some)
                                    last = b
                                    some = uint32(0)
                                    w_some = uint64(0)
                                some += uint32(1)
                                w_some += uint64(exp2(-below * steep) * float32(FIXED_POINT_ONE))
                        e = int32(e + 32)
                    s = int32(s + warps * LOADS_IN_FLIGHT)
                if some > 0:
                    cuda.atomic.add(n_upto, level * BINS + last, some)
                    cuda.atomic.add(w_upto, level * BINS + last, w_some)
                cuda.syncthreads()  # the bins are whole
                n_upto[of] = uint32(block_inclusive_scan(sums, uint64(n_upto[of])))
                cuda.syncthreads()  # `sums` is free
                w_upto[of] = block_inclusive_scan(sums, w_upto[of])
                cuda.syncthreads()  # the block_inclusive_scan sums are whole
            n_before = uint64(0)
            w_before = uint64(0)
            if me > 0:
                n_before = uint64(n_upto[of - 1])
                w_before = w_upto[of - 1]
            n_here = uint64(n_upto[of])
            w_here = w_upto[of]
            if (
                n + n_before < target and target <= n + n_here
                if goal == 0
                else w + w_before < target and target <= w + w_here
            ):
                found[1] = uint64(me)
                found[2] = n_before
                found[3] = w_before
                found[4] = n_here - n_before
                found[5] = w_here - w_before
            cuda.syncthreads()  # the bin is found
            bin_ = bin_ * int32(BINS) + int32(found[1])
            n += found[2]
            w += found[3]
            inside = found[4]
            weight = found[5]
            cuda.syncthreads()  # and read
            if level == 0:
                b0 = bin_
            if inside <= uint64(MAX_CANDIDATES) or level == LEVELS - 1:
                break
            level += int32(1)
            scale *= float32(BINS)

        # -- 2b. too many for a list: they are equal but for rounding, and go by id
        if inside > uint64(MAX_CANDIDATES):
            each = max(weight // inside, uint64(1))
            short = target - n if goal == 0 else (target - w + each - uint64(1)) // each
            short = min(max(short, uint64(1)), inside)  # so many of them are needed
            kept = min(kept, w + short * each)
            if goal == 2:
                ranked[me] = int32(0)  # tokens of the bin in a slice
                if me < slices:
                    at_end = int32((row * slices + me) * BINS + b0)
                    start[me] = int32(ends[at_end - 1]) if b0 > 0 else int32(0)
                    until[me] = int32(ends[at_end])
                cuda.syncthreads()  # zeros before sums, and the spans are whole
                s = int32(warp)
                while s < slices:
                    most = max_span(start, until, s, slices)
                    e = int32(lane)
                    while e < most:
                        load_candidates(
                            index, place, value, logits, order, base, size, start, until, s,
                            slices, e,
                        )  # fmt: skip
                        for u in range(LOADS_IN_FLIGHT):
                            at = (largest - value[u]) * per_bin
                            if index[u] >= 0 and int32(at * scale) == bin_:
                                cuda.atomic.add(ranked, s + u * warps, int32(1))
                        e = int32(e + 32)
                    s = int32(s + warps * LOADS_IN_FLIGHT)
                cuda.syncthreads()  # the slices are counted
                mine = uint64(ranked[me])
                upto = block_inclusive_scan(sums, mine)
                if upto - mine < short and short <= upto:
                    found[1] = uint64(me)
                    found[2] = upto - mine
                cuda.syncthreads()  # the slice is found
                short -= found[2]
                stretch = (size + width - 1) // width
                from_ = int32(found[1]) * size + me * stretch
                end = min(from_ + stretch, min((int32(found[1]) + 1) * size, vocab))
                mine = uint64(0)
                for i in range(from_, end):
                    at = (largest - logits[base + i]) * per_bin
                    if at < float32(BINS) and int32(at * scale) == bin_:
                        mine += uint64(1)
                upto = block_inclusive_scan(sums, mine)
                if upto - mine < short and short <= upto:
                    left = int32(short - (upto - mine))
                    for i in range(from_, end):
                        at = (largest - logits[base + i]) * per_bin
                        if at < float32(BINS) and int32(at * scale) == bin_:
                            left -= int32(1)
                            if left == 0:
                                token[row] = int32(i)
            continue

        # -- 2c. the tokens in order: of all bins up to this one where they are few, else of it
        if level != list_level or bin_ < list_from or bin_ > list_to:
            few = level == 0 and n + inside <= uint64(MAX_CANDIDATES)
            list_level = level
            list_from = int32(0) if few else bin_
            list_to = bin_
            list_n = uint64(0) if few else n
            list_w = uint64(0) if few else w
            listed = int32(n + inside) if few else int32(inside)
            if me == 0:
                entries[0] = uint32(0)
            if me < slices:
                at_end = int32((row * slices + me) * BINS + b0)
                start[me] = int32(0) if few or b0 == 0 else int32(ends[at_end - 1])
                until[me] = int32(ends[at_end])
            cuda.syncthreads()  # zero before the count, and the spans are whole
            s = int32(warp)
            while s < slices:
                most = max_span(start, until, s, slices)
                e = int32(lane)
                while e < most:
                    load_candidates(
                        index, place, value, logits, order, base, size, start, until, s,
                        slices, e,
                    )  # fmt: skip
                    for u in range(LOADS_IN_FLIGHT):
                        at = (largest - value[u]) * per_bin
                        if index[u] >= 0 and (level == 0 or int32(at * scale) == bin_):
                            entry = cuda.atomic.add(entries, 0, uint32(1))
                            ids[entry] = index[u]
                            values[entry] = value[u]
                    e = int32(e + 32)
                s = int32(s + warps * LOADS_IN_FLIGHT)
            cuda.syncthreads()  # the list is whole
            if me < listed:
                rank = 0
                for o in range(listed):
                    if values[o] > values[me] or (values[o] == values[me] and ids[o] < ids[me]):
                        rank += 1
                ranked[rank] = int32(me)
            cuda.syncthreads()  # the order is whole
            mine = uint64(0)
            if me < listed:
                mine = uint64(
                    exp2((values[ranked[me]] - largest) * steep) * float32(FIXED_POINT_ONE)
                )
            l_upto[me] = block_inclusive_scan(sums, mine)
            cuda.syncthreads()  # the block_inclusive_scan sums are whole
        if me < listed:
            before = list_w
            if me > 0:
                before += l_upto[me - 1]
            if (
                list_n + uint64(me) + uint64(1) == target
                if goal == 0
                else before < target and target <= list_w + l_upto[me]
            ):
                found[1] = uint64(ids[ranked[me]])
                found[2] = list_w + l_upto[me]
        cuda.syncthreads()  # the walk has ended
        kept = min(kept, found[2])
        if goal == 2 and me == 0:
            token[row] = int32(found[1])
        cuda.syncthreads()  # and is read


@python_kernel(
    "void(CPointer(int32), CPointer(int32), CPointer(int32), CPointer(int32), CPointer(int32), "
    "CPointer(int32), CPointer(int32), CPointer(int32), CPointer(int32), CPointer(int32), "
    "CPointer(int32), int32, int32, int32, int32, int32, int32)",
    block=32,
    grid="1",
    regs=64,
)
def advance_step(
    ids: Any,
    positions: Any,
    past: Any,
    slots: Any,
    pages: Any,
    token: Any,
    left: Any,
    heed: Any,
    eos: Any,
    turn: Any,
    mail: Any,
    rows: int,
    entries: int,
    ends: int,
    ring: int,
    nobody: int,
    nowhere: int,
) -> None:
    """Give the drawn tokens to the next step and to the host.  A row that has ended says -2, and
    goes on as nobody: on a slot and a page that are no sequence's, at position 0.

    ids, positions, past, slots i32 [rows], pages i32 [rows, entries]: of the step
    token i32 [rows]    left i32 [rows]: tokens a row may still say; 0 once it has ended
    heed i32 [rows]: whether a token of eos i32 [ends] ends the row    turn i32 [1]: raised by one
    mail i32 [1 + ring * rows]: turns done, then the tokens of the last `ring` turns
    nobody, nowhere: the slot and the page
    """
    me = cuda.threadIdx.x
    now = turn[0]
    if me < rows:
        said = token[me]
        if left[me] <= 0:
            said = int32(-2)
        else:
            end = said < 0 or left[me] == 1
            if heed[me] != 0:
                for e in range(ends):
                    if said == eos[e]:
                        end = True
            if end:
                left[me] = 0
                ids[me] = 0
                positions[me] = 0
                past[me] = 0
                slots[me] = nobody
                pages[me * entries] = nowhere
            else:
                left[me] -= 1
                ids[me] = said
                positions[me] += 1
                past[me] += 1
        mail[1 + (now % ring) * rows + me] = said
    cuda.threadfence_system()
    cuda.syncthreads()  # all tokens are in the mail before it is said to have come
    if me == 0:
        turn[0] = now + 1
        mail[0] = now + 1


ADVANCE_STEP, SAMPLE_TOKEN = advance_step, sample_token
