"""Opens files that another user or program may have put in place: regular ones, without links.

A lock or a partial file in a shared folder could be a symbolic link to a file of the owner.  A
small file of a checkpoint could be a pipe without a writer, or have many gigabytes.
"""

import os
import stat
from pathlib import Path

from osmium.errors import CheckpointError, ConfigError

__all__ = ["MAX_SMALL_FILE", "open_own", "read_small_file"]

MAX_SMALL_FILE = 256 << 20
"""Largest small file of a checkpoint, bytes; a tokenizer.json of 250,000 tokens has 12 MB."""


def open_own(path: Path, flags: int) -> int:
    """A descriptor of a regular file that is no symbolic link; `flags` as for os.open.

    Raises: ConfigError if it is something else; OSError.
    """
    no_wait = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    if path.is_symlink():
        raise ConfigError(f"{path} is a symbolic link, which Osmium does not follow; remove it.")
    handle = os.open(path, flags | no_wait, 0o644)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise ConfigError(f"{path} is no regular file; remove it.")
    return handle


def read_small_file(path: Path) -> bytes | None:
    """The bytes of a checkpoint's small file; None if there is no such regular file.

    Raises: CheckpointError if it cannot be read, or has more than MAX_SMALL_FILE bytes.
    """
    try:
        if not path.is_file():
            return None
        with open(path, "rb") as file:
            raw = file.read(MAX_SMALL_FILE + 1)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from None
    if len(raw) > MAX_SMALL_FILE:
        raise CheckpointError(
            f"{path} has more than {MAX_SMALL_FILE >> 20} MiB, the limit for such a file; replace "
            "it by the original."
        )
    return raw
