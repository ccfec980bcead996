"""CUDA runtime: memory on both sides, stream order, graphs, errors."""

import os
import subprocess
import sys
from collections.abc import Iterator
from threading import Thread

import numpy as np
import numpy.typing as npt
import pytest

from osmium.cuda.memory import DevicePool, HostBuffer, HostKind
from osmium.cuda.rates import SPILL_PROBE_BYTES, measure_vram_rate, spilled_bytes
from osmium.cuda.stream import CudaRuntime, Event, Stream
from osmium.errors import KernelError, OutOfMemory
from osmium.kernels.ptx import Kernel, kernel, parse
from osmium.ops.gpu import GpuOps

pytestmark = pytest.mark.gpu

ADD = kernel("add_f32")


@pytest.fixture
def runtime(gpu: GpuOps) -> Iterator[CudaRuntime]:
    assert isinstance(gpu.runtime, CudaRuntime)
    yield gpu.runtime


def test_copies_round_trip(runtime: CudaRuntime, rng: np.random.Generator) -> None:
    for dtype in (np.uint8, np.float16, np.int64):
        source = rng.integers(0, 100, (3, 5, 7)).astype(dtype)
        array = runtime.empty(source.shape, dtype)
        runtime.copy_h2d(array, source)
        assert np.array_equal(runtime.copy_d2h(array), source)
        assert np.array_equal(runtime.copy_d2h(array[1:3]), source[1:3])
        runtime.memset(array[0], 0)
        assert not runtime.copy_d2h(array)[0].any()


@pytest.mark.parametrize("kind", ["pinned", "write-combined", "registered", "registered-huge"])
def test_kernels_read_and_write_host_memory(
    runtime: CudaRuntime, rng: np.random.Generator, kind: HostKind
) -> None:
    count = 4096
    buffer = HostBuffer(runtime.device, 4 * count, kind)
    view, mapped = buffer.array((count,), np.float32), buffer.device_array((count,), np.float32)
    a, b = (rng.standard_normal(count).astype(np.float32) for _ in range(2))
    view[...] = a
    other = runtime.empty((count,), np.float32)
    runtime.copy_h2d(other, b)
    ADD(runtime.stream, mapped, other, count)
    ADD(runtime.stream, other, mapped, count)
    runtime.synchronize()
    assert np.array_equal(view, a + b)
    assert np.array_equal(runtime.copy_d2h(other), b + (a + b))
    buffer.close()


@pytest.mark.parametrize("kind", ["pinned", "write-combined", "registered", "registered-huge"])
def test_kernels_read_host_memory_filled_at_allocation(
    runtime: CudaRuntime, rng: np.random.Generator, kind: HostKind
) -> None:
    count = 3 << 20
    a = rng.standard_normal(count).astype(np.float32)

    def fill(memory: npt.NDArray[np.uint8]) -> None:
        memory[:] = a.view(np.uint8)

    def raise_error(memory: npt.NDArray[np.uint8]) -> None:
        memory[:] = 1
        raise ValueError("it cannot be read")

    buffer = HostBuffer(runtime.device, a.nbytes, kind, fill)
    sum_of = runtime.empty((count,), np.float32)
    runtime.memset(sum_of, 0)
    ADD(runtime.stream, sum_of, buffer.device_array((count,), np.float32), count)
    assert np.array_equal(runtime.copy_d2h(sum_of), a)
    buffer.close()
    with pytest.raises(ValueError, match="cannot be read"):
        HostBuffer(runtime.device, a.nbytes, kind, raise_error)


def test_replaying_a_graph_runs_the_captured_launches(runtime: CudaRuntime) -> None:
    count = 1000
    out, one = (runtime.empty((count,), np.float32) for _ in range(2))
    runtime.copy_h2d(out, np.zeros(count, np.float32))
    runtime.copy_h2d(one, np.ones(count, np.float32))
    ADD(runtime.stream, out, one, count)
    with runtime.stream.capture() as captured:
        for _ in range(3):
            ADD(runtime.stream, out, one, count)
    (graph,) = captured
    assert graph.nodes == 3
    assert runtime.copy_d2h(out).max() == 1, "capturing runs nothing"
    for _ in range(4):
        graph.replay(runtime.stream)
    assert (runtime.copy_d2h(out) == 13).all()
    graph.close()


def test_a_stream_waits_for_another(runtime: CudaRuntime) -> None:
    count = 1 << 22
    out, one = (runtime.empty((count,), np.float32) for _ in range(2))
    runtime.memset(out, 0)
    runtime.copy_h2d(one, np.ones(count, np.float32))
    start, end = Event(runtime.device), Event(runtime.device)
    start.record(runtime.stream)
    for _ in range(50):
        ADD(runtime.stream, out, one, count)
    end.record(runtime.stream)
    other = Stream(runtime.device)
    other.wait(end)
    ADD(other, one, out, count)
    other.synchronize()
    assert (runtime.copy_d2h(one) == 51).all()
    assert end - start > 0
    other.close()


def test_out_of_memory_lists_the_allocations(runtime: CudaRuntime) -> None:
    with runtime.pool.label("the test's own"):
        held = runtime.empty((1 << 20,), np.uint8)
        with pytest.raises(OutOfMemory, match="the test's own"):
            runtime.empty((1 << 50,), np.uint8)
    assert held.nbytes == 1 << 20


def test_unreferenced_memory_is_freed(runtime: CudaRuntime) -> None:
    before = runtime.pool.used
    array = runtime.empty((1 << 20,), np.uint8)
    view = array[100:200]
    del array
    assert runtime.pool.used == before + (1 << 20), "a view keeps the memory alive"
    del view
    assert runtime.pool.used == before


def test_text_that_does_not_assemble_raises_the_compilers_message(runtime: CudaRuntime) -> None:
    text = """//: entry   wrong
//: grid    1
//: block   32
//: param   n  u32
.version 7.8
.target sm_80
.address_size 64
.visible .entry wrong(
    .param .u32 n)
.maxntid 32
{
    add.u32 %nowhere, 1, 2;
    ret;
}
"""
    contract = parse(text, "wrong.ptx")
    with pytest.raises(KernelError, match="nowhere"):
        Kernel("wrong", lambda: contract)(runtime.stream, 1)


def test_a_too_large_launch_names_its_kernel(runtime: CudaRuntime) -> None:
    out = runtime.empty((4, 4), np.float32)
    with pytest.raises(KernelError, match="silu_and_mul_f32"):
        kernel("silu_and_mul_f32")(runtime.stream, 1 << 20, out, out, 4)


REACH = """//: entry   reach
//: grid    1
//: block   32
//: dynamic n
//: param   out  u64  out u32[1]
//: param   n    u32
.version 7.8
.target sm_80
.address_size 64
.extern .shared .align 16 .b8 room[];
.visible .entry reach(
    .param .u64 out, .param .u32 n)
.maxntid 32
{
    .reg .u64 %out;
    .reg .u32 %lane, %at, %last, %value;
    .reg .pred %other;
    mov.u32 %lane, %tid.x;
    setp.ne.u32 %other, %lane, 0;
    @%other bra done;
    ld.param.u64 %out, [out];
    ld.param.u32 %last, [n];
    mov.u32 %at, room;
    add.u32 %at, %at, %last;
    st.shared.u32 [%at+-4], %last;
    ld.shared.u32 %value, [%at+-4];
    st.global.u32 [%out], %value;
done:
    ret;
}
"""


def reaching(text: str) -> Kernel:
    contract = parse(text, "reach.ptx")
    return Kernel("reach", lambda: contract)


def test_dynamic_shared_memory_over_48_kib_works_on_every_stream(runtime: CudaRuntime) -> None:
    """The kernel writes and reads the last word of its dynamic shared memory."""
    reach, out = reaching(REACH), runtime.empty((1,), np.uint32)
    other = Stream(runtime.device)
    for stream, nbytes in (
        (runtime.stream, 96 << 10), (other, 60 << 10), (runtime.stream, 80 << 10),
        (other, 96 << 10), (runtime.stream, 1 << 10),
    ):  # fmt: skip
        reach(stream, out, nbytes)
        stream.synchronize()
        assert runtime.copy_d2h(out)[0] == nbytes
    with pytest.raises(KernelError, match="reach"):
        reach(runtime.stream, out, 1 << 20)
    other.close()


def test_two_kernels_may_have_the_same_entry_name(runtime: CudaRuntime) -> None:
    """Different text under the same entry name is another kernel."""
    out = runtime.empty((1,), np.uint32)
    for word in ("%last", "64"):
        text = REACH.replace("[%at+-4], %last", f"[%at+-4], {word}")
        reaching(text)(runtime.stream, out, 256)
        assert runtime.copy_d2h(out)[0] == (256 if word == "%last" else 64)


def test_spilled_memory_is_found_by_its_read_rate(runtime: CudaRuntime) -> None:
    """A driver cannot be made to spill, so the test registers host memory as part of the pool."""
    allocated = runtime.empty((4 * SPILL_PROBE_BYTES + 1,), np.uint8)
    runtime.memory_gb_s = measure_vram_rate(runtime.device)
    buffer = HostBuffer(runtime.device, 3 * SPILL_PROBE_BYTES, "pinned")
    try:
        assert spilled_bytes(runtime) == 0
        runtime.pool._allocated[buffer.device_address] = (3 * SPILL_PROBE_BYTES, "spilled")
        assert spilled_bytes(runtime) == 3 * SPILL_PROBE_BYTES
    finally:
        runtime.pool._allocated.pop(buffer.device_address, None)
        runtime.memory_gb_s = 0.0
        buffer.close()
    assert allocated.nbytes > 4 * SPILL_PROBE_BYTES


def test_a_frozen_pool_refuses_allocations(runtime: CudaRuntime) -> None:
    pool = DevicePool(runtime.device)
    allocated = pool.empty((16,), np.uint8)
    pool.freeze()
    with pytest.raises(AssertionError, match="32"):
        pool.empty((32,), np.uint8)
    assert pool.used == allocated.nbytes


@pytest.mark.parametrize("kind", ["pinned", "write-combined", "registered", "registered-huge"])
def test_too_much_host_memory_is_refused_with_the_number(
    runtime: CudaRuntime, kind: HostKind
) -> None:
    with pytest.raises(OutOfMemory, match=r"1073741824\.00 GiB"):
        HostBuffer(runtime.device, 1 << 60, kind)


def test_another_thread_launches_once_the_context_is_current_there(runtime: CudaRuntime) -> None:
    count = 1000
    out, one = (runtime.empty((count,), np.float32) for _ in range(2))
    runtime.copy_h2d(one, np.ones(count, np.float32))
    runtime.memset(out, 0)
    runtime.synchronize()
    failed: list[BaseException] = []

    def work() -> None:
        try:
            runtime.device.make_current()
            ADD(runtime.stream, out, one, count)
            runtime.synchronize()
        except BaseException as error:
            failed.append(error)

    thread = Thread(target=work)
    thread.start()
    thread.join()
    assert not failed
    assert (runtime.copy_d2h(out) == 1).all()


LOSE = """
import numpy as np
from osmium.cuda.driver import Device
from osmium.cuda.memory import DeviceArray
from osmium.cuda.stream import CudaRuntime
from osmium.errors import CudaError
from osmium.kernels.ptx import kernel

machine = CudaRuntime(Device())
out = machine.empty((1024,), np.float32)
nowhere = DeviceArray(0, (1024,), np.float32, None)
for again in range(2):
    try:
        kernel("add_f32")(machine.stream, out, nowhere, 1024)
        machine.synchronize()
    except CudaError as error:
        print(error.context_lost, error.code, "add_f32" in str(error), "restart" in str(error))
machine.close()
"""


@pytest.mark.parametrize("sync", ["0", "1"])
def test_a_lost_context_is_reported_and_blocking_launches_name_the_kernel(
    gpu: GpuOps, sync: str
) -> None:
    """In a separate process, because a lost context cannot be used afterwards."""
    done = subprocess.run(
        [sys.executable, "-c", LOSE],
        env={**os.environ, "OSMIUM_LAUNCH_BLOCKING": sync},
        capture_output=True,
        text=True,
    )
    first = done.stdout.splitlines()[0]
    assert first == f"True 700 {sync == '1'} True", done.stderr
    assert len(done.stdout.splitlines()) == 2, "every later call fails too"
    assert done.returncode == 0, done.stderr
