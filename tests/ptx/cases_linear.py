"""Ragged shapes for matrices, routed experts, top-k and fetch.

tests/ops/cases.py has one case per operation; these are the edges. Tokens go from one to more than
two tiles of four. Row counts are odd. Inputs fill a warp's 256 values partly, exactly, or several
times, with every group size of scales. Packed experts end in a partial 16 KiB segment.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from osmium.ops import (
    ExpertCache,
    HostExperts,
    LinearWeight,
    Ops,
    PrefetchState,
    SharedExpert,
    SlotAssignment,
)
from osmium.ops.types import (
    FETCH_BLOCKS,
    FETCH_SEGMENT_BYTES,
    FETCH_WARPS,
    PREFETCH_DISCARD,
    PREFETCH_STOP,
)
from osmium.quant import int4, int8
from osmium.quant.expert_layout import ExpertLayout
from osmium.quant.floats import bf16_from_f32, f32_from_bf16
from tests.ops import cases
from tests.ops.cases import (
    TINY,
    Arrays,
    Case,
    allowed,
    expert_tolerance,
    experts_call,
    matrix_tolerance,
    new_rows,
    normed_rows,
    packed_experts,
    read_rows,
    rows_of,
    shared_arrays,
)

Make = Callable[[np.random.Generator], Case]


def _f32(rng: np.random.Generator, *shape: int) -> npt.NDArray[np.float32]:
    return rng.standard_normal(shape, np.float32)


def _nan(*shape: int) -> npt.NDArray[np.float32]:
    return np.full(shape, np.nan, np.float32)


def linear(form: str, tokens: int, rows: int, columns: int, group: int = 0) -> Make:
    """out [tokens, rows] = x [tokens, columns] @ W.T."""

    def make(rng: np.random.Generator) -> Case:
        w = _f32(rng, rows, columns)
        arrays: Arrays = {"out": _nan(tokens, rows), "x": _f32(rng, tokens, columns)}
        if form == "bf16":
            arrays["w"] = bf16_from_f32(w)
        elif form == "int8":
            arrays["w"] = rng.integers(-128, 128, w.shape, dtype=np.int8)  # every byte
            arrays["scale"] = int8.quantize(w)[1]
        else:
            arrays["w"] = rng.integers(0, 256, (rows, columns // 2), dtype=np.uint8)  # every nibble
            arrays["scale"] = int4.quantize(w, group)[1]

        def call(ops: Ops, a: dict[str, Any]) -> None:
            matrix = LinearWeight(form, rows, columns, a["w"], a.get("scale"), group)  # type: ignore[arg-type]
            ops.linear(a["out"], rows_of(ops, a["x"]), matrix)

        return Case(arrays, call, {"out": matrix_tolerance(form, tokens, columns, group, rows)})

    return make


def fused(
    form: str, tokens: int, rows: int, columns: int, gain: float = 1, prefill: bool = False
) -> Make:
    """linear of normed rows, and linear_add_rms_norm; in a step, or in a prefill of few rows.

    One token's x may be all zeros; the others differ widely in scale.
    """

    def make(rng: np.random.Generator) -> Case:
        inner = linear(form, tokens, rows, columns, 128)(rng)
        x = inner.arrays["x"]
        x *= np.float32(gain) * np.exp(3 * _f32(rng, tokens, 1))
        if tokens > 2:
            x[1] = 0
        arrays = inner.arrays | {
            "norm": _f32(rng, columns),
            "more": _f32(rng, tokens, rows),
            "following": _f32(rng, rows),
            "next": _nan(tokens, rows),
        }
        group = 128 if form == "int4" else 0

        def multiply(ops: Ops, a: dict[str, Any]) -> None:
            matrix = LinearWeight(form, rows, columns, a["w"], a.get("scale"), group)  # type: ignore[arg-type]
            ops.linear(a["out"], normed_rows(ops, a["x"], a["norm"]), matrix)
            if rows % 8 == 0:
                h = new_rows(ops, tokens, rows, 1e-6)
                ops.linear_add_rms_norm(a["more"], rows_of(ops, a["x"]), matrix, h, a["following"])
                read_rows(ops, a["next"], h)

        def call(ops: Ops, a: dict[str, Any]) -> None:
            with ops.prefill() if prefill else nullcontext():
                multiply(ops, a)

        kind = matrix_tolerance(form, max(tokens, 9 * prefill), columns, group, rows)
        more = {"more": kind, "next": kind} if rows % 8 == 0 else {}
        return Case(arrays, call, {"out": kind, **more})

    return make


def gated(
    form: str, tokens: int, inner: int, columns: int, down_form: str = "bf16", rows: int = 0
) -> Make:
    """gate_up_silu of a matrix [2 * inner, columns]; then `down` [rows, inner], if it has rows."""

    def make(rng: np.random.Generator) -> Case:
        arrays = linear(form, tokens, 2 * inner, columns)(rng).arrays
        arrays |= {"inner": _nan(tokens, inner), "both": arrays.pop("out")}
        # Values exact as hi + lo, because eight values may cancel down to 2^-17 of x.
        x = arrays["x"] * np.float32(1e-2)
        hi = f32_from_bf16(bf16_from_f32(x))
        arrays["x"] = hi + f32_from_bf16(bf16_from_f32(x - hi))
        group = 128 if down_form == "int4" else 0
        if rows:
            second = linear(down_form, tokens, rows, inner, group)(rng).arrays
            arrays |= {f"down {name}": array for name, array in second.items() if name != "x"}

        def call(ops: Ops, a: dict[str, Any]) -> None:
            up = LinearWeight(form, 2 * inner, columns, a["w"], a.get("scale"))  # type: ignore[arg-type]
            data, scale = a.get("down w"), a.get("down scale")
            down = LinearWeight(down_form, rows, inner, data, scale, group)  # type: ignore[arg-type]
            out = new_rows(ops, tokens, inner)
            ops.gate_up_silu(out, rows_of(ops, a["x"]), SharedExpert(up, down, 0), a["both"])
            if rows:
                ops.linear(a["down out"], out, down)
            else:
                read_rows(ops, a["inner"], out)

        if rows:
            kind = matrix_tolerance(down_form, tokens, inner, group, rows)
            up_kind = matrix_tolerance(form, tokens, columns)
            return Case(arrays, call, {"down out": max(kind, up_kind, key=allowed)})
        return Case(arrays, call, {"inner": "f32"})

    return make


def cache_of(
    layout: ExpertLayout, slots: Any, slot_of: Any, counters: Any = None, step: Any = None
) -> ExpertCache:
    """One layer, without the arrays that only assign_slots reads."""
    _, experts = slot_of.shape
    unused: Any = None
    return ExpertCache(
        layout, experts, unused, slots, slot_of, unused, unused, unused,
        unused, step, counters,
    )  # fmt: skip


def experts(
    bits: int, tokens: int, top_k: int, hidden: int, inner: int, *parts: str, shared: int = 64,
    form: str = "int8",
) -> Make:  # fmt: skip
    """Experts in shuffled slots, some not resident, some fetched in this step, and a shared expert
    of size `shared`.  Without `pair_slots` all are resident, and the ids are slots."""
    parts = parts or ("hits", "rest")
    form = "bf16" if hidden % 16 else form  # INT8 rows are multiples of 16 bytes

    def make(rng: np.random.Generator) -> Case:
        layout, count, capacity = ExpertLayout(bits, hidden, inner), top_k + 4, top_k + 2
        resident_ids = rng.permutation(count)[:capacity]
        slot_of = np.full((1, count), -1, np.int32)
        slot_of[0, resident_ids] = np.arange(capacity)
        slots = packed_experts(rng, layout, capacity)
        ids = np.stack([rng.permutation(resident_ids)[:top_k] for _ in range(tokens)]).astype(
            np.uint16
        )
        arrays: Arrays = {
            "out": _f32(rng, tokens, hidden),
            "next": _nan(tokens, hidden),
            "norm": _f32(rng, hidden),
            "x": _f32(rng, tokens, hidden),
            "pair_slots": np.where(rng.random(ids.shape) < 0.4, ~slot_of[0][ids], slot_of[0][ids]),
            "routed_ids": ids,
            "fetch_progress": np.full(2, 1 << 20, np.int32),  # fetched long ago
            "partial_out": np.full((tokens, hidden), -7, np.int64),
            "weights": rng.random(ids.shape, np.float32),
            "slots": slots[None],
            "expert_to_slot": slot_of,
            **shared_arrays(rng, form, tokens, hidden, shared, 5),
        }

        def call(ops: Ops, a: dict[str, Any]) -> None:
            cache = cache_of(layout, a["slots"], a["expert_to_slot"])
            assignment = None
            if "pair_slots" in a:
                assignment = SlotAssignment(
                    None, None, None, None, None, a["pair_slots"], a["fetch_progress"],
                    a["partial_out"],
                )  # fmt: skip
            experts_call(ops, a, form, assignment, cache, parts, 3, norm=True)

        kind = expert_tolerance(layout, tokens, count, form)
        return Case(arrays, call, {"out": kind, "next": kind})

    return make


def topk_softmax(tokens: int, count: int, top_k: int, spare: int) -> Make:
    """Ties, both zeros, minus infinities, and `spare` larger columns past the experts."""

    def make(rng: np.random.Generator) -> Case:
        logits = _f32(rng, tokens, count + spare) * 3
        logits[:, count:] = 99
        tied = rng.permutation(count)[: count // 2]
        logits[0, tied] = logits[0, tied[:1]]
        logits[-1, tied] = rng.choice(np.array([0.0, -0.0], np.float32), len(tied))
        if count > top_k:
            logits[:, rng.integers(count)] = -np.inf
        arrays: Arrays = {
            "ids": np.full((tokens, top_k), 999, np.uint16),
            "weights": _nan(tokens, top_k),
            "logits": logits,
            "counters": np.array([5, 0, 0, 0], np.int64) << 33,  # 64 bits
        }

        def call(ops: Ops, a: dict[str, Any]) -> None:
            ops.topk_softmax(a["ids"], a["weights"], a["logits"], count, a["counters"])

        return Case(arrays, call, {"ids": "exact", "weights": "f32", "counters": "exact"})

    return make


def router(
    hidden: int, experts: int, top_k: int, equal: int = 1, form: Literal["bf16", "int8"] = "bf16"
) -> Make:
    """Five tokens; with more than eight experts every block has some."""
    size = replace(TINY, hidden=hidden, experts=experts, top_k=top_k)
    return lambda rng: cases.router(rng, size, equal, form)


def segments_of(layout: ExpertLayout) -> npt.NDArray[np.int32]:
    """Segments of a packed expert that each warp of a fetch copies a part of, i32 [FETCH_WARPS]."""
    pieces, blocks = -(-layout.nbytes // FETCH_SEGMENT_BYTES), FETCH_BLOCKS
    return np.repeat([len(range(block, pieces, blocks)) for block in range(blocks)], 8).astype(
        np.int32
    )


def copied_bytes(layout: ExpertLayout, done: npt.NDArray[np.int32]) -> npt.NDArray[np.bool_]:
    """Which bytes are copied when each warp has stored its part of `done` segments."""
    at, blocks = np.arange(layout.nbytes), FETCH_BLOCKS
    warp = at // FETCH_SEGMENT_BYTES % blocks * 8 + at % (FETCH_SEGMENT_BYTES // 4) // (
        FETCH_SEGMENT_BYTES // 32
    )  # a quarter of a segment per warp
    return np.asarray(at // FETCH_SEGMENT_BYTES // blocks < done[warp])


def prefetch_of(expert: Any, slot: Any, state: Any, done: Any, go: Any = None) -> PrefetchState:
    """Prefetch state without the arrays that only the router writes."""
    unused: Any = None
    return PrefetchState(
        unused, unused, unused, unused, unused, expert, slot, state, done, go,
    )  # fmt: skip


def state_words(started: Any, more: int = 0) -> npt.NDArray[np.int32]:
    """State words of a prefetch whose started blocks have also ended."""
    return (np.asarray(started) * (1 + (1 << 15)) + more).astype(np.int32)


def fetch(
    hidden: int, inner: int, fetched: tuple[int, ...], entries: int, with_prefetch: bool = False
) -> Make:
    """A slot assignment of len(fetched) experts in arrays of `entries`; bf16 experts.

    With prefetch some blocks have started and ended; an expert with fetch flag 2 has some segments
    copied.
    """

    def make(rng: np.random.Generator) -> Case:
        layout, count, used = ExpertLayout(16, hidden, inner), entries + 2, len(fetched)

        def assignment(values: Any) -> npt.NDArray[np.int32]:
            out = np.full(entries, 10**9, np.int32)  # entries past the count are not read
            out[:used] = values
            return out

        arrays: Arrays = {
            "host_experts": rng.integers(0, 256, (1, count, layout.nbytes), dtype=np.uint8),
            "slots": rng.integers(0, 256, (1, entries, layout.nbytes), dtype=np.uint8),
            "counters": np.arange(1, 8) << 32,
            "count": np.array([used], np.int32),
            "expert": assignment(np.sort(rng.permutation(count)[:used])),
            "slot": assignment(rng.permutation(entries)[:used]),
            "fetch": assignment(fetched),
            "uses": assignment(rng.integers(1, 9, used)),
            "fetch_progress": np.array([0, 0], np.int32),
        }
        if with_prefetch:
            started = rng.permutation(FETCH_BLOCKS) > 3
            done = rng.integers(0, segments_of(layout) + 1).astype(np.int32) * started.repeat(8)
            arrays["state"] = state_words(
                started, PREFETCH_STOP if fetched[0] == 2 else PREFETCH_STOP + PREFETCH_DISCARD
            )[None]
            arrays["segments_done"] = done[None].astype(np.int32)
            arrays["start_signal"] = 16 * np.arange(2 * FETCH_BLOCKS, dtype=np.int32).reshape(2, -1)
            arrays["start_signal"][:, ::3] += 15  # these layers get no start signal
            if fetched[0] == 2:
                copied = copied_bytes(layout, done)
                source = arrays["host_experts"][0, arrays["expert"][0]]
                arrays["slots"][0, arrays["slot"][0], copied] = source[copied]

        def call(ops: Ops, a: dict[str, Any]) -> None:
            layers = [a["slots"][0], None]  # the second layer's prefetch starts next
            cache = cache_of(layout, layers, np.empty((2, count), np.int32), a["counters"])
            assignment = SlotAssignment(
                a["count"], a["expert"], a["slot"], a["fetch"], a["uses"], None, a["fetch_progress"]
            )
            prefetch_state = (
                prefetch_of(None, None, a["state"], a["segments_done"], a["start_signal"])
                if with_prefetch
                else None
            )
            ops.fetch_experts(
                cache,
                assignment,
                HostExperts(layout, a["host_experts"]),
                0,
                prefetch=prefetch_state,
            )

        writes = ("slots", "counters", *(("start_signal",) if with_prefetch else ()))
        return Case(arrays, call, dict.fromkeys(writes, "exact"))

    return make


def prefetch_experts(
    hidden: int,
    inner: int,
    *experts: int,
    state: tuple[int, ...] = (),
    signals: tuple[int, ...] = (),
) -> Make:
    """Predictions for the layers after the first, in the third step, without an early stop.

    All layers may start, or those of `signals`. bf16 experts, as many as slots per layer.
    """

    def make(rng: np.random.Generator) -> Case:
        layout, shape = ExpertLayout(16, hidden, inner), (1 + len(experts), 3)
        unused_table = np.empty(shape, np.int32)
        first, words = 3 * np.arange(1, shape[0]), (0, *(signals or [8] * len(experts)))
        arrays: Arrays = {
            "host_experts": rng.integers(0, 256, (*shape, layout.nbytes), dtype=np.uint8),
            "slots": rng.integers(0, 256, (*shape, layout.nbytes), dtype=np.uint8),
            "expert": np.array([-1, *experts], np.int32),
            "slot": np.array([0, *rng.integers(0, 3, len(experts)) + first], np.int32),
            "state": np.array([7, *(state or [0] * len(experts))], np.int32)[:, None].repeat(
                FETCH_BLOCKS, 1
            ),
            "segments_done": np.zeros((shape[0], FETCH_WARPS), np.int32),
            "start_signal": 48 + np.array(words, np.int32)[:, None].repeat(FETCH_BLOCKS, 1),
            "step": np.array([2], np.int32),
        }

        def call(ops: Ops, a: dict[str, Any]) -> None:
            prefetch_state = prefetch_of(
                *(a[k] for k in ("expert", "slot", "state", "segments_done", "start_signal"))
            )
            slots = [a["slots"][i] for i in range(shape[0])]
            cache = cache_of(layout, slots, unused_table, step=a["step"])
            ops.prefetch_experts(cache, prefetch_state, HostExperts(layout, a["host_experts"]))

        return Case(arrays, call, dict.fromkeys(("slots", "state", "segments_done"), "exact"))

    return make


CASES: dict[str, Make] = {
    "bf16_linear 1x3x8": linear("bf16", 1, 3, 8),
    "bf16_linear 2x17x256": linear("bf16", 2, 17, 256),
    "bf16_linear 3x2x272": linear("bf16", 3, 2, 272),
    "bf16_linear 9x19x520": linear("bf16", 9, 19, 520),
    "int8_linear 1x3x16": linear("int8", 1, 3, 16),
    "int8_linear 2x17x256": linear("int8", 2, 17, 256),
    "int8_linear 3x2x272": linear("int8", 3, 2, 272),
    "int8_linear 9x19x528": linear("int8", 9, 19, 528),
    "int4_linear 1x3x32 groups of 32": linear("int4", 1, 3, 32, 32),
    "int4_linear 2x17x256 groups of 128": linear("int4", 2, 17, 256, 128),
    "int4_linear 3x2x320 groups of 64": linear("int4", 3, 2, 320, 64),
    "int4_linear 9x19x544 groups of 32": linear("int4", 9, 19, 544, 32),
    "int4_linear 4x3x640 groups of 128": linear("int4", 4, 3, 640, 128),
    "bf16_matvec 1x40x64": fused("bf16", 1, 40, 64),
    "bf16_matvec 8x70x1088": fused("bf16", 8, 70, 1088),
    "int8_matvec 1x3x64": fused("int8", 1, 3, 64, 1e-6),
    "int8_matvec 8x70x1088": fused("int8", 8, 70, 1088),
    "int8_matvec 11x19x64": fused("int8", 11, 19, 64, 1e4),
    "int4_matvec 1x16x128": fused("int4", 1, 16, 128, 1e4),
    "int4_matvec 8x64x1152": fused("int4", 8, 64, 1152),
    "int4_matvec 3x32x4096": fused("int4", 3, 32, 4096, 1e-6),
    "int4_matvec 2x16x8320": fused("int4", 2, 16, 8320),
    "int4_matvec 9x80x128": fused("int4", 9, 80, 128),
    "int4_gemm 9x130x128": fused("int4", 9, 130, 128, 1e-6),
    "int4_gemm 65x144x640": fused("int4", 65, 144, 640, 1e4),
    "int4_gemm 31x16x3200": fused("int4", 31, 16, 3200),
    "int4_gemm 1x16x256, a prefill": fused("int4", 1, 16, 256, prefill=True),
    "int8_gemm 3x24x128, a prefill": fused("int8", 3, 24, 128, prefill=True),
    "int8_gemm 9x130x128": fused("int8", 9, 130, 128, 1e4),
    "int8_gemm 65x144x640": fused("int8", 65, 144, 640),
    "int8_gemm 33x6x384": linear("int8", 33, 6, 384),
    "int8_matvec 11x128x64, the norm with digits": fused("int8", 11, 128, 64),
    "bf16_gemm 65x328x640": fused("bf16", 65, 328, 640),
    "bf16_gemm 9x385x96": fused("bf16", 9, 385, 96, 1e4),
    "bf16_gemm 31x323x32": linear("bf16", 31, 323, 32),
    "bf16_gemm 33x336x288": fused("bf16", 33, 336, 288, 1e-6),
    "bf16_gemm_narrow 9x1x32": fused("bf16", 9, 1, 32, 1e4),
    "bf16_gemm_narrow 65x144x640": fused("bf16", 65, 144, 640),
    "bf16_gemm_narrow 31x257x160": fused("bf16", 31, 257, 160),
    "bf16_gemm_narrow 33x120x1312": fused("bf16", 33, 120, 1312, 1e-6),
    "bf16_gemm_narrow 1x64x544, a prefill": fused("bf16", 1, 64, 544, prefill=True),
    "bf16_gemm_narrow 12x35x512": linear("bf16", 12, 35, 512),
    "bf16_expert 3 tokens": experts(16, 3, 2, 24, 16),
    "bf16_expert many inputs up": experts(16, 1, 3, 264, 24),
    "bf16_expert many inputs down": experts(16, 1, 3, 24, 272),
    "int8_expert 3 tokens": experts(8, 3, 2, 48, 16),
    "int8_expert many inputs up": experts(8, 1, 3, 272, 16),
    "int8_expert many inputs down": experts(8, 1, 3, 32, 272),
    "int4_expert groups of 32 and 64": experts(4, 3, 2, 96, 64),
    "int4_expert many inputs up": experts(4, 1, 3, 320, 32),
    "int4_expert many inputs down": experts(4, 1, 3, 32, 320),
    "int4_expert groups of 128": experts(4, 2, 1, 128, 128),
    "int4_experts in parts": experts(4, 3, 3, 256, 128),
    "int4_experts at once": experts(4, 2, 5, 128, 384, "all"),
    "int4_experts and a bf16 one": experts(4, 2, 3, 128, 128, form="bf16"),
    "int4_experts and a wide one": experts(4, 1, 2, 384, 128, "all", shared=448),
    "int4_experts many inputs": experts(4, 1, 2, 1280, 1152),
    "int4_experts of more segments than lanes": experts(4, 1, 17, 128, 256, "all"),
    "int4_experts of half a ring": experts(4, 1, 17, 128, 384, "all", shared=1088),
    "int4_experts nine tokens": experts(4, 9, 2, 128, 128),
    "int4_moe_gemm 9 tokens": experts(4, 9, 2, 128, 256, "all"),
    "int4_moe_gemm 70 tokens of one expert": experts(4, 70, 1, 256, 128),
    "bf16_moe_gemm 9 tokens": experts(16, 9, 2, 160, 96, "all"),
    "bf16_moe_gemm 70 tokens of one expert": experts(16, 70, 1, 32, 224, form="bf16"),
    "int8_moe_gemm 11 tokens": experts(8, 11, 3, 128, 128),
    "int8_moe_gemm 65 tokens of one expert": experts(8, 65, 1, 128, 128, form="bf16"),
    "gated_up int8 1x8x64": gated("int8", 1, 8, 64),
    "gated_up int8 5x56x640": gated("int8", 5, 56, 640),
    "gated_up int8 3x152x128": gated("int8", 3, 152, 128),
    "gated_up int8 9x16x64": gated("int8", 9, 16, 64),
    "gated_up bf16 2x8x64": gated("bf16", 2, 8, 64),
    "gated_up_digits int8 33x384x128": gated("int8", 33, 384, 128, "int8", 10),
    "gated_up_digits bf16 31x128x64, int4": gated("bf16", 31, 128, 64, "int4", 6),
    "gated_up_digits int8 9x128x64, bf16": gated("int8", 9, 128, 64, "bf16", 3),
    "int4_expert 11 experts, a warp takes two": experts(4, 2, 11, 32, 64),
    "int4_expert 9 tokens": experts(4, 9, 2, 64, 320),
    "topk_softmax all of one": topk_softmax(1, 1, 1, 0),
    "topk_softmax all of 7": topk_softmax(3, 7, 7, 1),
    "topk_softmax 2 of 33": topk_softmax(3, 33, 2, 3),
    "topk_softmax 32 of 70": topk_softmax(2, 70, 32, 1),
    "router, two blocks": router(64, 9, 3),
    "router, uneven blocks": router(320, 68, 32),
    "router, many tiles a block": router(128, 256, 8),
    "router, ties": router(64, 150, 12, 5),
    "router, all the same": router(64, 40, 32, 41),
    "router, two rows of blocks": router(4096, 9, 3),
    "router, inputs of no tile": router(72, 9, 3),
    "router, more experts than lanes hold": router(64, 260, 4),
    "router, the next one of another format": router(64, 9, 3, form="int8"),
    "fetch one page": fetch(16, 8, (1, 0, 1), 5),
    "fetch nothing": fetch(16, 8, (0, 0), 2),
    "fetch two steps a block, the last of three pages": fetch(256, 200, (0, 1), 3),
    "fetch of 35 entries": fetch(32, 24, (0,) * 30 + (1, 0, 1, 1, 0), 36),
    "fetch with a prefetch of a page": fetch(16, 8, (2, 0), 3, with_prefetch=True),
    "fetch with prefetch, up to four segments a block": fetch(
        256, 528, (2,), 2, with_prefetch=True
    ),
    "fetch with prefetch and others": fetch(256, 200, (2, 0, 1, 1), 4, with_prefetch=True),
    "fetch with prefetch and others, 35 entries": fetch(
        96, 48, (2,) + (1, 0) * 17, 36, with_prefetch=True
    ),
    "fetch others than the prefetched": fetch(256, 200, (1, 0), 3, with_prefetch=True),
    "fetch nothing, with a wrong prefetch": fetch(16, 8, (0, 0), 2, with_prefetch=True),
    "prefetch one page": prefetch_experts(16, 8, 2),
    "prefetch two pages": prefetch_experts(32, 24, 0),
    "prefetch fewer segments than blocks, the last of three pages": prefetch_experts(96, 48, 2),
    "prefetch up to four segments a block": prefetch_experts(256, 528, 1),
    "prefetch nothing": prefetch_experts(256, 200, -1),
    "prefetch stopped before its start": prefetch_experts(256, 200, 1, state=(PREFETCH_STOP,)),
    "prefetch one layer after the other": prefetch_experts(
        96, 48, 2, -1, 0, 1, 1, state=(0, 0, PREFETCH_STOP + PREFETCH_DISCARD, 0, 0)
    ),
    "prefetch until a layer has no start signal": prefetch_experts(
        96, 48, 2, 1, 0, signals=(8, 15, 0)
    ),
    "prefetch while seven of eight are done": prefetch_experts(96, 48, 2, 1, signals=(7, 8)),
    "prefetch in another step": prefetch_experts(96, 48, 2, signals=(24,)),
}
