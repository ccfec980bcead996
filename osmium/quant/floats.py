"""bf16 on NumPy, which has no such type: a bf16 is the upper half of an f32, kept as uint16."""

from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["bf16_from_f32", "f32_from_bf16"]


def bf16_from_f32(x: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Round to nearest, ties to even; a NaN stays one.  f32 [...] -> u16 [...]."""
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
