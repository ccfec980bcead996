"""Memory, rows and matrices of GpuOps, and the making of weights.

Matrices for few tokens read rows as hi + lo (values.Rows), which whoever makes rows leaves behind;
the kernels for odd shapes read f32, which join_f32 makes again.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from osmium.kernels.ptx import kernel
from osmium.ops.fit import MATVEC_NORM, Share, fits_matvec, share
from osmium.ops.machine import Machine
from osmium.ops.values import Array, Fill, Linear, Rows
from osmium.quant.noise import Pattern
from osmium.quant.record import group_of

__all__ = ["GpuRows"]

QUANTIZE_INT4 = kernel("int4_quantize_bf16")
QUANTIZE_INT8 = kernel("int8_quantize_bf16")
NOISE = kernel("noise_u64")
EMBED = kernel("embed_bf16")
TAKE = kernel("take_f32")
ADD = kernel("add_f32")
SPLIT = kernel("split_f32")
JOIN = kernel("join_f32")
LINEAR = {name: kernel(f"{name}_linear_f32") for name in ("bf16", "int8", "int4")}
MATVEC = {name: kernel(f"{name}_matvec_f32") for name in ("bf16", "int8", "int4")}


class GpuRows:
    """See ops.Ops for every method's formula, shapes and source."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.stream = machine.stream
        self.bytes_to_host = 0
        self.fetches_early = False
        """Whether something is launched early, beside others, and not joined yet."""

    # -- memory ----------------------------------------------------------------------------------

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        return self.machine.empty(shape, dtype)

    def put(self, array: npt.NDArray[Any]) -> Array:
        made = self.machine.empty(array.shape, array.dtype)
        self.machine.copy_in(made, np.ascontiguousarray(array))
        return made

    def host(self, shape: tuple[int, ...], dtype: npt.DTypeLike, fill: Fill | None = None) -> Array:
        return self.machine.host(shape, dtype, fill)

    def mailbox(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        return self.machine.mailbox(shape, dtype)

    def host_view(self, array: Array) -> npt.NDArray[Any]:
        return self.machine.host_view(array)

    def release(self, array: Array) -> None:
        self.machine.release(array)

    def rows(self, tokens: int, width: int, eps: float | None = None) -> Rows:
        return Rows(
            self.empty((tokens, width), np.float32),
            self.empty((tokens, 2, width), np.uint16),
            None if eps is None else self.empty((tokens, width // 8), np.float32),
            eps or 0.0,
        )

    def copy_in(self, out: Array, source: npt.NDArray[Any]) -> None:
        self.machine.copy_in(out, source)

    def copy_out(self, source: Array) -> npt.NDArray[Any]:
        self.bytes_to_host += source.nbytes
        return self.machine.copy_out(source)

    def copy(self, out: Array, source: Array) -> None:
        self.machine.copy(out, source)

    def fill(self, out: Array, byte: int) -> None:
        self.machine.fill(out, byte)

    def synchronize(self) -> None:
        self.machine.synchronize()

    @contextlib.contextmanager
    def beside(self, early: bool = False) -> Iterator[None]:
        self.stream = self.machine.fork(early)
        self.fetches_early |= early
        try:
            yield
        finally:
            self.stream = self.machine.stream

    def join(self, early: bool = False) -> None:
        self.machine.join(early)
        self.fetches_early &= not early

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        return self.machine.record(run)

    # -- rows ------------------------------------------------------------------------------------

    def embed(self, out: Array, ids: Array, table: Array) -> None:
        tokens, dim = out.shape
        EMBED(self.stream, tokens, out, ids, table, dim)

    def take(self, out: Array, x: Array, rows: Array) -> None:
        count, dim = out.shape
        TAKE(self.stream, count, out, x, rows, dim)

    def add(self, out: Array, x: Array) -> None:
        ADD(self.stream, out, x, out.nbytes // 4)

    def settle(self, a: Rows) -> None:
        tokens, width = a.f32.shape
        SPLIT(self.stream, tokens, a.split, 0, a.f32, 0, width)

    def norm(self, h: Rows, x: Array, w: Array) -> None:
        tokens, width = x.shape
        SPLIT(self.stream, tokens, h.split, h.squares, x, w, width)

    def joined(self, a: Rows) -> Array:
        """The rows in f32, for kernels that read that."""
        tokens, width = a.f32.shape
        JOIN(self.stream, tokens, a.f32, a.split, a.squares or 0, width, a.eps)
        return a.f32

    # -- matrices --------------------------------------------------------------------------------

    def linear(self, out: Array, a: Rows, w: Linear) -> None:
        if fits_matvec(w) and self.fits(a):
            self.matvec(out, a, w, None, None)
        else:
            self.plain_linear(out, self.joined(a), w, 0)

    def linear_norm(self, x: Array, a: Rows, w: Linear, h: Rows, norm: Array) -> None:
        if fits_matvec(w) and w.rows % 8 == 0 and self.fits(a):
            self.matvec(x, a, w, h, norm)
        else:
            self.plain_linear(x, self.joined(a), w, 1)
            self.norm(h, x, norm)

    def plain_linear(self, out: Array, x: Array, w: Linear, add: int) -> None:
        """Any shape, f32 rows."""
        sizes = (x.shape[0], w.rows, w.columns)
        if w.format == "bf16":
            LINEAR["bf16"](self.stream, out, x, w.data, *sizes, add)
        elif w.format == "int8":
            LINEAR["int8"](self.stream, out, x, w.data, w.scale, *sizes, add)
        else:
            LINEAR["int4"](self.stream, out, x, w.data, w.scale, *sizes, w.group, add)

    def matvec(
        self, out: Array, a: Rows, w: Linear, h: Rows | None, norm: Array | None, made: bool = False
    ) -> None:
        """`made`: a.split holds digits, as ptx/int4_matvec_f32.ptx has them."""
        to = (0, 0, 0) if h is None else (h.split, norm, h.squares)
        tokens, some = a.f32.shape[0], self.share(w)
        MATVEC[w.format](
            self.stream, some.blocks, out, a.split, a.squares or 0, w.data,
            *([] if w.scale is None else [w.scale]), *to,
            tokens, some.rows(tokens), w.rows, w.columns, some.tiles, int(h is not None),
            *([int(made)] if w.format == "int4" else []), a.eps,
        )  # fmt: skip

    @staticmethod
    def fits(a: Rows) -> bool:
        """Whether the matrices for few tokens can divide by its norm."""
        return a.squares is None or a.f32.shape[1] <= MATVEC_NORM

    def share(self, w: Linear) -> Share:
        """How blocks share out a matrix in tiles of eight rows."""
        return share(self.machine, w.rows, w.columns, 8, w.format == "int4")

    # -- making weights --------------------------------------------------------------------------

    def quantize_int4(self, out: Array, data: int, scale: int, w: Array, clips: Array) -> None:
        count, rows, columns = w.shape
        group = group_of(columns)
        QUANTIZE_INT4(
            self.stream, count, out, w, clips, out.shape[1], data, scale,
            rows * (columns // group), group, clips.shape[0],
        )  # fmt: skip

    def quantize_int8(self, out: Array, data: int, scale: int, w: Array) -> None:
        count, rows, columns = w.shape
        QUANTIZE_INT8(self.stream, count, out, w, out.shape[1], data, scale, rows, columns)

    def noise(self, out: Array, start: int, nbytes: int, seed: int, pattern: Pattern) -> None:
        count, stride = out.shape
        halves = [
            half
            for word in (seed, pattern.mask, pattern.base)
            for half in (word & 0xFFFFFFFF, word >> 32)
        ]
        NOISE(self.stream, count, out, stride, start, nbytes, *halves)
