"""Quantisation and random fill of ReferenceOps."""

import numpy as np

from osmium.ops.types import Array
from osmium.quant import int4, int8, random_fill
from osmium.quant.expert_layout import group_of
from osmium.quant.floats import f32_from_bf16
from osmium.quant.random_fill import BitPattern

__all__ = ["ReferenceQuantOps"]


class ReferenceQuantOps:
    """See ops.Ops for every method's formula, shapes and source."""

    def quantize_int4(self, out: Array, data: int, scale: int, w: Array, clips: Array) -> None:
        for row, matrix in zip(out, w, strict=True):
            values, scales = int4.quantize(f32_from_bf16(matrix), group_of(w.shape[2]), clips)
            row[data : data + values.nbytes] = values.reshape(-1)
            row[scale : scale + scales.nbytes] = scales.reshape(-1).view(np.uint8)

    def quantize_int8(self, out: Array, data: int, scale: int, w: Array) -> None:
        for row, matrix in zip(out, w, strict=True):
            values, scales = int8.quantize(f32_from_bf16(matrix))
            row[data : data + values.nbytes] = values.reshape(-1).view(np.uint8)
            row[scale : scale + scales.nbytes] = scales.view(np.uint8)

    def random_fill(
        self, out: Array, start: int, nbytes: int, seed: int, pattern: BitPattern
    ) -> None:
        words = out.shape[1] // 8
        for i, row in enumerate(out):
            part = row[start : start + nbytes].view(np.uint64)
            random_fill.fill(part, seed, i * words + start // 8, pattern)
