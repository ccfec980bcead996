"""top_logprobs: log-probabilities of the sampled token and of the likeliest ones.

Blocks take part if their slice's largest logit is among the row's num_logprobs largest such: no
other slice has a token of the list.  Each finds its slice's candidates; the block that ends last
sorts the candidates of all.  Every order is by logit, then by id, so that the bits are the same in
every run.  Method: docs/sampling.md.
"""

import math
from typing import Any

from osmium.kernels.adjust_logits import INT32_MAX, LOG2_E, block_sum
from osmium.kernels.logit_histogram import NEGATIVE_INFINITY, SLICE, block_argmax
from osmium.kernels.numba_kernels import (
    cuda,
    device_function,
    exp2,
    fetch_add,
    float32,
    float64,
    int32,
    int64,
    python_kernel,
    uint32,
)

__all__ = ["MAX_LOGPROBS", "TOP_LOGPROBS"]

MAX_LOGPROBS = 20
"""Most alternatives per token."""

PER_STEP = 8
"""List entries that `rank_in` compares at once."""

assert SLICE == 2048, "the lists in shared memory hold a slice"
assert SLICE % PER_STEP == 0, "a padded list fits"


@device_function
def is_before(value: Any, token: Any, other_value: Any, other_token: Any) -> Any:
    """Whether a token comes before another: by the larger logit, then by the lower id."""
    return value > other_value or (value == other_value and token < other_token)


@device_function
def pad_list(values: Any, tokens: Any, count: Any) -> None:
    """Write entries that come before no token behind a list, up to a multiple of PER_STEP.

    Called by all threads; the caller adds the barrier.
    """
    e = count + cuda.threadIdx.x
    if e < (count + PER_STEP - 1) // PER_STEP * PER_STEP:
        values[e] = float32(NEGATIVE_INFINITY)
        tokens[e] = int32(INT32_MAX)


@device_function
def rank_in(values: Any, tokens: Any, count: Any, value: Any, token: Any, most: Any) -> Any:
    """How many tokens of a padded list come before `token`; at least `most` if so many do.

    The loads of PER_STEP entries are in flight at once.
    """
    rank = int32(0)
    e = int32(0)
    while e < count and rank < most:
        for u in range(PER_STEP):
            if is_before(values[e + u], tokens[e + u], value, token):
                rank += int32(1)
        e += int32(PER_STEP)
    return rank


@python_kernel(
    "void(CPointer(float32), CPointer(int32), CPointer(float32), CPointer(int32), "
    "CPointer(int32), CPointer(int32), CPointer(float32), CPointer(float32), CPointer(int32), "
    "CPointer(float32), CPointer(int32), CPointer(int32), CPointer(int32), int32, int32, int32)",
    block=256,
    grid="slices, rows",
    regs=64,
)
def top_logprobs(
    logprobs: Any,
    logprob_tokens: Any,
    top_logits: Any,
    top_tokens: Any,
    blocks_done: Any,
    token: Any,
    logits: Any,
    raw_max: Any,
    raw_tokens: Any,
    raw_sums: Any,
    flags: Any,
    state_slots: Any,
    step: Any,
    vocab: int,
    slices: int,
    ring: int,
) -> None:
    """Store log-probabilities of the logits before adjustment, for rows that need them.

    logprobs f32, logprob_tokens i32 [ring, rows, 21]: entry step % ring: the sampled token, then
    the num_logprobs largest; nothing is written for a row with token -1
    top_logits f32, top_tokens i32 [rows, 20, 20], blocks_done i32 [rows]: scratch; the last is 0
    token i32 [rows]: sampled    logits f32 [rows, vocab]: before adjustment
    raw_max f32, raw_tokens i32, raw_sums f32 [rows, slices]: from `adjust_logits`
    flags i32 [rows, 3]: flags, prompt_tokens, num_logprobs; below 0 for none, at most 20 and vocab
    state_slots i32 [rows]: rows below 0 need none    step i32 [1]: decode steps done
    """
    list_logits = cuda.shared.array(2048, float32)
    list_tokens = cuda.shared.array(2048, int32)
    values = cuda.shared.array(256, float32)
    tokens = cuda.shared.array(256, int32)
    sums = cuda.shared.array(256, float64)
    shared_int = cuda.shared.array(4, int32)  # rank of the slice, list size, threshold, arrivals
    shared_logit = cuda.shared.array(1, float32)  # threshold
    shared_log = cuda.shared.array(1, float64)  # log of the sum of exponentials
    loaded = cuda.local.array(8, float32)
    thread, num_threads = cuda.threadIdx.x, cuda.blockDim.x
    slice_, row = cuda.blockIdx.x, cuda.blockIdx.y
    most = flags[row * 3 + 2]
    sampled = token[row]
    if most < 0 or sampled < 0 or state_slots[row] < 0:
        return
    size = int32(uint32(vocab + slices - 1) // uint32(slices))
    filled = int32(uint32(vocab + size - 1) // uint32(size))  # slices that have tokens
    if slice_ >= filled or (most == 0 and slice_ > 0):
        return
    base = int64(row) * vocab
    row_slices = row * slices
    participants = min(most, filled)

    if most > 0:
        # -- 1. the slice's rank among the row's slices, by largest logit
        s = thread
        while s < filled:
            list_logits[s] = raw_max[row_slices + s]
            list_tokens[s] = raw_tokens[row_slices + s]
            s += num_threads
        pad_list(list_logits, list_tokens, filled)
        if thread == 0:
            shared_int[0] = int32(0)
            shared_int[1] = int32(0)
            shared_int[2] = int32(INT32_MAX)
            shared_logit[0] = float32(NEGATIVE_INFINITY)
        cuda.syncthreads()  # the slices are listed
        own_logit, own_token = list_logits[slice_], list_tokens[slice_]
        s = thread
        while s < filled:
            if is_before(list_logits[s], list_tokens[s], own_logit, own_token):
                cuda.atomic.add(shared_int, 0, int32(1))
            s += num_threads
        cuda.syncthreads()  # the rank is complete
        slice_rank = shared_int[0]
        if slice_rank >= most:
            return

        # -- 2. the threshold: the num_logprobs-th largest of the slices' largest logits
        start = slice_ * size
        num_tokens = min(size, vocab - start)
        for u in range(8):  # in flight meanwhile
            loaded[u] = float32(NEGATIVE_INFINITY)
            if u * num_threads + thread < num_tokens:
                loaded[u] = logits[base + start + u * num_threads + thread]
        s = thread
        while s < filled:
            rank = rank_in(list_logits, list_tokens, filled, list_logits[s], list_tokens[s], most)
            if rank == most - 1:
                shared_logit[0] = list_logits[s]
                shared_int[2] = list_tokens[s]
            s += num_threads
        cuda.syncthreads()  # the threshold is written, the list of slices is read
        least_logit, least_token = shared_logit[0], shared_int[2]

        # -- 3. list the slice's tokens that are not behind it, then keep the first of them
        for u in range(8):
            i = int32(start + u * num_threads + thread)
            if u * num_threads + thread < num_tokens:
                if not is_before(least_logit, least_token, loaded[u], i):
                    entry = cuda.atomic.add(shared_int, 1, int32(1))
                    list_logits[entry] = loaded[u]
                    list_tokens[entry] = i
        cuda.syncthreads()  # the list is complete
        listed = shared_int[1]
        pad_list(list_logits, list_tokens, listed)
        cuda.syncthreads()  # the list is padded
        at = (row * MAX_LOGPROBS + slice_rank) * MAX_LOGPROBS
        e = thread
        while e < most:
            if e >= listed:
                top_tokens[at + e] = int32(-1)
            e += num_threads
        e = thread
        while e < listed:
            rank = rank_in(list_logits, list_tokens, listed, list_logits[e], list_tokens[e], most)
            if rank < most:
                top_logits[at + rank] = list_logits[e]
                top_tokens[at + rank] = list_tokens[e]
            e += num_threads
        cuda.threadfence()  # other blocks see the candidates before the arrival
        cuda.syncthreads()  # all of the block's candidates are stored
        if thread == 0:
            shared_int[3] = int32(fetch_add(blocks_done, row, int32(1)))
        cuda.syncthreads()  # the arrival is counted
        if shared_int[3] != participants - 1:
            return
        cuda.threadfence()  # the candidates of all blocks are loaded after the arrivals

    # -- 4. the last block: the sum of exponentials over all slices
    best = float32(NEGATIVE_INFINITY)
    s = thread
    while s < filled:
        best = max(best, raw_max[row_slices + s])
        s += num_threads
    block_argmax(values, tokens, best, int32(0))
    best = values[0]
    total = float64(0)
    s = thread
    while s < filled:
        scale = exp2((raw_max[row_slices + s] - best) * float32(LOG2_E))
        total += float64(raw_sums[row_slices + s]) * float64(scale)
        s += num_threads
    block_sum(sums, total)
    if thread == 0:
        shared_log[0] = math.log(sums[0])
    cuda.syncthreads()  # the logarithm is written
    log_sum = shared_log[0]

    # -- 5. the sampled token, and the candidates in order
    out = int32((step[0] % ring) * cuda.gridDim.y + row) * (MAX_LOGPROBS + 1)
    if thread == 0:
        logprobs[out] = float32((float64(logits[base + sampled]) - float64(best)) - log_sum)
        logprob_tokens[out] = sampled
    if most > 0:
        # A candidate comes behind the largest logits of the slices before its own, and behind the
        # candidates of its slice before it: these two counts are below `most` for half of them.
        if thread == 0:
            shared_int[1] = int32(0)
        cuda.syncthreads()  # the list is empty
        e = thread
        while e < participants * most:
            of_slice, place = e // most, e % most
            if of_slice + place < most:
                at = (row * MAX_LOGPROBS + of_slice) * MAX_LOGPROBS + place
                candidate = top_tokens[at]
                if candidate >= 0:
                    entry = cuda.atomic.add(shared_int, 1, int32(1))
                    list_tokens[entry] = candidate
                    list_logits[entry] = top_logits[at]
            e += num_threads
        cuda.syncthreads()  # the candidates are listed
        candidates = shared_int[1]
        pad_list(list_logits, list_tokens, candidates)
        cuda.syncthreads()  # the list is padded
        e = thread
        while e < candidates:
            rank = rank_in(
                list_logits, list_tokens, candidates, list_logits[e], list_tokens[e], most
            )
            if rank < most:
                difference = float64(list_logits[e]) - float64(best)
                logprobs[out + 1 + rank] = float32(difference - log_sum)
                logprob_tokens[out + 1 + rank] = list_tokens[e]
            e += num_threads
    cuda.threadfence_system()  # the host sees them before the step count of `advance_step`


TOP_LOGPROBS = top_logprobs
