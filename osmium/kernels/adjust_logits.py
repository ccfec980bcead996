"""adjust_logits: penalties, logit bias and token masks, before a token is sampled.

It takes the place of `slice_max` in steps with such rows: it also finds the largest adjusted logit
of each slice.  For rows with log-probabilities it keeps the largest logit of each slice before
adjustment, and the slice's sum of exponentials.  Method: docs/sampling.md.

A token is adjusted in f64, and rounded once to f32.  All factors come from f32, so products are
exact, and a fused multiply-add gives the same bits.
"""

from typing import Any

from osmium.kernels.logit_histogram import (
    BINS,
    FINITE_LIMIT,
    LOADS_IN_FLIGHT,
    NEGATIVE_INFINITY,
    block_argmax,
)
from osmium.kernels.numba_kernels import (
    cuda,
    device_function,
    exp2,
    float32,
    float64,
    int32,
    int64,
    python_kernel,
    uint32,
    uint64,
)

__all__ = ["ADJUST_LOGITS", "HAS_BIAS", "HAS_MASK", "HAS_PENALTIES", "LOG2_E", "PROMPT_BIT"]

HAS_PENALTIES, HAS_BIAS, HAS_MASK = 1, 2, 4
"""Bits of a row's flags: which adjustments it needs."""

PROMPT_BIT = 1 << 31
"""Bit of a token's count: the prompt has the token.  The other bits count generated tokens."""

COUNT_BITS = PROMPT_BIT - 1

LOG2_E = 1.4426950408889634

INT32_MAX = 0x7FFFFFFF


@device_function
def block_sum(sums: Any, value: Any) -> None:
    """Write the sum of the thread block's values to sums[0], in a fixed order.

    sums: shared memory, one element per thread
    """
    thread = cuda.threadIdx.x
    sums[thread] = value
    cuda.syncthreads()  # all values are written
    half = cuda.blockDim.x // 2
    while half > 0:
        if thread < half:
            sums[thread] += sums[thread + half]
        cuda.syncthreads()  # this half is added before the next reads it
        half //= 2


@python_kernel(
    "void(CPointer(float32), CPointer(float32), CPointer(int32), CPointer(uint32), "
    "CPointer(uint64), CPointer(float32), CPointer(int32), CPointer(float32), CPointer(int32), "
    "CPointer(uint32), CPointer(float32), CPointer(int32), CPointer(float32), CPointer(float32), "
    "CPointer(int32), CPointer(int32), CPointer(int32), CPointer(int32), int32, int32, int32)",
    block=256,
    grid="slices, rows",
    regs=128,
)
def adjust_logits(
    adjusted: Any,
    max_logits: Any,
    max_tokens: Any,
    counts: Any,
    masses: Any,
    raw_max: Any,
    raw_tokens: Any,
    raw_sums: Any,
    blocks_done: Any,
    token_counts: Any,
    logits: Any,
    flags: Any,
    penalties: Any,
    bias: Any,
    mask: Any,
    ids: Any,
    positions: Any,
    state_slots: Any,
    vocab: int,
    slices: int,
    mask_words: int,
) -> None:
    """Count the step's own token, adjust a row's logits, and find each slice's largest.

    adjusted f32 [rows, vocab]    max_logits f32, max_tokens i32 [rows, slices]: its largest; a
    token is -1 if a logit, before or after, is NaN or infinite    slices hold at most 2,048 tokens
    counts u32 [rows, BINS], masses u64 [rows, BINS + 1], blocks_done i32 [rows]: zeroed
    raw_max f32, raw_tokens i32, raw_sums f32 [rows, slices]: of rows with log-probabilities, the
    slice's largest logit, its lowest token, and the sum of exp(logit - largest)
    token_counts u32 [slots, vocab]: ids[row] is added, where the row has penalties
    logits f32 [rows, vocab]    flags i32 [rows, 3]: flags, prompt_tokens, num_logprobs
    penalties f32 [rows, 3]: repetition, presence, frequency    bias f32 [slots, vocab]
    mask i32 [rows, mask_words]: a bit per token, 1 if it is allowed; bit t % 32 of word t // 32
    ids, positions, state_slots i32 [rows]: of the step.  A row with a slot below 0 is not adjusted.
    """
    values = cuda.shared.array(256, float32)
    tokens = cuda.shared.array(256, int32)
    words = cuda.shared.array(66, int32)  # the slice's part of the mask
    loaded = cuda.local.array(8, float32)
    count_of = cuda.local.array(8, uint32)
    bias_of = cuda.local.array(8, float32)
    thread, num_threads = cuda.threadIdx.x, cuda.blockDim.x
    slice_, row = cuda.blockIdx.x, cuda.blockIdx.y
    size = int32(uint32(vocab + slices - 1) // uint32(slices))
    start = slice_ * size
    end = min(start + size, vocab)
    base = int64(row) * vocab
    slot = state_slots[row]
    slot_base = int64(slot) * vocab
    flag = flags[row * 3]
    num_logprobs = flags[row * 3 + 2]
    if slot < 0:
        flag = int32(0)
        num_logprobs = int32(-1)
    has_penalties = (flag & int32(HAS_PENALTIES)) != 0
    has_bias = (flag & int32(HAS_BIAS)) != 0
    has_mask = (flag & int32(HAS_MASK)) != 0

    # -- 1. loads, all in flight at once; bins of `logit_histogram` are zeroed meanwhile
    for u in range(LOADS_IN_FLIGHT):
        i = start + u * num_threads + thread
        loaded[u] = float32(NEGATIVE_INFINITY)
        if i < end:
            loaded[u] = logits[base + i]
    for u in range(LOADS_IN_FLIGHT):
        i = start + u * num_threads + thread
        count_of[u] = uint32(0)
        bias_of[u] = float32(0)
        if i < end:
            if has_penalties:
                count_of[u] = token_counts[slot_base + i]
            if has_bias:
                bias_of[u] = bias[slot_base + i]
    first_word = start >> 5
    if has_mask:
        w = thread
        while first_word + w <= (end - 1) >> 5:
            words[w] = mask[row * mask_words + first_word + w]
            w += num_threads
    b = slice_ * num_threads + thread
    while b < BINS + 1:
        masses[row * (BINS + 1) + b] = uint64(0)
        if b < BINS:
            counts[row * BINS + b] = uint32(0)
        b += slices * num_threads
    if slice_ == 0 and thread == 0:
        blocks_done[row] = int32(0)
    cuda.syncthreads()  # the words of the mask are written

    # -- 2. count the step's own token; adjust
    own = ids[row]
    in_prompt = positions[row] < flags[row * 3 + 1]
    repetition = float64(penalties[row * 3])
    presence = float64(penalties[row * 3 + 1])
    frequency = float64(penalties[row * 3 + 2])
    best = float32(-FINITE_LIMIT)
    token = int32(INT32_MAX)
    for u in range(LOADS_IN_FLIGHT):
        i = start + u * num_threads + thread
        if i < end:
            if has_penalties and i == own:
                if in_prompt:
                    count_of[u] = uint32(count_of[u] | uint32(PROMPT_BIT))
                else:
                    count_of[u] = uint32(count_of[u] + uint32(1))
                token_counts[slot_base + i] = count_of[u]
            score = loaded[u]
            if count_of[u] != uint32(0) or bias_of[u] != float32(0):
                exact = float64(score)
                if count_of[u] != uint32(0):
                    if exact > float64(0):
                        exact = exact / repetition
                    else:
                        exact = exact * repetition
                    generated = count_of[u] & uint32(COUNT_BITS)
                    if generated != uint32(0):
                        exact = exact - (presence + frequency * float64(generated))
                exact = exact + float64(bias_of[u])
                score = float32(exact)
            if not loaded[u] < float32(FINITE_LIMIT) or not score < float32(FINITE_LIMIT):
                token = int32(-1)
                best = float32(FINITE_LIMIT)
            if has_mask and ((words[(i >> 5) - first_word] >> (i & 31)) & 1) == 0:
                score = float32(NEGATIVE_INFINITY)
            if token != int32(-1) and score > best:
                best = score
                token = int32(i)
            adjusted[base + i] = score
    block_argmax(values, tokens, best, token)
    if thread == 0:
        max_logits[row * slices + slice_] = values[0]
        max_tokens[row * slices + slice_] = tokens[0]
    if num_logprobs < 0:
        return

    # -- 3. the slice before adjustment: largest logit, and the sum of exponentials
    cuda.syncthreads()  # values[0] is read
    best = float32(NEGATIVE_INFINITY)
    token = int32(INT32_MAX)
    for u in range(LOADS_IN_FLIGHT):
        i = start + u * num_threads + thread
        if i < end and (token == int32(INT32_MAX) or loaded[u] > best):
            best = loaded[u]
            token = int32(i)
    block_argmax(values, tokens, best, token)
    best = values[0]
    token = tokens[0]
    cuda.syncthreads()  # values[0] is read
    total = float32(0)
    for u in range(LOADS_IN_FLIGHT):
        if loaded[u] > float32(NEGATIVE_INFINITY):
            total += exp2((loaded[u] - best) * float32(LOG2_E))
    block_sum(values, total)
    if thread == 0:
        raw_max[row * slices + slice_] = best
        raw_tokens[row * slices + slice_] = token
        raw_sums[row * slices + slice_] = values[0]


ADJUST_LOGITS = adjust_logits
