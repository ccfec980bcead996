"""The interpreter on snippets with known results: values and reported faults."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from osmium.kernels.ptx import Kernel, parse
from osmium.quant.floats import bf16_from_f32, f32_from_bf16, f32_from_e4m3
from tests.ptx import interpreter
from tests.ptx.interpreter import InterpretedArray, InterpretedRuntime, PtxFault, Values

LANE = np.arange(32, dtype=np.uint32)

ORDERS = range(8)
"""Seeds of the order of warps."""


def module(body: str, inputs: int, sizes: list[int], block: int, shared: int) -> str:
    """A kernel around a body.

    Its parameters are the arrays in0, in1, ... and out. When the body starts, %t is the thread.
    %in0, %in1, ... and %out are the addresses of this thread's elements of `sizes` bytes.
    """
    names = [*(f"in{i}" for i in range(inputs)), "out"]
    contract = "\n".join(
        f"//: param {name} u64 {'out' if name == 'out' else 'in'} u8[.]" for name in names
    )
    own = "\n".join(
        f"ld.param.u64 %{name}, [{name}]; mad.wide.u32 %{name}, %t, {size}, %{name};"
        for name, size in zip(names, sizes, strict=True)
    )
    memory = f".shared .align 16 .b8 memory[{shared}];" if shared else ""
    return f"""//: entry snippet
//: grid blocks
//: block {block}
//: shared {shared}
{contract}
.version 7.8
.target sm_80
.address_size 64
.visible .entry snippet({", ".join(f".param .u64 {name}" for name in names)})
.maxntid {block}
{{
    .reg .pred %p, %q;
    .reg .b16 %h, %k;
    .reg .b32 %t, %a, %b, %c, %d, %i;
    .reg .b64 %wide, %far;
    .reg .b64 {", ".join("%" + name for name in names)};
    {memory}
    mov.u32 %t, %tid.x;
    {own}
    {body}
}}
"""


def run(
    body: str, *inputs: Values, out: Any = np.uint32, count: int | None = None, block: int = 32,
    shared: int = 0, seed: int = 0, without: int | None = None, blocks: int = 1,
    fresh: bool = False,
) -> Values:  # fmt: skip
    """The array `out` after a body: one element per thread, or `count`.

    It starts as all ones, or unwritten with `fresh`.
    """
    machine = InterpretedRuntime(seed, None if without is None else ("snippet", without))
    arrays: list[InterpretedArray] = []
    for value in inputs:
        arrays.append(machine.empty(value.shape, value.dtype))
        machine.copy_h2d(arrays[-1], value)
    result = machine.empty((block if count is None else count,), out)
    if not fresh:
        machine.memset(result, 0xFF)
    sizes = [array.dtype.itemsize for array in (*arrays, result)]
    text = module(body, len(inputs), sizes, block, shared)
    launch(machine, text, *arrays, result, blocks=blocks)
    return machine.copy_d2h(result)


def launch(
    machine: InterpretedRuntime, text: str, *arrays: InterpretedArray, blocks: int = 1
) -> None:
    kernel = Kernel("snippet", lambda: parse(text, "snippet.ptx"))
    machine.stream.launch(kernel, (blocks,), arrays)


def refuse(line: str, body: str, *inputs: Values, **more: Any) -> str:
    """Run a body that must fail, and return the error, which names the line."""
    with pytest.raises(PtxFault, match=re.escape(f"snippet: {line}")) as caught:
        run(body, *inputs, **more)
    return str(caught.value)


# -- control flow ----------------------------------------------------------------------------------


def test_divergent_lanes_reconverge() -> None:
    """The shuffle needs all 32 lanes, so it also proves that they reconverged."""
    body = """
        setp.lt.u32 %p, %t, 10;
        @%p bra low;
        mul.lo.u32 %a, %t, 3;
        bra met;
    low:
        add.u32 %a, %t, 100;
    met:
        shfl.sync.bfly.b32 %b, %a, 1, 31, 0xffffffff;
        st.global.u32 [%out], %b;
    """
    each = np.where(LANE < 10, LANE + 100, LANE * 3)
    assert np.array_equal(run(body), each[LANE ^ 1])


@pytest.mark.parametrize(("edge", "found"), [(0, 1), (32, 2)])
def test_a_uniform_branch_is_taken_by_all_or_none(edge: int, found: int) -> None:
    body = f"""
        setp.lt.u32 %p, %t, {edge};
        mov.u32 %a, 2;
        @%p bra.uni low;
        mov.u32 %a, 1;
    low:
        st.global.u32 [%out], %a;
    """
    assert (run(body) == found).all()


def test_divergence_at_a_uniform_branch_is_reported() -> None:
    refuse("@%p bra.uni low", "setp.lt.u32 %p, %t, 10; @%p bra.uni low; low: ret;")


def test_a_loop_ends_lane_by_lane(rng: np.random.Generator) -> None:
    trips = rng.integers(0, 20, 32).astype(np.uint32)
    body = """
        ld.global.u32 %i, [%in0];
        mov.u32 %a, 0;
    again:
        setp.eq.u32 %p, %i, 0;
        @%p bra done;
        add.u32 %a, %a, %i;
        sub.u32 %i, %i, 1;
        bra again;
    done:
        shfl.sync.idx.b32 %b, %a, 0, 31, 0xffffffff;
        sub.u32 %a, %a, %b;
        st.global.u32 [%out], %a;
    """
    sums = trips * (trips + np.uint32(1)) // np.uint32(2)
    assert np.array_equal(run(body, trips), sums - sums[0])


def test_branches_nest() -> None:
    body = """
        mov.u32 %a, 0;
        setp.ge.u32 %p, %t, 16;
        @!%p bra outer;
        add.u32 %a, %a, 1;
        setp.ge.u32 %q, %t, 24;
        @!%q bra inner;
        add.u32 %a, %a, 10;
    inner:
        add.u32 %a, %a, 100;
    outer:
        add.u32 %a, %a, 1000;
        st.global.u32 [%out], %a;
    """
    wanted = np.where(LANE < 16, 1000, np.where(LANE < 24, 1101, 1111))
    assert np.array_equal(run(body), wanted)


def test_nested_loops_have_their_own_trip_counts(rng: np.random.Generator) -> None:
    """Lanes that exit a loop wait behind it for those that continue."""
    outer, inner = rng.integers(1, 6, (2, 32)).astype(np.uint32)
    body = """
        ld.global.u32 %b, [%in0];
        mov.u32 %a, 0;
    rows:
        ld.global.u32 %c, [%in1];
    columns:
        add.u32 %a, %a, %b;
        sub.u32 %c, %c, 1;
        setp.ne.u32 %p, %c, 0;
        @%p bra columns;
        sub.u32 %b, %b, 1;
        setp.ne.u32 %p, %b, 0;
        @%p bra rows;
        shfl.sync.bfly.b32 %a, %a, 16, 31, 0xffffffff;
        st.global.u32 [%out], %a;
    """
    wanted = inner * outer * (outer + np.uint32(1)) // np.uint32(2)
    assert np.array_equal(run(body, outer, inner), wanted[LANE ^ 16])


def test_a_false_predicate_skips_an_instruction() -> None:
    """Also its fault: the store under %q would be out of bounds."""
    body = """
        setp.lt.u32 %p, %t, 5;
        setp.gt.u32 %q, %t, 31;
        mov.u32 %a, 7;
        @%p mov.u32 %a, 8;
        @!%p add.u32 %a, %a, %t;
        add.u64 %far, %out, 65536;
        @%q st.global.u32 [%far], %a;
        st.global.u32 [%out], %a;
    """
    assert np.array_equal(run(body), np.where(LANE < 5, 8, 7 + LANE))


def test_an_exited_lane_executes_nothing() -> None:
    body = """
        setp.ge.u32 %p, %t, 20;
        @%p ret;
        st.global.u32 [%out], %t;
    """
    assert np.array_equal(run(body), np.where(LANE < 20, LANE, np.uint32(0xFFFFFFFF)))


def test_predicates_combine() -> None:
    body = """
        setp.ge.u32 %p, %t, 8;
        setp.lt.u32 %q, %t, 24;
        and.pred %p, %p, %q;
        selp.b32 %a, 1, 2, %p;
        st.global.u32 [%out], %a;
    """
    assert np.array_equal(run(body), np.where((LANE >= 8) & (LANE < 24), 1, 2))


def test_every_block_and_warp_runs_once() -> None:
    body = """
        ld.param.u64 %far, [out];
        mov.u32 %a, %ctaid.x;
        mov.u32 %b, %ntid.x;
        mad.lo.u32 %a, %a, %b, %t;
        mad.wide.u32 %far, %a, 4, %far;
        mov.u32 %c, %nctaid.x;
        mad.lo.u32 %a, %a, 10, %c;
        st.global.u32 [%far], %a;
    """
    found = run(body, block=64, blocks=3, count=192)
    assert np.array_equal(found, np.arange(192) * 10 + 3)


def test_a_loop_without_end_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interpreter, "STEPS", 200)
    assert "200" in refuse("bra for_ever", "for_ever: bra for_ever;")
    one_lane = """
        setp.eq.u32 %p, %t, 17;
    spin:
        @%p bra spin;
        st.global.u32 [%out], %t;
    """
    refuse("@%p bra spin", one_lane)


# -- shuffles --------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", [1, 2, 4, 8, 16, 31, 33])
def test_a_butterfly_shuffle_exchanges_lanes(by: int, rng: np.random.Generator) -> None:
    """Only the low five bits of the distance count."""
    value = rng.integers(0, 1 << 32, 32, np.uint32)
    body = f"""
        ld.global.u32 %a, [%in0];
        shfl.sync.bfly.b32 %a, %a, {by}, 31, 0xffffffff;
        st.global.u32 [%out], %a;
    """
    assert np.array_equal(run(body, value), value[LANE ^ (by & 31)])


def test_a_shuffle_by_index_reads_the_given_lanes(rng: np.random.Generator) -> None:
    value = rng.integers(0, 1 << 32, 32, np.uint32)
    source = rng.integers(0, 64, 32).astype(np.uint32)
    body = """
        ld.global.u32 %a, [%in0];
        ld.global.u32 %b, [%in1];
        shfl.sync.idx.b32 %a, %a, %b, 31, 0xffffffff;
        st.global.u32 [%out], %a;
    """
    assert np.array_equal(run(body, value, source), value[source & 31])


SHUFFLE = "shfl.sync.bfly.b32 %a, %t, 1, 31, 0xffffffff"


@pytest.mark.parametrize(
    "before",
    ["setp.lt.u32 %p, %t, 31; @!%p ret;", "setp.lt.u32 %p, %t, 31; @!%p bra past;"],
    ids=["left", "elsewhere"],
)
def test_a_shuffle_without_some_of_its_lanes_is_reported(before: str) -> None:
    refuse(SHUFFLE, f"{before} {SHUFFLE}; past: ret;")


def test_a_shuffle_under_a_divergent_predicate_is_reported() -> None:
    refuse(f"@%p {SHUFFLE}", f"setp.ne.u32 %p, %t, 0; @%p {SHUFFLE};")
    run(f"setp.lt.u32 %p, %t, 32; @%p {SHUFFLE};")


LANE_ROWS = """
    mul.wide.u32 %far, %t, 12;
    add.u64 %wide, %in0, %far;
    mov.u32 %i, memory;
    mad.lo.u32 %i, %t, 16, %i;
"""
"""%wide is the thread's 16 bytes of in0, %i its 16 bytes of shared memory."""


@pytest.mark.parametrize("how", ["", ".trans"])
def test_ldmatrix_gives_each_lane_its_fragment_of_four_matrices(
    how: str, rng: np.random.Generator
) -> None:
    value = rng.integers(0, 1 << 32, 128, np.uint32)
    body = f"""
        {LANE_ROWS}
        ld.global.v4.u32 {{%a, %b, %c, %d}}, [%wide];
        st.shared.v4.u32 [%i], {{%a, %b, %c, %d}};
        bar.sync 0;
        ldmatrix.sync.aligned.m8n8.x4{how}.shared.b16 {{%a, %b, %c, %d}}, [%i];
        add.u64 %wide, %out, %far;
        st.global.v4.u32 [%wide], {{%a, %b, %c, %d}};
    """
    found = run(body, value, count=128, shared=512).reshape(8, 4, 4).view(np.uint16)
    matrices = value.view(np.uint16).reshape(4, 8, 8)
    for g in range(8):
        for q in range(4):
            for i, matrix in enumerate(matrices):
                wanted = matrix[2 * q : 2 * q + 2, g] if how else matrix[g, 2 * q : 2 * q + 2]
                assert np.array_equal(found[g, q, 2 * i : 2 * i + 2], wanted)


def test_movmatrix_transposes_a_matrix_of_halves(rng: np.random.Generator) -> None:
    value = rng.integers(0, 1 << 32, 32, np.uint32)
    body = """
        ld.global.u32 %a, [%in0];
        movmatrix.sync.aligned.m8n8.trans.b16 %b, %a;
        st.global.u32 [%out], %b;
    """
    found = run(body, value).view(np.uint16).reshape(8, 8)
    assert np.array_equal(found, value.view(np.uint16).reshape(8, 8).T)


def test_cp_async_reads_the_given_number_of_bytes(rng: np.random.Generator) -> None:
    value = rng.integers(1, 256, (32, 16), np.uint8)
    body = f"""
        {LANE_ROWS}
        shr.u32 %a, %t, 1;
        cp.async.cg.shared.global [%i], [%wide], 16, %a;
        cp.async.commit_group;
        cp.async.wait_group 0;
        ld.shared.v4.u32 {{%a, %b, %c, %d}}, [%i];
        add.u64 %wide, %out, %far;
        st.global.v4.u32 [%wide], {{%a, %b, %c, %d}};
    """
    found = run(body, value.view(np.uint32).reshape(-1), count=128, shared=512)
    wanted = np.where(np.arange(16) < (LANE // 2)[:, None], value, 0)
    assert np.array_equal(found.view(np.uint8).reshape(32, 16), wanted)


# -- bulk copies -----------------------------------------------------------------------------------

MAKE = "mbarrier.init.shared::cta.b64 [%a+256], 1;"
FENCE = "fence.proxy.async.shared::cta;"
ARRIVE = "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%a+256], 128;"
LOAD = """
    cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes [%a], [%in0], 128, [%a+256];"""
AGAIN = "@!%q bra not_yet;"
WAIT = f"""
not_yet:
    mbarrier.try_wait.parity.shared::cta.b64 %q, [%a+256], 0;
    {AGAIN}"""
STORE = "cp.async.bulk.global.shared::cta.bulk_group [%out], [%a], 128;"
COMMIT = "cp.async.bulk.commit_group;"
STORED = "cp.async.bulk.wait_group 0;"
READ = "cp.async.bulk.wait_group.read 0;"

THERE_AND_BACK = f"""
    setp.ne.u32 %p, %t, 0;
    @%p bra over;
    mov.u32 %a, memory;
    {MAKE} {FENCE} {ARRIVE} {LOAD} {WAIT} {STORE} {COMMIT} {STORED}
over:
    ret;
"""
"""128 bytes, by the first lane."""


def bulk(body: str, seed: int, **more: Any) -> Values:
    return run(body, LANE, shared=264, seed=seed, **more)


@pytest.mark.parametrize("seed", ORDERS)
def test_a_bulk_copy_is_visible_after_its_wait(seed: int) -> None:
    assert np.array_equal(bulk(THERE_AND_BACK, seed), LANE)


def test_barrier_phases_alternate() -> None:
    once = f"{ARRIVE} {LOAD} {WAIT}"
    twice = once + once.replace("not_yet", "nor_yet").replace("%q, [%a+256], 0", "%q, [%a+256], 1")
    for seed in ORDERS:
        assert np.array_equal(bulk(THERE_AND_BACK.replace(once, twice), seed), LANE)
    early = twice.replace("%q, [%a+256], 1", "%q, [%a+256], 0")  # that phase is over
    for seed in ORDERS:
        with pytest.raises(PtxFault, match=r"not written|never"):
            bulk(THERE_AND_BACK.replace(once, early), seed)


@pytest.mark.parametrize(
    ("line", "instead", "fault"),
    [
        (FENCE, "", "no fence since"),
        (MAKE, "", "no barrier was made there"),
        (MAKE, MAKE + MAKE, "a barrier is there"),
        (MAKE, MAKE.replace("256", "252"), "8 bytes at offset 252"),
        (MAKE, MAKE.replace(", 1", ", 2"), "never; 1 are to arrive, 0 bytes"),
        (FENCE, FENCE + "st.shared.u32 [%a+260], 0;", "a barrier is there"),
        (ARRIVE, ARRIVE + ARRIVE, "more arrivals in a phase than 1"),
        (ARRIVE, ARRIVE.replace("128", "112"), "16 bytes more have come"),
        (ARRIVE, ARRIVE.replace("128", "144"), "never; 0 are to arrive, 16 bytes"),
        (ARRIVE, "", "never; 1 are to arrive, -128 bytes"),
        (LOAD, "", "never; 0 are to arrive, 128 bytes"),
        (LOAD, LOAD.replace(" 128", " 120"), "120 bytes"),
        (LOAD, LOAD.replace("[%a]", "[%a+8]"), "16 bytes at offset 8"),
        (LOAD, LOAD.replace("[%a]", "[%a+192]"), "bytes 192 to 320"),
        (WAIT, "", "not written"),
        (WAIT, WAIT.replace("], 0", "], 2"), "parities"),
        (STORE, STORE.replace("[%a]", "[%a+128]"), "not written"),
        (STORE, STORE.replace(" 128", " 136"), "136 bytes"),
        (COMMIT, "", "its bulk copies may still read"),
        (STORED, "", "its bulk copies may still read"),
        (STORED, STORED.replace("0", "1"), "its bulk copies may still read"),
        ("setp.ne", "setp.lt", "32 lanes; one"),
    ],
)
def test_a_faulty_bulk_copy_is_reported(line: str, instead: str, fault: str) -> None:
    """For every seed."""
    assert THERE_AND_BACK.count(line) == 1
    body = THERE_AND_BACK.replace(line, instead)
    for seed in ORDERS:
        with pytest.raises(PtxFault, match=fault):
            bulk(body, seed)


def test_reading_a_pending_bulk_copy_is_reported_for_some_seed() -> None:
    with pytest.raises(PtxFault, match="not written"):
        for seed in ORDERS:
            bulk(THERE_AND_BACK.replace(AGAIN, ""), seed)


def test_waiting_for_missing_bytes_is_reported() -> None:
    body = THERE_AND_BACK.replace(f"{WAIT} {STORE} {COMMIT} {STORED}", "")
    for seed in ORDERS:
        with pytest.raises(PtxFault, match="bytes are still to come"):
            bulk(body, seed)


@pytest.mark.parametrize(("read", "kept"), [(READ, True), ("", False)])
def test_shared_memory_may_be_reused_after_a_read_wait(read: str, kept: bool) -> None:
    body = THERE_AND_BACK.replace(STORED, f"{read} st.shared.u32 [%a], 77; {STORED}")
    first = [int(bulk(body, seed)[0]) for seed in ORDERS]
    assert set(first) == ({0} if kept else {0, 77})


def test_overwriting_a_pending_bulk_store_is_reported_for_some_seed() -> None:
    again = f"{ARRIVE} {LOAD} {READ} {WAIT.replace('not_yet', 'nor_yet').replace('], 0', '], 1')}"
    with pytest.raises(PtxFault, match="is being overwritten"):
        for seed in ORDERS:
            bulk(THERE_AND_BACK.replace(STORED, f"{again} {STORED}"), seed)


@pytest.mark.parametrize(("waits", "seen"), [(STORED, {0}), (READ, {0xFFFFFFFF})])
def test_a_read_wait_does_not_make_the_store_visible(waits: str, seen: set[int]) -> None:
    """The store is visible at the end of the launch."""
    look = "ld.global.u32 %b, [%out]; add.u64 %far, %out, 128; st.global.u32 [%far], %b;"
    body = THERE_AND_BACK.replace(STORED, f"{waits} {look}")
    found = [bulk(body, seed, count=33) for seed in ORDERS]
    assert {int(one[32]) for one in found} == seen
    assert all(np.array_equal(one[:32], LANE) for one in found)


@pytest.mark.parametrize("tells", ["red.release.gpu.global.add.u32 [%far], 1", "fence.acq_rel.gpu"])
def test_announcing_an_unfinished_bulk_store_is_reported(tells: str) -> None:
    tell = f"add.u64 %far, %out, 128; {tells};"
    right = bulk(THERE_AND_BACK.replace(STORED, f"{STORED} {tell}"), 0, count=33)
    assert np.array_equal(right[:32], LANE)
    for seed in ORDERS:
        with pytest.raises(PtxFault, match="may not be stored"):
            bulk(THERE_AND_BACK.replace(STORED, f"{READ} {tell}"), seed, count=33)


def test_wait_group_leaves_the_newest_groups_pending() -> None:
    """One of two groups may still read."""
    second = STORE.replace("[%out], [%a]", "[%far], [%a+128]")
    body = THERE_AND_BACK.replace(
        f"{STORE} {COMMIT} {STORED}",
        f"""st.shared.v4.u32 [%a+128], {{%t, %t, %t, %t}}; add.u64 %far, %out, 128;
        {STORE} {COMMIT} {second.replace(" 128", " 16")} {COMMIT}
        cp.async.bulk.wait_group.read 1;
        st.shared.u32 [%a], 77; st.shared.u32 [%a+128], 6;
        {STORED}""",
    )
    found = [bulk(body, seed, count=36) for seed in ORDERS]
    assert all(np.array_equal(one[:32], LANE) for one in found)
    assert {int(one[32]) for one in found} == {0, 6}


# -- barriers --------------------------------------------------------------------------------------

HAND_OVER = """
    mov.u32 %a, memory;
    mad.lo.u32 %a, %t, 4, %a;
    st.shared.u32 [%a], 0;
    bar.sync 0;
    add.u32 %b, %t, 1;
    st.shared.u32 [%a], %b;
    bar.sync 0;
    setp.lt.u32 %p, %t, 32;
    mov.u32 %c, 0;
    @!%p ld.shared.u32 %c, [%a];
    setp.ge.u32 %p, %t, 32;
    sub.u32 %a, %a, 128;
    @%p ld.shared.u32 %c, [%a];
    st.global.u32 [%out], %c;
"""
"""The upper warp reads what the lower one wrote before the first barrier."""

HANDED = np.concatenate([np.zeros(32), LANE + 1])


def hand_over_is_right(seed: int, without: int | None) -> bool:
    try:
        found = run(HAND_OVER, block=64, shared=256, seed=seed, without=without)
    except PtxFault:
        return False
    return np.array_equal(found, HANDED)


def test_a_kernel_with_its_barriers_is_right_for_every_seed() -> None:
    assert all(hand_over_is_right(seed, None) for seed in ORDERS)


def test_a_missing_barrier_shows_for_some_seed() -> None:
    """And not for all seeds, because the order of the warps decides."""
    right = [hand_over_is_right(seed, 1) for seed in ORDERS]
    assert any(right) and not all(right)


def test_a_warp_that_exits_while_others_wait_is_reported() -> None:
    body = "setp.ge.u32 %p, %t, 32; @%p ret; bar.sync 0; st.global.u32 [%out], %t;"
    for seed in ORDERS:
        with pytest.raises(PtxFault, match="snippet"):
            run(body, block=64, seed=seed)
    assert np.array_equal(run(body, block=32), LANE), "a block of one warp"


@pytest.mark.parametrize(
    ("line", "before"),
    [
        ("bar.sync 0", "@%p bra past;"),
        ("bar.sync 0", "@%p ret;"),
        ("@!%p bar.sync 0", ""),
    ],
    ids=["elsewhere", "left", "predicate"],
)
def test_a_barrier_without_some_of_its_lanes_is_reported(line: str, before: str) -> None:
    refuse(line, f"setp.eq.u32 %p, %t, 3; {before} {line}; past: ret;")


# -- memory ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        "ld.global.u32 %a, [%in0+4]",
        "ld.global.nc.v2.u32 {%a, %b}, [%in0+128]",
        "st.global.u32 [%out+4]",
        "red.global.add.u32 [%out+4]",
    ],
)
def test_access_past_the_end_of_an_array_is_reported(line: str) -> None:
    line = line if line.startswith("ld") else f"{line}, %t"
    refuse(line, f"{line};", LANE)


def test_an_address_before_or_outside_arrays_is_reported() -> None:
    line = "st.global.u32 [%out], %t"
    refuse(line, f"sub.u64 %out, %out, 4; {line};")
    refuse(line, f"mov.u64 %out, 64; {line};")
    refuse(line, f"mov.u64 %out, 0xffffffffffff0000; {line};")


def test_access_past_the_end_of_shared_memory_is_reported() -> None:
    base = "mov.u32 %a, memory; mad.lo.u32 %a, %t, 4, %a;"
    run(f"{base} st.shared.u32 [%a], %t;", shared=128)
    refuse("st.shared.u32 [%a+4], %t", f"{base} st.shared.u32 [%a+4], %t;", shared=128)
    below = f"{base} sub.u32 %a, %a, 4; st.shared.u32 [%a], %t;"
    refuse("st.shared.u32 [%a], %t", below, shared=128)


@pytest.mark.parametrize(
    ("by", "line"),
    [
        (2, "ld.global.u32 %a, [%in0]"),
        (4, "ld.global.v2.u32 {%a, %b}, [%in0]"),
        (8, "ld.global.v4.u32 {%a, %b, %c, %d}, [%in0]"),
        (4, "ld.global.u64 %wide, [%in0]"),
    ],
)
def test_misaligned_access_is_reported(by: int, line: str) -> None:
    value = np.zeros(128, np.uint32)
    same = "ld.param.u64 %in0, [in0];"
    run(f"{same} {line};", value)
    assert "array 0" in refuse(line, f"{same} add.u64 %in0, %in0, {by}; {line};", value)


def test_a_slice_that_starts_off_a_vector_is_misaligned() -> None:
    """Alignment is that of the memory, not of the argument."""
    machine = InterpretedRuntime()
    whole = machine.empty((64,), np.uint32)
    machine.memset(whole, 0)
    text = module("st.global.v2.u32 [%out], {%t, %t};", 0, [0], 32, 0)
    launch(machine, text, whole[2:])
    with pytest.raises(PtxFault, match=r"st\.global\.v2"):
        launch(machine, text, whole[1:])


def test_reading_unwritten_memory_is_reported() -> None:
    load = "ld.global.u32 %a, [%out]"
    assert "array 0" in refuse(load, f"{load};", fresh=True)
    run(f"st.global.u32 [%out], 1; {load};", fresh=True)
    refuse(load, f"setp.ne.u32 %p, %t, 9; @%p st.global.u32 [%out], 1; {load};", fresh=True)
    add = "red.global.add.u32 [%out], 1"
    refuse(add, f"{add};", fresh=True)


def test_every_block_has_unwritten_shared_memory() -> None:
    """A block cannot read what an earlier one wrote."""
    load = "ld.shared.u32 %b, [%a]"
    base = "mov.u32 %a, memory; mad.lo.u32 %a, %t, 4, %a;"
    refuse(load, f"{base} {load};", shared=128)
    first = "mov.u32 %c, %ctaid.x; setp.eq.u32 %p, %c, 0; @%p st.shared.u32 [%a], 1;"
    for seed in ORDERS:
        refuse(load, f"{base} {first} {load};", shared=128, blocks=2, seed=seed)


def test_an_unwritten_register_is_reported() -> None:
    refuse("add.u32 %b, %a, 1", "add.u32 %b, %a, 1;")
    refuse("@%p ret", "@%p ret;")
    part = "setp.lt.u32 %p, %t, 16; @%p mov.u32 %a, 1;"
    refuse("add.u32 %b, %a, 1", f"{part} add.u32 %b, %a, 1;")
    run(f"{part} @%p add.u32 %b, %a, 1;")
    run(f"{part} @!%p mov.u32 %a, 2; add.u32 %b, %a, 1;")


def test_a_register_of_another_size_is_reported() -> None:
    refuse("add.u32 %a, %wide, 1", "mov.u64 %wide, 1; add.u32 %a, %wide, 1;")
    refuse("mov.u32 %wide, 1", "mov.u32 %wide, 1;")
    refuse("mov.u32 %undeclared, 1", "mov.u32 %undeclared, 1;")


@pytest.mark.parametrize("count", [2, 4])
def test_vectors_go_through_memory_in_order(count: int, rng: np.random.Generator) -> None:
    """Global to shared to global, reversed on the way."""
    value = rng.integers(0, 1 << 32, 32 * count, np.uint32)
    names = ["%a", "%b", "%c", "%d"][:count]
    body = f"""
        ld.param.u64 %in0, [in0];
        ld.param.u64 %out, [out];
        mul.lo.u32 %i, %t, {4 * count};
        mad.wide.u32 %in0, %t, {4 * count}, %in0;
        mad.wide.u32 %out, %t, {4 * count}, %out;
        ld.global.nc.L1::no_allocate.v{count}.u32 {{{", ".join(names)}}}, [%in0];
        st.shared.v{count}.u32 [%i], {{{", ".join(reversed(names))}}};
        ld.shared.v{count}.u32 {{{", ".join(names)}}}, [%i];
        st.global.v{count}.b32 [%out], {{{", ".join(names)}}};
    """
    found = run(body, value, count=32 * count, shared=128 * count)
    assert np.array_equal(found, value.reshape(32, count)[:, ::-1].reshape(-1))


def test_a_narrow_load_is_zero_extended() -> None:
    value = np.arange(65504, 65536, dtype=np.uint16)
    body = "ld.global.u16 %a, [%in0]; st.global.u32 [%out], %a;"
    assert np.array_equal(run(body, value), value.astype(np.uint32))


def test_concurrent_additions_to_one_word_are_all_counted(rng: np.random.Generator) -> None:
    """From every lane of every warp and block, and past 32 bits."""
    value = rng.integers(0, 1 << 40, 64, np.uint64)
    body = """
        ld.param.u64 %far, [out];
        ld.global.u64 %wide, [%in0];
        red.global.add.u64 [%far+8], %wide;
    """
    found = run(body, value, out=np.uint64, count=2, block=64, blocks=3)
    ones = (1 << 64) - 1
    assert found.tolist() == [ones, (ones + 3 * sum(value.tolist())) & ones]


def test_a_relaxed_store_becomes_visible_to_later_loads() -> None:
    """A block stores its word and counts; the last one reads all words, once or until complete."""
    body = """
        ld.param.u64 %far, [out];
        mov.u32 %a, %ctaid.x;
        mad.wide.u32 %wide, %a, 4, %far;
        setp.ne.u32 %p, %t, 0;
        @%p ret;
        add.u32 %a, %a, 1;
        st.relaxed.gpu.global.u32 [%wide+4], %a;
        atom.relaxed.gpu.global.add.u32 %b, [%far], 1;
        setp.ne.u32 %p, %b, 2;
        @%p ret;
        again:
        ld.relaxed.gpu.global.u32 %a, [%far+4];
        ld.relaxed.gpu.global.u32 %b, [%far+8];
        ld.relaxed.gpu.global.u32 %c, [%far+12];
        min.u32 %d, %a, %b;
        min.u32 %d, %d, %c;
        setp.eq.u32 %p, %d, 0;
        @%p bra again;
        add.u32 %a, %a, %b;
        add.u32 %a, %a, %c;
        st.global.u32 [%far+16], %a;
    """
    again, once = (
        {zeroed(text, 5, 3, seed)[4] for seed in ORDERS}
        for text in (body, body.replace("@%p bra again;", ""))
    )
    assert again == {6} and len(once) > 1


def test_atomic_inc_wraps_around() -> None:
    body = "ld.param.u64 %far, [out]; red.relaxed.gpu.global.inc.u32 [%far], 4;"
    made = [int(zeroed(body, 1, blocks, 0)[0]) for blocks in (1, 2, 3, 5)]
    assert made == [32 * blocks % 5 for blocks in (1, 2, 3, 5)]


@pytest.mark.parametrize("blocks", [2, 9])
def test_blocks_that_wait_for_each_other_run_concurrently(blocks: int) -> None:
    """For every seed; the last block wraps the count."""
    body = f"""setp.ne.u32 %p, %t, 0; @%p ret; mov.u32 %a, %ctaid.x; add.u64 %far, %out, 4;
        red.release.gpu.global.inc.u32 [%out], {2 * blocks - 1};
        again: ld.acquire.gpu.global.u32 %b, [%out];
        setp.lt.u32 %p, %b, {blocks}; @%p bra again;
        red.relaxed.gpu.global.inc.u32 [%out], {2 * blocks - 1};
        red.global.add.u32 [%far], 1;"""
    for seed in ORDERS:
        assert list(zeroed(body, 2, blocks, seed)) == [0, blocks]


def zeroed(body: str, count: int, blocks: int, seed: int) -> Values:
    """The array `out` of a body, which starts as zeros."""
    machine = InterpretedRuntime(seed)
    out = machine.empty((count,), np.uint32)
    machine.memset(out, 0)
    launch(machine, module(body, 0, [4], 32, 0), out, blocks=blocks)
    return machine.copy_d2h(out)


# -- unsupported instructions ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        "brev.b32 %a, %t",
        "vote.sync.any.pred %p, %p, 0xffffffff",
        "bar.sync 1",
        "bar.sync 0, 32",
        "brx.idx %t, end",
        "add.ftz.f32 %a, %a, %b",
        "add.f64 %wide, %wide, %wide",
        "mul.hi.u32 %a, %t, %t",
        "ld.local.u32 %a, [%out]",
        "ld.volatile.global.u32 %a, [%out]",
        "ld.global.v8.u32 {%a, %b}, [%out]",
        "ld.global.v2.u32 {%a, %b, %c}, [%out]",
        "st.local.u32 [%out], %t",
        "st.global.wt.u32 [%out], %t",
        "st.global.u32 [%out-4], %t",
        "red.global.max.u32 [%out], %t",
        "red.shared.add.u32 [%t], %t",
        "ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%a, %b}, [%t]",
        "movmatrix.sync.aligned.m8n8.b16 %a, %t",
        "shfl.sync.up.b32 %a, %t, 1, 0, 0xffffffff",
        "shfl.sync.bfly.b32 %a, %t, 1, 31, 0xffff",
        "shfl.sync.bfly.b32 %a, %t, 1, 0x1c1f, 0xffffffff",
        "cvt.rz.bf16.f32 %h, %t",
        "cvt.rn.ftz.f32.u32 %a, %t",
        "cvt.rzi.u32.f32 %a, %t",
        "setp.ltu.f32 %p, %a, %b",
        "setp.lt.and.u32 %p, %t, 1, %q",
        "prmt.b32.f4e %a, %t, %t, 1",
        "lop3.or.b32 %p|%a, %t, %t, %t, 1, %q",
        "add.u32 %a, %t",
        ".extern .shared .align 16 .b8 more[]",
        "mbarrier.init.shared.b64 [%t], 1",
        "mbarrier.inval.shared::cta.b64 [%t]",
        "mbarrier.arrive.shared::cta.b64 _, [%t]",
        "mbarrier.arrive.expect_tx.shared::cta.b64 %wide, [%t], 16",
        "mbarrier.test_wait.parity.shared::cta.b64 %p, [%t], 0",
        "mbarrier.try_wait.shared::cta.b64 %p, [%t], %wide",
        "mbarrier.try_wait.parity.shared::cta.b64 %p, [%t], 0, 100",
        "cp.async.bulk.prefetch.L2.global [%out], 16",
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%t], [%out], 16, [%t]",
        "cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes [%t], [%out], 16",
        "cp.async.bulk.global.shared::cta.bulk_group [%out], [%t], 16, %wide",
        "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.u32 [%out], [%t], 16",
        "fence.proxy.alias",
        "fence.proxy.async.global",
    ],
)
def test_unsupported_text_is_refused(line: str) -> None:
    """At parsing, so the ret before it does not help."""
    refuse(line, f"ret; {line}; end: ret;")


@pytest.mark.parametrize("block", [16, 48])
def test_a_block_with_a_partial_warp_is_refused(block: int) -> None:
    with pytest.raises(PtxFault, match=str(block)):
        run("st.global.u32 [%out], %t;", block=block)


# -- conversions -----------------------------------------------------------------------------------

BF16_EDGES = np.array(
    [
        0x00000000, 0x80000000, 0x3F800000,
        0x3F808000, 0x3F818000,  # ties: down to even, up to even
        0x3F807FFF, 0x3F808001, 0xBF808000, 0xBF818000,
        0x3FFF8000,  # a tie that carries into the exponent
        0x7F7FFFFF, 0xFF7FFFFF, 0x7F7F7FFF,  # over the greatest bf16, and not quite
        0x7F800000, 0xFF800000,
        0x7FC00000, 0x7F800001, 0xFFFFFFFF, 0xFF80FFFF,  # NaNs, also ones that would round away
        0x00000001, 0x00008000, 0x00018000, 0x00007FFF, 0x007FFFFF, 0x807F8000, 0x80000001,
    ],
    np.uint32,
)  # fmt: skip


def test_bf16_rounding_equals_the_reference(rng: np.random.Generator) -> None:
    bits = np.concatenate([BF16_EDGES, rng.integers(0, 1 << 32, 230, np.uint32)])
    bits = np.resize(bits, 256)
    body = "ld.global.f32 %a, [%in0]; cvt.rn.bf16.f32 %h, %a; st.global.b16 [%out], %h;"
    found = run(body, bits, out=np.uint16, block=256)
    value = bits.view(np.float32)
    nan = np.isnan(value)
    assert np.array_equal(found[~nan], bf16_from_f32(value[~nan]))
    assert nan.sum() >= 4 and np.isnan(f32_from_bf16(found[nan])).all()


def test_every_pair_of_e4m3_widens_exactly() -> None:
    codes = np.arange(256, dtype=np.uint16)
    pairs = (codes | (255 - codes) << 8).astype(np.uint16)
    body = "ld.global.nc.u16 %h, [%in0]; cvt.rn.f16x2.e4m3x2 %a, %h; st.global.u32 [%out], %a;"
    found = run(body, pairs, out=np.uint32, block=256).view(np.float16).reshape(-1, 2)
    wanted = f32_from_e4m3(np.stack([codes, 255 - codes], axis=1).astype(np.uint8))
    assert np.array_equal(found.astype(np.float32), wanted, equal_nan=True)


def test_every_f16_widens_exactly() -> None:
    half = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)
    body = "ld.global.nc.u16 %h, [%in0]; cvt.f32.f16 %a, %h; st.global.f32 [%out], %a;"
    for part in (half[i : i + 1024] for i in (0, 1024, 15360, 31744, 32768, 64512)):
        found = run(body, part, out=np.float32, block=1024)
        sign = np.where(part >> 15, -1.0, 1.0)
        exponent, fraction = (part >> 10 & 31).astype(int), (part & 1023).astype(np.float64)
        value = np.where(
            exponent == 0,
            sign * fraction * 2.0**-24,
            sign * (1 + fraction / 1024) * np.exp2(exponent - 15.0),
        )
        infinite = exponent == 31
        value[infinite] = np.where(fraction[infinite] > 0, np.nan, sign[infinite] * np.inf)
        assert np.array_equal(found, value.astype(np.float32), equal_nan=True)
        zeros = value == 0
        assert np.array_equal(np.signbit(found[zeros]), sign[zeros] < 0)


def test_a_byte_store_uses_the_low_byte() -> None:
    words = np.arange(32, dtype=np.uint32) * 0x01020304
    found = run("ld.global.u32 %a, [%in0]; st.global.u8 [%out], %a;", words, out=np.uint8)
    assert np.array_equal(found, words.astype(np.uint8))


def test_integer_conversions_respect_signedness() -> None:
    value = np.array([0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x01000001, 0x12345678], np.uint32)
    value = np.resize(value, 32)

    def convert(how: str, to: Any, register: str = "%wide") -> Values:
        line = f"ld.global.u32 %a, [%in0]; cvt.{how} {register}, %a;"
        size = 8 * np.dtype(to).itemsize
        return run(f"{line} st.global.b{size} [%out], {register};", value, out=to)

    assert convert("u64.u32", np.uint64).tolist() == value.tolist()
    assert convert("s64.s32", np.int64).tolist() == value.view(np.int32).tolist()
    assert convert("u16.u32", np.uint16, "%h").tolist() == [v & 0xFFFF for v in value.tolist()]
    assert np.array_equal(convert("rn.f32.u32", np.float32, "%b"), value.astype(np.float32))
    signed = value.view(np.int32).astype(np.float32)
    assert np.array_equal(convert("rn.f32.s32", np.float32, "%b"), signed)


def test_rounding_to_an_integer_goes_to_even() -> None:
    value = np.resize(np.array([0.5, 1.5, 2.5, -0.5, -1.5, 2.4, 1e10, np.inf], np.float32), 32)
    body = "ld.global.f32 %a, [%in0]; cvt.rni.f32.f32 %a, %a; st.global.f32 [%out], %a;"
    wanted = np.resize(np.array([0, 2, 2, 0, -2, 2, 1e10, np.inf], np.float32), 32)
    assert np.array_equal(run(body, value, out=np.float32), wanted)


# -- arithmetic ------------------------------------------------------------------------------------


def three(line: str, rng: np.random.Generator) -> tuple[list[list[int]], list[int]]:
    """256 random triples, and the result %d of a line from %a, %b and %c, as Python integers."""
    values = rng.integers(0, 1 << 32, (3, 256), np.uint32)
    body = "".join(f"ld.global.u32 %{n}, [%in{i}];" for i, n in enumerate("abc"))
    found = run(f"{body} {line}; st.global.u32 [%out], %d;", *values, block=256)
    return values.T.tolist(), found.tolist()


@pytest.mark.parametrize(
    ("table", "wanted"),
    [
        (0x00, lambda a, b, c: 0),
        (0xFF, lambda a, b, c: 0xFFFFFFFF),
        (0xF0, lambda a, b, c: a),
        (0xCC, lambda a, b, c: b),
        (0xAA, lambda a, b, c: c),
        (0x80, lambda a, b, c: a & b & c),
        (0x96, lambda a, b, c: a ^ b ^ c),
        (0xEA, lambda a, b, c: (a & b) | c),
        (0xCA, lambda a, b, c: (a & b) | (~a & c)),
        (0xE8, lambda a, b, c: (a & b) | (a & c) | (b & c)),
        (0x10, lambda a, b, c: a & ~b & ~c),
        (0x6A, lambda a, b, c: (a & b) ^ c),
    ],
)
def test_lop3_computes_its_table(
    table: int, wanted: Callable[[int, int, int], int], rng: np.random.Generator
) -> None:
    triples, found = three(f"lop3.b32 %d, %a, %b, %c, {table:#x}", rng)
    assert found == [wanted(a, b, c) & 0xFFFFFFFF for a, b, c in triples]


def permuted(a: int, b: int, how: int) -> int:
    """prmt.b32 by definition: a selector's nibble selects one byte of eight, or its sign."""
    eight = [*a.to_bytes(4, "little"), *b.to_bytes(4, "little")]
    out = []
    for i in range(4):
        nibble = how >> 4 * i & 15
        byte = eight[nibble & 7]
        out.append((0xFF if byte >= 128 else 0) if nibble >= 8 else byte)
    return int.from_bytes(bytes(out), "little")


def test_prmt_selects_bytes_and_signs(rng: np.random.Generator) -> None:
    triples, found = three("prmt.b32 %d, %a, %b, %c", rng)
    assert found == [permuted(a, b, how) for a, b, how in triples]
    triples, found = three("prmt.b32 %d, %a, 0x64006400, 0x7150", rng)
    assert found == [permuted(a, 0x64006400, 0x7150) for a, _, _ in triples]


def test_shifts_past_the_width_give_zero_or_the_sign() -> None:
    by = np.resize(np.array([0, 1, 31, 32, 33, 63, 64, 255, 256, 1 << 31], np.uint32), 32)
    value, wide = 0x87654321, 0x8765432112345678
    signed = value - (1 << 32)

    def shift(line: str, to: Any) -> list[int]:
        end = "st.global.b32 [%out], %d;" if np.dtype(to).itemsize == 4 else (
            "st.global.b64 [%out], %far;"
        )  # fmt: skip
        start = f"ld.global.u32 %b, [%in0]; mov.b32 %a, {value:#x}; mov.b64 %wide, {wide:#x};"
        found: list[int] = run(f"{start} {line}, %b; {end}", by, out=to).tolist()
        return found

    amounts = by.tolist()
    assert shift("shl.b32 %d, %a", np.uint32) == [
        value << n & 0xFFFFFFFF if n < 32 else 0 for n in amounts
    ]
    assert shift("shr.u32 %d, %a", np.uint32) == [value >> n if n < 32 else 0 for n in amounts]
    assert shift("shr.s32 %d, %a", np.int32) == [signed >> min(n, 31) for n in amounts]
    assert shift("shl.b64 %far, %wide", np.uint64) == [
        wide << n & (1 << 64) - 1 if n < 64 else 0 for n in amounts
    ]
    assert shift("shr.u64 %far, %wide", np.uint64) == [wide >> n if n < 64 else 0 for n in amounts]


def test_wide_products_keep_every_bit(rng: np.random.Generator) -> None:
    a, b = rng.integers(0, 1 << 32, (2, 32), np.uint32)
    a[:3], b[:3] = [0xFFFFFFFF, 0x80000000, 0xFFFFFFFF], [0xFFFFFFFF, 0x80000000, 1]
    load = "ld.global.u32 %a, [%in0]; ld.global.u32 %b, [%in1];"
    end = "st.global.b64 [%out], %wide;"
    found = run(f"{load} mul.wide.u32 %wide, %a, %b; {end}", a, b, out=np.uint64)
    assert found.tolist() == [x * y for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    found = run(f"{load} mul.wide.s32 %wide, %a, %b; {end}", a, b, out=np.int64)
    signed = list(zip(a.view(np.int32).tolist(), b.view(np.int32).tolist(), strict=True))
    assert found.tolist() == [x * y for x, y in signed]
    line = "mov.b64 %far, -5; mad.wide.s32 %wide, %a, %b, %far;"
    found = run(f"{load} {line} {end}", a, b, out=np.int64)
    assert found.tolist() == [x * y - 5 for x, y in signed]


def test_the_highest_bit_is_found() -> None:
    bits = np.uint32(1) << LANE | (LANE & 1)
    np.testing.assert_array_equal(
        run("ld.global.u32 %a, [%in0]; bfind.u32 %b, %a; st.global.u32 [%out], %b;", bits), LANE
    )
    none = run("mov.u32 %a, 0; bfind.u32 %b, %a; st.global.u32 [%out], %b;")
    np.testing.assert_array_equal(none, np.full(32, 0xFFFFFFFF, np.uint32))


def test_a_pair_of_halves_has_the_low_half_first(rng: np.random.Generator) -> None:
    value = rng.integers(0, 1 << 63, 32, np.uint64)
    body = """
        ld.global.b64 %wide, [%in0];
        mov.b64 {%a, %b}, %wide;
        add.u32 %a, %a, 1;
        mov.b64 %far, {%b, %a};
        st.global.b64 [%out], %far;
    """
    found = run(body, value, out=np.uint64).tolist()
    assert found == [((v + 1 & 0xFFFFFFFF) << 32) | v >> 32 for v in value.tolist()]


def test_division_rounds_toward_zero(rng: np.random.Generator) -> None:
    triples, found = three("div.u32 %d, %a, 7", rng)
    assert found == [a // 7 for a, _, _ in triples]
    triples, found = three("or.b32 %b, %b, 1; shr.s32 %b, %b, 16; or.b32 %b, %b, 1; "
                           "div.s32 %d, %a, %b", rng)  # fmt: skip
    for (a, b, _), got in zip(triples, found, strict=True):
        top, bottom = _signed(a), _signed(b) >> 16 | 1
        sign = -1 if (top < 0) != (bottom < 0) else 1
        assert _signed(got) == sign * (abs(top) // abs(bottom))


def _signed(value: int) -> int:
    return value - (1 << 32) if value >> 31 else value


def test_division_by_zero_is_reported_for_active_lanes() -> None:
    """Only lanes under %p load %a; the values of the others do not matter."""
    value = np.where(LANE == 9, 0, LANE + 1).astype(np.uint32)
    line = "@%p div.u32 %b, 100, %a"

    def body(which: str) -> str:
        return f"""
            setp.{which}.u32 %p, %t, 9;
            mov.u32 %b, 0;
            @%p ld.global.u32 %a, [%in0];
            {line};
            st.global.u32 [%out], %b;
        """

    wanted = np.where(LANE < 9, 100 // (LANE + 1), 0)
    assert np.array_equal(run(body("lt"), value), wanted)
    refuse(line, body("le"), value)


def test_comparisons_with_a_nan_are_false() -> None:
    value = np.full(32, np.nan, np.float32)
    for how in ("lt", "le", "gt", "ge", "eq", "ne"):
        body = f"""
            ld.global.f32 %a, [%in0];
            setp.{how}.f32 %p, %a, 0f3F800000;
            selp.b32 %b, 1, 0, %p;
            st.global.u32 [%out], %b;
        """
        assert not run(body, value).any(), how
    different = "setp.ne.f32 %p, 0f40000000, 0f3F800000; selp.b32 %b, 1, 0, %p;"
    assert run(f"{different} st.global.u32 [%out], %b;").all()


def test_comparisons_follow_the_type() -> None:
    """-1 is below 0 as an s32 and above it as a u32."""
    body = """
        mov.b32 %a, -1;
        setp.lt.{}32 %p, %a, 0;
        selp.b32 %b, 1, 0, %p;
        st.global.u32 [%out], %b;
    """
    assert run(body.format("s")).all()
    assert not run(body.format("u")).any()


def test_fma_rounds_once() -> None:
    """(1 + 2^-12)^2 - (1 + 2^-11) is 2^-24, which a product rounded to f32 first would lose."""
    a = np.full(32, 1 + 2.0**-12, np.float32)
    body = """
        ld.global.f32 %a, [%in0];
        mov.f32 %b, 0fBF801000;
        {}
        st.global.f32 [%out], %d;
    """
    fused = run(body.format("fma.rn.f32 %d, %a, %a, %b;"), a, out=np.float32)
    apart = run(body.format("mul.f32 %d, %a, %a; add.f32 %d, %d, %b;"), a, out=np.float32)
    assert (fused == np.float32(2.0**-24)).all() and not apart.any()


def test_max_of_a_number_and_nan_is_the_number() -> None:
    value = np.full(32, np.nan, np.float32)
    body = """
        ld.global.f32 %a, [%in0];
        max.f32 %b, %a, 0fC0000000;
        min.f32 %c, 0f40400000, %a;
        add.f32 %d, %b, %c;
        st.global.f32 [%out], %d;
    """
    assert (run(body, value, out=np.float32) == 1).all()


# -- arrays ----------------------------------------------------------------------------------------


def test_a_slice_of_an_array_is_a_view() -> None:
    machine = InterpretedRuntime()
    whole = machine.empty((6, 4), np.int32)
    value = np.arange(24, dtype=np.int32).reshape(6, 4)
    machine.copy_h2d(whole, value)
    parts: list[tuple[InterpretedArray, Values]] = [
        (whole[2], value[2]),
        (whole[1:4], value[1:4]),
        (whole[1:4][1], value[2]),
        (whole[4:], value[4:]),
        (whole[:2].reshape(2, 2, 2), value[:2].reshape(2, 2, 2)),
        (whole.reshape(24)[5:9], value.reshape(-1)[5:9]),
        (whole[3:3], value[3:3]),
    ]
    for part, wanted in parts:
        assert part.shape == wanted.shape and part.nbytes == wanted.nbytes
        assert part.dtype == np.int32
        assert np.array_equal(machine.copy_d2h(part), wanted)
        if wanted.size:
            by = wanted.__array_interface__["data"][0] - value.__array_interface__["data"][0]
            assert part.ptr - whole.ptr == by
    machine.copy_h2d(whole[2], np.full(4, -1, np.int32))
    assert (machine.copy_d2h(whole)[2] == -1).all()
    assert np.array_equal(machine.copy_d2h(whole)[3:], value[3:])


def test_slices_past_the_end_are_refused() -> None:
    whole = InterpretedRuntime().empty((6, 4), np.int32)
    for key in (6, -1, slice(None, None, 2)):
        with pytest.raises(AssertionError):
            whole[key]
    with pytest.raises(AssertionError):
        whole.reshape(5, 5)


def test_copies_and_fills_mark_only_their_bytes_as_written() -> None:
    machine = InterpretedRuntime()
    first, second = machine.empty((32,), np.uint32), machine.empty((64,), np.uint32)
    machine.copy_h2d(first, LANE)
    machine.copy(second[:32], first)
    text = module("ld.global.u32 %a, [%in0]; st.global.u32 [%out], %a;", 1, [4, 4], 32, 0)
    out = machine.empty((32,), np.uint32)
    launch(machine, text, second[:32], out)
    assert np.array_equal(machine.copy_d2h(out), LANE)
    with pytest.raises(PtxFault, match="array 1"):
        launch(machine, text, second[1:33], out)
    machine.memset(second[32:], 0)
    launch(machine, text, second[1:33], out)
