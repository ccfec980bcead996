"""The machine itself: memory on both sides, order, graphs, and what goes wrong."""

import os
import subprocess
import sys
from collections.abc import Iterator
from threading import Thread

import numpy as np
import numpy.typing as npt
import pytest

from osmium.cuda.memory import DevicePool, HostBuffer, HostKind
from osmium.cuda.stream import (
    SPILL_PROBE_BYTES,
    CudaRuntime,
    Event,
    Stream,
    measure_vram_rate,
    spilled_bytes,
)
from osmium.errors import KernelError, OutOfMemory
from osmium.kernels.ptx import Kernel, kernel, parse
from osmium.ops.gpu import GpuOps

pytestmark = pytest.mark.gpu

ADD = kernel("add_f32")


@pytest.fixture
def machine(gpu: GpuOps) -> Iterator[CudaRuntime]:
    assert isinstance(gpu.machine, CudaRuntime)
    yield gpu.machine


def test_what_goes_in_comes_out(machine: CudaRuntime, rng: np.random.Generator) -> None:
    for dtype in (np.uint8, np.float16, np.int64):
        source = rng.integers(0, 100, (3, 5, 7)).astype(dtype)
        array = machine.empty(source.shape, dtype)
        machine.copy_h2d(array, source)
        assert np.array_equal(machine.copy_d2h(array), source)
        assert np.array_equal(machine.copy_d2h(array[1:3]), source[1:3])
        machine.memset(array[0], 0)
        assert not machine.copy_d2h(array)[0].any()


@pytest.mark.parametrize("kind", ["pinned", "write-combined", "registered", "registered-huge"])
def test_kernels_read_and_write_host_memory(
    machine: CudaRuntime, rng: np.random.Generator, kind: HostKind
) -> None:
    count = 4096
    buffer = HostBuffer(machine.device, 4 * count, kind)
    view, mapped = buffer.array((count,), np.float32), buffer.device_array((count,), np.float32)
    a, b = (rng.standard_normal(count).astype(np.float32) for _ in range(2))
    view[...] = a
    other = machine.empty((count,), np.float32)
    machine.copy_h2d(other, b)
    ADD(machine.stream, mapped, other, count)
    ADD(machine.stream, other, mapped, count)
    machine.synchronize()
    assert np.array_equal(view, a + b)
    assert np.array_equal(machine.copy_d2h(other), b + (a + b))
    buffer.close()


@pytest.mark.parametrize("kind", ["pinned", "write-combined", "registered", "registered-huge"])
def test_kernels_read_what_filled_host_memory(
    machine: CudaRuntime, rng: np.random.Generator, kind: HostKind
) -> None:
    count = 3 << 20
    a = rng.standard_normal(count).astype(np.float32)

    def fill(memory: npt.NDArray[np.uint8]) -> None:
        memory[:] = a.view(np.uint8)

    def fails(memory: npt.NDArray[np.uint8]) -> None:
        memory[:] = 1
        raise ValueError("it cannot be read")

    buffer = HostBuffer(machine.device, a.nbytes, kind, fill)
    sum_of = machine.empty((count,), np.float32)
    machine.memset(sum_of, 0)
    ADD(machine.stream, sum_of, buffer.device_array((count,), np.float32), count)
    assert np.array_equal(machine.copy_d2h(sum_of), a)
    buffer.close()
    with pytest.raises(ValueError, match="cannot be read"):
        HostBuffer(machine.device, a.nbytes, kind, fails)


def test_a_graph_does_again_what_was_recorded(machine: CudaRuntime) -> None:
    count = 1000
    out, one = (machine.empty((count,), np.float32) for _ in range(2))
    machine.copy_h2d(out, np.zeros(count, np.float32))
    machine.copy_h2d(one, np.ones(count, np.float32))
    ADD(machine.stream, out, one, count)
    with machine.stream.capture() as made:
        for _ in range(3):
            ADD(machine.stream, out, one, count)
    (graph,) = made
    assert graph.nodes == 3
    assert machine.copy_d2h(out).max() == 1, "recording runs nothing"
    for _ in range(4):
        graph.replay(machine.stream)
    assert (machine.copy_d2h(out) == 13).all()
    graph.close()


def test_one_stream_waits_for_another(machine: CudaRuntime) -> None:
    count = 1 << 22
    out, one = (machine.empty((count,), np.float32) for _ in range(2))
    machine.memset(out, 0)
    machine.copy_h2d(one, np.ones(count, np.float32))
    start, end = Event(machine.device), Event(machine.device)
    start.record(machine.stream)
    for _ in range(50):
        ADD(machine.stream, out, one, count)
    end.record(machine.stream)
    other = Stream(machine.device)
    other.wait(end)
    ADD(other, one, out, count)
    other.synchronize()
    assert (machine.copy_d2h(one) == 51).all()
    assert end - start > 0
    other.close()


def test_running_out_says_who_holds_what(machine: CudaRuntime) -> None:
    with machine.pool.label("the test's own"):
        held = machine.empty((1 << 20,), np.uint8)
        with pytest.raises(OutOfMemory, match="the test's own"):
            machine.empty((1 << 50,), np.uint8)
    assert held.nbytes == 1 << 20


def test_memory_comes_back_when_nobody_holds_it(machine: CudaRuntime) -> None:
    before = machine.pool.used
    array = machine.empty((1 << 20,), np.uint8)
    view = array[100:200]
    del array
    assert machine.pool.used == before + (1 << 20), "a view keeps it"
    del view
    assert machine.pool.used == before


def test_a_text_that_does_not_assemble_shows_the_compilers_words(machine: CudaRuntime) -> None:
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
        Kernel("wrong", lambda: contract)(machine.stream, 1)


def test_a_launch_too_large_is_said_with_its_kernel(machine: CudaRuntime) -> None:
    out = machine.empty((4, 4), np.float32)
    with pytest.raises(KernelError, match="silu_mul_f32"):
        kernel("silu_mul_f32")(machine.stream, 1 << 20, out, out, 4)


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


def test_shared_memory_past_48_kib_is_asked_for_on_every_stream(machine: CudaRuntime) -> None:
    """It writes and reads the last word of its dynamic shared memory."""
    reach, out = reaching(REACH), machine.empty((1,), np.uint32)
    other = Stream(machine.device)
    for stream, nbytes in (
        (machine.stream, 96 << 10), (other, 60 << 10), (machine.stream, 80 << 10),
        (other, 96 << 10), (machine.stream, 1 << 10),
    ):  # fmt: skip
        reach(stream, out, nbytes)
        stream.synchronize()
        assert machine.copy_d2h(out)[0] == nbytes
    with pytest.raises(KernelError, match="reach"):
        reach(machine.stream, out, 1 << 20)
    other.close()


def test_two_texts_may_share_an_entrys_name(machine: CudaRuntime) -> None:
    """The same name with other numbers in it is another kernel."""
    out = machine.empty((1,), np.uint32)
    for word in ("%last", "64"):
        text = REACH.replace("[%at+-4], %last", f"[%at+-4], {word}")
        reaching(text)(machine.stream, out, 256)
        assert machine.copy_d2h(out)[0] == (256 if word == "%last" else 64)


def test_host_memory_among_vram_is_found_by_its_rate(machine: CudaRuntime) -> None:
    """No driver can be told to spill; host memory can be entered as if it were of the pool."""
    kept = machine.empty((4 * SPILL_PROBE_BYTES + 1,), np.uint8)
    machine.memory_gb_s = measure_vram_rate(machine.device)
    buffer = HostBuffer(machine.device, 3 * SPILL_PROBE_BYTES, "pinned")
    try:
        assert spilled_bytes(machine) == 0
        machine.pool._allocated[buffer.device_address] = (3 * SPILL_PROBE_BYTES, "spilled")
        assert spilled_bytes(machine) == 3 * SPILL_PROBE_BYTES
    finally:
        machine.pool._allocated.pop(buffer.device_address, None)
        machine.memory_gb_s = 0.0
        buffer.close()
    assert kept.nbytes > 4 * SPILL_PROBE_BYTES


def test_a_frozen_pool_gives_nothing_more(machine: CudaRuntime) -> None:
    pool = DevicePool(machine.device)
    kept = pool.empty((16,), np.uint8)
    pool.freeze()
    with pytest.raises(AssertionError, match="32"):
        pool.empty((32,), np.uint8)
    assert pool.used == kept.nbytes


@pytest.mark.parametrize("kind", ["pinned", "write-combined", "registered", "registered-huge"])
def test_too_much_host_memory_is_refused_with_the_number(
    machine: CudaRuntime, kind: HostKind
) -> None:
    with pytest.raises(OutOfMemory, match=r"1073741824\.00 GiB"):
        HostBuffer(machine.device, 1 << 60, kind)


def test_another_thread_launches_once_the_context_is_current_there(machine: CudaRuntime) -> None:
    count = 1000
    out, one = (machine.empty((count,), np.float32) for _ in range(2))
    machine.copy_h2d(one, np.ones(count, np.float32))
    machine.memset(out, 0)
    machine.synchronize()
    failed: list[BaseException] = []

    def work() -> None:
        try:
            machine.device.make_current()
            ADD(machine.stream, out, one, count)
            machine.synchronize()
        except BaseException as error:
            failed.append(error)

    thread = Thread(target=work)
    thread.start()
    thread.join()
    assert not failed
    assert (machine.copy_d2h(out) == 1).all()


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
def test_a_lost_context_says_so_and_with_sync_names_the_kernel(gpu: GpuOps, sync: str) -> None:
    """In a process of its own, as nothing can be done with a context after that."""
    done = subprocess.run(
        [sys.executable, "-c", LOSE],
        env={**os.environ, "OSMIUM_LAUNCH_BLOCKING": sync},
        capture_output=True,
        text=True,
    )
    first = done.stdout.splitlines()[0]
    assert first == f"True 700 {sync == '1'} True", done.stderr
    assert len(done.stdout.splitlines()) == 2, "everything after it fails too"
    assert done.returncode == 0, done.stderr
