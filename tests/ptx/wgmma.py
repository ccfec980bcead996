"""wgmma in the PTX interpreter: products of registers and shared memory, in flight until a wait.

Each warp of a warpgroup computes its own 16 rows.  A product is computed when it is issued, and its
registers are taken away until wgmma.wait_group.  So an early access to them is a fault, and so is a
store to the shared memory that it reads.  Stores need fence.proxy.async before wgmma reads them,
by the warp that stored.  Registers need wgmma.fence before wgmma uses them.  The latter is stricter
than PTX: accumulators need it after each wait, also if nothing has used them since.

Source: PTX ISA 8.0, asynchronous warpgroup level matrix instructions; async proxy.
"""

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.ptx.faults import PtxFault

__all__ = ["AsyncProxy", "Product", "Products", "matrix_units", "sums_of"]

Values = npt.NDArray[Any]

UNIT = 16
"""Bytes of the units of shared memory that matrices and these records have."""

WARPGROUP = 4
"""Warps of a warpgroup."""


class AsyncProxy:
    """What a block's shared memory is to wgmma, by units."""

    def __init__(self, nbytes: int, num_warps: int) -> None:
        self.num_warps = num_warps
        self.writers = np.full(-(-nbytes // UNIT), -1)
        """The warp that stored there last and has had no fence.proxy.async since; -1: none."""
        self.readers = np.zeros(-(-nbytes // UNIT), np.int32)
        """wgmma in flight that read it."""
        self.matrices: dict[int, list[int]] = defaultdict(list)
        """Descriptors of every wgmma, by warp."""

    def check_store(self, at: npt.NDArray[np.int64], where: str) -> None:
        """Raises: PtxFault where wgmma in flight read those bytes."""
        if self.readers[at // UNIT].any():
            raise PtxFault(f"{where}: wgmma in flight read it; wgmma.wait_group must come first")

    def store(self, at: npt.NDArray[np.int64], warp: int) -> None:
        """Record that a warp's ordinary stores or cp.async have arrived at those offsets."""
        self.writers[at // UNIT] = warp

    def fence(self, warp: int) -> None:
        """fence.proxy.async of a warp."""
        self.writers[self.writers == warp] = -1

    def leave(self) -> None:
        """Raises: PtxFault unless the four warps of each warpgroup have issued the same wgmma."""
        for first in range(0, self.num_warps, WARPGROUP):
            issued = [self.matrices[warp] for warp in range(first, first + WARPGROUP)]
            if any(one != issued[0] for one in issued):
                raise PtxFault("the warps of a warpgroup have issued different wgmma")


@dataclass(eq=False)
class Product:
    """One wgmma in flight in one warp."""

    registers: tuple[str, ...]
    """Accumulators, and the registers of A."""
    units: npt.NDArray[np.int64]
    """Units of B in shared memory."""


class Products:
    """The wgmma of a warp that are in flight."""

    def __init__(self, proxy: AsyncProxy, warp: int) -> None:
        self.proxy, self.warp = proxy, warp
        self.values: dict[str, Values] = {}
        """Registers in flight, with their values after the last wgmma."""
        self.last: dict[str, Product] = {}
        """The last wgmma in flight of each of these registers."""
        self.groups: list[list[Product]] = [[]]
        """Not waited for yet; the open group last."""
        self.unfenced: set[str] = set()
        """Registers written or waited for since the last wgmma.fence."""
        self.fenced = False

    def fence(self) -> None:
        """wgmma.fence."""
        self.unfenced.clear()
        self.fenced = True

    def check(self, name: str, where: str) -> None:
        """Raises: PtxFault if wgmma in flight use a register."""
        if name in self.values:
            raise PtxFault(f"{where}: wgmma in flight use {name}; wgmma.wait_group must come first")

    def issue(self, product: Product, values: dict[str, Values], matrix: int, where: str) -> None:
        """Start a product that leaves `values` in its registers.  Raises: PtxFault."""
        for name in product.registers:
            if not self.fenced or name in self.unfenced:
                raise PtxFault(f"{where}: no wgmma.fence since {name} was written")
        if (self.proxy.writers[product.units] >= 0).any():
            raise PtxFault(f"{where}: no fence.proxy.async since its matrix was stored")
        self.proxy.readers[product.units] += 1
        self.proxy.matrices[self.warp].append(matrix)
        self.groups[-1].append(product)
        self.values |= values
        self.last |= dict.fromkeys(values, product)

    def wait(self, left: int) -> dict[str, Values]:
        """End all groups but the open one and the last `left`; returns their registers."""
        over = self.groups[: max(len(self.groups) - 1 - left, 0)]
        del self.groups[: len(over)]
        ended: dict[str, Values] = {}
        for product in (product for group in over for product in group):
            self.proxy.readers[product.units] -= 1
            for name in product.registers:
                if self.last.get(name) is product:
                    del self.last[name]
                    ended[name] = self.values.pop(name)
        self.unfenced |= ended.keys()
        return ended

    def leave(self, where: str) -> None:
        """Raises: PtxFault if the warp ends before its wgmma."""
        if self.values:
            raise PtxFault(f"{where}: a warp has left; its wgmma are in flight")


def matrix_units(descriptor: int, n: int, where: str) -> npt.NDArray[np.int64]:
    """Units of B [n, 2] that a matrix descriptor names: n rows of 32 bytes, K-major.

    Only a swizzle of 128 bytes is known, with 1024 bytes from eight rows to the next ones.
    Raises: PtxFault.
    """
    start, stride = (descriptor & 0x3FFF) * 16, (descriptor >> 32 & 0x3FFF) * 16
    if descriptor & ~(0x3FFF | 0x3FFF << 32) != 1 << 62 | 1 << 16 or stride != 1024:
        raise PtxFault(f"{where}: matrix descriptor {descriptor:#x} is not known")
    row, unit = np.arange(n)[:, None], np.arange(2)[None]
    at = start + row // 8 * stride + row % 8 * 128 + unit * UNIT
    units: npt.NDArray[np.int64] = at // UNIT ^ at // 128 % 8  # of addresses, as the hardware does
    return units


def sums_of(product: npt.NDArray[np.float64]) -> list[npt.NDArray[np.int64]]:
    """A product [16, n] of a warp as accumulators: 32 lanes of each of n / 2 registers."""
    lane = np.arange(32)
    g, q = lane // 4, lane % 4
    return [
        product[g + i % 4 // 2 * 8, i // 4 * 8 + 2 * q + i % 2].astype(np.int64)
        for i in range(product.shape[1] // 2)
    ]
