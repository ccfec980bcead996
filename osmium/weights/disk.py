"""Free disk, checked before something large is written."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from osmium.errors import ConfigError

__all__ = ["DiskNeed", "check_disk", "free_bytes", "free_text", "gb"]


@dataclass(frozen=True)
class DiskNeed:
    """Bytes that are about to be written below a folder."""

    what: str
    """What is written, for people: "the packed file"."""
    folder: Path
    """It need not exist yet."""
    nbytes: int
    setting: str
    """What chooses another folder: "--cache-dir"."""


def free_bytes(folder: Path) -> int:
    """Bytes that this user may still write below a folder, which need not exist yet."""
    stat = os.statvfs(_existing(folder))
    return stat.f_bavail * stat.f_frsize


def check_disk(needs: Sequence[DiskNeed]) -> None:
    """Raises: ConfigError where a disk has less free than what is to be written to it in all."""
    disks: dict[int, list[DiskNeed]] = {}
    for need in needs:
        if need.nbytes > 0:
            disks.setdefault(_existing(need.folder).stat().st_dev, []).append(need)
    for there in disks.values():
        total, free = sum(need.nbytes for need in there), free_bytes(there[0].folder)
        if total > free:
            parts = " and ".join(f"{n.what} takes {gb(n.nbytes)} in {n.folder}" for n in there)
            ways = " or ".join(dict.fromkeys(n.setting for n in there))
            raise ConfigError(
                f"Not enough disk: {parts}; {gb(free)} are free there, {gb(total)} are needed. "
                f"Free some, or choose another disk with {ways}."
            )


def free_text(needs: Sequence[DiskNeed]) -> str:
    """What is free where it is needed, for people: "80.1 GB", "80.1 GB and 2.0 GB" of two disks."""
    return " and ".join(dict.fromkeys(gb(free_bytes(need.folder)) for need in needs))


def gb(nbytes: float) -> str:
    """For people, as disks and downloads are sold: 1 GB is 10^9 bytes."""
    if nbytes >= 1e9:
        return f"{nbytes / 1e9:.1f} GB"
    return f"{nbytes / 1e6:.1f} MB" if nbytes >= 1e6 else f"{nbytes / 1e3:.1f} kB"


def _existing(folder: Path) -> Path:
    """The folder, or the closest one above it that exists."""
    folder = folder.absolute()
    return next(one for one in (folder, *folder.parents) if one.exists())
