"""sample and advance: from rows of logits to tokens, and on to the next step, without the host.

`peaks` finds the largest logit of each slice of a row; `draw`, one thread block a row, draws a
token from what temperature, top-k, top-p and min-p leave; `advance` writes the tokens where the
next step reads its own, and tells the host.

What top-k, top-p and min-p keep is always a prefix of the tokens in order of their logits, so a
token is found by walking down that order until enough tokens, or enough probability, lie behind.
The walk goes by bins of equal width below the largest logit, by finer bins inside the one where it
ends, and then token by token.  Probabilities are integers, in 2^-40 of the largest, so that sums
come out the same in any order of the threads.
"""

from typing import Any

from osmium.kernels.python import (
    cuda,
    exp2,
    float32,
    float64,
    int32,
    int64,
    python_kernel,
    uint32,
    uint64,
)

__all__ = ["ADVANCE", "DRAW", "PEAKS"]

BINS, FINER = 2048, 512
WINDOW = 28.0
"""Logits further below the largest, in units of the temperature, weigh less than 2^-40: nothing."""

LIST = 1024
"""Tokens of one finer bin that are put in order; more must be equal but for rounding, and go by id.
"""


@python_kernel(
    "void(CPointer(float32), CPointer(int32), CPointer(float32), int32, int32)",
    block=256,
    grid="slices, rows",
    regs=64,
)
def peaks(best: Any, where: Any, logits: Any, vocab: int, slices: int) -> None:
    """The largest logit of each slice of a row, and the first token that has it.

    best f32, where i32 [rows, slices]    logits f32 [rows, vocab]
    where is -1 if a logit of the slice is no number, or the largest is not finite.
    """
    values = cuda.shared.array(256, float32)
    tokens = cuda.shared.array(256, int32)
    me, width = cuda.threadIdx.x, cuda.blockDim.x
    row = cuda.blockIdx.y
    size = (vocab + slices - 1) // slices
    start = cuda.blockIdx.x * size
    end = min(start + size, vocab)
    largest = float32(-3.4e38)
    token = int32(0x7FFFFFFF)
    for i in range(start + me, end, width):
        value = logits[int64(row) * vocab + i]
        if not value < float32(3.4e38):  # infinite, or no number
            token = int32(-1)
            largest = float32(3.4e38)
        elif value > largest:
            largest = value
            token = int32(i)
    values[me] = largest
    tokens[me] = token
    cuda.syncthreads()  # every thread's own is there
    half = width // 2
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
    if me == 0:
        best[row * slices + cuda.blockIdx.x] = values[0]
        where[row * slices + cuda.blockIdx.x] = tokens[0]


@python_kernel(
    "void(CPointer(int32), CPointer(float32), CPointer(float32), CPointer(int32), "
    "CPointer(float32), CPointer(float64), CPointer(int32), int32, int32, int32)",
    block=512,
    grid="rows",
    regs=96,
)
def draw(
    token: Any,
    logits: Any,
    best: Any,
    where: Any,
    settings: Any,
    chance: Any,
    turn: Any,
    vocab: int,
    slices: int,
    ring: int,
) -> None:
    """token i32 [rows]: drawn, or -1 where a row's largest logit is not finite.

    logits f32 [rows, vocab]    best f32, where i32 [rows, slices]: what `peaks` found
    settings f32 [rows, 4]: temperature, top-k, top-p, min-p
    chance f64 [ring, rows], in [0, 1); row turn % ring of it is used    turn i32 [1]
    """
    count = cuda.shared.array(2560, uint32)  # tokens of a bin: BINS, then FINER inside one of them
    mass = cuda.shared.array(2560, uint64)  # and the sum of their probabilities
    tokens_of = cuda.shared.array(32, uint64)  # sums over a 32nd of the bins
    mass_of = cuda.shared.array(32, uint64)
    ids = cuda.shared.array(1024, int32)  # the tokens of the last bin, as they came
    values = cuda.shared.array(1024, float32)
    order = cuda.shared.array(1024, int32)  # where in `ids` the next likeliest is
    found = cuda.shared.array(4, uint64)
    total = cuda.shared.array(4, uint64)
    me, width = cuda.threadIdx.x, cuda.blockDim.x
    row = cuda.blockIdx.x
    base = int64(row) * vocab

    # -- 1. the largest logit of the row, of the first slice that has it
    largest = float32(-3.4e38)
    first = int32(0x7FFFFFFF)
    s = me
    while s < slices:
        if best[row * slices + s] > largest:
            largest = best[row * slices + s]
            first = where[row * slices + s]
        s += width
    temperature = settings[row * 4]
    values[me] = largest
    order[me] = first
    cuda.syncthreads()  # every thread's own is there
    half = width // 2
    while half > 0:
        if me < half:
            other = me + half
            if values[other] > values[me] or (
                values[other] == values[me] and uint32(order[other]) < uint32(order[me])
            ):
                values[me] = values[other]
                order[me] = order[other]
        cuda.syncthreads()  # this half is done before the next is read
        half //= 2
    largest = values[0]
    first = order[0]
    cuda.syncthreads()  # both are read before they are used again
    if first == int32(0x7FFFFFFF):
        first = int32(-1)  # every logit is minus infinity
    if first < 0 or temperature == float32(0):
        if me == 0:
            token[row] = first
        return
    steep = min(float32(1.4426950408889634) / temperature, float32(1e30))
    per_bin = min(float32(BINS / WINDOW) / temperature, float32(1e30))
    unit = float32(1099511627776.0)  # 2^40

    # -- 2. bins of equal width below the largest: how many tokens, how much probability
    for b in range(me, BINS, width):
        count[b] = uint32(0)
        mass[b] = uint64(0)
    if me < 4:
        total[me] = uint64(0)
    cuda.syncthreads()  # zeros before sums
    least = settings[row * 4 + 3]
    tokens = uint64(0)
    weights = uint64(0)
    likely = uint64(0)  # of the tokens that min-p leaves
    for i in range(me, vocab, width):
        below = largest - logits[base + i]
        at = below * per_bin
        if at < float32(BINS):
            share = exp2(-below * steep)
            one = uint64(share * unit)
            cuda.atomic.add(count, int32(at), uint32(1))
            cuda.atomic.add(mass, int32(at), one)
            tokens += uint64(1)
            weights += one
            if share >= least:
                likely += one
    cuda.atomic.add(total, 0, tokens)
    cuda.atomic.add(total, 1, weights)
    cuda.atomic.add(total, 2, likely)
    cuda.syncthreads()  # bins and sums are whole
    kept = total[1]
    likely = total[2]

    # -- 3. three walks: over top-k tokens; over top-p of what they weigh; up to the draw
    for goal in range(3):
        target = uint64(0)  # the walk ends with the token that brings it there
        if goal == 0:
            top_k = settings[row * 4 + 1]
            if top_k < float32(1) or float32(total[0]) <= top_k:
                continue  # all are kept
            target = uint64(top_k)
        elif goal == 1:
            top_p = settings[row * 4 + 2]
            if top_p >= float32(1):
                continue
            target = max(uint64(float64(kept) * float64(top_p)), uint64(1))
        else:
            kept = min(kept, likely)
            lot = chance[(turn[0] % ring) * cuda.gridDim.x + row]
            target = min(uint64(float64(kept) * lot) + uint64(1), kept)

        # -- 3a. the bin where the walk ends, and the finer bin inside it
        n = uint64(0)  # tokens behind
        w = uint64(0)  # and their probability
        inside = uint64(0)  # tokens of the bin
        chosen = int32(0)
        fine = int32(0)
        for level in range(2):
            start = level * BINS
            span = (BINS - level * (BINS - FINER)) // 32
            if level == 1:
                for b in range(me, FINER, width):
                    count[BINS + b] = uint32(0)
                    mass[BINS + b] = uint64(0)
                cuda.syncthreads()  # zeros before sums
                for i in range(me, vocab, width):
                    below = largest - logits[base + i]
                    at = below * per_bin
                    if at < float32(BINS) and int32(at) == chosen:
                        b = BINS + int32((at - float32(chosen)) * float32(FINER))
                        cuda.atomic.add(count, b, uint32(1))
                        cuda.atomic.add(mass, b, uint64(exp2(-below * steep) * unit))
                cuda.syncthreads()  # the finer bins are whole
            if me < 32:
                tokens = uint64(0)
                weights = uint64(0)
                for b in range(start + me * span, start + me * span + span):
                    tokens += uint64(count[b])
                    weights += mass[b]
                tokens_of[me] = tokens
                mass_of[me] = weights
            cuda.syncthreads()  # the sums over bins are whole
            if me == 0:
                c = 0
                while c < 31 and (
                    n + tokens_of[c] < target if goal == 0 else w + mass_of[c] < target
                ):
                    n += tokens_of[c]
                    w += mass_of[c]
                    c += 1
                b = start + c * span
                last = b + span - 1
                while b < last and (
                    n + uint64(count[b]) < target if goal == 0 else w + mass[b] < target
                ):
                    n += uint64(count[b])
                    w += mass[b]
                    b += 1
                found[0] = uint64(b - start)
                found[1] = n
                found[2] = w
                found[3] = uint64(count[b])
            cuda.syncthreads()  # the bin is found
            n = found[1]
            w = found[2]
            inside = found[3]
            if level == 0:
                chosen = int32(found[0])
            else:
                fine = int32(found[0])

        # -- 3b. its tokens in order; where they are too many they are equal but for rounding
        many = inside > uint64(LIST)
        if me == 0:
            total[3] = uint64(0)
        cuda.syncthreads()  # zero before the count, and `found` is read
        stretch = (vocab + width - 1) // width if many else width
        from_ = me * stretch if many else me
        until = min(from_ + stretch, vocab) if many else vocab
        step = 1 if many else width
        mine = 0
        for i in range(from_, until, step):
            below = largest - logits[base + i]
            at = below * per_bin
            if at < float32(BINS) and int32(at) == chosen:
                if int32((at - float32(chosen)) * float32(FINER)) == fine:
                    if many:
                        mine += 1
                    else:
                        e = int32(cuda.atomic.add(total, 3, uint64(1)))
                        ids[e] = int32(i)
                        values[e] = logits[base + i]
        if many:
            ids[me] = mine
        cuda.syncthreads()  # the list, or how many each thread has, is whole
        if not many:
            for e in range(me, int32(inside), width):
                rank = 0
                for o in range(int32(inside)):
                    if values[o] > values[e] or (values[o] == values[e] and ids[o] < ids[e]):
                        rank += 1
                order[rank] = int32(e)
        cuda.syncthreads()  # the order is whole
        if me == 0:
            if many:
                each = max(mass[BINS + fine] // inside, uint64(1))
                short = target - n if goal == 0 else (target - w + each - uint64(1)) // each
                short = min(max(short, uint64(1)), inside)  # so many of them are needed
                w += short * each
                o = 0
                while short > uint64(ids[o]):
                    short -= uint64(ids[o])
                    o += 1
                found[0] = uint64(o)
                found[1] = short
            else:
                o = 0
                while True:
                    e = order[o]
                    n += uint64(1)
                    w += uint64(exp2((values[e] - largest) * steep) * unit)
                    o += 1
                    if o == int32(inside) or (n >= target if goal == 0 else w >= target):
                        break
                found[0] = uint64(ids[e])
            found[2] = w
        cuda.syncthreads()  # the walk has ended
        kept = min(kept, found[2])
        if goal == 2:
            if not many:
                if me == 0:
                    token[row] = int32(found[0])
            elif me == int32(found[0]):
                left = int32(found[1])
                for i in range(from_, until):
                    below = largest - logits[base + i]
                    at = below * per_bin
                    if at < float32(BINS) and int32(at) == chosen:
                        if int32((at - float32(chosen)) * float32(FINER)) == fine:
                            left -= 1
                            if left == 0:
                                token[row] = int32(i)


@python_kernel(
    "void(CPointer(int32), CPointer(int32), CPointer(int32), CPointer(int32), CPointer(int32), "
    "CPointer(int32), CPointer(int32), CPointer(int32), CPointer(int32), CPointer(int32), "
    "CPointer(int32), int32, int32, int32, int32, int32, int32)",
    block=32,
    grid="1",
    regs=64,
)
def advance(
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


ADVANCE, DRAW, PEAKS = advance, draw, peaks
