"""sample_token and advance_step: sampling on the device, and the hand-over to the next step.

`slice_max` finds the largest logit of each slice of a row.  `logit_histogram` sorts each slice's
tokens into bins and sums up the slices.  `sample_token` samples a token under temperature, top-k,
top-p and min-p, one thread block per row.  `advance_step` writes the tokens into the next step's
inputs and into the token ring in host memory.  Method: docs/sampling.md.

Probabilities are integers in units of 2^-40 of the largest, so that sums are the same bits in any
order of the threads.
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
"""Tokens that are sorted by logit: one per thread of `sample_token`."""

LEVELS = 3
"""Levels of bins.  A bin of the last is 2^-27 of the window wide: its tokens differ by rounding."""


@device_function
def load_candidates(
    index: Any, sorted_index: Any, value: Any, logits: Any, order: Any, base: Any, size: Any,
    start: Any, stop: Any, first_slice: Any, slices: Any, offset: Any,
) -> None:  # fmt: skip
    """Load LOADS_IN_FLIGHT candidates: token ids into index[u], their logits into value[u].

    u stands for element start + offset of the span of slice first_slice + u * warps.  Past the end
    of a span index[u] is -1, and another logit is loaded: without branches all loads are in flight
    at once.
    """
    warps = cuda.blockDim.x // 32
    for u in range(LOADS_IN_FLIGHT):
        from_slice = min(int32(first_slice + u * warps), int32(slices - 1))
        exists = (
            first_slice + u * warps < slices
            and int32(start[from_slice] + offset) < stop[from_slice]
        )
        index[u] = int32(from_slice * size + start[from_slice] + offset) if exists else int32(-1)
    for u in range(LOADS_IN_FLIGHT):
        sorted_index[u] = int32(order[int32(base + max(index[u], int32(0)))])
    for u in range(LOADS_IN_FLIGHT):
        if index[u] >= 0:
            index[u] = int32((first_slice + u * warps) * size + sorted_index[u])
        value[u] = logits[int32(base + max(index[u], int32(0)))]


@device_function
def max_span(start: Any, stop: Any, first_slice: Any, slices: Any) -> Any:
    """Length of the longest span that `load_candidates` reads from these slices."""
    longest = int32(0)
    for u in range(LOADS_IN_FLIGHT):
        slice_ = first_slice + u * (cuda.blockDim.x // 32)
        if slice_ < slices:
            longest = max(longest, int32(stop[slice_] - start[slice_]))
    return longest


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
    max_logits: Any,
    settings: Any,
    uniforms: Any,
    step: Any,
    counts: Any,
    masses: Any,
    ends: Any,
    order: Any,
    vocab: int,
    slices: int,
    ring: int,
) -> None:
    """Sample token i32 [rows], in rows where `logit_histogram` has not written it.

    logits f32 [rows, vocab]    max_logits f32 [rows, slices]: from `slice_max`; slices <= 512
    settings f32 [rows, 4]: temperature, top-k, top-p, min-p
    uniforms f64 [ring, rows], in [0, 1): row step % ring is used    step i32 [1]
    counts u32 [rows, BINS], masses u64 [rows, BINS + 1], ends u16 [rows, slices, BINS],
    order u16 [rows, vocab]: from `logit_histogram`
    """
    token_prefix = cuda.shared.array(1536, uint32)  # [LEVELS, BINS]: tokens up to each bin
    mass_prefix = cuda.shared.array(1536, uint64)  # [LEVELS, BINS]: and their probability
    sums = cuda.shared.array(1024, uint64)
    start = cuda.shared.array(512, int32)  # per slice: span of its sorted tokens that
    stop = cuda.shared.array(512, int32)  # a walk reads, [start, stop)
    ids = cuda.shared.array(512, int32)  # listed tokens, unordered
    values = cuda.shared.array(512, float32)
    order_by_logit = cuda.shared.array(512, int32)  # indices into `ids`, largest logit first
    list_mass_prefix = cuda.shared.array(512, uint64)  # inclusive sums of probability in that order
    num_listed = cuda.shared.array(1, uint32)
    result = cuda.shared.array(8, uint64)
    index = cuda.local.array(8, int32)
    sorted_index = cuda.local.array(8, int32)
    value = cuda.local.array(8, float32)
    thread, num_threads = cuda.threadIdx.x, cuda.blockDim.x
    warp, lane, warps = thread // 32, thread % 32, cuda.blockDim.x // 32
    row = cuda.blockIdx.x
    size = int32(uint32(vocab + slices - 1) // uint32(slices))
    base = int32(row * vocab)

    # -- 1. issue all global loads; `uniforms` is in host memory, with the longest latency
    temperature = settings[row * 4]
    if temperature == float32(0):
        return
    top_k, top_p, min_p = settings[row * 4 + 1], settings[row * 4 + 2], settings[row * 4 + 3]
    bin_count = uint64(counts[row * BINS + thread])
    bin_weight = masses[row * (BINS + 1) + thread]
    min_p_mass = masses[row * (BINS + 1) + BINS]
    largest = float32(-FINITE_LIMIT)
    if thread < slices:
        largest = max_logits[row * slices + thread]
    uniform = float64(0)
    if thread == 0:
        uniform = uniforms[int32(uint32(step[0]) % uint32(ring)) * cuda.gridDim.x + row]
    block_argmax(values, ids, largest, int32(0))
    largest = values[0]
    if not (largest < float32(FINITE_LIMIT) and largest > float32(-FINITE_LIMIT)):
        return
    exp2_scale = min(float32(1.4426950408889634) / temperature, float32(1e30))
    per_bin = min(float32(BINS / WINDOW) / temperature, float32(1e30))
    token_prefix[thread] = uint32(block_inclusive_scan(sums, bin_count))
    cuda.syncthreads()  # `sums` is free
    mass_prefix[thread] = block_inclusive_scan(sums, bin_weight)
    cuda.syncthreads()  # the prefix sums are complete
    mass_kept = mass_prefix[BINS - 1]

    # -- 2. walks in order of logits: to the last top-k token, the last top-p token, the sample
    finer_of = int32(-1)  # the bins whose finer bins are in levels 1 and 2
    finest_of = int32(-1)
    list_level = int32(-1)  # the list has bins list_from to list_to of this level
    list_from = int32(0)
    list_to = int32(0)
    list_tokens_before = uint64(0)  # tokens before the list
    list_mass_before = uint64(0)
    list_size = int32(0)
    for goal in range(3):
        target = uint64(0)  # the walk ends at the token that reaches it
        if goal == 0:
            if top_k < float32(1) or float32(token_prefix[BINS - 1]) <= top_k:
                continue  # all are kept
            target = uint64(top_k)
        elif goal == 1:
            if top_p >= float32(1):
                continue
            target = max(uint64(float64(mass_kept) * float64(top_p)), uint64(1))
        else:
            if min_p > float32(0):
                mass_kept = min(mass_kept, min_p_mass)
            if thread == 0:
                target = min(uint64(float64(mass_kept) * uniform) + uint64(1), mass_kept)
                result[0] = max(target, uint64(1))
            cuda.syncthreads()  # the target is written
            target = result[0]

        # -- 2a. the bin where the walk ends; if it has many tokens, the finer bin inside it
        tokens_before = uint64(0)  # tokens before the bin
        mass_before = uint64(0)  # their probability
        bin_tokens = uint64(0)  # tokens of the bin
        bin_mass = uint64(0)
        b0 = int32(0)  # the bin of level 0
        bin_ = int32(0)  # bin number at `level`, from the largest logit down
        level = int32(0)
        scale = float32(1)  # bins of `level` per bin of level 0
        while True:
            bin_index = level * BINS + thread
            is_built = level == 0 or (bin_ == finer_of if level == 1 else bin_ == finest_of)
            if not is_built:
                if level == 1:
                    finer_of = bin_
                    finest_of = int32(-1)
                else:
                    finest_of = bin_
                token_prefix[bin_index] = uint32(0)
                mass_prefix[bin_index] = uint64(0)
                if thread < slices:
                    at_end = int32((row * slices + thread) * BINS + b0)
                    start[thread] = int32(ends[at_end - 1]) if b0 > 0 else int32(0)
                    stop[thread] = int32(ends[at_end])
                cuda.syncthreads()  # zeros and spans are written
                run_bin = int32(-1)
                run_count = uint32(0)  # consecutive tokens of bin `run_bin`
                run_mass = uint64(0)
                s = int32(warp)
                while s < slices:
                    longest = max_span(start, stop, s, slices)
                    e = int32(lane)
                    while e < longest:
                        load_candidates(
                            index, sorted_index, value, logits, order, base, size, start, stop, s,
                            slices, e,
                        )  # fmt: skip
                        for u in range(LOADS_IN_FLIGHT):
                            below = largest - value[u]
                            b = int32(-1)
                            if index[u] >= 0:
                                b = int32(below * per_bin * scale) - bin_ * int32(BINS)
                            if b >= 0 and b < BINS:
                                if b != run_bin:
                                    if run_count > 0:
                                        cuda.atomic.add(
                                            token_prefix, level * BINS + run_bin, run_count
                                        )
                                        cuda.atomic.add(
                                            mass_prefix, level * BINS + run_bin, run_mass
                                        )
                                    run_bin = b
                                    run_count = uint32(0)
                                    run_mass = uint64(0)
                                run_count += uint32(1)
                                run_mass += uint64(
                                    exp2(-below * exp2_scale) * float32(FIXED_POINT_ONE)
                                )
                        e = int32(e + 32)
                    s = int32(s + warps * LOADS_IN_FLIGHT)
                if run_count > 0:
                    cuda.atomic.add(token_prefix, level * BINS + run_bin, run_count)
                    cuda.atomic.add(mass_prefix, level * BINS + run_bin, run_mass)
                cuda.syncthreads()  # the bins are complete
                token_prefix[bin_index] = uint32(
                    block_inclusive_scan(sums, uint64(token_prefix[bin_index]))
                )
                cuda.syncthreads()  # `sums` is free
                mass_prefix[bin_index] = block_inclusive_scan(sums, mass_prefix[bin_index])
                cuda.syncthreads()  # the prefix sums are complete
            bin_tokens_before = uint64(0)
            bin_mass_before = uint64(0)
            if thread > 0:
                bin_tokens_before = uint64(token_prefix[bin_index - 1])
                bin_mass_before = mass_prefix[bin_index - 1]
            tokens_through = uint64(token_prefix[bin_index])
            mass_through = mass_prefix[bin_index]
            if (
                tokens_before + bin_tokens_before < target
                and target <= tokens_before + tokens_through
                if goal == 0
                else mass_before + bin_mass_before < target and target <= mass_before + mass_through
            ):
                result[1] = uint64(thread)
                result[2] = bin_tokens_before
                result[3] = bin_mass_before
                result[4] = tokens_through - bin_tokens_before
                result[5] = mass_through - bin_mass_before
            cuda.syncthreads()  # the bin is found
            bin_ = bin_ * int32(BINS) + int32(result[1])
            tokens_before += result[2]
            mass_before += result[3]
            bin_tokens = result[4]
            bin_mass = result[5]
            cuda.syncthreads()  # `result` is read
            if level == 0:
                b0 = bin_
            if bin_tokens <= uint64(MAX_CANDIDATES) or level == LEVELS - 1:
                break
            level += int32(1)
            scale *= float32(BINS)

        # -- 2b. too many to sort: they differ by rounding only, and are taken in order of id
        if bin_tokens > uint64(MAX_CANDIDATES):
            token_mass = max(bin_mass // bin_tokens, uint64(1))
            tokens_needed = (
                target - tokens_before
                if goal == 0
                else (target - mass_before + token_mass - uint64(1)) // token_mass
            )
            tokens_needed = min(max(tokens_needed, uint64(1)), bin_tokens)  # tokens of this bin
            mass_kept = min(mass_kept, mass_before + tokens_needed * token_mass)
            if goal == 2:
                order_by_logit[thread] = int32(0)  # here: tokens of the bin per slice
                if thread < slices:
                    at_end = int32((row * slices + thread) * BINS + b0)
                    start[thread] = int32(ends[at_end - 1]) if b0 > 0 else int32(0)
                    stop[thread] = int32(ends[at_end])
                cuda.syncthreads()  # zeros and spans are written
                s = int32(warp)
                while s < slices:
                    longest = max_span(start, stop, s, slices)
                    e = int32(lane)
                    while e < longest:
                        load_candidates(
                            index, sorted_index, value, logits, order, base, size, start, stop, s,
                            slices, e,
                        )  # fmt: skip
                        for u in range(LOADS_IN_FLIGHT):
                            position = (largest - value[u]) * per_bin
                            if index[u] >= 0 and int32(position * scale) == bin_:
                                cuda.atomic.add(order_by_logit, s + u * warps, int32(1))
                        e = int32(e + 32)
                    s = int32(s + warps * LOADS_IN_FLIGHT)
                cuda.syncthreads()  # the counts are complete
                own = uint64(order_by_logit[thread])
                cumulative = block_inclusive_scan(sums, own)
                if cumulative - own < tokens_needed and tokens_needed <= cumulative:
                    result[1] = uint64(thread)
                    result[2] = cumulative - own
                cuda.syncthreads()  # the slice is found
                tokens_needed -= result[2]
                per_thread = (size + num_threads - 1) // num_threads
                begin = int32(result[1]) * size + thread * per_thread
                end = min(begin + per_thread, min((int32(result[1]) + 1) * size, vocab))
                own = uint64(0)
                for i in range(begin, end):
                    position = (largest - logits[base + i]) * per_bin
                    if position < float32(BINS) and int32(position * scale) == bin_:
                        own += uint64(1)
                cumulative = block_inclusive_scan(sums, own)
                if cumulative - own < tokens_needed and tokens_needed <= cumulative:
                    remaining = int32(tokens_needed - (cumulative - own))
                    for i in range(begin, end):
                        position = (largest - logits[base + i]) * per_bin
                        if position < float32(BINS) and int32(position * scale) == bin_:
                            remaining -= int32(1)
                            if remaining == 0:
                                token[row] = int32(i)
            continue

        # -- 2c. sort tokens by logit: of all bins up to this one if they fit, else of this bin
        if level != list_level or bin_ < list_from or bin_ > list_to:
            list_all = level == 0 and tokens_before + bin_tokens <= uint64(MAX_CANDIDATES)
            list_level = level
            list_from = int32(0) if list_all else bin_
            list_to = bin_
            list_tokens_before = uint64(0) if list_all else tokens_before
            list_mass_before = uint64(0) if list_all else mass_before
            list_size = int32(tokens_before + bin_tokens) if list_all else int32(bin_tokens)
            if thread == 0:
                num_listed[0] = uint32(0)
            if thread < slices:
                at_end = int32((row * slices + thread) * BINS + b0)
                start[thread] = int32(0) if list_all or b0 == 0 else int32(ends[at_end - 1])
                stop[thread] = int32(ends[at_end])
            cuda.syncthreads()  # the counter and the spans are written
            s = int32(warp)
            while s < slices:
                longest = max_span(start, stop, s, slices)
                e = int32(lane)
                while e < longest:
                    load_candidates(
                        index, sorted_index, value, logits, order, base, size, start, stop, s,
                        slices, e,
                    )  # fmt: skip
                    for u in range(LOADS_IN_FLIGHT):
                        position = (largest - value[u]) * per_bin
                        if index[u] >= 0 and (level == 0 or int32(position * scale) == bin_):
                            entry = cuda.atomic.add(num_listed, 0, uint32(1))
                            ids[entry] = index[u]
                            values[entry] = value[u]
                    e = int32(e + 32)
                s = int32(s + warps * LOADS_IN_FLIGHT)
            cuda.syncthreads()  # the list is complete
            if thread < list_size:
                rank = 0
                for o in range(list_size):
                    if values[o] > values[thread] or (
                        values[o] == values[thread] and ids[o] < ids[thread]
                    ):
                        rank += 1
                order_by_logit[rank] = int32(thread)
            cuda.syncthreads()  # the order is complete
            own = uint64(0)
            if thread < list_size:
                own = uint64(
                    exp2((values[order_by_logit[thread]] - largest) * exp2_scale)
                    * float32(FIXED_POINT_ONE)
                )
            list_mass_prefix[thread] = block_inclusive_scan(sums, own)
            cuda.syncthreads()  # the prefix sums are complete
        if thread < list_size:
            before = list_mass_before
            if thread > 0:
                before += list_mass_prefix[thread - 1]
            if (
                list_tokens_before + uint64(thread) + uint64(1) == target
                if goal == 0
                else before < target and target <= list_mass_before + list_mass_prefix[thread]
            ):
                result[1] = uint64(ids[order_by_logit[thread]])
                result[2] = list_mass_before + list_mass_prefix[thread]
        cuda.syncthreads()  # the walk has ended
        mass_kept = min(mass_kept, result[2])
        if goal == 2 and thread == 0:
            token[row] = int32(result[1])
        cuda.syncthreads()  # `result` is read


@python_kernel(
    "void(CPointer(int32), CPointer(int32), CPointer(int32), CPointer(int32), CPointer(int32), "
    "CPointer(int32), CPointer(int32), CPointer(int32), CPointer(int32), CPointer(int32), "
    "CPointer(int32), int32, int32, int32, int32, int32)",
    block=32,
    grid="1",
    regs=64,
)
def advance_step(
    ids: Any,
    positions: Any,
    context_lens: Any,
    state_slots: Any,
    page_table: Any,
    token: Any,
    tokens_left: Any,
    stop_on_eos: Any,
    eos: Any,
    step: Any,
    token_ring: Any,
    rows: int,
    max_pages: int,
    num_eos: int,
    ring: int,
    null_page: int,
) -> None:
    """Write the sampled tokens into the next step's inputs and into the token ring.

    A row that has ended gets -2 in the ring and continues on the null page at position 0, without
    a state slot (-1).

    ids, positions, context_lens, state_slots i32 [rows], page_table i32 [rows, max_pages]: of the
    next step
    token i32 [rows]: sampled    tokens_left i32 [rows]: tokens until the limit; 0 after the end
    stop_on_eos i32 [rows]: whether a token of eos i32 [num_eos] ends the row
    step i32 [1]: incremented
    token_ring i32 [1 + ring * rows]: steps done, then the tokens of the last `ring` steps
    """
    thread = cuda.threadIdx.x
    step_now = step[0]
    if thread < rows:
        sampled = token[thread]
        if tokens_left[thread] <= 0:
            sampled = int32(-2)
        else:
            end = sampled < 0 or tokens_left[thread] == 1
            if stop_on_eos[thread] != 0:
                for e in range(num_eos):
                    if sampled == eos[e]:
                        end = True
            if end:
                tokens_left[thread] = 0
                ids[thread] = 0
                positions[thread] = 0
                context_lens[thread] = 0
                state_slots[thread] = int32(-1)
                page_table[thread * max_pages] = null_page
            else:
                tokens_left[thread] -= 1
                ids[thread] = sampled
                positions[thread] += 1
                context_lens[thread] += 1
        token_ring[1 + (step_now % ring) * rows + thread] = sampled
    cuda.threadfence_system()
    cuda.syncthreads()  # all tokens are visible to the host before the step count is
    if thread == 0:
        step[0] = step_now + 1
        token_ring[0] = step_now + 1


ADVANCE_STEP, SAMPLE_TOKEN = advance_step, sample_token
