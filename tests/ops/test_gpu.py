"""Every operation on a GPU against its reference: the interpreter's cases and larger ones."""

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from osmium.cuda.stream import CudaRuntime, Stream
from osmium.experts.cache import make_cache, resident, verify
from osmium.experts.prefetch import MIN_BULK_COPY_CC
from osmium.ops import HostExperts, LinearWeight, PrefetchState, SlotAssignment
from osmium.ops.gpu import GpuOps
from osmium.ops.reference import ReferenceOps
from osmium.ops.types import FETCH_BLOCKS, FETCH_WARPS, PREFETCH_DISCARD, PREFETCH_STOP
from osmium.quant.expert_layout import ExpertLayout
from osmium.quant.floats import f32_from_bf16
from tests.ops.cases import CASES, DECODE, LAB, TINY, Case, allowed, compare, rows_of, run, sized
from tests.ops.report import LARGE, LONG, RAGGED
from tests.ptx import cases_linear
from tests.tolerance import distance

pytestmark = pytest.mark.gpu

ALL: dict[str, Callable[[np.random.Generator], Case]] = {
    **{name: sized(name, TINY) for name in CASES},
    **{f"{name}, lab": sized(name, LAB) for name in CASES},
    **{f"{name}, 122b": sized(name, DECODE) for name in CASES},
    **{
        f"sample_controlled, {vocab:,} tokens": sized(
            "sample_controlled", replace(LAB, outputs=vocab)
        )
        for vocab in (3, 18, 190, 8_191, 151_936, 248_320)
    },
    **RAGGED,
    **LARGE,
    **LONG,
}


def require_bulk_copies(gpu: GpuOps) -> None:
    """Skip on GPUs without bulk copies, which prefetch needs."""
    machine: Any = gpu.runtime
    if machine.device.capability < MIN_BULK_COPY_CC:
        pytest.skip("bulk copies are for compute capability 9.0 and up")


@pytest.mark.parametrize("name", ALL)
def test_a_kernel_computes_its_reference_operation(
    rng: np.random.Generator, gpu: GpuOps, name: str
) -> None:
    if name.startswith("prefetch"):
        require_bulk_copies(gpu)
    seed = int(rng.integers(1 << 32))
    case = ALL[name](np.random.default_rng(seed))
    wanted = run(ALL[name](np.random.default_rng(seed)), ReferenceOps(cache_bytes=0))
    found = run(case, gpu)
    repeated = run(case, gpu)
    for output, kind in case.writes.items():
        assert compare(found[output], wanted[output], kind) <= allowed(kind), output
        assert found[output].tobytes() == repeated[output].tobytes(), f"{output}: other bits"


DIGIT_CASES = [
    name
    for name in ALL
    if re.search(r"int[48]_(moe_)?gemm|expert_part|(linear|experts) int[48], lab", name)
    and "bf16" not in name
]
"""Cases that launch gemm_digits.ptx, or gemm_wgmma.ptx in its place."""


@pytest.mark.parametrize("name", DIGIT_CASES)
def test_wgmma_does_not_change_a_bit(
    rng: np.random.Generator, gpu: GpuOps, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not gpu.runtime.has_wgmma:
        pytest.skip("only compute capability 9.0 has wgmma")
    launched: set[str] = set()
    launch = Stream.launch

    def recording_launch(stream: Stream, kernel: Any, grid: Any, values: Any) -> None:
        launched.add(kernel.name)
        launch(stream, kernel, grid, values)

    monkeypatch.setattr(Stream, "launch", recording_launch)
    case = ALL[name](rng)
    with gpu.prefill():
        found = run(case, gpu)
        assert any("_wgmma_" in kernel for kernel in launched)
        launched.clear()
        monkeypatch.setattr(CudaRuntime, "has_wgmma", False)
        wanted = run(case, gpu)
    assert not any("_wgmma_" in kernel for kernel in launched)
    for output in case.writes:
        assert found[output].tobytes() == wanted[output].tobytes(), output


@pytest.mark.parametrize("form", ["bf16", "int8", "int4"])
def test_a_rows_bits_depend_neither_on_other_rows_nor_on_the_blocks_of_a_launch(
    rng: np.random.Generator, gpu: GpuOps, form: str
) -> None:
    a = cases_linear.linear(form, 700, 2050, 1024, 128)(rng).arrays
    w = LinearWeight(
        form, 2050, 1024, gpu.to_device(a["w"]),  # type: ignore[arg-type]
        gpu.to_device(a["scale"]) if "scale" in a else None, 128 if form == "int4" else 0,
    )  # fmt: skip

    def multiply(rows: Any) -> Any:
        out = gpu.empty((len(rows), 2050), np.float32)
        gpu.linear(out, rows_of(gpu, gpu.to_device(a["x"][rows])), w)
        return np.array(gpu.copy_d2h(out))

    whole = multiply(np.arange(700))
    for some in (rng.permutation(700)[:9], np.arange(33), np.arange(100, 612)):
        assert multiply(some).tobytes() == whole[some].tobytes(), len(some)


def test_a_bf16_matrix_of_many_rows_is_as_exact_as_of_few(
    rng: np.random.Generator, gpu: GpuOps
) -> None:
    """Tensor cores round sums toward zero; long chains of mma would show here."""
    a = cases_linear.linear("bf16", 64, 200, 16384)(rng).arrays
    exact = a["x"].astype(np.float64) @ f32_from_bf16(a["w"]).astype(np.float64).T
    w = LinearWeight("bf16", 200, 16384, gpu.to_device(a["w"]))

    def error(rows: int) -> float:
        """The distance from the exact result, with some rows a launch."""
        found = []
        for x in np.split(a["x"], 64 // rows):
            out = gpu.empty((rows, 200), np.float32)
            gpu.linear(out, rows_of(gpu, gpu.to_device(x)), w)
            found.append(gpu.copy_d2h(out))
        return distance(np.concatenate(found), exact)

    assert error(64) <= 1.25 * error(8)


def test_assign_slots_equals_the_reference_over_many_calls(
    rng: np.random.Generator, gpu: GpuOps
) -> None:
    for seed in rng.integers(1 << 32, size=200):
        case = CASES["assign_slots"](np.random.default_rng(seed), LAB)
        wanted = run(CASES["assign_slots"](np.random.default_rng(seed), LAB), ReferenceOps())
        found = run(case, gpu)
        for output, kind in case.writes.items():
            assert compare(found[output], wanted[output], kind) <= allowed(kind), (seed, output)


def test_experts_are_complete_whenever_prefetch_stops(
    rng: np.random.Generator, gpu: GpuOps
) -> None:
    """Slots are assigned at once, later, or after the prefetch; predictions are right or wrong."""
    require_bulk_copies(gpu)
    layout, experts, top_k = ExpertLayout(4, 3072, 1024), 8, 2
    unused: Any = None

    def i32(*shape: int) -> Any:
        return gpu.to_device(np.zeros(shape, np.int32))

    packed = rng.integers(0, 256, (2, experts, layout.nbytes), dtype=np.uint8)
    host_experts = HostExperts(layout, gpu.empty_mapped(packed.shape, np.uint8))
    gpu.host_view(host_experts.packed)[...] = packed
    cache = make_cache(gpu, host_experts, 2 * top_k, top_k)
    first_ids, routed_ids, predicted_ids = (gpu.empty((1, top_k), np.uint16) for _ in range(3))
    plan = SlotAssignment(
        i32(1), i32(top_k), i32(top_k), i32(top_k), i32(top_k), i32(1, top_k), i32(2)
    )
    weights = gpu.to_device(rng.random((1, top_k), np.float32))
    prefetch = PrefetchState(
        predicted_ids,
        weights,
        unused,
        unused,
        unused,
        i32(2),
        i32(2),
        i32(2, FETCH_BLOCKS),
        i32(2, FETCH_WARPS),
        i32(2, FETCH_BLOCKS),
    )
    gpu.memset(prefetch.expert, 0xFF)  # -1
    busy_buffer, num_started = gpu.empty((1 << 26,), np.uint8), 0
    for step in range(49):
        for ids in (first_ids, predicted_ids, routed_ids):
            gpu.copy_h2d(ids, rng.permutation(experts)[None, :top_k].astype(np.uint16))
        if step % 3:
            gpu.copy(routed_ids, predicted_ids)
        with gpu.on_side_stream(prefetch=True):
            gpu.prefetch_experts(cache, prefetch, host_experts)
        gpu.assign_slots(plan, cache, 0, first_ids, prefetch)
        gpu.fetch_experts(cache, plan, host_experts, 0, prefetch=prefetch)
        for _ in range(step // 3):
            gpu.memset(busy_buffer, step)
        gpu.assign_slots(plan, cache, 1, routed_ids, prefetch)
        gpu.fetch_experts(cache, plan, host_experts, 1, prefetch=prefetch)
        gpu.join_side_stream(prefetch=True)
        # in the first step kernels are loaded, and prefetch may not start; later it may start too
        # late
        state = gpu.copy_d2h(prefetch.state)[1] & ~(PREFETCH_STOP | PREFETCH_DISCARD)
        assert np.isin(state, (0, 1 | 1 << 15)).all()
        num_started += step > 0 and bool(state.all())
        assert resident(gpu, cache)[1, gpu.copy_d2h(routed_ids)[0]].all()
        assert verify(gpu, cache, packed, 4 * top_k, step)
    assert num_started > 24
    num_prefetched, num_right, segments_copied = gpu.copy_d2h(cache.counters)[4:]
    assert (
        0 < num_right <= num_prefetched and 0 < segments_copied <= num_right * layout.nbytes // 2048
    )
    gpu.release(host_experts.packed)
