"""Ragged shapes for attention, the delta net and the norms.

tests/ops/cases.py has one case per operation; these are the edges. Heads fill a warp's 128 values
partly, exactly, or twice. Positions go up to the longest context. Contexts leave warps idle or give
them a second tile. Pages are cut anywhere; chunks are full, ragged, or one token; decays go to
zero.

Memory that must not be read is poisoned. That is the recurrent state of a sequence without context,
rows of pages past a sequence's end, and unused page table entries.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from osmium.ops import Ops
from osmium.ops.reference import ReferenceOps
from tests.ops import cases
from tests.ops.cases import TINY, Case

Make = Callable[[np.random.Generator], Case]
Counts = tuple[int, ...]
"""One number per sequence."""

NAN = 0x7FC1
"""A bf16 NaN."""
NOWHERE = 10**9
"""Marks an unused page table entry."""


def rope(
    dim: int, rotary: int, heads: int, kv: int, lengths: Counts, past: Counts, kept: str = "bf16"
) -> Make:
    """Heads of `dim` values, `rotary` of them rotated, written into pages of 4 tokens."""

    def make(rng: np.random.Generator) -> Case:
        near = (8,) * len(past)  # four pages per sequence in the pool, for any position
        size = replace(
            TINY, head_dim=dim, rotary=rotary, heads=heads, kv_heads=kv, lengths=lengths, past=near
        )
        case = cases.rope_append(rng, size, kept)
        a = case.arrays
        a["positions"] += (np.array(past, np.int32) - 8)[a["sequence"]]
        pool = iter(a["pages"].flatten())
        a["pages"] = np.full((len(past), a["positions"].max() // size.page + 1), NOWHERE, np.int32)
        for s, index in {*zip(a["sequence"], a["positions"] // size.page, strict=True)}:
            a["pages"][s, index] = next(pool)
        return case

    return make


def attention(
    dim: int, heads: int, kv: int, page: int, lengths: Counts, past: Counts, kept: str = "bf16"
) -> Make:
    """Each sequence has its own pages; everything else in the pool is NaN."""

    def make(rng: np.random.Generator) -> Case:
        size = replace(
            TINY, head_dim=dim, heads=heads, kv_heads=kv, page=page, lengths=lengths, past=past
        )
        return _poisoned(cases.attention(rng, size, kept), size)

    return make


def prefill(
    kept: str, dim: int, heads: int, kv: int, page: int, lengths: Counts, past: Counts
) -> Make:
    """A step with more than eight rows: with e4m3 keys, q and the weights are rounded to f16."""

    def make(rng: np.random.Generator) -> Case:
        case = attention(dim, heads, kv, page, lengths, past, kept)(rng)
        kind = "f16 attention" if kept == "fp8" else "f32"
        return replace(case, writes=case.writes | {"out": kind})

    return make


def split_kv(
    dim: int, heads: int, kv: int, page: int, room: int, past: Counts, kept: str = "bf16",
    rotary: int | None = None, turns: int = 1,
) -> Make:  # fmt: skip
    """One row per sequence with split-KV blocks, and `room` partial results.

    The kernel writes the newest key and value, which are NaN before. A quarter of a head rotates.
    """

    def make(rng: np.random.Generator) -> Case:
        size = replace(
            TINY, head_dim=dim, heads=heads, kv_heads=kv, page=page, lengths=(1,) * len(past),
            past=past, rotary=dim // 4 if rotary is None else rotary,
        )  # fmt: skip
        return _poisoned(cases.shared_context(rng, size, room, kept, turns), size, made=1)

    return make


def _poisoned(case: Case, size: cases.Size, made: int = 0) -> Case:
    """Poison what no sequence reads, and its last `made` positions; unused page table entries are
    NOWHERE."""
    a = case.arrays
    for row, length, before in zip(a["pages"], size.lengths, size.past, strict=True):
        last, end = divmod(length + before - made, size.page)
        for name, nan in (
            ("k_pages", NAN), ("v_pages", NAN), ("k_scales", np.nan), ("v_scales", np.nan),
        ):  # fmt: skip
            if name in a:
                poison = 0x7F if a[name].dtype == np.uint8 else nan
                a[name][row[last:][:1], end:] = poison
                a[name][row[last + 1 :]] = poison
        row[-(-(length + before) // size.page) :] = NOWHERE
    return case


def _end(a: cases.Arrays, ended: Counts, *states: npt.NDArray[Any]) -> None:
    """Take the slots of the sequences `ended`; the states of others without context are NaN."""
    a["slots"][list(ended)] = -1
    new = a["slots"][(a["past"] == 0) & (a["slots"] >= 0)]
    for state in states:
        state[new] = np.nan


def conv(heads: Counts, dims: Counts, lengths: Counts, past: Counts, ended: Counts = ()) -> Make:
    """Sequences that begin anywhere in a block's 16 rows; without context their states are NaN.

    The sequences `ended` have no state slot.
    """

    def make(rng: np.random.Generator) -> Case:
        size = replace(
            TINY, key_heads=heads[0], value_heads=heads[1], key_dim=dims[0], value_dim=dims[1],
            lengths=lengths, past=past,
        )  # fmt: skip
        case = cases.causal_conv1d(rng, size)
        a = case.arrays
        _end(a, ended, a["state"])
        return case

    return make


def delta(
    name: str, heads: Counts, dims: Counts, lengths: Counts, past: Counts, learned: bool = False,
    ended: Counts = (),
) -> Make:  # fmt: skip
    """(key heads, value heads), (dk, dv); a third of the gates near 1, a third near exp(-20).

    The reference of all kernels is delta_rule_recurrent: chunks add only rounding.  With `learned`
    every gate and beta is near 1, and all keys are near one of three: each token replaces values.
    The sequences `ended` have no state slot.
    """

    def make(rng: np.random.Generator) -> Case:
        size = replace(
            TINY, key_heads=heads[0], value_heads=heads[1], key_dim=dims[0], value_dim=dims[1],
            lengths=lengths, past=past,
        )  # fmt: skip
        case, kernel = cases.CASES["delta_rule_recurrent"](rng, size), cases.CASES[name](rng, size)
        a = case.arrays
        if learned:
            keys = a["qkv"][:, heads[0] * dims[0] :][:, : heads[0] * dims[0]]
            near = keys[rng.integers(0, min(3, len(keys)), len(keys))].copy()
            keys[...] = near + np.float32(0.01) * keys
            a["decay"] *= np.float32(1e-3)
            a["beta"][...] = 1 - np.float32(1e-3) * a["beta"]
        else:
            a["decay"] *= rng.choice(np.array([1e-3, 1, 20], np.float32), a["decay"].shape)
        _end(a, ended, a["state"])

        def call(ops: Ops, placed: dict[str, Any]) -> None:
            (case if isinstance(ops, ReferenceOps) else kernel).call(ops, placed)

        return replace(case, call=call)

    return make


def delta_net(
    heads: Counts,
    dims: Counts,
    hidden: int,
    past: Counts,
    lengths: Counts | None = None,
    ended: Counts = (),
) -> Make:
    """One row per sequence, or chunks; the states of a sequence without context are NaN.

    The sequences `ended` have no state slot.
    """

    def make(rng: np.random.Generator) -> Case:
        size = replace(
            TINY, key_heads=heads[0], value_heads=heads[1], key_dim=dims[0], value_dim=dims[1],
            hidden=hidden, lengths=lengths or (1,) * len(past), past=past,
        )  # fmt: skip
        case = cases.CASES["delta_net, chunks" if lengths else "delta_net"](rng, size)
        a = case.arrays
        _end(a, ended, a["state"], a["inputs"])
        return case

    return make


def norm(hidden: int) -> Make:
    """Two rows of `hidden` values."""
    return lambda rng: cases.rms_norm(rng, replace(TINY, hidden=hidden, lengths=(2,), past=(0,)))


PREFILL: dict[str, tuple[int, int, int, Counts, Counts]] = {
    "31 rows": (4, 2, 8, (31,), (0,)),
    "33 rows after 5": (2, 1, 64, (33,), (5,)),
    "65 rows after 100": (8, 1, 7, (65,), (100,)),
    "1 row beside 12": (6, 2, 16, (1, 12), (70, 3)),
    "rows on both sides of a tile": (3, 1, 1, (10, 2), (59, 31)),
}
"""Heads, KV heads, page size, rows and past of prefill attention, for each format and head size."""

CASES: dict[str, Make] = {
    "rope_append 32, all turn": rope(32, 32, 4, 2, (3, 1), (0, 6)),
    "rope_append 64, 2 turn": rope(64, 2, 1, 1, (1, 5), (7, 0)),
    "rope_append 96, far": rope(96, 32, 5, 1, (2, 1), (131071, 3)),
    "rope_append 256, farthest": rope(256, 64, 2, 2, (2, 1, 1), (262142, 65537, 0)),
    "attention 32, one token": attention(32, 2, 2, 4, (1, 1), (0, 1)),
    "attention 64, within one tile": attention(64, 4, 1, 5, (3, 2), (0, 27)),
    "attention 96, across tiles": attention(96, 2, 1, 16, (2, 1), (31, 64)),
    "attention 128, every warp": attention(128, 2, 2, 7, (1,), (250,)),
    "attention 160, a second tile a warp": attention(160, 1, 1, 16, (2, 1), (255, 12)),
    "attention 256, grouped": attention(256, 4, 2, 8, (1, 1), (34, 8)),
    "rope_append fp8 32, all turn": rope(32, 32, 4, 2, (3, 1), (0, 6), "fp8"),
    "rope_append fp8 96, far": rope(96, 32, 5, 1, (2, 1), (131071, 3), "fp8"),
    "rope_append fp8 256, farthest": rope(256, 64, 2, 2, (2, 1, 1), (262142, 65537, 0), "fp8"),
    "attention fp8 64, within one tile": attention(64, 4, 1, 5, (3, 2), (0, 27), "fp8"),
    "attention fp8 160, a second tile a warp": attention(160, 1, 1, 16, (2, 1), (255, 12), "fp8"),
    "attention fp8 256, grouped": attention(256, 4, 2, 8, (1, 1), (34, 8), "fp8"),
    **{
        f"prefill attention {kept} {dim}, {name}": prefill(kept, dim, *shape)
        for kept in ("bf16", "fp8")
        for dim in (128, 256)
        for name, shape in PREFILL.items()
    },
    "split kv 32, one token": split_kv(32, 2, 2, 4, 2, (0, 1)),
    "split kv 96, across tiles": split_kv(96, 16, 1, 5, 8, (31, 32, 63)),
    "split kv 128, two kinds of rows": split_kv(128, 36, 2, 16, 3, (70,)),
    "split kv 160, one block": split_kv(160, 9, 1, 64, 1, (140,)),
    "split kv 256, short rows": split_kv(256, 16, 2, 7, 6, (100, 40)),
    "split kv fp8 32, one token": split_kv(32, 2, 2, 4, 2, (0, 1), "fp8"),
    "split kv fp8 96, across tiles": split_kv(96, 16, 1, 5, 8, (31, 32, 63), "fp8"),
    "split kv fp8 128, two kinds of rows": split_kv(128, 36, 2, 16, 3, (70,), "fp8"),
    "split kv fp8 160, one block": split_kv(160, 9, 1, 64, 1, (230,), "fp8"),
    "split kv fp8 64, a ring that turns": split_kv(64, 4, 1, 16, 1, (300,), "fp8"),
    "split kv fp8 256, short rows": split_kv(256, 16, 2, 7, 6, (100, 40), "fp8"),
    "split kv 64, the newest first": split_kv(64, 2, 1, 4, 2, (0, 1), rotary=2),
    "split kv 96, newest in any tile": split_kv(96, 4, 2, 16, 4, (31, 32, 95, 160)),
    "split kv fp8 64, the newest first": split_kv(64, 2, 1, 4, 2, (0, 1), "fp8", 64),
    "split kv fp8 96, newest in any tile": split_kv(96, 4, 2, 16, 5, (31, 40, 95, 100, 130), "fp8"),
    "split kv fp8 160, newest of one block": split_kv(160, 9, 1, 64, 1, (33,), "fp8"),
    "split kv fp8 128, newest far": split_kv(128, 2, 1, 64, 1, (130,), "fp8", 128),
    "split kv 128, again and again": split_kv(128, 4, 2, 32, 8, (31, 63), turns=3),
    "split kv fp8 256, again and again": split_kv(256, 2, 1, 32, 8, (32, 64), "fp8", 64, 3),
    "split_kv of digits 96, nine rows": split_kv(96, 4, 2, 4, 9, tuple(range(9))),
    "split kv 32, of nine by themselves": split_kv(32, 2, 1, 4, 9, tuple(range(9))),
    "causal_conv1d, one row": conv((1, 2), (32, 32), (1,), (0,)),
    "causal_conv1d, a block's rows": conv((1, 1), (32, 64), (16, 17), (7, 0)),
    "causal_conv1d, the first rows in the next block": conv(
        (2, 4), (64, 96), (14, 18, 15, 2, 1), (0, 5, 2, 0, 6)
    ),
    "causal_conv1d, short contexts": conv(
        (1, 2), (32, 32), (1, 2, 3, 1, 2, 3, 40, 1), (1, 1, 1, 2, 2, 3, 2, 4)
    ),
    "causal_conv1d, without slots": conv(
        (1, 2), (32, 32), (14, 18, 2, 1, 1), (0, 5, 2, 0, 6), (1, 3, 4)
    ),
    "delta_rule_recurrent 32x32": delta(
        "delta_rule_recurrent", (1, 2), (32, 32), (3, 1, 2), (0, 4, 2)
    ),
    "delta_rule_recurrent 64x96": delta("delta_rule_recurrent", (2, 2), (64, 96), (1, 4), (9, 0)),
    "delta_rule_recurrent 96x64": delta("delta_rule_recurrent", (1, 1), (96, 64), (5,), (0,)),
    "delta_rule_recurrent 128x128": delta(
        "delta_rule_recurrent", (1, 3), (128, 128), (2, 1), (0, 1)
    ),
    "delta_rule_recurrent 32x64, without slots": delta(
        "delta_rule_recurrent", (1, 2), (32, 64), (1, 7, 2, 1), (0, 4, 2, 3), ended=(1, 3)
    ),
    "delta_rule_chunk 32x64, without slots": delta(
        "delta_rule_chunk", (1, 2), (32, 64), (1, 7, 18, 1), (0, 4, 2, 3), ended=(1, 3)
    ),
    "delta_rule_chunk 128x128, without slots": delta(
        "delta_rule_chunk", (1, 2), (128, 128), (1, 7, 18, 1), (0, 62, 2, 3), ended=(1, 3)
    ),
    "delta_rule_chunk 32x32": delta("delta_rule_chunk", (1, 2), (32, 32), (17, 1, 15), (0, 4, 2)),
    "delta_rule_chunk 64x96": delta("delta_rule_chunk", (1, 1), (64, 96), (16, 18), (9, 0)),
    "delta_rule_chunk 96x64": delta("delta_rule_chunk", (1, 1), (96, 64), (33,), (3,)),
    "delta_rule_chunk 96x96": delta("delta_rule_chunk", (2, 2), (96, 96), (20,), (0,)),
    **{
        f"delta_rule_chunk 128x128, {name}": delta("delta_rule_chunk", heads, (128, 128), *rows)
        for name, heads, rows in (
            ("a token", (1, 1), ((1,), (0,))),
            ("31", (1, 1), ((31,), (64,))),
            ("33 of two heads", (1, 2), ((33,), (0,))),
            ("a chunk, and 65 in three", (1, 1), ((64, 65), (128, 63))),
            ("130 off the grid", (1, 1), ((130,), (37,))),
            ("200", (1, 1), ((200,), (0,))),
            ("two heads of two", (2, 4), ((3, 5), (62, 0))),
            (
                "nine sequences",
                (1, 1),
                ((1, 2, 3, 1, 17, 1, 2, 1, 33), (0, 63, 62, 5, 7, 64, 1, 0, 0)),
            ),
            ("learned, 150", (1, 1), ((150,), (10,), True)),
        )
    },
    "delta_net 32x32": delta_net((1, 3), (32, 32), 200, (4, 0, 1)),
    "delta_net 64x96, a row in one turn": delta_net((2, 4), (64, 96), 3072, (0, 7)),
    "delta_net 96x64, a row in two": delta_net((1, 1), (96, 64), 4104, (6,)),
    "delta_net 128x128": delta_net((1, 3), (128, 128), 64, (1, 0, 5)),
    "delta_net 32x32, nine": delta_net((1, 1), (32, 32), 64, (7, 0, 1, 2, 3, 4, 5, 6, 8)),
    "delta_net of digits 32x32, nine": delta_net((1, 4), (32, 32), 64, tuple(range(9))),
    "delta-net of digits 32x32, 31 rows": delta_net((1, 4), (32, 32), 64, (0, 5), (30, 1)),
    "delta-net of digits 128x128, 33 rows": delta_net((1, 3), (128, 128), 64, (3,), (33,)),
    "delta_net 64x96, without slots": delta_net((1, 3), (64, 96), 200, (4, 0, 1), ended=(0, 2)),
    "delta_net 128x128, without slots": delta_net((1, 3), (128, 128), 64, (1, 0, 5), ended=(1, 2)),
    "delta_net 128x128, no slot at all": delta_net((1, 1), (128, 128), 64, (0, 0), ended=(0, 1)),
    "delta_net 128x128, nine without slots": delta_net(
        (1, 1), (128, 128), 64, (7, 0, 1, 2, 3, 4, 5, 6, 8), ended=(0, 1, 5)
    ),
    "rms_norm 8, a thread": norm(8),
    "rms_norm 3080, two turns": norm(3080),
}

LONG: dict[str, Make] = {
    **{
        f"delta_rule_chunk 128x128, long, {learned=}": delta(
            "delta_rule_chunk", (2, 8), (128, 128), (3000, 1, 700), (100, 64, 0), learned
        )
        for learned in (False, True)
    },
    **{
        f"prefill attention {kept} {dim}, {heads} heads": prefill(
            kept, dim, heads, kv, 64, (130, 1, 77, 9), (8100, 5000, 0, 20_000)
        )
        for kept in ("bf16", "fp8")
        for dim, heads, kv in ((256, 32, 2), (256, 16, 2), (128, 64, 4), (128, 32, 4))
    },
    "split kv 256, long": split_kv(256, 32, 2, 64, 128, (50_000,), rotary=64),
    "split kv fp8 256, long": split_kv(256, 32, 2, 64, 128, (100_000,), "fp8"),
    "split kv fp8 256, eight": split_kv(256, 16, 2, 64, 128, tuple(range(0, 24_000, 3_000)), "fp8"),
    **{
        f"split kv {kept} 256, {rows} of 5,000": split_kv(
            256, 16, 2, 64, 160, tuple(5_000 - 31 * s for s in range(rows)), kept, 64, turns=4
        )
        for kept in ("bf16", "fp8")
        for rows in (1, 2, 3, 5, 8)
    },
    **{
        f"split kv {kept} 256, a thousand turns": split_kv(
            256, 16, 2, 64, 160, (1_000, 31), kept, 64, turns=1000
        )
        for kept in ("bf16", "fp8")
    },
}
"""Cases that only a GPU runs in reasonable time: many resident blocks, rings with many turns."""
