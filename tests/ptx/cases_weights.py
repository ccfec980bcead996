"""Ragged cases of the kernels that write weights; results must be exact."""

from collections.abc import Callable
from typing import Any

import numpy as np

from osmium.ops import Ops
from osmium.quant import int4, random_fill
from osmium.quant.floats import bf16_from_f32
from osmium.quant.random_fill import BitPattern
from tests.ops.cases import Arrays, Case

__all__ = ["CASES", "LARGE"]


def _weights(rng: np.random.Generator, *shape: int) -> Any:
    """bf16 [E, N, K] with edge cases of quantisation.

    They are rows and groups of zeros, -0, ties of the largest value, wide ranges, and values below
    any f16 scale.
    """
    w = rng.standard_normal(shape, np.float32) * np.float32(0.02)
    w[0, 0] = 0
    w[-1, -1, :32] = -0.0
    w[0, 1, 3:40:5] = 0.07
    w[0, 1, 1] = -0.07
    w[0, 2] *= np.exp2(rng.integers(-40, 10, shape[2])).astype(np.float32)
    w[-1, 3] *= np.float32(1e-8)
    w[-1, 4] *= np.float32(1e-33)
    return bf16_from_f32(w)


def _quantize(bits: int, *shape: int) -> Callable[[np.random.Generator], Case]:
    def make(rng: np.random.Generator) -> Case:
        count, rows, columns = shape
        data = 16
        scale = data + -(-rows * columns * bits // 8 // 16) * 16 + 16
        nbytes = scale + -(-rows * columns // 8 // 16) * 16
        arrays: Arrays = {
            "out": np.full((count, nbytes), 0x5A, np.uint8),
            "w": _weights(rng, *shape),
            "clips": np.array(int4.CLIPS, np.float32),
        }

        def call(ops: Ops, a: dict[str, Any]) -> None:
            if bits == 4:
                ops.quantize_int4(a["out"], data, scale, a["w"], a["clips"])
            else:
                ops.quantize_int8(a["out"], data, scale, a["w"])

        return Case(arrays, call, {"out": "exact"})

    return make


def _noise(pattern: BitPattern, count: int, stride: int, part: slice) -> Any:
    def make(rng: np.random.Generator) -> Case:
        seed = int(rng.integers(1 << 64, dtype=np.uint64, endpoint=False))
        arrays: Arrays = {"out": np.full((count, stride), 0x5A, np.uint8)}

        def call(ops: Ops, a: dict[str, Any]) -> None:
            ops.random_fill(a["out"], part.start, part.stop - part.start, seed, pattern)

        return Case(arrays, call, {"out": "exact"})

    return make


CASES: dict[str, Callable[[np.random.Generator], Case]] = {
    "quantize int4, groups of 128": _quantize(4, 2, 21, 256),
    "quantize int4, groups of 64": _quantize(4, 1, 33, 192),
    "quantize int4, groups of 32": _quantize(4, 3, 7, 96),
    "quantize int8": _quantize(8, 2, 19, 304),
    "quantize int8, narrow": _quantize(8, 1, 5, 48),
    "noise, bits": _noise(random_fill.ALL_BITS, 3, 8272, slice(16, 8240)),
    "noise, bf16": _noise(random_fill.bf16(0.02), 1, 4096, slice(0, 4096)),
    "noise, f16 scales": _noise(random_fill.f16_scales(0.004), 2, 96, slice(32, 80)),
    "noise, f32 scales": _noise(random_fill.f32_scales(0.0002), 2, 96, slice(0, 16)),
}

LARGE: dict[str, Callable[[np.random.Generator], Case]] = {
    "quantize int4, 122b": _quantize(4, 3, 2048, 3072),
    "quantize int4, 122b down": _quantize(4, 3, 3072, 1024),
    "quantize int8, 122b": _quantize(8, 1, 8209, 3072),
    "noise, 122b": _noise(random_fill.ALL_BITS, 5, 1188 * 4096, slice(0, 1188 * 4096)),
}
"""Cases for a GPU."""
