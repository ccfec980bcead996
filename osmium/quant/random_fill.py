"""Numbers that look random and can be made again anywhere: integers of a counter, no state.

Word i of a stream is splitmix64's, mix(seed + (i + 1) * GAMMA), under a mask and over a base.  A
mask that keeps sign and mantissa and a base that is an exponent make floating-point numbers of one
size, exactly.  Steele, Lea & Flood 2014, doi:10.1145/2660193.2660195.
"""

import math
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = [
    "ALL_BITS",
    "BitPattern",
    "bf16",
    "f16_scales",
    "f32_scales",
    "fill",
    "seed_from_name",
    "skip_seed",
]

_GAMMA = 0x9E3779B97F4A7C15
_WHOLE = (1 << 64) - 1

_BLOCK = 1 << 15
"""Words at a time: their quarter of a MiB stays in the processor's cache."""


@dataclass(frozen=True)
class BitPattern:
    """What of a 64-bit word is random, and what the rest of it is."""

    mask: int
    base: int


ALL_BITS = BitPattern(_WHOLE, 0)
"""Every bit random: bytes and nibbles of every value."""


def bf16(magnitude: float) -> BitPattern:
    """bf16 numbers of either sign from 2^e to 2^(e + 1), e = floor(log2(size))."""
    return _each(16, 0x807F, (127 + math.floor(math.log2(magnitude))) << 7)


def f16_scales(magnitude: float) -> BitPattern:
    """f16 numbers above 0, evenly spread over an octave whose mean is near `size`, to a root of 2.
    Nothing below 2^-14."""
    return _each(16, 0x03FF, max(1, 15 + _octave(magnitude)) << 10)


def f32_scales(magnitude: float) -> BitPattern:
    """The same in f32."""
    return _each(32, 0x007FFFFF, (127 + _octave(magnitude)) << 23)


def _octave(magnitude: float) -> int:
    return round(math.log2(magnitude / 1.5))


def _each(bits: int, mask: int, base: int) -> BitPattern:
    """A pattern of `bits` all over the word."""
    ones = sum(1 << at for at in range(0, 64, bits))
    return BitPattern(mask * ones, base * ones)


def seed_from_name(name: str) -> int:
    """A stream of its own for every name."""
    z = zlib.crc32(name.encode()) * _GAMMA
    return (z ^ z >> 29) * _GAMMA & _WHOLE


def skip_seed(seed: int, words: int) -> int:
    """The seed of what a stream is from its word `words` on."""
    return seed + words * _GAMMA & _WHOLE


def fill(words: npt.NDArray[Any], seed: int, first: int, pattern: BitPattern) -> None:
    """Write words first, first + 1, ... of a stream.  u64 [n], little-endian."""
    for start in range(0, len(words), _BLOCK):
        out = words[start : start + _BLOCK]
        z = np.arange(len(out), dtype=np.uint64)
        z *= np.uint64(_GAMMA)
        z += np.uint64(seed + (first + start + 1) * _GAMMA & _WHOLE)
        z ^= z >> np.uint64(30)
        z *= np.uint64(0xBF58476D1CE4E5B9)
        z ^= z >> np.uint64(27)
        z *= np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
        z &= np.uint64(pattern.mask)
        np.bitwise_or(z, np.uint64(pattern.base), out=out)
