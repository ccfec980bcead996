"""A CUDA binding whose memory is host memory and whose kernels do nothing, for loader tests.

Tracks every allocation by its call, so that tests see current and peak use and leaks.

The nth allocation can be refused.
"""

import ctypes
import mmap
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from osmium import loader
from osmium.cuda.driver import Driver
from osmium.cuda.memory import HostKind
from osmium.cuda.stream import CudaRuntime as Gpu
from osmium.engine.runner import ModelRunner
from osmium.planning import hardware

__all__ = ["FakeGpu"]


class _Result:
    def __init__(self, value: int = 0) -> None:
        self.value = value
        self.name = "CUDA_ERROR_OUT_OF_MEMORY" if value else "CUDA_SUCCESS"

    def __int__(self) -> int:
        return self.value


DONE = (_Result(),)
REFUSED = (_Result(2), None)


class FakeGpu:
    """The CUDA binding; `install` makes the loader use it."""

    def __init__(
        self,
        vram: int = 1 << 30,
        refuse: int | None = None,
        capability: tuple[int, int] = (9, 0),
    ) -> None:
        """Refuses allocation number `refuse`, counted from 0."""
        self.vram, self.refuse, self.capability = vram, refuse, capability
        self.held: dict[int, tuple[str, int, Any]] = {}
        """Per address: allocating call, bytes, owner of the memory."""
        self.num_allocations = 0
        self.peak_bytes: dict[str, int] = {}
        self.copied = 0
        """Bytes copied from host to device."""
        self.launched: list[str] = []
        """Entry names of launched kernels; a captured graph adds its kernels once."""

    def install(self, monkeypatch: pytest.MonkeyPatch, kind: HostKind = "registered-huge") -> None:
        for module in (loader, hardware):
            monkeypatch.setattr(module, "open_gpu", lambda config: Gpu(self.device(), kind))
        monkeypatch.setattr(
            ModelRunner, "capture_graphs", lambda self: None
        )  # it waits for tokens from kernels

    def device(self) -> Any:
        return _Device(self)

    def bytes_of(self, call: str) -> int:
        """Bytes allocated now by `call`."""
        return sum(nbytes for name, nbytes, _ in self.held.values() if name == call)

    def host_bytes(self) -> int:
        return self.bytes_of("cuMemHostAlloc") + self.bytes_of("cuMemHostRegister")

    # -- the binding -------------------------------------------------------------------------------

    def __getattr__(self, call: str) -> Callable[..., Any]:
        if not call.startswith("cu"):
            raise AttributeError(call)
        return lambda *args: (_Result(), 0)  # handles of streams and events, never read

    def _keep(self, call: str, address: int, nbytes: int, owner: Any) -> tuple[Any, ...]:
        self.num_allocations += 1
        full = call == "cuMemAlloc" and self.bytes_of(call) + nbytes > self.vram
        if self.num_allocations - 1 == self.refuse or full:
            return REFUSED
        self.held[address] = (call, nbytes, owner)
        host = self.host_bytes()
        self.peak_bytes["host"] = max(self.peak_bytes.get("host", 0), host)
        return _Result(), address

    def cuMemAlloc(self, nbytes: int) -> tuple[Any, ...]:
        memory = np.empty(nbytes, np.uint8)
        return self._keep("cuMemAlloc", memory.ctypes.data, nbytes, memory)

    def cuMemHostAlloc(self, nbytes: int, flags: int) -> tuple[Any, ...]:
        memory = np.frombuffer(mmap.mmap(-1, nbytes), np.uint8)
        return self._keep("cuMemHostAlloc", memory.ctypes.data, nbytes, memory)

    def cuMemHostRegister(self, address: int, nbytes: int, flags: int) -> tuple[Any, ...]:
        result = self._keep("cuMemHostRegister", address, nbytes, None)
        return result[:1]

    def _drop(self, address: int) -> tuple[Any, ...]:
        del self.held[address]
        return DONE

    cuMemFree = cuMemFreeHost = cuMemHostUnregister = _drop

    def cuMemHostGetDevicePointer(self, address: int, flags: int) -> tuple[Any, ...]:
        return _Result(), address

    def cuMemGetInfo(self) -> tuple[Any, ...]:
        return _Result(), self.vram - self.bytes_of("cuMemAlloc"), self.vram

    def cuLaunchKernel(self, entry: str, *launch: Any) -> tuple[Any, ...]:
        self.launched.append(entry)
        return DONE

    def CUstreamCaptureMode(self, mode: int) -> int:
        return mode

    def cuGraphGetNodes(self, graph: Any, most: int) -> tuple[Any, ...]:
        return _Result(), [], 0

    def cuCtxGetStreamPriorityRange(self) -> tuple[Any, ...]:
        return _Result(), 0, -5

    def cuMemcpyHtoDAsync(self, out: int, source: int, nbytes: int, stream: Any) -> Any:
        self.copied += nbytes
        return self.cuMemcpyAsync(out, source, nbytes, stream)

    def cuMemcpyAsync(self, out: int, source: int, nbytes: int, stream: Any) -> tuple[Any, ...]:
        ctypes.memmove(out, source, nbytes)
        return DONE

    cuMemcpyDtoHAsync = cuMemcpyAsync

    def cuMemsetD8Async(self, out: int, byte: int, nbytes: int, stream: Any) -> tuple[Any, ...]:
        ctypes.memset(out, byte, nbytes)
        return DONE

    def cuDevicePrimaryCtxRelease(self, handle: Any) -> tuple[Any, ...]:
        """Frees all VRAM, as destroying the context does."""
        self.held = {
            a: allocation for a, allocation in self.held.items() if allocation[0] != "cuMemAlloc"
        }
        return DONE


class _Device:
    """Stands in for cuda.driver.Device."""

    def __init__(self, binding: FakeGpu) -> None:
        self.driver = Driver(binding)
        self.name, self.capability, self.pdl_enabled = "fake", binding.capability, False
        self.sm_count, self.max_shared_per_block, self.l2, self.closed = (
            4,
            100 << 10,
            4 << 20,
            False,
        )

    def make_current(self) -> None:
        pass

    def memory(self) -> tuple[int, int]:
        free, total = self.driver("cuMemGetInfo")
        return free, total

    def synchronize(self) -> None:
        pass

    def dynamic_shared_bytes(self, contract: Any, nbytes: int, rows: int) -> int:
        return nbytes

    def text(self, contract: Any) -> str:
        return ""

    def function(self, entry: str, text: str, dynamic: int = 0) -> str:
        return entry

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self.driver("cuDevicePrimaryCtxRelease", 0)
