"""CudaRuntime orders copies to buffers and their readers by events alone, on a simulated driver."""

import itertools
from collections import defaultdict
from typing import Any, cast

import numpy as np

from osmium.cuda.driver import Device
from osmium.cuda.memory import DeviceArray
from osmium.cuda.stream import CudaRuntime


class Timeline:
    """A driver in which a copy takes a microsecond per byte, and streams run in parallel."""

    def __init__(self) -> None:
        self.handles = itertools.count(1)
        self.stream_ends: dict[int, int] = defaultdict(int)
        self.marks: dict[int, int] = {}
        self.copies: list[tuple[int, int, int, int]] = []
        """(stream, out, start, end) of each copy."""

    def __call__(self, call: str, *args: Any) -> Any:
        return getattr(self, call)(*args)

    def cuCtxGetStreamPriorityRange(self) -> tuple[int, int]:
        return 0, -5

    def cuStreamCreateWithPriority(self, flags: int, priority: int) -> int:
        return next(self.handles)

    def cuEventCreate(self, flags: int) -> int:
        return next(self.handles)

    def cuEventRecord(self, event: int, stream: int) -> None:
        self.marks[event] = self.stream_ends[stream]

    def cuStreamWaitEvent(self, stream: int, event: int, flags: int) -> None:
        self.stream_ends[stream] = max(self.stream_ends[stream], self.marks.get(event, 0))

    def cuMemcpyAsync(self, out: int, source: int, nbytes: int, stream: int) -> None:
        start = self.stream_ends[stream]
        self.stream_ends[stream] = start + nbytes
        self.copies.append((stream, out, start, start + nbytes))


class Card:
    def __init__(self) -> None:
        self.driver, self.closed = Timeline(), True


def array(ptr: int, nbytes: int) -> DeviceArray:
    return DeviceArray(ptr, (nbytes,), np.uint8, None)


def test_a_half_is_copied_while_the_other_is_read() -> None:
    """Six parts of 100 us of copies and 40 us of launches: the link is never idle."""
    runtime = CudaRuntime(cast(Device, Card()))
    timeline: Any = runtime.device.driver
    reads = []
    for part in range(6):
        half = part % 2
        runtime.stage(half, [(array(half, 60), array(900, 60)), (array(half, 40), array(900, 40))])
        runtime.wait_staged(half)
        runtime.stream.copy(array(700 + half, 40), array(half, 40))  # stands for the launches
        reads.append(timeline.copies[-1])
        runtime.release_staged(half)
    staged = [one for one in timeline.copies if one[0] == runtime.copy_stream.handle]
    ends = [end for *_, end in staged[1::2]]
    assert ends == [100 * part for part in range(1, 7)]
    for (_, _, start, _), end in zip(reads, ends, strict=True):
        assert start == end, "a part's launches wait for its copies, and for no later ones"


def test_a_half_is_not_overwritten_while_it_is_read() -> None:
    """Launches are slower than copies here, so copies wait for them."""
    runtime = CudaRuntime(cast(Device, Card()))
    timeline: Any = runtime.device.driver
    read_until = [0, 0]
    for part in range(6):
        half = part % 2
        runtime.stage(half, [(array(half, 10), array(900, 10))])
        assert timeline.copies[-1][2] >= read_until[half]
        runtime.wait_staged(half)
        runtime.stream.copy(array(700, 50), array(half, 50))
        read_until[half] = timeline.copies[-1][3]
        runtime.release_staged(half)
    assert read_until == [10 + 5 * 50, 10 + 6 * 50], "and launches never wait but for the first"
