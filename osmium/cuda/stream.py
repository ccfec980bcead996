"""Streams, events and graphs, and the CUDA runtime that the operations run on."""

import contextlib
import ctypes
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from osmium.cuda.driver import Device
from osmium.cuda.memory import DeviceArray, DevicePool, Fill, HostBuffer, HostKind
from osmium.errors import CudaError, KernelError

__all__ = [
    "CudaRuntime",
    "Event",
    "Graph",
    "Stream",
]

MAX_QUEUE_DEPTH = 8
"""Most calls of `CudaRuntime.limit_queue` whose launches may be queued."""

STAGING_GROUPS = 4
"""Groups of staging slots, filled in turns by `CudaRuntime.stage`."""

LAUNCH_BLOCKING = os.environ.get("OSMIUM_LAUNCH_BLOCKING") == "1"
"""Synchronise after every launch, so that an error names its kernel; no graph is captured."""


class Launchable(Protocol):
    """What a stream needs from a kernel."""

    @property
    def contract(self) -> Any: ...
    def pack(self, values: tuple[Any, ...]) -> bytearray: ...


class Event:
    """A mark in a stream; `later - earlier` is the milliseconds between them."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.handle = device.driver("cuEventCreate", 0)

    def record(self, stream: "Stream") -> "Event":
        """Mark the end of the work queued on `stream` so far."""
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
    """Launches captured once and replayed by one call."""

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
        """Queue all captured launches on `stream`."""
        self.device.driver("cuGraphLaunch", self.handle, stream.handle)

    def close(self) -> None:
        handle, self.handle = self.handle, None
        if handle is not None:
            self.device.driver("cuGraphExecDestroy", handle)


class Stream:
    """An ordered queue of launches and copies."""

    def __init__(self, device: Device, high_priority: bool = True) -> None:
        """Blocks of a high-priority stream are scheduled before those of a low-priority one."""
        self.device = device
        # Flag 1: no implicit wait for the null stream.  `highest` is the smaller number.
        lowest, highest = device.driver("cuCtxGetStreamPriorityRange")
        priority = highest if high_priority else lowest
        self.handle = device.driver("cuStreamCreateWithPriority", 1, priority)
        self._packed: dict[Launchable, tuple[Any, Any, int]] = {}
        """(function, argument pointers, dynamic shared bytes) by kernel."""
        self._capturing = False
        self._follows_kernel = False
        """Whether the next captured launch directly follows a kernel here, as PDL requires."""

    # -- kernels -----------------------------------------------------------------------------------

    def launch(self, kernel: Launchable, grid: tuple[int, ...], values: tuple[Any, ...]) -> None:
        """Launch with `values` for the contract's parameters.  Raises: KernelError, CudaError."""
        contract = kernel.contract
        buffer = kernel.pack(values)
        dynamic = 0 if contract.dynamic is None else contract.dynamic(_sizes(contract, values))
        entry = contract.entry
        prepared = self._packed.get(kernel)
        x, y, z = (*grid, 1, 1)[:3]
        dynamic = self.device.dynamic_shared_bytes(contract, dynamic, y)
        try:
            if prepared is None or dynamic > prepared[2]:
                prepared = (
                    self.device.function(entry, self.device.text(contract), dynamic),
                    _addresses(buffer, contract.offsets), dynamic,
                )  # fmt: skip
                self._packed[kernel] = prepared
            function, arguments = prepared[0], ctypes.addressof(prepared[1])
            if self._capturing and self._follows_kernel and self.device.pdl_enabled:
                config = self._pdl_config((x, y, z), contract.block, dynamic)
                self.device.driver("cuLaunchKernelEx", config, function, arguments, 0)
            else:
                self.device.driver(
                    "cuLaunchKernel", function, x, y, z, contract.block, 1, 1, dynamic,
                    self.handle, arguments, 0,
                )  # fmt: skip
            self._follows_kernel = self._capturing
            if LAUNCH_BLOCKING and not self._capturing:
                self.synchronize()
        except CudaError as error:
            if not error.context_lost:
                raise KernelError(f"{entry}, grid {grid}: {error}") from None
            if LAUNCH_BLOCKING:  # otherwise an earlier launch may be the cause
                error.args = (f"{entry}, grid {grid}: {error}",)
            raise

    def _pdl_config(self, grid: tuple[int, int, int], block: int, dynamic: int) -> Any:
        """A launch config for PDL: the kernel may start before its predecessor ends
        (kernels.ptx.pdl_text)."""
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
        """Host to device.  The caller may reuse `source` at once unless it is page-locked."""
        contiguous = np.ascontiguousarray(source)
        nbytes = contiguous.nbytes
        assert nbytes == out.nbytes, f"{nbytes} bytes into {out.nbytes}"
        if nbytes:
            self.device.driver(
                "cuMemcpyHtoDAsync", out.ptr, contiguous.ctypes.data, nbytes, self.handle
            )

    def copy_d2h(self, out: npt.NDArray[Any], source: DeviceArray) -> None:
        """Device to host; `out` is valid after `synchronize`."""
        assert out.nbytes == source.nbytes, f"{source.nbytes} bytes into {out.nbytes}"
        if out.nbytes:
            self.device.driver(
                "cuMemcpyDtoHAsync", out.ctypes.data, source.ptr, out.nbytes, self.handle
            )

    def copy(self, out: DeviceArray, source: DeviceArray) -> None:
        """Device to device; `source` may also be mapped host memory."""
        assert out.nbytes == source.nbytes, f"{source.nbytes} bytes into {out.nbytes}"
        if out.nbytes:
            self.device.driver("cuMemcpyAsync", out.ptr, source.ptr, out.nbytes, self.handle)

    def memset(self, out: DeviceArray, byte: int) -> None:
        """Set every byte of `out` to `byte`."""
        self._follows_kernel = False
        if out.nbytes:
            self.device.driver("cuMemsetD8Async", out.ptr, byte, out.nbytes, self.handle)

    # -- order -------------------------------------------------------------------------------------

    def wait(self, event: Event) -> None:
        """Later work on this stream starts after `event`."""
        self._follows_kernel = False
        self.device.driver("cuStreamWaitEvent", self.handle, event.handle, 0)

    def synchronize(self) -> None:
        """Wait for all queued work.  Raises: CudaError if any of it failed."""
        self.device.driver("cuStreamSynchronize", self.handle)

    @contextlib.contextmanager
    def capture(self) -> Iterator[list[Graph]]:
        """Capture the launches of the body instead of running them; the list then holds the graph.

        Raises: CudaError.
        """
        graphs: list[Graph] = []
        mode = self.device.driver.binding.CUstreamCaptureMode(1)  # thread-local
        self.device.driver("cuStreamBeginCapture", self.handle, mode)
        self._capturing, self._follows_kernel = True, False
        try:
            yield graphs
        except BaseException:
            with contextlib.suppress(CudaError):
                self.device.driver("cuStreamEndCapture", self.handle)
            raise
        finally:
            self._capturing = False
        graphs.append(Graph(self.device, self.device.driver("cuStreamEndCapture", self.handle)))

    def close(self) -> None:
        self.device.driver("cuStreamDestroy", self.handle)


def _addresses(buffer: bytearray, offsets: tuple[int, ...]) -> Any:
    """A C array of pointers to each parameter in `buffer`; `buffer` must outlive the array."""
    base = ctypes.addressof((ctypes.c_uint8 * len(buffer)).from_buffer(buffer))
    return (ctypes.c_void_p * len(offsets))(*(base + offset for offset in offsets))


def _sizes(contract: Any, values: tuple[Any, ...]) -> dict[str, int]:
    pairs = zip(contract.params, values, strict=True)
    return {p.name: int(value) for p, value in pairs if not p.is_array and p.type != "f32"}


class CudaRuntime:
    """A device with its memory pool and streams: the runtime of ops.GpuOps."""

    def __init__(self, device: Device, host_kind: HostKind = "pinned") -> None:
        self.device = device
        self.link_gb_s = self.memory_gb_s = 0.0
        """Measured copy rates from host memory of `host_kind` and in VRAM; 0: not measured."""
        self.pool = DevicePool(device)
        self.stream = Stream(device)
        self.side_streams = Stream(device, high_priority=False), Stream(device)
        """[0] low priority, hits; [1] high priority, prefetch."""
        self._fork_event, self._join_event = Event(device), Event(device)
        self.copy_stream = Stream(device)
        """Copies from host memory, in parallel with the main stream; ordered by events alone."""
        self._staged = [Event(device) for _ in range(STAGING_GROUPS)]
        """The ends of the last copies to each group of staging slots."""
        self._released = [Event(device) for _ in range(STAGING_GROUPS)]
        """The ends of the launches that last read each group."""
        self._timer, self._readback = Event(device), Event(device)
        self._queue_marks = [Event(device) for _ in range(MAX_QUEUE_DEPTH)]
        """The ends of the launches before the last calls of `limit_queue`, in turns."""
        self._queue_calls = 0
        self.host_kind: HostKind = host_kind
        self._buffers: dict[int, HostBuffer] = {}

    @property
    def sm_count(self) -> int:
        """Multiprocessors of the device."""
        return self.device.sm_count

    @property
    def max_shared_per_block(self) -> int:
        """Most bytes of shared memory per block."""
        return self.device.max_shared_per_block

    @property
    def l2(self) -> int:
        """Bytes of the L2 cache."""
        return self.device.l2

    @property
    def has_wgmma(self) -> bool:
        """Whether kernels for sm_90a load: no other compute capability has wgmma instructions."""
        return self.device.capability == (9, 0)

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> DeviceArray:
        """A new array in VRAM.  Raises: OutOfMemory."""
        return self.pool.empty(shape, dtype)

    def empty_mapped(
        self, shape: tuple[int, ...], dtype: npt.DTypeLike, fill: Fill | None = None
    ) -> DeviceArray:
        """A new array in mapped host memory, by its device address; `fill` first writes its bytes.

        Raises: OutOfMemory, and the errors of `fill`.
        """
        assert not self.pool.frozen, "allocation of host memory while serving"
        nbytes = math.prod(shape) * np.dtype(dtype).itemsize
        write = None if fill is None else lambda memory: fill(memory[:nbytes])
        buffer = HostBuffer(self.device, max(nbytes, 4096), self.host_kind, write)
        array = buffer.device_array(shape, dtype)
        self._buffers[array.ptr] = buffer
        return array

    def zeros_mapped(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> DeviceArray:
        """Zeros in mapped host memory that the host reads fast, too.  Raises: OutOfMemory."""
        assert not self.pool.frozen, "allocation of host memory while serving"
        nbytes = math.prod(shape) * np.dtype(dtype).itemsize
        buffer = HostBuffer(self.device, max(nbytes, 4096), "pinned")
        array = buffer.device_array(shape, dtype)
        self._buffers[array.ptr] = buffer
        self.host_view(array)[...] = 0
        return array

    def release(self, array: DeviceArray) -> None:
        """Free an array of `empty_mapped` or `zeros_mapped`; its views become invalid."""
        self._buffers.pop(array.ptr).close()

    def host_view(self, array: DeviceArray) -> npt.NDArray[Any]:
        """The host's view of an array of `empty_mapped` or `zeros_mapped`."""
        return self._buffers[array.ptr].array(array.shape, array.dtype)

    def copy_h2d(self, out: DeviceArray, source: npt.NDArray[Any]) -> None:
        """out = source, ordered before later launches."""
        self.stream.copy_h2d(out, source)

    def copy_d2h(self, source: DeviceArray) -> npt.NDArray[Any]:
        """A NumPy copy of `source` after all launches so far; synchronises."""
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
        """Capture the launches of `run` as one graph; the returned function replays it."""
        if LAUNCH_BLOCKING:
            return run
        for side in self.side_streams:
            side._capturing = True
        try:
            with self.stream.capture() as graphs:
                run()
        finally:
            for side in self.side_streams:
                side._capturing = False
        (graph,) = graphs
        return lambda: graph.replay(self.stream)

    def fork_side_stream(self, prefetch: bool = False) -> Stream:
        """A side stream, ordered after the main stream; with `prefetch` the high-priority one."""
        self._fork_event.record(self.stream)
        self.side_streams[prefetch].wait(self._fork_event)
        return self.side_streams[prefetch]

    def join_side_stream(self, prefetch: bool = False) -> None:
        """Make later work on the main stream wait for the side stream.

        The next kernel may still use PDL with the main stream's last one.
        """
        follows_kernel = self.stream._follows_kernel
        self._join_event.record(self.side_streams[prefetch])
        self.stream.wait(self._join_event)
        self.stream._follows_kernel = follows_kernel

    def stage(self, buffer: int, copies: Sequence[tuple[DeviceArray, DeviceArray]]) -> None:
        """Copy (out, source) pairs on the copy stream, after the buffer's last `release_staged`."""
        self.copy_stream.wait(self._released[buffer])
        for out, source in copies:
            self.copy_stream.copy(out, source)
        self._staged[buffer].record(self.copy_stream)

    def wait_staged(self, buffer: int) -> None:
        """Make later work on the main stream wait for the last copies to this buffer."""
        self.stream.wait(self._staged[buffer])

    def release_staged(self, buffer: int) -> None:
        """The next copies to this buffer wait for the work on the main stream so far."""
        self._released[buffer].record(self.stream)

    def start_timer(self) -> None:
        """`wait_readback` measures from the end of the work on the main stream so far."""
        self._timer.record(self.stream)

    def record_readback(self) -> None:
        """`wait_readback` waits for the work on the main stream so far."""
        self._readback.record(self.stream)

    def wait_readback(self) -> float:
        """Wait for the last `record_readback`; returns milliseconds since `start_timer`."""
        return self._readback - self._timer

    def limit_queue(self, depth: int) -> None:
        """Wait for the work on the main stream before the `depth`-th last call."""
        assert 1 <= depth <= MAX_QUEUE_DEPTH, f"a depth of {depth}"
        marks, self._queue_calls = self._queue_marks, self._queue_calls + 1
        if self._queue_calls > depth:
            marks[(self._queue_calls - depth) % MAX_QUEUE_DEPTH].synchronize()
        marks[self._queue_calls % MAX_QUEUE_DEPTH].record(self.stream)

    def close(self) -> None:
        """Free the streams, host memory and all VRAM; repeated calls do nothing."""
        if self.device.closed:
            return
        with contextlib.suppress(CudaError):  # a lost context has freed everything
            self.device.make_current()
            self.stream.synchronize()
            for buffer in self._buffers.values():
                buffer.close()
            for stream in (self.stream, self.copy_stream, *self.side_streams):
                stream.close()
        with contextlib.suppress(CudaError):
            self.device.close()
