"""What the kernels for few tokens take, and how much of it at once."""

from typing import Any, cast

import numpy as np

from osmium.errors import ConfigError
from osmium.ops.values import Array, Linear, Step
from osmium.quant.record import Record

__all__ = [
    "MATVEC_NORM", "MATVEC_ROWS", "fits_experts", "fits_matvec", "need_bf16", "one_each",
    "rows_at_once",
]  # fmt: skip

MATVEC_INPUTS = {"bf16": 64, "int8": 64, "int4": 128}
"""What the inputs of a matrix must be a multiple of for MATVEC; LINEAR takes the others."""

MATVEC_ROWS = 8
"""Tokens that a block of MATVEC multiplies at once: half the rows of a tensor core's tile."""

MATVEC_NORM = 4096
"""Inputs up to which MATVEC takes a norm."""

MATVEC_SHARED = 64 << 10
"""Bytes of shared memory for them, at most: three blocks stay on a multiprocessor of an H100, one
on an RTX 30's."""


def one_each(step: Step) -> bool:
    """Whether row s is the one row of sequence s."""
    return step.tokens == step.sequences


def fits_matvec(w: Linear) -> bool:
    whole = w.format != "int4" or w.rows % 16 == 0
    return whole and w.columns % MATVEC_INPUTS[w.format] == 0 and w.group in (0, 128)


def rows_at_once(tokens: int, columns: int) -> int:
    """Tokens that a block of MATVEC takes."""
    return max(1, min(tokens, MATVEC_ROWS, MATVEC_SHARED // (4 * columns)))


def fits_experts(record: Record, tokens: int) -> bool:
    """Whether the experts' kernels for few tokens do it."""
    return record.bits == 4 and tokens <= MATVEC_ROWS


def need_bf16(pages: Array) -> None:
    if cast(np.dtype[Any], pages.dtype) != np.uint16:
        raise ConfigError("The GPU keeps KV in bf16; --kv-dtype f32 is for the CPU.")
