"""slice_max and logit_histogram: rows of logits cut into slices, and each slice's tokens sorted into bins.

Bins have equal width below a row's largest logit.  A row's bins are the sums of its slices'; what
is summed are integers, so that they come out the same in any order.
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
    "BINS",
    "FINITE_LIMIT",
    "FIXED_POINT_ONE",
    "LOADS_IN_FLIGHT",
    "LOGIT_HISTOGRAM",
    "SLICE",
    "SLICE_MAX",
    "WINDOW",
    "block_argmax",
    "block_inclusive_scan",
]  # fmt: skip

BINS = 512
"""Two for each thread of `logit_histogram`, one for each of `sample_token`."""

WINDOW = 28.0
"""Logits further below the largest, in units of the temperature, weigh less than 2^-40: nothing."""

FIXED_POINT_ONE = 1099511627776.0
"""The weight of the largest logit, 2^40."""

LOADS_IN_FLIGHT = 8
"""Loads that a thread has on their way."""

SLICE = 256 * LOADS_IN_FLIGHT
"""Tokens of a slice, at most: LOADS_IN_FLIGHT for each thread of `logit_histogram`."""

FINITE_LIMIT = 3.4e38
"""From here on a logit is not finite."""

NEGATIVE_INFINITY = float("-inf")

INT32_MAX = 0x7FFFFFFF


@device_function
def block_argmax(values: Any, tokens: Any, value: Any, token: Any) -> None:
    """values[0], tokens[0]: the largest value of the block's threads, and the first token of those
    that have it.  Both arrays are shared, an element a thread."""
    me = cuda.threadIdx.x
    values[me] = value
    tokens[me] = token
    cuda.syncthreads()  # every thread's own is there
    half = cuda.blockDim.x // 2
    while half > 0:
        if me < half:
            other = me + half
            if values[other] > values[me] or (
                values[other] == values[me] and tokens[other] < tokens[me]
            ):
                values[me] = values[other]
                tokens[me] = tokens[other]
        cuda.syncthreads()  # this half is done before the next is read
        half //= 2


@device_function
def block_inclusive_scan(sums: Any, value: Any) -> Any:
    """The sum of the values of the threads up to this one, itself included.

    sums is shared, two elements a thread, and free again once the block has met.
    """
    me, width = cuda.threadIdx.x, cuda.blockDim.x
    sums[me] = value
    cuda.syncthreads()  # every thread's own is there
    at = 0
    step = 1
    while step < width:
        if me >= step:
            value += sums[at + me - step]
        at = width - at
        sums[at + me] = value
        cuda.syncthreads()  # the sums of this round are whole, and those of the last one read
        step *= 2
    return value


@device_function
def add_to_bin(count: Any, low: Any, high: Any, b: Any, tokens: Any, weight: Any) -> None:
    """Add to a bin of a slice.  Sums in two halves of 32 bits are one instruction each, where 64
    are a loop; a slice's 2048 tokens cannot overflow either."""
    if tokens > 0:
        cuda.atomic.add(count, b, uint32(tokens))
        cuda.atomic.add(low, b, uint32(weight & uint64(0xFFFFF)))
        cuda.atomic.add(high, b, uint32(weight >> uint64(20)))


@python_kernel(
    "void(CPointer(float32), CPointer(int32), CPointer(uint32), CPointer(uint64), "
    "CPointer(float32), int32, int32)",
    block=256,
    grid="slices, rows",
    regs=64,
)
def slice_max(
    best: Any, where: Any, counts: Any, masses: Any, logits: Any, vocab: int, slices: int
) -> None:
    """The largest logit of each slice of a row, and the first token that has it; zeros for `logit_histogram`.

    best f32, where i32 [rows, slices]    logits f32 [rows, vocab]
    where is -1 if a logit of the slice is no number, or the largest is not finite.
    counts u32 [rows, BINS], masses u64 [rows, BINS + 1]: 0
    """
    values = cuda.shared.array(256, float32)
    tokens = cuda.shared.array(256, int32)
    few = cuda.local.array(8, float32)
    me, width = cuda.threadIdx.x, cuda.blockDim.x
    row = cuda.blockIdx.y
    size = int32(uint32(vocab + slices - 1) // uint32(slices))
    start = cuda.blockIdx.x * size
    end = min(start + size, vocab)
    b = cuda.blockIdx.x * width + me
    while b < BINS + 1:
        masses[row * (BINS + 1) + b] = uint64(0)
        if b < BINS:
            counts[row * BINS + b] = uint32(0)
        b += slices * width
    largest = float32(-FINITE_LIMIT)
    token = int32(INT32_MAX)
    while start < end:
        for u in range(LOADS_IN_FLIGHT):
            i = start + u * width + me
            few[u] = float32(NEGATIVE_INFINITY)
            if i < end:
                few[u] = logits[int64(row) * vocab + i]
        for u in range(LOADS_IN_FLIGHT):
            if not few[u] < float32(FINITE_LIMIT):  # infinite, or no number
                token = int32(-1)
                largest = float32(FINITE_LIMIT)
            elif few[u] > largest:
                largest = few[u]
                token = int32(start + u * width + me)
        start += LOADS_IN_FLIGHT * width
    block_argmax(values, tokens, largest, token)
    if me == 0:
        best[row * slices + cuda.blockIdx.x] = values[0]
        where[row * slices + cuda.blockIdx.x] = tokens[0]


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
    best: Any,
    where: Any,
    settings: Any,
    vocab: int,
    slices: int,
) -> None:
    """Bins of equal width below a row's largest logit: what is in them, and each slice in their
    order.  Of a row at temperature 0, or whose largest logit is not finite, the token and no more.

    token i32 [rows]: the block_argmax, or -1; of such rows
    counts u32 [rows, BINS], masses u64 [rows, BINS + 1]: tokens of a bin and the sum of their
    probabilities, and the sum of those that min-p leaves; were 0
    ends u16 [rows, slices, BINS]: tokens of a slice up to a bin and with it
    order u16 [rows, vocab]: from a slice's first place on, its tokens in order of their bins, as
    counted from the slice's first; within a bin in any order
    logits f32 [rows, vocab]    best f32, where i32 [rows, slices]: what `slice_max` found
    settings f32 [rows, 4]: temperature, top-k, top-p, min-p
    """
    values = cuda.shared.array(256, float32)
    tokens = cuda.shared.array(256, int32)
    sorted_ = cuda.shared.array(2048, uint16)
    count = cuda.shared.array(512, uint32)
    low = cuda.shared.array(512, uint32)
    high = cuda.shared.array(512, uint32)
    sums = cuda.shared.array(512, uint32)
    likely = cuda.shared.array(2, uint32)
    own = cuda.local.array(8, float32)  # the thread's logits
    me, width = cuda.threadIdx.x, cuda.blockDim.x
    slice_, row = cuda.blockIdx.x, cuda.blockIdx.y
    temperature = settings[row * 4]
    least = settings[row * 4 + 3]
    if temperature == float32(0) and slice_ > 0:
        return
    size = int32(uint32(vocab + slices - 1) // uint32(slices))
    base = int64(row) * vocab + slice_ * size
    have = max(min(size, vocab - slice_ * size), 0)

    for u in range(LOADS_IN_FLIGHT):  # all on their way while the largest is found
        own[u] = float32(NEGATIVE_INFINITY)
        if me + u * width < have and temperature != float32(0):
            own[u] = logits[base + me + u * width]

    # -- 1. the largest logit of the row, of the first slice that has it
    largest = float32(-FINITE_LIMIT)
    first = int32(INT32_MAX)
    s = me
    while s < slices:
        value, of = best[row * slices + s], where[row * slices + s]
        if value > largest:
            largest = value
            first = of
        s += width
    b = me
    while b < BINS:
        count[b] = uint32(0)
        low[b] = uint32(0)
        high[b] = uint32(0)
        b += width
    if me < 2:
        likely[me] = uint32(0)
    block_argmax(values, tokens, largest, first)
    largest = values[0]
    first = tokens[0]
    if first == int32(INT32_MAX):
        first = int32(-1)  # every logit is minus infinity
    if first < 0 or temperature == float32(0):
        if slice_ == 0 and me == 0:
            token[row] = first
        return

    # -- 2. how many tokens of the slice are in each bin, and how much probability
    steep = min(float32(1.4426950408889634) / temperature, float32(1e30))
    per_bin = min(float32(BINS / WINDOW) / temperature, float32(1e30))
    last = int32(0)
    some = int32(0)  # tokens, one after another, of bin `last`
    weight = uint64(0)
    above = uint64(0)  # of what min-p leaves
    for u in range(LOADS_IN_FLIGHT):
        below = largest - own[u]
        at = below * per_bin
        if at < float32(BINS):
            b = int32(at)
            if b != last:
                add_to_bin(count, low, high, last, some, weight)
                last = b
                some = int32(0)
                weight = uint64(0)
            share = exp2(-below * steep)
            one = uint64(share * float32(FIXED_POINT_ONE))
            some += int32(1)
            weight += one
            if share >= least:
                above += one
    add_to_bin(count, low, high, last, some, weight)
    if least > float32(0):
        cuda.atomic.add(likely, 0, uint32(above & uint64(0xFFFFF)))
        cuda.atomic.add(likely, 1, uint32(above >> uint64(20)))
    cuda.syncthreads()  # the bins are whole
    if least > float32(0) and me == 0:
        above = uint64(likely[0]) + (uint64(likely[1]) << uint64(20))
        atomic_add(masses, row * (BINS + 1) + BINS, above)

    # -- 3. to the row's bins; where each bin begins among the tokens of the slice
    b = 2 * me
    for o in range(2):
        if count[b + o] > 0:
            atomic_add(counts, row * BINS + b + o, count[b + o])
            weight = uint64(low[b + o]) + (uint64(high[b + o]) << uint64(20))
            atomic_add(masses, row * (BINS + 1) + b + o, weight)
    upto = block_inclusive_scan(sums, uint32(count[b] + count[b + 1]))
    at_end = (int64(row) * slices + slice_) * BINS + b
    ends[at_end] = uint16(upto - count[b + 1])
    ends[at_end + 1] = uint16(upto)
    count[b] = uint32(upto - count[b + 1] - count[b])
    count[b + 1] = uint32(upto - count[b + 1])
    cuda.syncthreads()  # the first places are whole

    # -- 4. the tokens in order of their bins
    for u in range(LOADS_IN_FLIGHT):
        at = (largest - own[u]) * per_bin
        if at < float32(BINS):
            place = cuda.atomic.add(count, int32(at), uint32(1))
            sorted_[place] = uint16(me + u * width)
    cuda.syncthreads()  # the order is whole
    have = int32(count[BINS - 1])
    i = me
    while i < have:
        order[base + i] = sorted_[i]
        i += width


SLICE_MAX, LOGIT_HISTOGRAM = slice_max, logit_histogram
