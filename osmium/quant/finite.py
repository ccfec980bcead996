"""Whether weights and scales are finite: without NaN and infinity, at the speed of the memory."""

from typing import Any

import numpy as np
import numpy.typing as npt

from osmium.quant.expert_layout import ExpertLayout, group_of

__all__ = ["first_not_finite", "is_finite", "packed_is_finite"]

_EXPONENTS = {np.dtype(np.uint16): 0x7F80, np.dtype(np.float16): 0x7C00,
              np.dtype(np.float32): 0x7F800000}  # fmt: skip
"""The bits of the exponent, all set in NaN and infinity; u16 is bf16."""

_BLOCK = 1 << 17
"""Values of a block, which fits the CPU's cache."""


def is_finite(x: npt.NDArray[Any]) -> bool:
    """Whether no value is NaN or infinite.  x is bf16 as u16, f16 or f32, contiguous."""
    mask = _EXPONENTS[x.dtype]
    bits = x.reshape(-1).view(np.uint32 if x.dtype.itemsize == 4 else np.uint16)
    block = np.empty(min(_BLOCK, bits.size), bits.dtype)
    for start in range(0, bits.size, _BLOCK):
        part = bits[start : start + _BLOCK]
        if np.bitwise_and(part, mask, out=block[: part.size]).max() == mask:
            return False
    return True


def first_not_finite(x: npt.NDArray[Any]) -> tuple[tuple[int, ...], str, int] | None:
    """(index, "NaN" or "infinity", count) of the first value that is not finite; None without one.

    x is bf16 as u16, f16 or f32.
    """
    if is_finite(x):
        return None
    mask = _EXPONENTS[x.dtype]
    bits: npt.NDArray[Any] = x.view(np.uint32 if x.dtype.itemsize == 4 else np.uint16)
    bad = (bits & mask) == mask
    index = tuple(int(i) for i in np.unravel_index(int(bad.argmax()), x.shape))
    sign = 1 << (8 * x.dtype.itemsize - 1)
    kind = "NaN" if int(bits[index]) & ~sign & ~mask else "infinity"
    return index, kind, int(bad.sum())


def packed_is_finite(packed: npt.NDArray[np.uint8], layout: ExpertLayout) -> bool:
    """Whether packed experts, u8 [..., nbytes], have finite scales; in 16 bits finite values."""
    if layout.bits == 16:
        return is_finite(packed.view(np.uint16))
    dtype = np.dtype(np.float32 if layout.bits == 8 else np.float16)
    up, down = (2 * layout.inner, layout.hidden), (layout.hidden, layout.inner)
    for start, (rows, columns) in ((layout.up_scale, up), (layout.down_scale, down)):
        count = rows if layout.bits == 8 else rows * (columns // group_of(columns))
        raw = packed[..., start : start + count * dtype.itemsize]
        if not is_finite(np.ascontiguousarray(raw).view(dtype)):
            return False
    return True
