"""Counter-based random words: any part of a stream can be computed on its own.

Word i of a stream is (mix(seed + (i + 1) * GAMMA) & mask) | base, with splitmix64's mix.  A mask of
sign and mantissa bits and a base of exponent bits give floating-point numbers of one octave.
Steele, Lea & Flood 2014, doi:10.1145/2660193.2660195.
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
_WORD_MASK = (1 << 64) - 1

_BLOCK = 1 << 15
"""Words per block: 256 KiB, which fit the CPU's cache."""


@dataclass(frozen=True)
class BitPattern:
    """Which bits of a 64-bit word are random, and the value of the others."""

    mask: int
    """Random bits."""
    base: int
    """The other bits."""


ALL_BITS = BitPattern(_WORD_MASK, 0)
"""All bits random: bytes and nibbles of every value."""


def bf16(magnitude: float) -> BitPattern:
    """bf16 numbers of either sign from 2^e to 2^(e + 1), e = floor(log2(magnitude))."""
    return _repeated(16, 0x807F, (127 + math.floor(math.log2(magnitude))) << 7)


def f16_scales(magnitude: float) -> BitPattern:
    """Positive f16 numbers, uniform over one octave; its mean is within sqrt(2) of `magnitude`.
    At least 2^-14."""
    return _repeated(16, 0x03FF, max(1, 15 + _octave(magnitude)) << 10)


def f32_scales(magnitude: float) -> BitPattern:
    """f16_scales in f32, without the lower bound."""
    return _repeated(32, 0x007FFFFF, (127 + _octave(magnitude)) << 23)


def _octave(magnitude: float) -> int:
    return round(math.log2(magnitude / 1.5))


def _repeated(bits: int, mask: int, base: int) -> BitPattern:
    """The pattern of one `bits`-wide field, repeated over the word."""
    ones = sum(1 << at for at in range(0, 64, bits))
    return BitPattern(mask * ones, base * ones)


def seed_from_name(name: str) -> int:
    """The seed of a name's stream."""
    z = zlib.crc32(name.encode()) * _GAMMA
    return (z ^ z >> 29) * _GAMMA & _WORD_MASK


def skip_seed(seed: int, words: int) -> int:
    """The seed of the stream that starts at word `words` of this one."""
    return seed + words * _GAMMA & _WORD_MASK


def fill(words: npt.NDArray[Any], seed: int, first: int, pattern: BitPattern) -> None:
    """words[i] = word first + i of the stream.  u64 [n], little-endian."""
    for start in range(0, len(words), _BLOCK):
        out = words[start : start + _BLOCK]
        z = np.arange(len(out), dtype=np.uint64)
        z *= np.uint64(_GAMMA)
        z += np.uint64(seed + (first + start + 1) * _GAMMA & _WORD_MASK)
        z ^= z >> np.uint64(30)
        z *= np.uint64(0xBF58476D1CE4E5B9)
        z ^= z >> np.uint64(27)
        z *= np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
        z &= np.uint64(pattern.mask)
        np.bitwise_or(z, np.uint64(pattern.base), out=out)
