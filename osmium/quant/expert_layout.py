"""The bytes of one expert: the same on disk, in the host arena and in a VRAM slot.

A record is gate and up [2I, D] (rows 0 .. I-1 gate, I .. 2I-1 up), their scales, down [D, I], its
scales, padded to a multiple of 4 KiB.  Every part starts at a multiple of 16 bytes.

bits  matrices                                   scales
16    bf16, row-major                            none
8     int8, row-major, one scale a row           f32 [2I], f32 [D]
4     nibbles (quant/int4.py), row-major         f16 [2I, D / group], f16 [D, I / group]
"""

from dataclasses import dataclass

from osmium.errors import ConfigError

__all__ = ["IO_ALIGNMENT", "ExpertLayout", "group_of"]

IO_ALIGNMENT = 4096
"""Records are multiples of this, so that they can be read by direct I/O."""


def group_of(columns: int) -> int:
    """The INT4 group along an axis of `columns` inputs: the largest of 128, 64, 32 dividing it."""
    for group in (128, 64, 32):
        if columns % group == 0:
            return group
    raise ConfigError(
        f"INT4 needs an input axis that is a multiple of 32, this one has {columns}; "
        "use --gpu-expert-bits 16 or 8."
    )


def _padded(n: int, to: int) -> int:
    return -(-n // to) * to


@dataclass(frozen=True)
class ExpertLayout:
    """Where the parts of one expert lie, in bytes from its start."""

    bits: int
    """16, 8 or 4."""
    hidden: int
    """D."""
    inner: int
    """I."""

    def __post_init__(self) -> None:
        if self.bits not in (16, 8, 4):
            raise ConfigError(f"--gpu-expert-bits is {self.bits}; it must be 16, 8 or 4.")
        step = {16: 8, 8: 16, 4: 32}[self.bits]
        for name, size in (("hidden size", self.hidden), ("expert size", self.inner)):
            if size % step:
                raise ConfigError(
                    f"The {name} is {size}; {self.bits}-bit experts need a multiple of {step}."
                )

    @property
    def up_group(self) -> int:
        """Inputs that share a scale in gate and up; 0 where scales are per row or absent."""
        return group_of(self.hidden) if self.bits == 4 else 0

    @property
    def down_group(self) -> int:
        """Inputs that share a scale in down; 0 where scales are per row or absent."""
        return group_of(self.inner) if self.bits == 4 else 0

    def _scales(self, rows: int, columns: int) -> int:
        if self.bits == 16:
            return 0
        return rows * 4 if self.bits == 8 else rows * (columns // group_of(columns)) * 2

    @property
    def up_scale(self) -> int:
        """Offset of gate and up's scales; gate and up themselves lie at 0."""
        return _padded(2 * self.inner * self.hidden * self.bits // 8, 16)

    @property
    def down(self) -> int:
        """Offset of down."""
        return _padded(self.up_scale + self._scales(2 * self.inner, self.hidden), 16)

    @property
    def down_scale(self) -> int:
        """Offset of down's scales."""
        return _padded(self.down + self.hidden * self.inner * self.bits // 8, 16)

    @property
    def nbytes(self) -> int:
        """Bytes of a record, padding included: a multiple of 4 KiB."""
        return _padded(self.down_scale + self._scales(self.hidden, self.inner), IO_ALIGNMENT)
