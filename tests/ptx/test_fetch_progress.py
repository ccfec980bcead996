"""Progress words of a fetch, waits of the expert kernels for them, and the end of a prefetch."""

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from osmium.ops import HostExperts, SlotAssignment
from osmium.ops.gpu import GpuOps
from osmium.ops.gpu_experts import FETCH_EXPERTS, PREFETCH_EXPERTS
from osmium.ops.reference import ReferenceOps
from osmium.ops.types import FETCH_BLOCKS, FETCH_WARPS, PREFETCH_DISCARD, PREFETCH_STOP
from osmium.quant.expert_layout import ExpertLayout
from tests.ops.cases import allowed, compare, run
from tests.ptx.cases_linear import (
    CASES,
    cache_of,
    copied_bytes,
    prefetch_of,
    segments_of,
    state_words,
)
from tests.ptx.interpreter import InterpretedRuntime, PtxFault, parse_program
from tests.ptx.test_barriers import BARRIERS_AFTER_WAITS, is_right

LAYOUTS = {
    "a page": ExpertLayout(4, 64, 32),
    "gate/up ends inside of a segment": ExpertLayout(4, 384, 128),
    "fewer segments than blocks": ExpertLayout(16, 128, 128),
    "one segment more than blocks": ExpertLayout(16, 376, 120),
    "no down segment for some warps": ExpertLayout(16, 512, 128),
}

PLANS = {
    "nothing": (0, 0),
    "one": (1,),
    "the last but one": (0, 1, 0),
    "several": (1, 0, 1, 1),
    "more entries than lanes": (1, *[0] * 33, 1, 0),
    "the last lanes have none": (0, 1, *[0] * 33),
    "prefetched": (2,),
    "prefetched and others": (2, 0, 1, 1),
}


def run_fetch(
    rng: np.random.Generator, layout: ExpertLayout, fetch: tuple[int, ...], text: str
) -> Any:
    """Run a text of fetch_experts. Returns the fetched slots' bytes before and after, their
    experts' bytes, and the progress words.

    With prefetch some segments are copied before.
    """
    ops, used = GpuOps(InterpretedRuntime(int(rng.integers(99)))), len(fetch)
    ops.runtime.stream.programs["fetch_experts"] = parse_program(text)
    experts = rng.integers(0, 256, (1, used, layout.nbytes), dtype=np.uint8)
    before = rng.integers(0, 256, (1, used, layout.nbytes), dtype=np.uint8)
    slot = rng.permutation(used).astype(np.int32)
    prefetch = None
    if fetch[0] == 2:
        done = rng.integers(0, segments_of(layout) + 1).astype(np.int32)
        copied = copied_bytes(layout, done)
        before[0, slot[0], copied] = experts[0, 0, copied]
        state = state_words(np.ones((1, FETCH_BLOCKS)), PREFETCH_STOP)
        prefetch = prefetch_of(None, None, ops.to_device(state), ops.to_device(done[None]))
    slots, words = ops.to_device(before), ops.to_device(np.zeros(2, np.int32))
    counters = ops.to_device(np.zeros(7, np.int64))
    cache = cache_of(layout, slots, np.empty((1, used), np.int32), counters)
    plan = SlotAssignment(
        ops.to_device(np.array([used], np.int32)), ops.to_device(np.arange(used, dtype=np.int32)),
        ops.to_device(slot), ops.to_device(np.array(fetch, np.int32)), ops.to_device(np.ones(used,
        np.int32)),
        None, words,
    )  # fmt: skip
    ops.fetch_experts(
        cache, plan, HostExperts(layout, ops.to_device(experts)), 0, prefetch=prefetch
    )
    fetched_ids = np.flatnonzero(fetch)
    after = ops.copy_d2h(slots)
    return (
        before[0, slot[fetched_ids]],
        after[0, slot[fetched_ids]],
        experts[0, fetched_ids],
        ops.copy_d2h(words),
    )


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_warp_reports_both_parts_done(rng: np.random.Generator, name: str, plan: str) -> None:
    assert FETCH_WARPS % (FETCH_EXPERTS.contract.block // 32) == 0
    text = FETCH_EXPERTS.contract.text
    _, after, wanted, words = run_fetch(rng, LAYOUTS[name], PLANS[plan], text)
    np.testing.assert_array_equal(after, wanted)
    assert list(words) == [FETCH_WARPS, FETCH_WARPS]


@pytest.mark.parametrize("nbytes", [128, (1 << 18) - 128, 1 << 18, 700_000])
@pytest.mark.parametrize("plan", ["nothing", "one", "several"])
def test_the_l2_prefetch_requests_each_line_once(
    rng: np.random.Generator, plan: str, nbytes: int
) -> None:
    """At most 256 KiB with each segment of the last expert's down part, and never past the end."""
    layout, fetch = LAYOUTS["one segment more than blocks"], PLANS[plan]
    machine, used = InterpretedRuntime(int(rng.integers(99))), len(fetch)
    ops = GpuOps(machine)

    def i32(values: Any) -> Any:
        return ops.to_device(np.array(values, np.int32))

    l2_range = ops.empty((nbytes,), np.uint8)
    slots = ops.to_device(np.zeros((1, used, layout.nbytes), np.uint8))
    entries = range(used)
    plan_of = SlotAssignment(
        i32([used]), i32(entries), i32(entries), i32(fetch), i32([1] * used), None, i32([0, 0])
    )
    cache = cache_of(
        layout, slots, np.empty((1, used), np.int32), ops.to_device(np.zeros(7, np.int64))
    )
    ops.fetch_experts(cache, plan_of, HostExperts(layout, slots), 0, l2_range)
    pieces = -(-layout.nbytes // (1 << 14)) - -(-layout.down // (1 << 14))
    most = min(nbytes, pieces << 18, machine.l2 // 2) if any(fetch) else 0
    assert pieces > 1
    assert sorted(machine.prefetched) == list(range(l2_range.ptr, l2_range.ptr + most, 128))


@pytest.mark.parametrize(
    "plan", ["one", "the last but one", "several", "prefetched", "prefetched and others"]
)
def test_gate_up_is_stored_when_its_progress_word_is_complete(
    rng: np.random.Generator, plan: str
) -> None:
    """Warps end as soon as they have reported gate/up."""
    layout = ExpertLayout(16, 512, 344)
    wanted = r"(setp.eq.u32 +%gate_up_signaled, %lane, %lane;)"
    text, replacements = re.subn(wanted, r"\1 ret;", FETCH_EXPERTS.contract.text)
    before, after, wanted, words = run_fetch(rng, layout, PLANS[plan], text)
    assert replacements == 1 and words[0] == FETCH_WARPS and words[1] < FETCH_WARPS
    np.testing.assert_array_equal(after[:, : layout.down], wanted[:, : layout.down])
    last = slice(layout.down + (1 << 14), None)
    np.testing.assert_array_equal(after[-1, last], before[-1, last])


def right_when_data_arrives_late(
    seed: int, without: tuple[str, int] | None = None, last: bool = True
) -> bool:
    """Whether the results are right when gate/up, then down, arrive while the expert kernels poll.

    Optionally without one barrier, or with the last progress word incomplete.
    """
    make = CASES["int4_experts in parts"]
    wanted = run(make(np.random.default_rng(seed)), ReferenceOps(cache_bytes=0))
    case, machine = make(np.random.default_rng(seed)), InterpretedRuntime(seed, without)
    down, call = ExpertLayout(4, 256, 128).down, case.call

    def arrive_late(ops: Any, a: dict[str, Any]) -> None:
        slots, words, pairs = (
            a[name].numpy() for name in ("slots", "fetch_progress", "pair_slots")
        )
        slot = np.where(pairs < 0, ~pairs, pairs)
        complete, fetched_ids = slots.copy(), np.unique(slot)[::2]
        pairs[...] = np.where(np.isin(slot, fetched_ids), ~slot, slot)
        slots[0, fetched_ids], words[:] = 0x5A, 0

        def complete_part(word: int, part: slice) -> None:
            slots[0, fetched_ids, part] = complete[0, fetched_ids, part]
            words[word] = FETCH_WARPS

        def incomplete(word: int) -> None:
            words[word] = FETCH_WARPS - 1

        callbacks = {
            "int4_moe_up_fused_f32": [lambda: incomplete(0), lambda: complete_part(0, slice(down))],
            "int4_moe_down_fused_f32": [
                lambda: incomplete(1),
                lambda: complete_part(1, slice(down, None)),
            ],
        }
        launch = machine.stream.launch

        def recording_launch(kernel: Any, grid: tuple[int, ...], values: tuple[Any, ...]) -> None:
            if kernel.name in callbacks:
                machine.stream.concurrent = callbacks[kernel.name][
                    : 2 if last else 1
                ]  # the last part only
            launch(kernel, grid, values)

        machine.stream.launch = recording_launch  # type: ignore[method-assign]
        call(ops, a)

    found = run(replace(case, call=arrive_late), GpuOps(machine))
    return all(
        compare(found[k], wanted[k], kind) <= allowed(kind) for k, kind in case.writes.items()
    )


def test_expert_kernels_wait_for_the_bytes_they_read() -> None:
    assert all(right_when_data_arrives_late(seed) for seed in range(2))


@pytest.mark.parametrize(("name", "which"), BARRIERS_AFTER_WAITS)
def test_an_expert_kernel_without_its_barrier_reads_too_early(name: str, which: int) -> None:
    assert not all(right_when_data_arrives_late(seed, (name, which)) for seed in range(6))


def test_waiting_for_a_fetch_that_never_ends_is_a_fault() -> None:
    with pytest.raises(PtxFault, match="gives up"):
        right_when_data_arrives_late(0, last=False)


def stopped_prefetch(seed: int, word: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arrays after a prefetch that finds `word` in its state at any time, and those before."""
    case = CASES["prefetch up to four segments a block"](np.random.default_rng(seed))
    machine = InterpretedRuntime(seed)

    def assign_meanwhile(ops: Any, a: dict[str, Any]) -> None:
        def stop() -> None:
            a["state"].numpy()[1] |= word
            a["expert"].numpy()[1] = -1

        machine.stream.concurrent = [*[lambda: None] * 40, stop]
        case.call(ops, a)
        assert not machine.stream.concurrent

    found = run(replace(case, call=assign_meanwhile), GpuOps(machine))
    assert (found["state"][1] == state_words(np.ones(FETCH_BLOCKS), word)).all()
    return found, case.arrays


def test_a_stopped_prefetch_ends_after_a_whole_segment() -> None:
    """Slots are assigned at any time; each block has stored its reported segments and ended."""
    layout, stopped_midway = ExpertLayout(16, 256, 528), False
    most = segments_of(layout)
    for seed in range(8):
        found, before = stopped_prefetch(seed, PREFETCH_STOP)
        done, slot = found["segments_done"][1], before["slot"][1] - 3
        wanted, copied = before["slots"].copy(), copied_bytes(layout, done)
        wanted[1, slot, copied] = before["host_experts"][1, before["expert"][1], copied]
        np.testing.assert_array_equal(found["slots"], wanted)
        assert (done == most).any() and (done == 0).any()
        stopped_midway |= bool(((0 < done) & (done < most)).any())
    assert stopped_midway, "no block stopped between two of its segments"


def test_a_dropped_prefetch_ends_inside_of_a_segment() -> None:
    """The prediction was wrong; each block has stored what it had started, in order, and ended."""
    stopped_midway = False
    for seed in range(8):
        found, before = stopped_prefetch(seed, PREFETCH_STOP + PREFETCH_DISCARD)
        slot, expert = before["slot"][1] - 3, before["expert"][1]
        after, old, new = (
            rows.reshape(-1, 4096)
            for rows in (
                found["slots"][1, slot],
                before["slots"][1, slot],
                before["host_experts"][1, expert],
            )
        )
        copied = (after == new).all(1)
        np.testing.assert_array_equal(after[~copied], old[~copied])
        block = np.arange(len(copied)) // 4 % (FETCH_BLOCKS)
        for block_copied in (copied[block == i] for i in range(FETCH_BLOCKS)):
            stored = int(block_copied.sum())
            assert block_copied[:stored].all()
            stopped_midway |= 0 < stored < len(block_copied) and stored % 4 > 0
    assert stopped_midway, "no block stopped inside of a segment"


@pytest.mark.parametrize(
    ("waits", "instead"),
    [
        (r"cp\.async\.bulk\.wait_group\.read 1;", ""),
        (r"cp\.async\.bulk\.wait_group +0;", ""),
        (r"cp\.async\.bulk\.wait_group +0;", "cp.async.bulk.wait_group.read 0;"),
        (r"fence\.proxy\.async\.shared::cta;", ""),
        (r"@!%ready bra +wait_chunk;", ""),
    ],
)
def test_a_prefetch_without_one_of_its_waits_fails(waits: str, instead: str) -> None:
    text, replacements = re.subn(waits, instead, PREFETCH_EXPERTS.contract.text)
    make = CASES["prefetch up to four segments a block"]
    assert replacements == 1 and is_right(make, 0, None)
    assert not any(is_right(make, seed, None, {"prefetch_experts": text}) for seed in range(2))


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("fetch with prefetch, up to four segments a block", (256, 528)),
        ("fetch with prefetch and others", (256, 200)),
    ],
)
def test_prefetched_segments_are_not_copied_again(
    rng: np.random.Generator, name: str, size: tuple[int, int]
) -> None:
    """Other bytes in their place remain."""
    case = CASES[name](rng)
    wanted, slot = run(case, ReferenceOps())["slots"], case.arrays["slot"][0]
    copied = copied_bytes(ExpertLayout(16, *size), case.arrays["segments_done"][0])
    case.arrays["slots"][0, slot, copied] ^= 0xFF
    wanted[0, slot, copied] ^= 0xFF
    found = run(case, GpuOps(InterpretedRuntime(int(rng.integers(99)))))["slots"]
    assert copied.any()
    np.testing.assert_array_equal(found, wanted)


def right_when_prefetch_ends_late(name: str, seed: int, ends: bool = True) -> bool:
    """Whether a fetch is right whose prefetch stores its segments while the fetch polls.

    The prefetch's blocks end, or never end.
    """
    make = CASES[name]
    wanted = run(make(np.random.default_rng(seed)), ReferenceOps())
    case, machine = make(np.random.default_rng(seed)), InterpretedRuntime(seed)

    def end_late(ops: Any, a: dict[str, Any]) -> None:
        state, done, slots = (a[name].numpy() for name in ("state", "segments_done", "slots"))
        slot, stored = a["slot"].numpy()[0], done.copy()
        copied = copied_bytes(ExpertLayout(16, 256, 200), stored[0])
        part = slots[0, slot, copied]
        slots[0, slot, copied], done[...] = 0x5A, 0
        state -= (state & 1) << 15

        def end() -> None:
            slots[0, slot, copied], done[...] = part, stored
            state[...] += (state & 1) << 15

        machine.stream.concurrent = [lambda: None, end] if ends else []
        case.call(ops, a)
        assert not machine.stream.concurrent, "the fetch did not wait"

    found = run(replace(case, call=end_late), GpuOps(machine))
    return all(np.array_equal(found[k], wanted[k]) for k in case.writes)


@pytest.mark.parametrize(
    "name", ["fetch with prefetch and others", "fetch others than the prefetched"]
)
def test_a_fetch_waits_for_a_running_prefetch(name: str) -> None:
    assert all(right_when_prefetch_ends_late(name, seed) for seed in range(4))


def test_a_fetch_of_nothing_does_not_wait() -> None:
    case = CASES["fetch nothing, with a wrong prefetch"](np.random.default_rng(0))
    state = case.arrays["state"]
    state -= (state & 1) << 15
    wanted, found = (run(case, ops) for ops in (ReferenceOps(), GpuOps(InterpretedRuntime(0))))
    assert all(np.array_equal(found[k], wanted[k]) for k in case.writes)


def test_waiting_for_a_prefetch_that_never_ends_is_a_fault() -> None:
    with pytest.raises(PtxFault, match="gives up"):
        right_when_prefetch_ends_late("fetch with prefetch and others", 0, ends=False)
