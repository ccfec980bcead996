"""slice_max and logit_histogram: rows of logits in slices, and each slice's tokens in bins.

Bins have equal width below a row's largest logit.  A row's bins are the sums of its slices' bins:
integers, so that they are the same bits in any order.  Method: docs/sampling.md.
"""

from typing import Any

from osmium.kernels.numba_kernels import (
    atomic_add,
    cuda,
    device_function,
    exp2,
    float32,
    int32,
    int64,
    python_kernel,
    uint16,
    uint32,
    uint64,
)

__all__ = [
    "BINS", "FINITE_LIMIT", "FIXED_POINT_ONE", "LOADS_IN_FLIGHT", "LOGIT_HISTOGRAM", "SLICE",
    "SLICE_MAX", "WINDOW", "block_argmax", "block_inclusive_scan",
]  # fmt: skip

BINS = 512
"""Bins per row: two per thread of `logit_histogram`, one per thread of `sample_token`."""

WINDOW = 28.0
"""Width of all bins in units of the temperature.  A logit further below the largest has a
probability under 2^-40 of its: it counts as 0."""

FIXED_POINT_ONE = 1099511627776.0
"""The probability of the largest logit as an integer, 2^40."""

LOADS_IN_FLIGHT = 8
"""Global loads that a thread issues before it uses the first."""

SLICE = 256 * LOADS_IN_FLIGHT
"""Most tokens of a slice: LOADS_IN_FLIGHT per thread of `logit_histogram`."""

FINITE_LIMIT = 3.4e38
"""A logit of at least this counts as not finite."""

NEGATIVE_INFINITY = float("-inf")

INT32_MAX = 0x7FFFFFFF


@device_function
def block_argmax(values: Any, tokens: Any, value: Any, token: Any) -> None:
    """Write the largest value of the thread block to values[0], its lowest token to tokens[0].

    values, tokens: shared memory, one element per thread
    """
    thread = cuda.threadIdx.x
    values[thread] = value
    tokens[thread] = token
    cuda.syncthreads()  # all values are written
    half = cuda.blockDim.x // 2
    while half > 0:
        if thread < half:
            other = thread + half
            if values[other] > values[thread] or (
                values[other] == values[thread] and tokens[other] < tokens[thread]
            ):
                values[thread] = values[other]
                tokens[thread] = tokens[other]
        cuda.syncthreads()  # this half is reduced before the next reads it
        half //= 2


@device_function
def block_inclusive_scan(sums: Any, value: Any) -> Any:
    """Inclusive prefix sum over the threads of a block (Hillis and Steele 1986).

    sums: shared memory, two elements per thread; reusable after the next barrier
    """
    thread, num_threads = cuda.threadIdx.x, cuda.blockDim.x
    sums[thread] = value
    cuda.syncthreads()  # all values are written
    offset = 0
    step = 1
    while step < num_threads:
        if thread >= step:
            value += sums[offset + thread - step]
        offset = num_threads - offset
        sums[offset + thread] = value
        cuda.syncthreads()  # this round is written, the last one is read
        step *= 2
    return value


@device_function
def add_to_bin(count: Any, low: Any, high: Any, bin_: Any, num_tokens: Any, mass: Any) -> None:
    """Add tokens and their probability to a bin of the slice, in shared memory.

    A 32-bit atomic addition is one instruction, a 64-bit one is a loop: so the sum has two halves
    of 20 and 32 bits, which the 2048 tokens of a slice cannot overflow.
    """
    if num_tokens > 0:
        cuda.atomic.add(count, bin_, uint32(num_tokens))
        cuda.atomic.add(low, bin_, uint32(mass & uint64(0xFFFFF)))
        cuda.atomic.add(high, bin_, uint32(mass >> uint64(20)))


@python_kernel(
    "void(CPointer(float32), CPointer(int32), CPointer(uint32), CPointer(uint64), "
    "CPointer(float32), int32, int32)",
    block=256,
    grid="slices, rows",
    regs=64,
)
def slice_max(
    max_logits: Any, max_tokens: Any, counts: Any, masses: Any, logits: Any, vocab: int, slices: int
) -> None:
    """The largest logit of each slice of a row, and its lowest token; zeroes counts and masses.

    max_logits f32, max_tokens i32 [rows, slices]    logits f32 [rows, vocab]
    max_tokens is -1 if a logit of the slice is NaN or the largest is not finite.
    counts u32 [rows, BINS], masses u64 [rows, BINS + 1]: inputs of `logit_histogram`
    """
    values = cuda.shared.array(256, float32)
    tokens = cuda.shared.array(256, int32)
    loaded = cuda.local.array(8, float32)
    thread, num_threads = cuda.threadIdx.x, cuda.blockDim.x
    row = cuda.blockIdx.y
    size = int32(uint32(vocab + slices - 1) // uint32(slices))
    start = cuda.blockIdx.x * size
    end = min(start + size, vocab)
    b = cuda.blockIdx.x * num_threads + thread
    while b < BINS + 1:
        masses[row * (BINS + 1) + b] = uint64(0)
        if b < BINS:
            counts[row * BINS + b] = uint32(0)
        b += slices * num_threads
    best = float32(-FINITE_LIMIT)
    token = int32(INT32_MAX)
    while start < end:
        for u in range(LOADS_IN_FLIGHT):
            i = start + u * num_threads + thread
            loaded[u] = float32(NEGATIVE_INFINITY)
            if i < end:
                loaded[u] = logits[int64(row) * vocab + i]
        for u in range(LOADS_IN_FLIGHT):
            if not loaded[u] < float32(FINITE_LIMIT):  # infinite or NaN
                token = int32(-1)
                best = float32(FINITE_LIMIT)
            elif loaded[u] > best:
                best = loaded[u]
                token = int32(start + u * num_threads + thread)
        start += LOADS_IN_FLIGHT * num_threads
    block_argmax(values, tokens, best, token)
    if thread == 0:
        max_logits[row * slices + cuda.blockIdx.x] = values[0]
        max_tokens[row * slices + cuda.blockIdx.x] = tokens[0]


@python_kernel(
    "void(CPointer(int32), CPointer(uint32), CPointer(uint64), CPointer(uint16), "
    "CPointer(uint16), CPointer(float32), CPointer(float32), CPointer(int32), CPointer(float32), "
    "int32, int32)",
    block=256,
    grid="slices, rows",
    regs=64,
)
def logit_histogram(
    token: Any,
    counts: Any,
    masses: Any,
    ends: Any,
    order: Any,
    logits: Any,
    max_logits: Any,
    max_tokens: Any,
    settings: Any,
    vocab: int,
    slices: int,
) -> None:
    """Count a row's tokens and their probability per bin, and sort each slice's tokens by bin.

    At temperature 0, or if the largest logit is not finite, it writes token alone.

    token i32 [rows]: of such rows, the first token with the largest logit, or -1
    counts u32 [rows, BINS]: tokens per bin    masses u64 [rows, BINS + 1]: their probability, and
    behind the bins that of the tokens within min-p    (`slice_max` has zeroed both)
    ends u16 [rows, slices, BINS]: tokens of a slice up to and including a bin
    order u16 [rows, vocab]: per slice, offsets of its tokens in order of bins, unordered in a bin
    logits f32 [rows, vocab]    max_logits f32, max_tokens i32 [rows, slices]: from `slice_max`
    settings f32 [rows, 4]: temperature, top-k, top-p, min-p
    """
    values = cuda.shared.array(256, float32)
    tokens = cuda.shared.array(256, int32)
    sorted_ = cuda.shared.array(2048, uint16)
    count = cuda.shared.array(512, uint32)
    low = cuda.shared.array(512, uint32)
    high = cuda.shared.array(512, uint32)
    sums = cuda.shared.array(512, uint32)
    min_p_mass = cuda.shared.array(2, uint32)
    loaded = cuda.local.array(8, float32)  # the thread's logits
    thread, num_threads = cuda.threadIdx.x, cuda.blockDim.x
    slice_, row = cuda.blockIdx.x, cuda.blockIdx.y
    temperature = settings[row * 4]
    min_p = settings[row * 4 + 3]
    if temperature == float32(0) and slice_ > 0:
        return
    size = int32(uint32(vocab + slices - 1) // uint32(slices))
    base = int64(row) * vocab + slice_ * size
    num_tokens = max(min(size, vocab - slice_ * size), 0)

    for u in range(LOADS_IN_FLIGHT):  # in flight during the reduction
        loaded[u] = float32(NEGATIVE_INFINITY)
        if thread + u * num_threads < num_tokens and temperature != float32(0):
            loaded[u] = logits[base + thread + u * num_threads]

    # -- 1. the largest logit of the row, and its lowest token
    largest = float32(-FINITE_LIMIT)
    best_token = int32(INT32_MAX)
    s = thread
    while s < slices:
        value, of_token = max_logits[row * slices + s], max_tokens[row * slices + s]
        if value > largest:
            largest = value
            best_token = of_token
        s += num_threads
    b = thread
    while b < BINS:
        count[b] = uint32(0)
        low[b] = uint32(0)
        high[b] = uint32(0)
        b += num_threads
    if thread < 2:
        min_p_mass[thread] = uint32(0)
    block_argmax(values, tokens, largest, best_token)
    largest = values[0]
    best_token = tokens[0]
    if best_token == int32(INT32_MAX):
        best_token = int32(-1)  # every logit is minus infinity
    if best_token < 0 or temperature == float32(0):
        if slice_ == 0 and thread == 0:
            token[row] = best_token
        return

    # -- 2. how many tokens of the slice are in each bin, and how much probability
    exp2_scale = min(float32(1.4426950408889634) / temperature, float32(1e30))
    per_bin = min(float32(BINS / WINDOW) / temperature, float32(1e30))
    run_bin = int32(0)
    run_count = int32(0)  # consecutive tokens of bin `run_bin`
    run_mass = uint64(0)
    mass_above = uint64(0)  # probability of the tokens within min-p
    for u in range(LOADS_IN_FLIGHT):
        below = largest - loaded[u]
        position = below * per_bin
        if position < float32(BINS):
            b = int32(position)
            if b != run_bin:
                add_to_bin(count, low, high, run_bin, run_count, run_mass)
                run_bin = b
                run_count = int32(0)
                run_mass = uint64(0)
            probability = exp2(-below * exp2_scale)
            mass = uint64(probability * float32(FIXED_POINT_ONE))
            run_count += int32(1)
            run_mass += mass
            if probability >= min_p:
                mass_above += mass
    add_to_bin(count, low, high, run_bin, run_count, run_mass)
    if min_p > float32(0):
        cuda.atomic.add(min_p_mass, 0, uint32(mass_above & uint64(0xFFFFF)))
        cuda.atomic.add(min_p_mass, 1, uint32(mass_above >> uint64(20)))
    cuda.syncthreads()  # the bins are complete
    if min_p > float32(0) and thread == 0:
        mass_above = uint64(min_p_mass[0]) + (uint64(min_p_mass[1]) << uint64(20))
        atomic_add(masses, row * (BINS + 1) + BINS, mass_above)

    # -- 3. add to the row's bins; offset of each bin in the sorted slice
    b = 2 * thread
    for o in range(2):
        if count[b + o] > 0:
            atomic_add(counts, row * BINS + b + o, count[b + o])
            run_mass = uint64(low[b + o]) + (uint64(high[b + o]) << uint64(20))
            atomic_add(masses, row * (BINS + 1) + b + o, run_mass)
    cumulative = block_inclusive_scan(sums, uint32(count[b] + count[b + 1]))
    at_end = (int64(row) * slices + slice_) * BINS + b
    ends[at_end] = uint16(cumulative - count[b + 1])
    ends[at_end + 1] = uint16(cumulative)
    count[b] = uint32(cumulative - count[b + 1] - count[b])
    count[b + 1] = uint32(cumulative - count[b + 1])
    cuda.syncthreads()  # the offsets are complete

    # -- 4. sort the tokens by bin
    for u in range(LOADS_IN_FLIGHT):
        position = (largest - loaded[u]) * per_bin
        if position < float32(BINS):
            entry = cuda.atomic.add(count, int32(position), uint32(1))
            sorted_[entry] = uint16(thread + u * num_threads)
    cuda.syncthreads()  # the order is complete
    num_tokens = int32(count[BINS - 1])
    i = thread
    while i < num_tokens:
        order[base + i] = sorted_[i]
        i += num_threads


SLICE_MAX, LOGIT_HISTOGRAM = slice_max, logit_histogram
