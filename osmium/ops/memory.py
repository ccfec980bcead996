"""The part of the list of operations that concerns memory, graphs and streams.

Called while loading and around a forward pass, never inside one.  ops/__init__.py has the rest.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

import numpy as np
import numpy.typing as npt

from osmium.ops.types import Array, Fill, MatmulInput

__all__ = ["MemoryOps"]


class MemoryOps(Protocol):
    """Allocation, copies, graphs and streams of a backend; part of ops.Ops."""

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        """A new array with unspecified contents, in VRAM on the GPU.  Raises: OutOfMemory."""

    def to_device(self, array: npt.NDArray[np.generic]) -> Array:
        """A copy of a host array in VRAM, or the array itself on the CPU.  Raises: OutOfMemory."""

    def empty_mapped(
        self, shape: tuple[int, ...], dtype: npt.DTypeLike, fill: Fill | None = None
    ) -> Array:
        """A new array in host memory that kernels can read: NumPy, or mapped page-locked memory.
        `fill` writes its bytes, u8 [n], first.  Raises: OutOfMemory, or the error of `fill`."""

    def host_view(self, array: Array) -> npt.NDArray[np.generic]:
        """The host's NumPy view of an array of `empty_mapped` or `zeros_mapped`.  Memory of
        `empty_mapped` may be write-combined: write there, but do not read."""

    def zeros_mapped(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        """Zeros in host memory that host and kernels read and write.  Raises: OutOfMemory."""

    def release(self, array: Array) -> None:
        """Free an array of `empty_mapped` or `zeros_mapped`.  No launch may still use it."""

    def empty_input(self, tokens: int, width: int, eps: float | None = None) -> MatmulInput:
        """A new matrix input, normed if `eps` is given.  width % 8 == 0.  Raises: OutOfMemory."""

    def copy_h2d(self, out: Array, source: npt.NDArray[np.generic]) -> None:
        """out = source, same shape and dtype, ordered before later launches."""

    def copy_d2h(self, source: Array) -> npt.NDArray[np.generic]:
        """A NumPy copy of `source`, after all earlier launches.  Counted in `d2h_bytes`."""

    def copy(self, out: Array, source: Array) -> None:
        """out = source, same number of bytes; `source` may be an array of `empty_mapped`."""

    def memset(self, out: Array, byte: int) -> None:
        """Set every byte of `out` to `byte`."""

    def synchronize(self) -> None:
        """Wait for all launches.  Raises: CudaError if one of them failed."""

    def capture_graph(self, run: Callable[[], None]) -> Callable[[], None]:
        """A function that repeats what `run` does, on the same arrays.

        On the GPU this call only captures the launches of `run` as a graph.  `run` must not
        allocate or wait, and each of its kernels must have been launched once before.
        """

    def on_side_stream(self, prefetch: bool = False) -> AbstractContextManager[None]:
        """Launches inside run after all earlier launches, and in parallel with later ones outside,
        until `join_side_stream`.  `prefetch` picks a second, independent side stream."""

    def join_side_stream(self, prefetch: bool = False) -> None:
        """Later launches wait for all launches on that side stream."""

    def prefill(self) -> AbstractContextManager[None]:
        """Launches inside use the kernels for many tokens, whatever the number of rows.

        So a row's bits do not depend on how many rows a step has."""

    d2h_bytes: int
    """Bytes that `copy_d2h` has copied so far."""
