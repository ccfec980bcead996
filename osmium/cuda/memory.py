"""Memory on both sides of the link: VRAM, and mapped host memory.

`DevicePool` allocates VRAM with labels; an out-of-memory error lists the bytes of each label.  A
frozen pool allocates nothing.  `HostBuffer` is page-locked memory of one kind.
"""

import contextlib
import math
import mmap
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from osmium.cuda.driver import Device
from osmium.errors import CudaError, OutOfMemory

__all__ = ["DeviceArray", "DevicePool", "Fill", "HostBuffer", "HostKind", "Waits", "waited_for"]

HostKind = Literal["pinned", "write-combined", "registered", "registered-huge"]

Fill = Callable[[npt.NDArray[np.uint8]], None]
"""Writes all bytes of new host memory, u8 [n]; no thread writes after it returns or raises."""

Waits = list[Callable[[], None]]
"""One function for each read in flight: it waits for the bytes, or raises the read's error."""


@contextlib.contextmanager
def waited_for(waits: Waits) -> Iterator[None]:
    """If the body fails, wait for all reads in flight before raising: none writes later."""
    try:
        yield
    except BaseException:
        for wait in waits:
            with contextlib.suppress(Exception):
                wait()
        raise


_PREFAULT_BYTES = 64 << 20
"""Bytes that one task of _prefault touches."""

_PORTABLE, _MAPPED, _WRITE_COMBINED = 1, 2, 4
_OUT_OF_MEMORY = 2


class DeviceArray:
    """A row-major array that kernels can reach: in VRAM, or in mapped host memory.

    Slices along the first axis and reshapes are views and keep the owner alive.
    """

    __slots__ = ("dtype", "nbytes", "owner", "ptr", "shape")

    def __init__(
        self, ptr: int, shape: tuple[int, ...], dtype: npt.DTypeLike, owner: object
    ) -> None:
        self.ptr = ptr
        """Device address."""
        self.shape = shape
        self.dtype: np.dtype[Any] = np.dtype(dtype)
        self.nbytes = math.prod(shape) * self.dtype.itemsize
        self.owner = owner

    def __getitem__(self, key: int | slice) -> "DeviceArray":
        """a[i] drops the first axis, a[i:j] keeps it.  Raises: IndexError, also for a step."""
        length, rest = self.shape[0], self.shape[1:]
        row = math.prod(rest) * self.dtype.itemsize
        if isinstance(key, slice):
            start, stop, step = key.indices(length)
            if step != 1:
                raise IndexError(f"A device array is sliced in steps of 1, not {step}.")
            count = max(0, stop - start)
            return DeviceArray(self.ptr + start * row, (count, *rest), self.dtype, self.owner)
        index = key + length if key < 0 else key
        if not 0 <= index < length:
            raise IndexError(f"Index {key} of an axis of {length}.")
        return DeviceArray(self.ptr + index * row, rest, self.dtype, self.owner)

    def __len__(self) -> int:
        return self.shape[0]

    def reshape(self, *shape: int) -> "DeviceArray":
        """The same bytes in another shape of the same size; one length may be -1, as in NumPy."""
        if -1 in shape:
            inferred = math.prod(self.shape) // max(1, -math.prod(shape))
            shape = tuple(inferred if length == -1 else length for length in shape)
        if math.prod(shape) != math.prod(self.shape):
            raise ValueError(f"{list(self.shape)} cannot be reshaped to {list(shape)}.")
        return DeviceArray(self.ptr, shape, self.dtype, self.owner)

    def view(self, dtype: npt.DTypeLike) -> "DeviceArray":
        """The same bytes as another dtype; the last axis changes its length."""
        size = np.dtype(dtype).itemsize
        last = self.shape[-1] * self.dtype.itemsize
        if last % size:
            raise ValueError(f"{last} bytes per row cannot be viewed as {np.dtype(dtype)}.")
        return DeviceArray(self.ptr, (*self.shape[:-1], last // size), dtype, self.owner)

    def __repr__(self) -> str:
        return f"DeviceArray({self.dtype} {list(self.shape)} at {self.ptr:#x})"


class Allocation:
    """One VRAM allocation; freed with the last array over it."""

    def __init__(self, pool: "DevicePool", ptr: int, nbytes: int, label: str) -> None:
        self.pool, self.ptr, self.nbytes, self.label = pool, ptr, nbytes, label

    def free(self) -> None:
        """Free the memory; repeated calls do nothing."""
        ptr, self.ptr = self.ptr, 0
        if ptr and not self.pool.device.closed:
            with contextlib.suppress(CudaError):  # the context may be lost
                self.pool.device.driver("cuMemFree", ptr)
        self.pool.remove(ptr)

    def __del__(self) -> None:
        if self.ptr:
            self.free()


class DevicePool:
    """VRAM of one device."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.frozen = False
        self._allocated: dict[int, tuple[int, str]] = {}
        """(bytes, label) by address."""
        self._label = "other"

    @property
    def used(self) -> int:
        """Bytes allocated."""
        return sum(nbytes for nbytes, _ in self._allocated.values())

    def allocations(self) -> list[tuple[int, int]]:
        """(address, bytes) of each allocation."""
        return [(ptr, nbytes) for ptr, (nbytes, _) in self._allocated.items()]

    @contextlib.contextmanager
    def label(self, label: str) -> Iterator[None]:
        """Label the allocations of the body; OutOfMemory sums bytes by label."""
        before, self._label = self._label, label
        try:
            yield
        finally:
            self._label = before

    def freeze(self) -> None:
        """Make every later allocation an assertion failure: serving allocates nothing."""
        self.frozen = True

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> DeviceArray:
        """A new array in VRAM with unspecified contents.  Raises: OutOfMemory."""
        nbytes = math.prod(shape) * np.dtype(dtype).itemsize
        assert not self.frozen, f"allocation of {nbytes} bytes while serving"
        try:
            ptr = int(self.device.driver("cuMemAlloc", max(nbytes, 16)))
        except CudaError as error:
            if error.code != _OUT_OF_MEMORY:
                raise
            raise self._out_of_memory(nbytes) from None
        allocation = Allocation(self, ptr, nbytes, self._label)
        self._allocated[ptr] = (nbytes, self._label)
        return DeviceArray(ptr, shape, dtype, allocation)

    def _out_of_memory(self, nbytes: int) -> OutOfMemory:
        free, total = self.device.memory()
        sums: dict[str, int] = {}
        for size, label in self._allocated.values():
            sums[label] = sums.get(label, 0) + size
        used = ", ".join(f"{label} {_gib(size)}" for label, size in sums.items()) or "nothing"
        return OutOfMemory(
            f"Cannot allocate {_gib(nbytes)} of VRAM for {self._label}: {_gib(free)} of "
            f"{_gib(total)} are free; Osmium uses {used}. "
            "Lower --vram, --expert-slots or --context."
        )

    def remove(self, ptr: int) -> None:
        """Remove a freed allocation from the pool's table."""
        self._allocated.pop(ptr, None)


class HostBuffer:
    """Page-locked host memory that kernels can read and write.

    pinned, write-combined      cuMemHostAlloc: pages of the driver
    registered                  ordinary pages, locked and mapped by cuMemHostRegister
    registered-huge             the same on transparent huge pages, where the system has them
    """

    def __init__(
        self, device: Device, nbytes: int, kind: HostKind, fill: Fill | None = None
    ) -> None:
        """Allocate `nbytes`; `fill` writes them all first, u8 [nbytes].

        Registered kinds are locked after `fill`: by then its writes have faulted the pages in.  No
        thread may write after `fill` returns or raises.
        Raises: OutOfMemory where the system refuses to lock so much; the errors of `fill`.
        """
        self.device, self.nbytes, self.kind, self.address = device, nbytes, kind, 0
        self._map: mmap.mmap | None = None
        with self._as_out_of_memory():
            view = self._host_alloc() if kind in ("pinned", "write-combined") else self._map_pages()
        if fill is not None:
            fill(view)
        elif self._map is not None:
            _prefault(view)
        if self._map is not None:
            with self._as_out_of_memory():
                address = int(view.ctypes.data)
                device.driver("cuMemHostRegister", address, nbytes, _PORTABLE | _MAPPED)
                self.address = address
        self.device_address = int(device.driver("cuMemHostGetDevicePointer", self.address, 0))

    def _host_alloc(self) -> npt.NDArray[np.uint8]:
        extra = _WRITE_COMBINED if self.kind == "write-combined" else 0
        flags = _PORTABLE | _MAPPED | extra
        self.address = int(self.device.driver("cuMemHostAlloc", self.nbytes, flags))
        return self.array((self.nbytes,), np.uint8)

    def _map_pages(self) -> npt.NDArray[np.uint8]:
        self._map = mmap.mmap(-1, self.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if self.kind == "registered-huge":
            self._map.madvise(mmap.MADV_HUGEPAGE)
        return np.frombuffer(self._map, np.uint8)

    @contextlib.contextmanager
    def _as_out_of_memory(self) -> Iterator[None]:
        """Raise OutOfMemory for a failed allocation in the body."""
        try:
            yield
        except (CudaError, OSError) as error:
            if isinstance(error, CudaError) and error.context_lost:
                raise
            raise OutOfMemory(
                f"Cannot allocate {_gib(self.nbytes)} of {self.kind} host memory ({error}). "
                "Free memory, choose a smaller model, or --no-wc-alloc for another kind."
            ) from None

    def array(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """The host's view.  Reads of write-combined memory are slow: only write."""
        return _host_array(self.address, shape, np.dtype(dtype), self)

    def device_array(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> DeviceArray:
        """The device's view of the same bytes."""
        return DeviceArray(self.device_address, shape, dtype, self)

    def close(self) -> None:
        """Free the memory; its views become invalid."""
        if not self.address or self.device.closed:
            return
        if self._map is None:
            self.device.driver("cuMemFreeHost", self.address)
        else:
            self.device.driver("cuMemHostUnregister", self.address)
        self.address = 0

    def __del__(self) -> None:
        if getattr(self, "address", 0):
            with contextlib.suppress(CudaError):
                self.close()


def _prefault(memory: npt.NDArray[np.uint8]) -> None:
    """Fault all pages in, with several threads.

    One thread clears pages at a fraction of the memory bandwidth, and cuMemHostRegister faults them
    in with one thread.
    """
    starts = range(0, memory.nbytes, _PREFAULT_BYTES)

    def touch(start: int) -> None:
        memory[start : start + _PREFAULT_BYTES : mmap.PAGESIZE] = 0  # NumPy releases the GIL

    with ThreadPoolExecutor(min(len(starts), os.cpu_count() or 1, 16)) as pool:
        list(pool.map(touch, starts))


class _Memory:
    """An address with NumPy's array interface; keeps its owner alive."""

    def __init__(
        self, address: int, shape: tuple[int, ...], dtype: np.dtype[Any], owner: object
    ) -> None:
        self.__array_interface__ = {
            "shape": shape, "typestr": dtype.str, "data": (address, False), "version": 3,
        }  # fmt: skip
        self.owner = owner


def _host_array(
    address: int, shape: tuple[int, ...], dtype: np.dtype[Any], owner: object
) -> npt.NDArray[Any]:
    return np.asarray(_Memory(address, shape, dtype, owner))


def _gib(nbytes: int) -> str:
    return f"{nbytes / (1 << 30):.2f} GiB" if nbytes >= 1 << 27 else f"{nbytes / (1 << 20):.2f} MiB"
