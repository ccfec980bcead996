"""Scratch memory: arrays cut one after another from one buffer, and the sizes of such arrays."""

import math

import numpy as np
import numpy.typing as npt

from osmium.ops import Array

__all__ = ["Scratch", "aligned_bytes"]

ALIGNMENT = 256
"""Arrays start at multiples of this many bytes, as those of an allocator do."""


def aligned_bytes(shape: tuple[int, ...], dtype: npt.DTypeLike) -> int:
    """Bytes of an array in a Scratch."""
    nbytes = math.prod(shape) * np.dtype(dtype).itemsize
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


class Scratch:
    """A buffer from which arrays are cut.

    Two of them over the same buffer have arrays that overlap: only those of one are in use.
    """

    def __init__(self, buffer: Array) -> None:
        """buffer u8 [n]"""
        self._buffer, self._used = buffer, 0

    def rest(self) -> "Scratch":
        """Another Scratch over what is left: its arrays overlap those that this one still gives."""
        return Scratch(self._buffer[self._used :])

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        """A new array with unspecified contents."""
        start, nbytes = self._used, math.prod(shape) * np.dtype(dtype).itemsize
        self._used += aligned_bytes(shape, dtype)
        assert self._used <= self._buffer.shape[0], f"a buffer of {self._buffer.shape[0]} bytes"
        return self._buffer[start : start + nbytes].view(dtype).reshape(*shape)
