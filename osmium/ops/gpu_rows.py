"""Memory, rows, matrices and quantisation of GpuOps.

Matvec kernels, for few tokens, and BF16 matrices of many read hi + lo (types.MatmulInput), which
the producer of the rows stores.  Other matrices of many tokens read digits.  `has_digits` says
where a producer stores these, too: shape and mode decide, so a reader does not split rows again.
The generic kernels, for other shapes, read f32, which merge_hi_lo_f32 restores.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from osmium.kernels.ptx import kernel
from osmium.ops.runtime import DeviceRuntime
from osmium.ops.tiling import (
    MATVEC_MAX_TOKENS,
    MAX_NORM_K,
    Tiling,
    bf16_gemm_kind,
    bf16_gemm_stages,
    bf16_narrow_stages,
    gemm_stages,
    input_shapes,
    supports_gemm,
    supports_matvec,
    tile_matrix,
    wgmma_stages,
)
from osmium.ops.types import Array, Fill, LinearWeight, MatmulInput
from osmium.quant.expert_layout import group_of
from osmium.quant.random_fill import BitPattern

__all__ = ["GpuRows"]

QUANTIZE_INT4 = kernel("int4_quantize_bf16")
QUANTIZE_INT8 = kernel("int8_quantize_bf16")
RANDOM_FILL = kernel("random_fill_u64")
EMBED = kernel("embed_bf16")
GATHER_ROWS = kernel("gather_rows_f32")
ADD = kernel("add_f32")
NORM_SPLIT_HI_LO = kernel("norm_split_hi_lo_f32")
MERGE_HI_LO = kernel("merge_hi_lo_f32")
LINEAR = {name: kernel(f"{name}_linear_f32") for name in ("bf16", "int8", "int4")}
NORM_SPLIT_DIGITS = kernel("norm_split_digits_f32")
SPLIT_DIGITS = kernel("split_digits_f32")
SPLIT_DIGITS_HI_LO = kernel("split_digits_hi_lo_f32")
GEMM = {name: kernel(f"{name}_gemm_f32") for name in ("int8", "int4")}
WGMMA_GEMM = {name: kernel(f"{name}_gemm_wgmma_f32") for name in ("int8", "int4")}
"""The same bits by instructions of compute capability 9.0."""
BF16_GEMM = {
    "large": kernel("bf16_gemm_f32"),
    "small": kernel("bf16_gemm_small_f32"),
    "narrow": kernel("bf16_gemm_narrow_f32"),
}
"""By tiling.bf16_gemm_kind."""
MATVEC = {name: kernel(f"{name}_matvec_f32") for name in ("bf16", "int8", "int4")}


class GpuRows:
    """See ops.Ops for every method's formula, shapes and source."""

    def __init__(self, runtime: DeviceRuntime) -> None:
        self.runtime = runtime
        self.stream = runtime.stream
        self.d2h_bytes = 0
        self.is_prefill = False
        """Whether launches use the kernels for many tokens, whatever the number of rows."""
        self.prefetch_is_active = False
        """Whether the prefetch side stream has launches that are not joined yet."""

    # -- memory ----------------------------------------------------------------------------------

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        return self.runtime.empty(shape, dtype)

    def to_device(self, array: npt.NDArray[Any]) -> Array:
        out = self.runtime.empty(array.shape, array.dtype)
        self.runtime.copy_h2d(out, np.ascontiguousarray(array))
        return out

    def empty_mapped(
        self, shape: tuple[int, ...], dtype: npt.DTypeLike, fill: Fill | None = None
    ) -> Array:
        return self.runtime.empty_mapped(shape, dtype, fill)

    def zeros_mapped(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        return self.runtime.zeros_mapped(shape, dtype)

    def host_view(self, array: Array) -> npt.NDArray[Any]:
        return self.runtime.host_view(array)

    def release(self, array: Array) -> None:
        self.runtime.release(array)

    def empty_input(self, tokens: int, width: int, eps: float | None = None) -> MatmulInput:
        shapes = input_shapes(tokens, width, eps is not None, gpu=True)
        arrays = {name: self.empty(*shape) for name, shape in shapes.items()}
        return MatmulInput(eps=eps or 0.0, **arrays)

    @contextlib.contextmanager
    def prefill(self) -> Iterator[None]:
        self.is_prefill = True
        try:
            yield
        finally:
            self.is_prefill = False

    def copy_h2d(self, out: Array, source: npt.NDArray[Any]) -> None:
        self.runtime.copy_h2d(out, source)

    def copy_d2h(self, source: Array) -> npt.NDArray[Any]:
        self.d2h_bytes += source.nbytes
        return self.runtime.copy_d2h(source)

    def copy(self, out: Array, source: Array) -> None:
        self.runtime.copy(out, source)

    def memset(self, out: Array, byte: int) -> None:
        self.runtime.memset(out, byte)

    def synchronize(self) -> None:
        self.runtime.synchronize()

    @contextlib.contextmanager
    def on_side_stream(self, prefetch: bool = False) -> Iterator[None]:
        self.stream = self.runtime.fork_side_stream(prefetch)
        self.prefetch_is_active |= prefetch
        try:
            yield
        finally:
            self.stream = self.runtime.stream

    def join_side_stream(self, prefetch: bool = False) -> None:
        self.runtime.join_side_stream(prefetch)
        self.prefetch_is_active &= not prefetch

    def capture_graph(self, run: Callable[[], None]) -> Callable[[], None]:
        return self.runtime.capture_graph(run)

    # -- rows ------------------------------------------------------------------------------------

    def embed(self, out: Array, ids: Array, table: Array) -> None:
        tokens, dim = out.shape
        EMBED(self.stream, tokens, out, ids, table, dim)

    def gather_rows(self, out: Array, x: Array, rows: Array) -> None:
        count, dim = out.shape
        GATHER_ROWS(self.stream, count, out, x, rows, dim)

    def add(self, out: Array, x: Array) -> None:
        ADD(self.stream, out, x, out.nbytes // 4)

    def prepare_input(self, a: MatmulInput) -> None:
        self._norm_split(a, a.f32, None)

    def rms_norm(self, h: MatmulInput, x: Array, w: Array) -> None:
        self._norm_split(h, x, w)

    def _norm_split(self, h: MatmulInput, x: Array, norm: Array | None) -> None:
        """h = rms_norm(x, norm), or x without `norm`: hi and lo, and digits if h has them."""
        tokens, width = x.shape
        square_sums = 0 if norm is None else h.square_sums
        if self.has_digits(h):
            NORM_SPLIT_DIGITS(
                self.stream, tokens, h.digits, h.units, h.hi_lo, square_sums, x,
                0 if norm is None else norm, width, h.eps,
            )  # fmt: skip
            return
        NORM_SPLIT_HI_LO(
            self.stream, tokens, h.hi_lo, square_sums, x, 0 if norm is None else norm, width
        )

    def prepare_input_of(self, w: LinearWeight, a: MatmulInput) -> None:
        """Store a.f32, not normed, in the form alone that `w` reads: digits, or hi and lo."""
        tokens, width = a.f32.shape
        if self.uses_digits(a, w):
            self.split_digits(a)
        else:
            NORM_SPLIT_HI_LO(self.stream, tokens, a.hi_lo, 0, a.f32, 0, width)

    def split_digits(self, a: MatmulInput) -> None:
        """a.digits and a.units of a.f32."""
        tokens, width = a.f32.shape
        SPLIT_DIGITS(self.stream, tokens, a.digits, a.units, a.f32, width)

    def split_digits_hi_lo(self, a: MatmulInput) -> None:
        """a.digits and a.units of hi + lo, not normed."""
        tokens, width = a.f32.shape
        SPLIT_DIGITS_HI_LO(self.stream, tokens, a.digits, a.units, a.hi_lo, width)

    def merge_hi_lo(self, a: MatmulInput) -> Array:
        """a.f32 = hi + lo, divided by the root mean square if normed; returns a.f32 [T, K]."""
        tokens, width = a.f32.shape
        MERGE_HI_LO(self.stream, tokens, a.f32, a.hi_lo, a.square_sums or 0, width, a.eps)
        return a.f32

    # -- matrices --------------------------------------------------------------------------------

    def linear(self, out: Array, a: MatmulInput, w: LinearWeight) -> None:
        if self.uses_gemm(a, w):
            self.gemm(out, a, w, 0)
        elif supports_matvec(w) and self.fits_norm(a):
            self.matvec(out, a, w, None, None)
        else:
            self.generic_linear(out, self.merge_hi_lo(a), w, 0)

    def linear_add_rms_norm(
        self, x: Array, a: MatmulInput, w: LinearWeight, h: MatmulInput, norm: Array
    ) -> None:
        if self.uses_gemm(a, w):
            self.gemm(x, a, w, 1)
            self.rms_norm(h, x, norm)
        elif supports_matvec(w) and w.out_features % 8 == 0 and self.fits_norm(a):
            self.matvec(x, a, w, h, norm)
            if self.has_digits(h):  # the kernel stores hi and lo alone
                self.rms_norm(h, x, norm)
        else:
            self.generic_linear(x, self.merge_hi_lo(a), w, 1)
            self.rms_norm(h, x, norm)

    def is_many(self, rows: int) -> bool:
        """Whether the kernels for many tokens take this number of rows."""
        return self.is_prefill or rows > MATVEC_MAX_TOKENS

    def has_digits(self, a: MatmulInput) -> bool:
        """Whether rms_norm and prepare_input store digits in `a`, beside hi and lo."""
        return a.digits is not None and self.is_many(a.f32.shape[0])

    def uses_gemm(self, a: MatmulInput, w: LinearWeight) -> bool:
        """Whether a matrix is multiplied by the kernels for many tokens."""
        if w.format == "bf16":
            return self.is_many(a.f32.shape[0]) and supports_gemm(w)
        return self.uses_digits(a, w)

    def uses_digits(self, a: MatmulInput, w: LinearWeight) -> bool:
        """Whether `gemm` multiplies the digits of `a`, and does not read hi and lo."""
        return w.format != "bf16" and self.has_digits(a) and supports_gemm(w)

    def gemm(self, out: Array, a: MatmulInput, w: LinearWeight, accumulate: int) -> None:
        """out = a @ W.T, or out += with `accumulate` 1, for many tokens.

        BF16 weights multiply hi + lo, others the digits.  The error of these is 16 bits of the
        largest of 128 inputs.
        """
        sizes = a.f32.shape[0], w.out_features, w.in_features
        if w.format != "bf16":
            bits, tiles = 4 if w.format == "int4" else 8, -(-sizes[0] // 64)
            values = (self.stream, out, a.digits, a.units, w.data, w.scale, *sizes)
            if stages := wgmma_stages(self.runtime, bits, sizes[2], tiles):
                WGMMA_GEMM[w.format](*values, stages, accumulate)
            else:
                stages = gemm_stages(self.runtime, bits, sizes[2])
                GEMM[w.format](*values, stages, accumulate)
            return
        kind = bf16_gemm_kind(self.runtime, sizes[0], w.out_features)
        stages = {
            "large": bf16_gemm_stages(self.runtime),
            "small": 5,
            "narrow": bf16_narrow_stages(self.runtime),
        }[kind]
        BF16_GEMM[kind](
            self.stream, out, a.hi_lo, a.square_sums or 0, w.data, *sizes, stages, accumulate, a.eps
        )

    def generic_linear(self, out: Array, x: Array, w: LinearWeight, add: int) -> None:
        """out = x @ W.T, or out += with `add` 1, for any shape.

        out f32 [T, N]    x f32 [T, K]
        """
        sizes = (x.shape[0], w.out_features, w.in_features)
        if w.format == "bf16":
            LINEAR["bf16"](self.stream, out, x, w.data, *sizes, add)
        elif w.format == "int8":
            LINEAR["int8"](self.stream, out, x, w.data, w.scale, *sizes, add)
        else:
            LINEAR["int4"](self.stream, out, x, w.data, w.scale, *sizes, w.group, add)

    def matvec(
        self,
        out: Array,
        a: MatmulInput,
        w: LinearWeight,
        h: MatmulInput | None,
        norm: Array | None,
        has_digits: bool = False,
    ) -> None:
        """out = a @ W.T, or with `h` out += a @ W.T; h = rms_norm(out, norm).

        With `has_digits`, INT4 only, a.hi_lo holds each group of 128 values as 512 bytes: 3 x 128
        i8 digits, then the f32 unit.  value = 16 * unit * (d0 + 256 d1 + 65536 d2); the kernel's
        weights are 16 * (q - 8).  Digit row i starts at byte 128 i.  Inputs j to j + 7 are bytes j
        to j + 7 of a row, in the order 0, 4, 1, 5, 2, 6, 3, 7; row 1 swaps neighbouring units of 16
        bytes.  The other bytes are unspecified.
        """
        norm_out = (0, 0, 0) if h is None else (h.hi_lo, norm, h.square_sums)
        tokens, tiling = a.f32.shape[0], self.tile(w)
        MATVEC[w.format](
            self.stream, tiling.blocks, out, a.hi_lo, a.square_sums or 0, w.data,
            *([] if w.scale is None else [w.scale]), *norm_out,
            tokens, tiling.tokens_per_block(tokens), w.out_features, w.in_features, tiling.tiles,
            int(h is not None),
            *([int(has_digits)] if w.format == "int4" else []), a.eps,
        )  # fmt: skip

    @staticmethod
    def fits_norm(a: MatmulInput) -> bool:
        """Whether the matvec kernels can apply the norm of `a` themselves."""
        return a.square_sums is None or a.f32.shape[1] <= MAX_NORM_K

    def tile(self, w: LinearWeight) -> Tiling:
        """The tiling of a matrix by tiles of eight rows."""
        return tile_matrix(self.runtime, w.out_features, w.in_features, 8, w.format == "int4")

    # -- quantisation, random fill----------------------------------------------------------------

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

    def random_fill(
        self, out: Array, start: int, nbytes: int, seed: int, pattern: BitPattern
    ) -> None:
        count, stride = out.shape
        halves = [
            half
            for word in (seed, pattern.mask, pattern.base)
            for half in (word & 0xFFFFFFFF, word >> 32)
        ]
        RANDOM_FILL(self.stream, count, out, stride, start, nbytes, *halves)
