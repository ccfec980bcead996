"""Seeded random values in device arrays."""

import functools
import math
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from osmium.engine.engine import Engine
from osmium.ops import Ops
from osmium.quant.floats import bf16_from_f32

__all__ = ["arrays", "fill_noise", "seed_state"]


def seed_state(engine: Engine) -> None:
    """Fill every KV page and state slot with seeded random values."""
    for array in arrays(engine.runner.state.layers):
        fill_noise(engine.runner.ops, array)


def fill_noise(ops: Ops, array: Any) -> None:
    """Fill a device array with seeded random values, small and finite in each format of a dtype."""
    size = math.prod(array.shape)
    values, flat = _noise(np.dtype(array.dtype)), array.reshape(size)
    for start in range(0, size, len(values)):
        part = flat[start : min(start + len(values), size)]
        ops.copy_h2d(part, values[: part.shape[0]])


@functools.cache
def _noise(dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    rng, size = np.random.default_rng(7), 1 << 22
    if dtype == np.uint8:  # no NaN as e4m3, nor as halves of an f16
        return rng.integers(0, 256, size, np.uint8) & np.uint8(0xBF)
    if dtype == np.int8:
        return rng.integers(-127, 128, size, np.int8)
    if dtype == np.float16:
        return np.full(size, 0.01, np.float16)
    noise = rng.standard_normal(size, np.float32)
    return bf16_from_f32(noise) if dtype == np.uint16 else noise * np.float32(0.1)


def arrays(value: Any) -> Iterator[Any]:
    """Yield every array in a tree of dataclasses and tuples."""
    if is_dataclass(value):
        for field in fields(value):
            yield from arrays(getattr(value, field.name))
    elif isinstance(value, tuple):
        for item in value:
            yield from arrays(item)
    elif hasattr(value, "nbytes"):
        yield value
