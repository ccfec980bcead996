"""Free disk space, checked before something large is written."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from osmium.errors import ConfigError

__all__ = ["DiskNeed", "check_disk", "free_bytes", "free_text", "gb"]


@dataclass(frozen=True)
class DiskNeed:
    """Bytes that Osmium will write below a folder."""

    what: str
    """What is written, for messages: "the packed file"."""
    folder: Path
    """The folder, which may not exist yet."""
    nbytes: int
    setting: str
    """The flag or variable that chooses another folder: "--cache-dir"."""


def free_bytes(folder: Path) -> int:
    """Bytes that this user may still write below a folder, which may not exist yet."""
    stat = os.statvfs(_existing(folder))
    return stat.f_bavail * stat.f_frsize


def check_disk(needs: Sequence[DiskNeed]) -> None:
    """Raises: ConfigError if a disk has less free space than the sum of its needs."""
    disks: dict[int, list[DiskNeed]] = {}
    for need in needs:
        if need.nbytes > 0:
            disks.setdefault(_existing(need.folder).stat().st_dev, []).append(need)
    for on_disk in disks.values():
        total, free = sum(need.nbytes for need in on_disk), free_bytes(on_disk[0].folder)
        if total > free:
            parts = " and ".join(f"{n.what} takes {gb(n.nbytes)} in {n.folder}" for n in on_disk)
            settings = " or ".join(dict.fromkeys(n.setting for n in on_disk))
            raise ConfigError(
                f"Not enough disk: {parts}; {gb(free)} are free there, {gb(total)} are needed. "
                f"Free some, or choose another disk with {settings}."
            )


def free_text(needs: Sequence[DiskNeed]) -> str:
    """Free space of the disks in text: "80.1 GB", or "80.1 GB and 2.0 GB" of two disks."""
    return " and ".join(dict.fromkeys(gb(free_bytes(need.folder)) for need in needs))


def gb(nbytes: float) -> str:
    """Bytes in text, 1 GB = 10^9 bytes as for disks and downloads."""
    if nbytes >= 1e9:
        return f"{nbytes / 1e9:.1f} GB"
    return f"{nbytes / 1e6:.1f} MB" if nbytes >= 1e6 else f"{nbytes / 1e3:.1f} kB"


def _existing(folder: Path) -> Path:
    """The folder, or the closest one above it that exists."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.exists())
