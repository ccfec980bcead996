"""A device of shapes alone: it records the launches of operations, and computes nothing."""

from collections.abc import Callable
from typing import Any, cast

import numpy as np

from osmium.kernels.ptx import Kernel
from osmium.ops.gpu import GpuOps
from osmium.ops.runtime import DeviceRuntime
from tests.ops.cases import Case

__all__ = ["Launch", "ShapeRuntime", "launches_of"]

Launch = tuple[Kernel, tuple[int, ...], tuple[Any, ...]]
"""Kernel, grid, values of the parameters."""


class UnwrittenArray(np.ndarray[Any, Any]):
    """Reserved memory, true as every device array."""

    def __bool__(self) -> bool:
        return True


class ShapeRuntime:
    """An ops.runtime.DeviceRuntime that records launches.  Memory is reserved, never written."""

    l2 = 48 << 20

    def __init__(
        self, sm_count: int = 132, max_shared_per_block: int = 227 << 10, has_wgmma: bool = False
    ) -> None:
        self.sm_count, self.max_shared_per_block = sm_count, max_shared_per_block
        self.has_wgmma = has_wgmma
        self.stream = self
        self.launches: list[Launch] = []

    def launch(self, one: Kernel, grid: tuple[int, ...], values: tuple[Any, ...]) -> None:
        self.launches.append((one, grid, values))

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        return np.empty(shape, dtype).view(UnwrittenArray)

    def empty_mapped(self, shape: tuple[int, ...], dtype: Any, fill: Any = None) -> Any:
        return self.empty(shape, dtype)

    def zeros_mapped(self, shape: tuple[int, ...], dtype: Any) -> Any:
        return np.zeros(shape, dtype)

    def host_view(self, array: Any) -> Any:
        return array

    def copy_d2h(self, source: Any) -> Any:
        return source

    def fork_side_stream(self, prefetch: bool) -> Any:
        return self

    def __getattr__(self, name: str) -> Callable[..., None]:
        """Copies and waits do nothing."""
        if name.startswith("_"):
            raise AttributeError(name)
        return lambda *arguments, **options: None


def launches_of(case: Case, machine: ShapeRuntime) -> list[Launch]:
    """The launches of a case, on all streams."""
    machine.launches.clear()
    ops = GpuOps(cast(DeviceRuntime, machine))
    case.call(ops, {name: ops.to_device(array) for name, array in case.arrays.items()})
    return machine.launches
