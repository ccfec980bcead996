"""Pack one expert's matrices (quant/expert_layout.py)."""

from typing import Any

import numpy as np
import numpy.typing as npt

from osmium.quant import int4, int8
from osmium.quant.expert_layout import ExpertLayout
from osmium.quant.floats import bf16_from_f32, f32_from_bf16

__all__ = ["pack_expert"]


def pack_expert(
    out: npt.NDArray[np.uint8], layout: ExpertLayout, up: npt.NDArray[Any], down: npt.NDArray[Any]
) -> None:
    """out = the packed expert of `up` and `down`, padding zeroed.

    out u8 [nbytes]    up [2I, D], gate rows, then up rows    down [D, I]
    up and down are f32, or bf16 as uint16.
    """
    out[...] = 0  # equal experts have equal bytes, padding included
    for w, start, scales, group in (
        (up, 0, layout.up_scale, layout.up_group),
        (down, layout.down, layout.down_scale, layout.down_group),
    ):
        if layout.bits == 16:
            _write(out, start, w if w.dtype == np.uint16 else bf16_from_f32(w))
            continue
        w_f32 = f32_from_bf16(w) if w.dtype == np.uint16 else w
        if layout.bits == 8:
            int8_data, scale8 = int8.quantize(w_f32)
            _write(out, start, int8_data)
            _write(out, scales, scale8)
        else:
            int4_data, scale4 = int4.quantize(w_f32, group)
            _write(out, start, int4_data)
            _write(out, scales, scale4)


def _write(out: npt.NDArray[np.uint8], start: int, array: npt.NDArray[Any]) -> None:
    raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    out[start : start + raw.size] = raw
