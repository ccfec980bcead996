"""One expert's matrices into the bytes of its record (quant/expert_layout.py)."""

from typing import Any

import numpy as np
import numpy.typing as npt

from osmium.quant import int4, int8
from osmium.quant.expert_layout import ExpertLayout
from osmium.quant.floats import bf16_from_f32, f32_from_bf16

__all__ = ["pack_expert"]


def pack_expert(
    out: npt.NDArray[np.uint8], record: ExpertLayout, up: npt.NDArray[Any], down: npt.NDArray[Any]
) -> None:
    """out u8 [nbytes]; up [2I, D], gate rows first, and down [D, I], bf16 (u16) or f32."""
    out[...] = 0  # the padding too: the same expert is the same bytes
    for w, start, scales, group in (
        (up, 0, record.up_scale, record.up_group),
        (down, record.down, record.down_scale, record.down_group),
    ):
        if record.bits == 16:
            _write(out, start, w if w.dtype == np.uint16 else bf16_from_f32(w))
            continue
        wide = f32_from_bf16(w) if w.dtype == np.uint16 else w
        if record.bits == 8:
            bytes_, scale8 = int8.quantize(wide)
            _write(out, start, bytes_)
            _write(out, scales, scale8)
        else:
            nibbles, scale4 = int4.quantize(wide, group)
            _write(out, start, nibbles)
            _write(out, scales, scale4)


def _write(out: npt.NDArray[np.uint8], start: int, array: npt.NDArray[Any]) -> None:
    raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    out[start : start + raw.size] = raw
