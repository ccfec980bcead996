"""Order: streams, events, graphs, and the machine that the operations run on."""

import contextlib
import ctypes
import math
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from osmium.cuda.driver import Device
from osmium.cuda.memory import DeviceArray, DevicePool, Fill, HostBuffer, HostKind
from osmium.errors import CudaError, KernelError, OutOfMemory

__all__ = [
    "CudaRuntime",
    "Event",
    "Graph",
    "Stream",
    "measure_h2d_rates",
    "measure_vram_rate",
    "spilled_bytes",
]

SYNC = os.environ.get("OSMIUM_LAUNCH_BLOCKING") == "1"
"""Wait after every launch, so that an error names its kernel; graphs are run launch by launch."""


class Launchable(Protocol):
    """What a stream needs of a kernel."""

    @property
    def contract(self) -> Any: ...
    def pack(self, values: tuple[Any, ...]) -> bytearray: ...


class Event:
    """A mark in a stream; `later - earlier` is the milliseconds between them."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.handle = device.driver("cuEventCreate", 0)

    def record(self, stream: "Stream") -> "Event":
        """Mark what `stream` has been given so far."""
        self.device.driver("cuEventRecord", self.handle, stream.handle)
        return self

    def synchronize(self) -> None:
        """Wait until the mark is reached."""
        self.device.driver("cuEventSynchronize", self.handle)

    def __sub__(self, earlier: "Event") -> float:
        self.synchronize()
        return float(self.device.driver("cuEventElapsedTime", earlier.handle, self.handle))

    def close(self) -> None:
        self.device.driver("cuEventDestroy", self.handle)


class Graph:
    """Launches captured once, to be replayed by one call."""

    def __init__(self, device: Device, captured: Any) -> None:
        self.device = device
        self.nodes = int(device.driver("cuGraphGetNodes", captured, 0)[1])
        self.handle = device.driver("cuGraphInstantiate", captured, 0)
        device.driver("cuGraphDestroy", captured)

    def __del__(self) -> None:
        if not self.device.closed:
            with contextlib.suppress(CudaError):
                self.close()

    def replay(self, stream: "Stream") -> None:
        """Run everything again, in order after what `stream` was given before."""
        self.device.driver("cuGraphLaunch", self.handle, stream.handle)

    def close(self) -> None:
        handle, self.handle = self.handle, None
        if handle is not None:
            self.device.driver("cuGraphExecDestroy", handle)


class Stream:
    """Launches and copies, in order."""

    def __init__(self, device: Device, high_priority: bool = True) -> None:
        """With `first` its blocks get multiprocessors before those of streams without."""
        self.device = device
        # 1: does not wait for the null stream.  The smaller the priority's number, the sooner.
        least, most = device.driver("cuCtxGetStreamPriorityRange")
        self.handle = device.driver(
            "cuStreamCreateWithPriority", 1, most if high_priority else least
        )
        self._packed: dict[Launchable, tuple[Any, Any, int]] = {}
        self._capturing = False
        self._follows = False
        """Whether what is recorded next follows a kernel of this stream and nothing else."""

    # -- kernels -----------------------------------------------------------------------------------

    def launch(self, kernel: Launchable, grid: tuple[int, ...], values: tuple[Any, ...]) -> None:
        """Launch with `values`, the contract's parameters.  Raises: KernelError, CudaError."""
        contract = kernel.contract
        buffer = kernel.pack(values)
        dynamic = 0 if contract.dynamic is None else contract.dynamic(_sizes(contract, values))
        entry = contract.entry
        found = self._packed.get(kernel)
        x, y, z = (*grid, 1, 1)[:3]
        dynamic = self.device.dynamic_shared_bytes(contract, dynamic, y)
        try:
            if found is None or dynamic > found[2]:
                found = (
                    self.device.function(entry, self.device.text(contract), dynamic),
                    _addresses(buffer, contract.offsets), dynamic,
                )  # fmt: skip
                self._packed[kernel] = found
            if self._capturing and self._follows and self.device.pdl_enabled:
                config = self._overlapping((x, y, z), contract.block, dynamic)
                at = ctypes.addressof(found[1])
                self.device.driver("cuLaunchKernelEx", config, found[0], at, 0)
            else:
                self.device.driver(
                    "cuLaunchKernel", found[0], x, y, z, contract.block, 1, 1, dynamic,
                    self.handle, ctypes.addressof(found[1]), 0,
                )  # fmt: skip
            self._follows = self._capturing
            if SYNC and not self._capturing:
                self.synchronize()
        except CudaError as error:
            if not error.context_lost:
                raise KernelError(f"{entry}, grid {grid}: {error}") from None
            if SYNC:  # else it is an earlier launch that did it
                error.args = (f"{entry}, grid {grid}: {error}",)
            raise

    def _overlapping(self, grid: tuple[int, int, int], block: int, dynamic: int) -> Any:
        """A launch that may begin while the kernel before it ends (kernels.ptx.pdl_text)."""
        binding = self.device.driver.binding
        attribute = binding.CUlaunchAttribute()
        attribute.id = binding.CUlaunchAttributeID(6)  # programmatic stream serialization
        attribute.value.programmaticStreamSerializationAllowed = 1
        config = binding.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = grid
        config.blockDimX, config.blockDimY, config.blockDimZ = block, 1, 1
        config.sharedMemBytes, config.hStream = dynamic, self.handle
        config.attrs, config.numAttrs = [attribute], 1
        return config

    # -- copies ------------------------------------------------------------------------------------

    def copy_h2d(self, out: DeviceArray, source: npt.NDArray[Any]) -> None:
        """Host to device.  `source` may be used again at once unless it is page-locked."""
        plain = np.ascontiguousarray(source)
        assert plain.nbytes == out.nbytes, f"{plain.nbytes} bytes into {out.nbytes}"
        if plain.nbytes:
            self.device.driver(
                "cuMemcpyHtoDAsync", out.ptr, plain.ctypes.data, plain.nbytes, self.handle
            )

    def copy_d2h(self, out: npt.NDArray[Any], source: DeviceArray) -> None:
        """Device to host; done when the stream has been waited for."""
        assert out.nbytes == source.nbytes, f"{source.nbytes} bytes into {out.nbytes}"
        if out.nbytes:
            self.device.driver(
                "cuMemcpyDtoHAsync", out.ctypes.data, source.ptr, out.nbytes, self.handle
            )

    def copy(self, out: DeviceArray, source: DeviceArray) -> None:
        """Device to device, or out of mapped host memory."""
        assert out.nbytes == source.nbytes, f"{source.nbytes} bytes into {out.nbytes}"
        if out.nbytes:
            self.device.driver("cuMemcpyAsync", out.ptr, source.ptr, out.nbytes, self.handle)

    def memset(self, out: DeviceArray, byte: int) -> None:
        """Every byte of `out` = byte."""
        self._follows = False
        if out.nbytes:
            self.device.driver("cuMemsetD8Async", out.ptr, byte, out.nbytes, self.handle)

    # -- order -------------------------------------------------------------------------------------

    def wait(self, event: Event) -> None:
        """What follows on this stream starts after `event`."""
        self._follows = False
        self.device.driver("cuStreamWaitEvent", self.handle, event.handle, 0)

    def synchronize(self) -> None:
        """Wait for everything given to this stream.  Raises: CudaError of what failed in it."""
        self.device.driver("cuStreamSynchronize", self.handle)

    @contextlib.contextmanager
    def capture(self) -> Iterator[list[Graph]]:
        """Record what is launched inside instead of running it; the list then holds the graph."""
        made: list[Graph] = []
        mode = self.device.driver.binding.CUstreamCaptureMode(1)  # this thread alone
        self.device.driver("cuStreamBeginCapture", self.handle, mode)
        self._capturing, self._follows = True, False
        try:
            yield made
        except BaseException:
            with contextlib.suppress(CudaError):
                self.device.driver("cuStreamEndCapture", self.handle)
            raise
        finally:
            self._capturing = False
        made.append(Graph(self.device, self.device.driver("cuStreamEndCapture", self.handle)))

    def close(self) -> None:
        self.device.driver("cuStreamDestroy", self.handle)


def _addresses(buffer: bytearray, offsets: tuple[int, ...]) -> Any:
    """A C array of pointers to each parameter inside `buffer`, which must outlive it."""
    base = ctypes.addressof((ctypes.c_uint8 * len(buffer)).from_buffer(buffer))
    return (ctypes.c_void_p * len(offsets))(*(base + offset for offset in offsets))


def _sizes(contract: Any, values: tuple[Any, ...]) -> dict[str, int]:
    pairs = zip(contract.params, values, strict=True)
    return {p.name: int(value) for p, value in pairs if not p.is_array and p.type != "f32"}


class CudaRuntime:
    """A device with its pool and its stream: what ops.GpuOps runs on."""

    def __init__(self, device: Device, host_kind: HostKind = "pinned") -> None:
        self.device = device
        self.link_gb_s = self.memory_gb_s = 0.0
        """What host memory of that kind and VRAM were measured to give; 0: not measured."""
        self.pool = DevicePool(device)
        self.stream = Stream(device)
        self.side_streams = Stream(device, high_priority=False), Stream(device)
        """What is done beside: the second early, by blocks that come before others."""
        self._forked, self._joined = Event(device), Event(device)
        self.host_kind: HostKind = host_kind
        self._buffers: dict[int, HostBuffer] = {}

    @property
    def sm_count(self) -> int:
        """How many of them the device has."""
        return self.device.sm_count

    @property
    def max_shared_per_block(self) -> int:
        """Bytes of shared memory that a block may ask for."""
        return self.device.max_shared_per_block

    @property
    def l2(self) -> int:
        """Bytes of its L2 cache."""
        return self.device.l2

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> DeviceArray:
        """A new array in VRAM.  Raises: OutOfMemory."""
        return self.pool.empty(shape, dtype)

    def empty_mapped(
        self, shape: tuple[int, ...], dtype: npt.DTypeLike, fill: Fill | None = None
    ) -> DeviceArray:
        """A new array in page-locked host memory, as kernels see it; with `fill`, that has written
        its bytes before.  Raises: OutOfMemory, what `fill` raises."""
        assert not self.pool.frozen, "host memory was asked for while serving"
        nbytes = math.prod(shape) * np.dtype(dtype).itemsize
        write = None if fill is None else lambda memory: fill(memory[:nbytes])
        buffer = HostBuffer(self.device, max(nbytes, 4096), self.host_kind, write)
        array = buffer.device_array(shape, dtype)
        self._buffers[array.ptr] = buffer
        return array

    def zeros_mapped(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> DeviceArray:
        """Zeros in page-locked memory that the host also reads fast.  Raises: OutOfMemory."""
        assert not self.pool.frozen, "host memory was asked for while serving"
        nbytes = math.prod(shape) * np.dtype(dtype).itemsize
        buffer = HostBuffer(self.device, max(nbytes, 4096), "pinned")
        array = buffer.device_array(shape, dtype)
        self._buffers[array.ptr] = buffer
        self.host_view(array)[...] = 0
        return array

    def release(self, array: DeviceArray) -> None:
        """Give back what `host` or `mailbox` gave; views of it must not be used any more."""
        self._buffers.pop(array.ptr).close()

    def host_view(self, array: DeviceArray) -> npt.NDArray[Any]:
        """The host's view of what `host` gave."""
        return self._buffers[array.ptr].array(array.shape, array.dtype)

    def copy_h2d(self, out: DeviceArray, source: npt.NDArray[Any]) -> None:
        """out = source, ordered before what is launched next."""
        self.stream.copy_h2d(out, source)

    def copy_d2h(self, source: DeviceArray) -> npt.NDArray[Any]:
        """A NumPy copy, after everything launched."""
        out = np.empty(source.shape, source.dtype)
        self.stream.copy_d2h(out, source)
        self.stream.synchronize()
        return out

    def copy(self, out: DeviceArray, source: DeviceArray) -> None:
        self.stream.copy(out, source)

    def memset(self, out: DeviceArray, byte: int) -> None:
        self.stream.memset(out, byte)

    def synchronize(self) -> None:
        self.stream.synchronize()

    def capture_graph(self, run: Callable[[], None]) -> Callable[[], None]:
        """The launches of `run` as one graph; calling what comes back replays it."""
        if SYNC:
            return run
        for side in self.side_streams:
            side._capturing = True
        try:
            with self.stream.capture() as made:
                run()
        finally:
            for side in self.side_streams:
                side._capturing = False
        (graph,) = made
        return lambda: graph.replay(self.stream)

    def fork_side_stream(self, prefetch: bool = False) -> Stream:
        """A side stream, which goes on from where the main one is."""
        self._forked.record(self.stream)
        self.side_streams[prefetch].wait(self._forked)
        return self.side_streams[prefetch]

    def join_side_stream(self, prefetch: bool = False) -> None:
        """The main stream goes on when the side stream is done; its next kernel may still begin
        while its last one ends."""
        follows = self.stream._follows
        self._joined.record(self.side_streams[prefetch])
        self.stream.wait(self._joined)
        self.stream._follows = follows

    def close(self) -> None:
        """Give everything back: the stream, host memory, and the context with all of VRAM."""
        if self.device.closed:
            return
        with contextlib.suppress(CudaError):  # a lost context frees all by itself
            self.device.make_current()
            self.stream.synchronize()
            for buffer in self._buffers.values():
                buffer.close()
            for stream in (self.stream, *self.side_streams):
                stream.close()
        with contextlib.suppress(CudaError):
            self.device.close()


def measure_h2d_rates(
    device: Device, kinds: Sequence[HostKind], nbytes: int = 64 << 20
) -> dict[HostKind, float]:
    """GB/s at which the copy engine takes host memory of each kind; 0 where there is none of it.

    The kinds are copied in turns, and the best round of each counts: a link that is only waking up,
    or that somebody else uses, is slow for all of them.
    """
    pool, sources = DevicePool(device), dict[HostKind, HostBuffer]()
    out = pool.empty((nbytes,), np.uint8)
    for kind in kinds:
        with contextlib.suppress(OutOfMemory, CudaError):
            sources[kind] = HostBuffer(device, nbytes, kind)
    arrays = [source.device_array((nbytes,), np.uint8) for source in sources.values()]
    rates = {kind: max(x) for kind, x in zip(sources, _rates(device, out, arrays, 9), strict=True)}
    for source in sources.values():
        source.close()
    return {kind: rates.get(kind, 0.0) for kind in kinds}


def measure_vram_rate(device: Device, nbytes: int = 1 << 30) -> float:
    """GB/s of a copy inside VRAM, bytes read and bytes written; of less where less is free."""
    nbytes = min(nbytes, device.memory()[0] // 8)
    pool = DevicePool(device)
    out, source = pool.empty((nbytes,), np.uint8), pool.empty((nbytes,), np.uint8)
    return 2 * statistics.median(_rates(device, out, [source], 9)[0])


SPILL_PROBE_BYTES = 64 << 20
"""Bytes that are looked at together for where they are: 0.1 ms of VRAM, 3 ms of a link."""

SLOW = 0.25
"""A piece that is copied at less than this share of VRAM's rate is not in VRAM.  Out of host
memory 2 x 25 GB/s (PCIe 4) beside a slow card's 330 (RTX 3060) is .15, 2 x 50 beside a 5090's 1,500
is .07."""


TIMES = 3
"""How often a piece must be slow."""


def spilled_bytes(machine: CudaRuntime) -> int:
    """Bytes of the pool that the driver keeps in host memory, by timing a copy of each piece of it.

    Some drivers (Windows and WSL2) give more than the card has rather than refuse.  Contents stay;
    to be called after `memory_gb_s` is known.  0 where there is not a piece more to look with.
    """
    device, stream = machine.device, machine.stream
    pieces = [
        DeviceArray(ptr + at, (min(SPILL_PROBE_BYTES, nbytes - at),), np.uint8, None)
        for ptr, nbytes in machine.pool.blocks()
        for at in range(0, nbytes, SPILL_PROBE_BYTES)
        if nbytes - at >= SPILL_PROBE_BYTES // 4  # what is shorter is lost in the time of a launch
    ]
    if not pieces or not machine.memory_gb_s:
        return 0
    try:
        scratch = DevicePool(device).empty((SPILL_PROBE_BYTES,), np.uint8)
    except OutOfMemory:
        return 0
    stream.memset(scratch, 0)  # wake it up
    suspects = pieces
    for _ in range(TIMES):  # whoever was slow is asked again: it may have been the host that was
        marks = [Event(device).record(stream)]
        for piece in suspects:
            stream.copy(scratch[: piece.nbytes], piece)
            marks.append(Event(device).record(stream))
        most = [2e-6 * piece.nbytes / (SLOW * machine.memory_gb_s) for piece in suspects]
        times = [end - start for start, end in pairwise(marks)]
        suspects = [
            piece for piece, ms, much in zip(suspects, times, most, strict=True) if ms > much
        ]
        for mark in marks:
            mark.close()
    return sum(piece.nbytes for piece in suspects)


def _rates(
    device: Device, out: DeviceArray, sources: Sequence[DeviceArray], rounds: int
) -> list[list[float]]:
    """GB/s of copying each, `rounds` times, after one round that does not count."""
    stream = Stream(device)
    times: list[list[float]] = [[] for _ in sources]
    for _ in range(rounds + 1):
        for source, taken in zip(sources, times, strict=True):
            start, end = Event(device).record(stream), Event(device)
            stream.copy(out, source)
            end.record(stream)
            taken.append(end - start)
            start.close()
            end.close()
    stream.close()
    return [[out.nbytes / ms / 1e6 for ms in taken[1:]] for taken in times]
