"""INT8 with one scale per output row: w = q * scale, q in -127 .. 127.

A row with a value that is not finite has a scale that is not finite.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["dequantize", "quantize"]


def quantize(w: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """scale = max |w| / 127 per row, 0 for a row of zeros; q = rint(w / scale).

    f32 [..., N, K] -> i8 [..., N, K], f32 [..., N]
    """
    with np.errstate(all="ignore"):  # values that are not finite
        highest, lowest = w.max(axis=-1, initial=0.0), w.min(axis=-1, initial=0.0)
        largest = np.maximum(np.abs(highest), np.abs(lowest))  # without an array of |w|
        scale = (largest / 127).astype(np.float32)
        inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale > 0)
        q = np.multiply(w, inverse[..., None], dtype=np.float32)
        np.clip(np.rint(q, out=q), -127, 127, out=q)
        return q.astype(np.int8), scale


def dequantize(q: npt.NDArray[Any], scale: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """i8 [..., N, K], f32 [..., N] -> f32 [..., N, K]."""
    w: npt.NDArray[np.float32] = np.multiply(q, scale[..., None], dtype=np.float32)
    return w
