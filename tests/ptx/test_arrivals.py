"""What fetch says of bytes that have arrived, and that who computes with them waits for it."""

import re
from typing import Any

import numpy as np
import pytest

from osmium.ops import ExpertArena, ExpertPlan
from osmium.ops.gpu import FETCH, FETCH_BLOCKS, FETCH_WARPS, GpuOps
from osmium.quant.record import Record
from tests.ptx.cases_linear import cache_of
from tests.ptx.interpreter import InterpretedMachine, parse_program

RECORDS = {
    "a page": Record(4, 64, 32),
    "gates and ups end inside of a piece": Record(4, 384, 128),
    "fewer pieces than blocks": Record(16, 128, 128),
    "a piece more than blocks": Record(16, 376, 120),
    "no piece of down for some": Record(16, 512, 128),
}

PLANS = {
    "nothing": (0, 0),
    "one": (1,),
    "the last but one": (0, 1, 0),
    "several": (1, 0, 1, 1),
    "more entries than lanes": (1, *[0] * 33, 1, 0),
    "the last lanes have none": (0, 1, *[0] * 33),
}


def fetched(rng: np.random.Generator, record: Record, fetch: tuple[int, ...], text: str) -> Any:
    """A plan carried out by a text of fetch_records: entries fetched, their slots' bytes before
    and after, their records, and the words."""
    ops, used = GpuOps(InterpretedMachine(int(rng.integers(99)))), len(fetch)
    ops.machine.stream.programs["fetch_records"] = parse_program(text)
    arena = rng.integers(0, 256, (1, used, record.nbytes), dtype=np.uint8)
    before = rng.integers(0, 256, (1, used, record.nbytes), dtype=np.uint8)
    slot = rng.permutation(used).astype(np.int32)
    slots, words = ops.put(before), ops.put(np.zeros(2, np.int32))
    counters = ops.put(np.zeros(4, np.int64))
    cache = cache_of(record, slots, np.empty((1, used), np.int32), counters)
    plan = ExpertPlan(
        ops.put(np.array([used], np.int32)), ops.put(np.arange(used, dtype=np.int32)),
        ops.put(slot), ops.put(np.array(fetch, np.int32)), ops.put(np.ones(used, np.int32)),
        None, words,
    )  # fmt: skip
    ops.fetch(cache, plan, ExpertArena(record, ops.put(arena)), 0)
    who = np.flatnonzero(fetch)
    after = ops.copy_out(slots)
    return before[0, slot[who]], after[0, slot[who]], arena[0, who], ops.copy_out(words)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", RECORDS)
def test_every_warp_says_that_it_is_done(rng: np.random.Generator, name: str, plan: str) -> None:
    assert FETCH_WARPS == FETCH_BLOCKS * FETCH.contract.block // 32
    text = FETCH.contract.text
    _, after, wanted, words = fetched(rng, RECORDS[name], PLANS[plan], text)
    np.testing.assert_array_equal(after, wanted)
    assert list(words) == [FETCH_WARPS, FETCH_WARPS]


@pytest.mark.parametrize("plan", ["one", "the last but one", "several"])
def test_gates_and_ups_are_stored_when_that_is_said(rng: np.random.Generator, plan: str) -> None:
    """Warps that leave as soon as they have said it."""
    record = Record(16, 512, 344)
    text, ways = re.subn(r"(setp.eq.u32 +%said, %lane, %lane;)", r"\1 ret;", FETCH.contract.text)
    before, after, wanted, words = fetched(rng, record, PLANS[plan], text)
    assert ways == 1 and words[0] == FETCH_WARPS and words[1] < FETCH_WARPS
    np.testing.assert_array_equal(after[:, : record.down], wanted[:, : record.down])
    last = slice(record.down + (1 << 14), None)
    np.testing.assert_array_equal(after[-1, last], before[-1, last])
