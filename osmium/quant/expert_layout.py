"""The bytes of one packed expert: the same on disk, in host memory and in a VRAM slot.

Four parts in this order: gate and up, their scales, down, its scales.  Rows 0 to I - 1 of the first
are gate, rows I to 2I - 1 up.  Each part starts at a multiple of 16 bytes; the end is padded to a
multiple of 4 KiB.  Matrices and scales are row-major:

bits  gate and up       scales                   down            scales
16    bf16 [2I, D]      none                     bf16 [D, I]     none
8     i8 [2I, D]        f32 [2I]                 i8 [D, I]       f32 [D]
4     u8 [2I, D / 2]    f16 [2I, D / up_group]   u8 [D, I / 2]   f16 [D, I / down_group]

Two 4-bit values share a byte, in the order of quant/int4.py.
"""

from dataclasses import dataclass

from osmium.errors import ConfigError

__all__ = ["IO_ALIGNMENT", "ExpertLayout", "group_of"]

IO_ALIGNMENT = 4096
"""A packed expert's size is a multiple of this, as direct I/O needs."""


def group_of(columns: int) -> int:
    """Inputs per INT4 scale: the largest of 128, 64, 32 that divides `columns`.

    Raises: ConfigError if none does.
    """
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
    """Offsets, in bytes, of the parts of a packed expert.

    Raises: ConfigError if the format cannot hold these sizes.
    """

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
        """INT4 inputs per scale in gate and up; 0 in the other formats."""
        return group_of(self.hidden) if self.bits == 4 else 0

    @property
    def down_group(self) -> int:
        """INT4 inputs per scale in down; 0 in the other formats."""
        return group_of(self.inner) if self.bits == 4 else 0

    def _scales(self, rows: int, columns: int) -> int:
        if self.bits == 16:
            return 0
        return rows * 4 if self.bits == 8 else rows * (columns // group_of(columns)) * 2

    @property
    def up_scale(self) -> int:
        """Offset of the scales of gate and up.  Gate and up are at offset 0."""
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
        """Bytes of a packed expert with its padding, a multiple of 4 KiB."""
        return _padded(self.down_scale + self._scales(self.hidden, self.inner), IO_ALIGNMENT)
