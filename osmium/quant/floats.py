"""bf16 and e4m3 as NumPy integers.

A bf16 is the upper half of an f32, stored as uint16.  An e4m3 is stored as uint8: a sign bit, four
exponent bits with bias 7, three mantissa bits.  It has no infinity; its largest value is 448.
Micikevicius et al. 2022, arXiv:2209.05433.
"""

from typing import Any, cast

import numpy as np
import numpy.typing as npt

__all__ = ["bf16_from_f32", "e4m3_from_f32", "f32_from_bf16", "f32_from_e4m3", "quantize_e4m3_rows"]


def bf16_from_f32(x: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Round to nearest, ties to even; NaN stays NaN.  f32 [...] -> u16 [...]."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    upper = (rounded >> np.uint32(16)).astype(np.uint16)
    nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    if nan.any():
        upper[nan] = (bits[nan] >> np.uint32(16)).astype(np.uint16) | np.uint16(0x0040)
    return upper


def f32_from_bf16(x: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Exact.  u16 [...] -> f32 [...]."""
    wide = np.empty(x.shape, np.uint32)
    np.left_shift(x, 16, out=wide, dtype=np.uint32, casting="unsafe")
    return wide.view(np.float32)


def e4m3_from_f32(x: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """Round to nearest, ties to even, clipped to 448; NaN stays NaN.  f32 [...] -> u8 [...]."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    size = bits & np.uint32(0x7FFFFFFF)
    upper = (size + np.uint32(0x7FFFF) + ((size >> np.uint32(20)) & np.uint32(1))) >> np.uint32(20)
    large = np.minimum(upper.astype(np.int32) - 960, 126)
    small = np.rint(np.fmin(np.abs(x), np.float32(1)) * np.float32(512))  # multiples of 2^-9
    code = np.where(size < np.uint32(0x3C800000), small, large).astype(np.uint8)  # below 2^-6
    code[size > np.uint32(0x7F800000)] = 0x7F
    return code | (bits >> np.uint32(24)).astype(np.uint8) & np.uint8(0x80)


def f32_from_e4m3(x: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Exact.  u8 [...] -> f32 [...]."""
    return cast(npt.NDArray[np.float32], _E4M3[x])


def _e4m3() -> npt.NDArray[np.float32]:
    """f32 [256], the value of each e4m3 code."""
    codes = np.arange(256)
    exponent, mantissa = codes >> 3 & 15, codes & 7
    value = np.where(
        exponent == 0, np.ldexp(mantissa, -9), np.ldexp(8 + mantissa, np.maximum(exponent, 1) - 10)
    )
    value[codes & 0x7F == 0x7F] = np.nan
    values = np.where(codes & 0x80, -value, value).astype(np.float32)
    return cast(npt.NDArray[np.float32], values)


_E4M3 = _e4m3()


def quantize_e4m3_rows(
    x: npt.NDArray[np.float32],
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float16]]:
    """e4m3 with one scale per row: x = e4m3 * scale.  f32 [..., d] -> u8 [..., d], f16 [...].

    scale = max |x| / 448 as f16, at least 2^-14: a subnormal scale would lose bits.  The error of
    a value is at most the largest of |x| / 16, 2^-24 and max |x| / 2^18.  The scale is at most
    65504; larger values are clipped.  A row that is not finite has scale NaN.
    """
    largest = np.abs(x).max(axis=-1)
    scale = np.clip(largest / np.float32(448), np.float32(2**-14), np.float32(65504))
    scale = np.where(largest < np.inf, scale, np.float32(np.nan)).astype(np.float16)
    return e4m3_from_f32(x / scale.astype(np.float32)[..., None]), scale
