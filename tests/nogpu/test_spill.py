"""The spill probe, on a simulated driver with a clock."""

from typing import Any, cast

import numpy as np
import pytest

from osmium.cuda.driver import Device
from osmium.cuda.memory import DevicePool
from osmium.cuda.rates import SPILL_PROBE_BYTES, measure_vram_rate, spilled_bytes
from osmium.cuda.stream import CudaRuntime
from osmium.errors import CudaError

VRAM_GB_S, LINK_GB_S = 1000.0, 50.0

GIB = 1 << 30


class Clock:
    """A driver whose copies take as long as their source memory needs."""

    def __init__(self, room: int) -> None:
        self.room, self.now, self.next = room, 0.0, 4096
        self.marks: dict[int, float] = {}
        self.blocks: dict[int, int] = {}
        self.in_host: list[tuple[int, int]] = []
        self.stall_at, self.copies = -1, 0

    def __call__(self, call: str, *args: Any) -> Any:
        return getattr(self, call)(*args)

    def cuCtxGetStreamPriorityRange(self) -> tuple[int, int]:
        return 0, -5

    def cuStreamCreateWithPriority(self, flags: int, priority: int) -> int:
        return 1

    def cuStreamDestroy(self, handle: int) -> None:
        pass

    def cuMemAlloc(self, nbytes: int) -> int:
        if nbytes > self.room - sum(self.blocks.values()):
            raise CudaError("full", call="cuMemAlloc", name="OOM", code=2, context_lost=False)
        ptr, self.next = self.next, self.next + nbytes
        self.blocks[ptr] = nbytes
        return ptr

    def cuMemFree(self, ptr: int) -> None:
        del self.blocks[ptr]

    def cuEventCreate(self, flags: int) -> int:
        self.marks[len(self.marks)] = 0.0
        return len(self.marks) - 1

    def cuEventRecord(self, handle: int, stream: int) -> None:
        self.marks[handle] = self.now

    def cuEventSynchronize(self, handle: int) -> None:
        pass

    def cuEventElapsedTime(self, start: int, end: int) -> float:
        return self.marks[end] - self.marks[start]

    def cuEventDestroy(self, handle: int) -> None:
        pass

    def cuMemsetD8Async(self, ptr: int, byte: int, nbytes: int, stream: int) -> None:
        pass

    def cuMemcpyAsync(self, out: int, source: int, nbytes: int, stream: int) -> None:
        self.copies += 1
        slow = any(at <= source < at + size for at, size in self.in_host)
        rate = LINK_GB_S / 2 if slow else VRAM_GB_S
        self.now += 2 * nbytes / rate / 1e6
        if self.copies == self.stall_at:
            self.now += 20.0  # the host was descheduled before it recorded the event


class Card:
    """A device of the simulated driver."""

    closed = False

    def __init__(self, room: int = 32 * GIB) -> None:
        self.driver = Clock(room)

    def memory(self) -> tuple[int, int]:
        return self.driver.room - sum(self.driver.blocks.values()), self.driver.room


def machine(card: Card) -> CudaRuntime:
    made = CudaRuntime(cast(Device, card))
    made.memory_gb_s = measure_vram_rate(cast(Device, card))
    return made


def test_the_vram_rate_counts_reads_and_writes_and_frees_its_buffers() -> None:
    card = Card()
    assert measure_vram_rate(cast(Device, card)) == pytest.approx(VRAM_GB_S)
    assert card.driver.blocks == {}
    assert measure_vram_rate(cast(Device, Card(GIB))) == pytest.approx(VRAM_GB_S)


def test_spilled_memory_is_found() -> None:
    card = Card()
    one = machine(card)
    arrays = [
        one.pool.empty((nbytes,), np.uint8) for nbytes in (8 * GIB, 5 * SPILL_PROBE_BYTES, 100)
    ]
    assert spilled_bytes(one) == 0
    card.driver.in_host = [(arrays[0].ptr + 6 * GIB, 2 * GIB)]
    assert spilled_bytes(one) == 2 * GIB
    card.driver.in_host.append((arrays[1].ptr, 5 * SPILL_PROBE_BYTES))
    assert spilled_bytes(one) == 2 * GIB + 5 * SPILL_PROBE_BYTES
    assert len(card.driver.blocks) == 3, "the probe frees its buffer"


def test_a_busy_host_is_not_taken_for_slow_memory() -> None:
    card = Card()
    one = machine(card)
    held = one.pool.empty((GIB,), np.uint8)
    card.driver.stall_at = card.driver.copies + 5
    assert spilled_bytes(one) == 0
    assert card.driver.copies >= card.driver.stall_at and held.nbytes == GIB


def test_without_a_measured_rate_no_spill_is_reported() -> None:
    one = CudaRuntime(cast(Device, Card()))
    held = one.pool.empty((GIB,), np.uint8)
    assert spilled_bytes(one) == 0 and held.nbytes == GIB


def test_a_frozen_pool_is_not_probed() -> None:
    pool = DevicePool(cast(Device, Card()))
    held = pool.empty((4,), np.float32)
    pool.freeze()
    with pytest.raises(AssertionError, match="while serving"):
        pool.empty((1,), np.uint8)
    assert pool.used == held.nbytes
    one = CudaRuntime(cast(Device, Card()))
    one.pool.freeze()
    for ask in (one.empty, one.empty_mapped, one.zeros_mapped):
        with pytest.raises(AssertionError, match="while serving"):
            ask((1,), np.uint8)
