"""What fetch says of bytes that have arrived, and that who computes with them waits for it; and how
what is fetched early ends."""

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from osmium.ops import HostExperts, SlotAssignment
from osmium.ops.gpu import GpuOps
from osmium.ops.gpu_experts import FETCH, FETCH_EARLY
from osmium.ops.reference import ReferenceOps
from osmium.ops.types import FETCH_BLOCKS, FETCH_WARPS, PREFETCH_DISCARD, PREFETCH_STOP
from osmium.quant.expert_layout import ExpertLayout
from tests.ops.cases import allowed, compare, run
from tests.ptx.cases_linear import CASES, cache_of, came, guess_of, pieces_of, words_of
from tests.ptx.interpreter import InterpretedMachine, PtxFault, parse_program
from tests.ptx.test_barriers import AWAITED, right

RECORDS = {
    "a page": ExpertLayout(4, 64, 32),
    "gates and ups end inside of a piece": ExpertLayout(4, 384, 128),
    "fewer pieces than blocks": ExpertLayout(16, 128, 128),
    "a piece more than blocks": ExpertLayout(16, 376, 120),
    "no piece of down for some": ExpertLayout(16, 512, 128),
}

PLANS = {
    "nothing": (0, 0),
    "one": (1,),
    "the last but one": (0, 1, 0),
    "several": (1, 0, 1, 1),
    "more entries than lanes": (1, *[0] * 33, 1, 0),
    "the last lanes have none": (0, 1, *[0] * 33),
    "a guess": (2,),
    "a guess and others": (2, 0, 1, 1),
}


def fetched(
    rng: np.random.Generator, record: ExpertLayout, fetch: tuple[int, ...], text: str
) -> Any:
    """A plan carried out by a text of fetch_records: entries fetched, their slots' bytes before
    and after, their records, and the words.  Of a guess some pieces are there."""
    ops, used = GpuOps(InterpretedMachine(int(rng.integers(99)))), len(fetch)
    ops.runtime.stream.programs["fetch_records"] = parse_program(text)
    arena = rng.integers(0, 256, (1, used, record.nbytes), dtype=np.uint8)
    before = rng.integers(0, 256, (1, used, record.nbytes), dtype=np.uint8)
    slot = rng.permutation(used).astype(np.int32)
    guess = None
    if fetch[0] == 2:
        done = rng.integers(0, pieces_of(record) + 1).astype(np.int32)
        there = came(record, done)
        before[0, slot[0], there] = arena[0, 0, there]
        state = words_of(np.ones((1, FETCH_BLOCKS)), PREFETCH_STOP)
        guess = guess_of(None, None, ops.to_device(state), ops.to_device(done[None]))
    slots, words = ops.to_device(before), ops.to_device(np.zeros(2, np.int32))
    counters = ops.to_device(np.zeros(7, np.int64))
    cache = cache_of(record, slots, np.empty((1, used), np.int32), counters)
    plan = SlotAssignment(
        ops.to_device(np.array([used], np.int32)), ops.to_device(np.arange(used, dtype=np.int32)),
        ops.to_device(slot), ops.to_device(np.array(fetch, np.int32)), ops.to_device(np.ones(used,
        np.int32)),
        None, words,
    )  # fmt: skip
    ops.fetch_experts(cache, plan, HostExperts(record, ops.to_device(arena)), 0, prefetch=guess)
    who = np.flatnonzero(fetch)
    after = ops.copy_d2h(slots)
    return before[0, slot[who]], after[0, slot[who]], arena[0, who], ops.copy_d2h(words)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", RECORDS)
def test_every_warp_says_that_it_is_done(rng: np.random.Generator, name: str, plan: str) -> None:
    assert FETCH_WARPS % (FETCH.contract.block // 32) == 0
    text = FETCH.contract.text
    _, after, wanted, words = fetched(rng, RECORDS[name], PLANS[plan], text)
    np.testing.assert_array_equal(after, wanted)
    assert list(words) == [FETCH_WARPS, FETCH_WARPS]


@pytest.mark.parametrize("nbytes", [128, (1 << 18) - 128, 1 << 18, 700_000])
@pytest.mark.parametrize("plan", ["nothing", "one", "several"])
def test_what_is_read_next_is_asked_for_once(
    rng: np.random.Generator, plan: str, nbytes: int
) -> None:
    """Up to 256 KiB with each piece of the last record's down part, and never past its end."""
    record, fetch = RECORDS["a piece more than blocks"], PLANS[plan]
    machine, used = InterpretedMachine(int(rng.integers(99))), len(fetch)
    ops = GpuOps(machine)

    def i32(values: Any) -> Any:
        return ops.to_device(np.array(values, np.int32))

    ahead = ops.empty((nbytes,), np.uint8)
    slots = ops.to_device(np.zeros((1, used, record.nbytes), np.uint8))
    every = range(used)
    plan_of = SlotAssignment(
        i32([used]), i32(every), i32(every), i32(fetch), i32([1] * used), None, i32([0, 0])
    )
    cache = cache_of(
        record, slots, np.empty((1, used), np.int32), ops.to_device(np.zeros(7, np.int64))
    )
    ops.fetch_experts(cache, plan_of, HostExperts(record, slots), 0, ahead)
    pieces = -(-record.nbytes // (1 << 14)) - -(-record.down // (1 << 14))
    most = min(nbytes, pieces << 18, machine.l2 // 2) if any(fetch) else 0
    assert pieces > 1
    assert sorted(machine.prefetched) == list(range(ahead.ptr, ahead.ptr + most, 128))


@pytest.mark.parametrize(
    "plan", ["one", "the last but one", "several", "a guess", "a guess and others"]
)
def test_gates_and_ups_are_stored_when_that_is_said(rng: np.random.Generator, plan: str) -> None:
    """Warps that leave as soon as they have said it."""
    record = ExpertLayout(16, 512, 344)
    text, ways = re.subn(r"(setp.eq.u32 +%said, %lane, %lane;)", r"\1 ret;", FETCH.contract.text)
    before, after, wanted, words = fetched(rng, record, PLANS[plan], text)
    assert ways == 1 and words[0] == FETCH_WARPS and words[1] < FETCH_WARPS
    np.testing.assert_array_equal(after[:, : record.down], wanted[:, : record.down])
    last = slice(record.down + (1 << 14), None)
    np.testing.assert_array_equal(after[-1, last], before[-1, last])


def late(seed: int, without: tuple[str, int] | None = None, last: bool = True) -> bool:
    """Whether experts come out right of which the gates and ups, then the rest arrive while the
    halves look for them; without one barrier of theirs, or with the last word never said."""
    make = CASES["int4_experts in parts"]
    wanted = run(make(np.random.default_rng(seed)), ReferenceOps(cache_bytes=0))
    case, machine = make(np.random.default_rng(seed)), InterpretedMachine(seed, without)
    down, call = ExpertLayout(4, 256, 128).down, case.call

    def arriving(ops: Any, a: dict[str, Any]) -> None:
        slots, words, pairs = (a[name].numpy() for name in ("slots", "arrived", "pairs"))
        slot = np.where(pairs < 0, ~pairs, pairs)
        whole, who = slots.copy(), np.unique(slot)[::2]
        pairs[...] = np.where(np.isin(slot, who), ~slot, slot)
        slots[0, who], words[:] = 0x5A, 0

        def some(word: int, part: slice) -> None:
            slots[0, who, part] = whole[0, who, part]
            words[word] = FETCH_WARPS

        def short(word: int) -> None:
            words[word] = FETCH_WARPS - 1

        then = {
            "int4_experts_up_f32": [lambda: short(0), lambda: some(0, slice(down))],
            "int4_experts_down_f32": [lambda: short(1), lambda: some(1, slice(down, None))],
        }
        launch = machine.stream.launch

        def launched(kernel: Any, grid: tuple[int, ...], values: tuple[Any, ...]) -> None:
            if kernel.name in then:
                machine.stream.beside = then[kernel.name][: 2 if last else 1]  # of parts, the last
            launch(kernel, grid, values)

        machine.stream.launch = launched  # type: ignore[method-assign]
        call(ops, a)

    found = run(replace(case, call=arriving), GpuOps(machine))
    return all(
        compare(found[k], wanted[k], kind) <= allowed(kind) for k, kind in case.writes.items()
    )


def test_halves_wait_for_what_they_read() -> None:
    assert all(late(seed) for seed in range(2))


@pytest.mark.parametrize(("name", "which"), AWAITED)
def test_a_half_without_its_barrier_reads_too_soon(name: str, which: int) -> None:
    assert not all(late(seed, (name, which)) for seed in range(6))


def test_what_never_arrives_is_given_up() -> None:
    with pytest.raises(PtxFault, match="gives up"):
        late(0, last=False)


def told(seed: int, word: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """What an early fetch leaves that is told `word` at any time; and what was there before."""
    case = CASES["fetch early up to four pieces a block"](np.random.default_rng(seed))
    machine = InterpretedMachine(seed)

    def placed(ops: Any, a: dict[str, Any]) -> None:
        def stop() -> None:
            a["state"].numpy()[1] |= word
            a["expert"].numpy()[1] = -1

        machine.stream.beside = [*[lambda: None] * 40, stop]
        case.call(ops, a)
        assert not machine.stream.beside

    found = run(replace(case, call=placed), GpuOps(machine))
    assert (found["state"][1] == words_of(np.ones(FETCH_BLOCKS), word)).all()
    return found, case.arrays


def test_what_is_fetched_early_ends_at_the_next_piece() -> None:
    """The layer is placed at any time: each block has stored the pieces that it says, and left."""
    record, cut = ExpertLayout(16, 256, 528), False
    most = pieces_of(record)
    for seed in range(8):
        found, before = told(seed, PREFETCH_STOP)
        done, slot = found["done"][1], before["slot"][1] - 3
        wanted, there = before["slots"].copy(), came(record, done)
        wanted[1, slot, there] = before["arena"][1, before["expert"][1], there]
        np.testing.assert_array_equal(found["slots"], wanted)
        assert (done == most).any() and (done == 0).any()
        cut |= bool(((0 < done) & (done < most)).any())
    assert cut, "no block was told between two of its pieces"


def test_what_nobody_asked_for_ends_inside_of_a_piece() -> None:
    """The guess was wrong: each block has stored what it had begun, in order, and left."""
    cut = False
    for seed in range(8):
        found, before = told(seed, PREFETCH_STOP + PREFETCH_DISCARD)
        slot, expert = before["slot"][1] - 3, before["expert"][1]
        after, old, new = (
            rows.reshape(-1, 4096)
            for rows in (
                found["slots"][1, slot],
                before["slots"][1, slot],
                before["arena"][1, expert],
            )
        )
        there = (after == new).all(1)
        np.testing.assert_array_equal(after[~there], old[~there])
        block = np.arange(len(there)) // 4 % (FETCH_BLOCKS)
        for mine in (there[block == i] for i in range(FETCH_BLOCKS)):
            stored = int(mine.sum())
            assert mine[:stored].all()
            cut |= 0 < stored < len(mine) and stored % 4 > 0
    assert cut, "no block was told inside of a piece"


@pytest.mark.parametrize(
    ("waits", "instead"),
    [
        (r"cp\.async\.bulk\.wait_group\.read 1;", ""),
        (r"cp\.async\.bulk\.wait_group +0;", ""),
        (r"cp\.async\.bulk\.wait_group +0;", "cp.async.bulk.wait_group.read 0;"),
        (r"fence\.proxy\.async\.shared::cta;", ""),
        (r"@!%here bra +not_yet;", ""),
    ],
)
def test_an_early_fetch_that_does_not_wait_fails(waits: str, instead: str) -> None:
    text, ways = re.subn(waits, instead, FETCH_EARLY.contract.text)
    make = CASES["fetch early up to four pieces a block"]
    assert ways == 1 and right(make, 0, None)
    assert not any(right(make, seed, None, {"fetch_early": text}) for seed in range(2))


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("fetch a guess, up to four pieces a block", (256, 528)),
        ("fetch a guess and others", (256, 200)),
    ],
)
def test_what_came_early_is_not_copied_again(
    rng: np.random.Generator, name: str, size: tuple[int, int]
) -> None:
    """Other bytes in its place stay."""
    case = CASES[name](rng)
    wanted, slot = run(case, ReferenceOps())["slots"], case.arrays["slot"][0]
    there = came(ExpertLayout(16, *size), case.arrays["done"][0])
    case.arrays["slots"][0, slot, there] ^= 0xFF
    wanted[0, slot, there] ^= 0xFF
    found = run(case, GpuOps(InterpretedMachine(int(rng.integers(99)))))["slots"]
    assert there.any()
    np.testing.assert_array_equal(found, wanted)


def beside_the_last(name: str, seed: int, ends: bool = True) -> bool:
    """Whether a fetch comes out right whose guess is stored, and said to be, while it looks; with
    the blocks that have begun leaving, or not."""
    make = CASES[name]
    wanted = run(make(np.random.default_rng(seed)), ReferenceOps())
    case, machine = make(np.random.default_rng(seed)), InterpretedMachine(seed)

    def ending(ops: Any, a: dict[str, Any]) -> None:
        state, done, slots = (a[name].numpy() for name in ("state", "done", "slots"))
        slot, stored = a["slot"].numpy()[0], done.copy()
        there = came(ExpertLayout(16, 256, 200), stored[0])
        part = slots[0, slot, there]
        slots[0, slot, there], done[...] = 0x5A, 0
        state -= (state & 1) << 15

        def end() -> None:
            slots[0, slot, there], done[...] = part, stored
            state[...] += (state & 1) << 15

        machine.stream.beside = [lambda: None, end] if ends else []
        case.call(ops, a)
        assert not machine.stream.beside, "it has not waited"

    found = run(replace(case, call=ending), GpuOps(machine))
    return all(np.array_equal(found[k], wanted[k]) for k in case.writes)


@pytest.mark.parametrize("name", ["fetch a guess and others", "fetch others than the guess"])
def test_a_fetch_waits_for_what_is_fetched_early(name: str) -> None:
    assert all(beside_the_last(name, seed) for seed in range(4))


def test_a_fetch_of_nothing_waits_for_nobody() -> None:
    case = CASES["fetch nothing, not the guess either"](np.random.default_rng(0))
    state = case.arrays["state"]
    state -= (state & 1) << 15
    wanted, found = (run(case, ops) for ops in (ReferenceOps(), GpuOps(InterpretedMachine(0))))
    assert all(np.array_equal(found[k], wanted[k]) for k in case.writes)


def test_what_never_leaves_is_given_up() -> None:
    with pytest.raises(PtxFault, match="gives up"):
        beside_the_last("fetch a guess and others", 0, ends=False)
