"""Every operation on a GPU against its reference: the interpreter's cases, and larger ones."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from osmium.experts.cache import make_cache, resident, verify
from osmium.experts.prefetch import MIN_BULK_COPY_CC
from osmium.ops import HostExperts, PrefetchState, SlotAssignment
from osmium.ops.gpu import GpuOps
from osmium.ops.reference import ReferenceOps
from osmium.ops.types import FETCH_BLOCKS, FETCH_WARPS, PREFETCH_DISCARD, PREFETCH_STOP
from osmium.quant.expert_layout import ExpertLayout
from tests.ops.cases import CASES, DECODE, LAB, TINY, Case, allowed, compare, run, sized
from tests.ptx import cases_attention, cases_linear, cases_making

pytestmark = pytest.mark.gpu

ALL: dict[str, Callable[[np.random.Generator], Case]] = {
    **{name: sized(name, TINY) for name in CASES},
    **{f"{name}, lab": sized(name, LAB) for name in CASES},
    **{f"{name}, 122b": sized(name, DECODE) for name in CASES},
    **cases_linear.CASES,
    **cases_attention.CASES,
    **cases_making.CASES,
    **cases_making.LARGE,
    **cases_attention.LONG,
}


def copies_in_bulk(gpu: GpuOps) -> None:
    """What is fetched early is copied in bulk."""
    machine: Any = gpu.runtime
    if machine.device.capability < MIN_BULK_COPY_CC:
        pytest.skip("bulk copies are for compute capability 9.0 and up")


@pytest.mark.parametrize("name", ALL)
def test_a_kernel_computes_its_reference_operation(
    rng: np.random.Generator, gpu: GpuOps, name: str
) -> None:
    if name.startswith("fetch early"):
        copies_in_bulk(gpu)
    seed = int(rng.integers(1 << 32))
    case = ALL[name](np.random.default_rng(seed))
    wanted = run(ALL[name](np.random.default_rng(seed)), ReferenceOps(cache_bytes=0))
    found = run(case, gpu)
    again = run(case, gpu)
    for output, kind in case.writes.items():
        assert compare(found[output], wanted[output], kind) <= allowed(kind), output
        assert found[output].tobytes() == again[output].tobytes(), f"{output}: other bits"


def test_place_agrees_with_the_reference_over_many_calls(
    rng: np.random.Generator, gpu: GpuOps
) -> None:
    for seed in rng.integers(1 << 32, size=200):
        case = CASES["place"](np.random.default_rng(seed), LAB)
        wanted = run(CASES["place"](np.random.default_rng(seed), LAB), ReferenceOps())
        found = run(case, gpu)
        for output, kind in case.writes.items():
            assert compare(found[output], wanted[output], kind) <= allowed(kind), (seed, output)


def test_experts_arrive_whole_whenever_what_is_fetched_early_stops(
    rng: np.random.Generator, gpu: GpuOps
) -> None:
    """It is placed at once, or later, or when all has come; guessed rightly, or not."""
    copies_in_bulk(gpu)
    record, experts, top_k = ExpertLayout(4, 3072, 1024), 8, 2
    nothing: Any = None

    def i32(*shape: int) -> Any:
        return gpu.to_device(np.zeros(shape, np.int32))

    records = rng.integers(0, 256, (2, experts, record.nbytes), dtype=np.uint8)
    arena = HostExperts(record, gpu.empty_mapped(records.shape, np.uint8))
    gpu.host_view(arena.packed)[...] = records
    cache = make_cache(gpu, arena, 2 * top_k, top_k)
    first, asked, likely = (gpu.empty((1, top_k), np.uint16) for _ in range(3))
    plan = SlotAssignment(
        i32(1), i32(top_k), i32(top_k), i32(top_k), i32(top_k), i32(1, top_k), i32(2)
    )
    weights = gpu.to_device(rng.random((1, top_k), np.float32))
    guess = PrefetchState(
        likely,
        weights,
        nothing,
        nothing,
        nothing,
        i32(2),
        i32(2),
        i32(2, FETCH_BLOCKS),
        i32(2, FETCH_WARPS),
        i32(2, FETCH_BLOCKS),
    )
    gpu.memset(guess.expert, 0xFF)  # -1
    pause, begun = gpu.empty((1 << 26,), np.uint8), 0
    for turn in range(49):
        for ids in (first, likely, asked):
            gpu.copy_h2d(ids, rng.permutation(experts)[None, :top_k].astype(np.uint16))
        if turn % 3:
            gpu.copy(asked, likely)
        with gpu.on_side_stream(prefetch=True):
            gpu.prefetch_experts(cache, guess, arena)
        gpu.assign_slots(plan, cache, 0, first, guess)
        gpu.fetch_experts(cache, plan, arena, 0, prefetch=guess)
        for _ in range(turn // 3):
            gpu.memset(pause, turn)
        gpu.assign_slots(plan, cache, 1, asked, guess)
        gpu.fetch_experts(cache, plan, arena, 1, prefetch=guess)
        gpu.join_side_stream(prefetch=True)
        # the first time kernels are loaded meanwhile, and no turn may come; else it may be too late
        state = gpu.copy_d2h(guess.state)[1] & ~(PREFETCH_STOP | PREFETCH_DISCARD)
        assert np.isin(state, (0, 1 | 1 << 15)).all()
        begun += turn > 0 and bool(state.all())
        assert resident(gpu, cache)[1, gpu.copy_d2h(asked)[0]].all()
        assert verify(gpu, cache, records, 4 * top_k, turn)
    assert begun > 24
    guessed, right, brought = gpu.copy_d2h(cache.counters)[4:]
    assert 0 < right <= guessed and 0 < brought <= right * record.nbytes // 2048
    gpu.release(arena.packed)
