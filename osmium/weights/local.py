"""Packed models in the cache folder: list, last use, removal.

Files beside NAME.osmium: NAME.osmium.lock, locked during packing; NAME.osmium.used, whose
modification time is the last load; FINGERPRINT.usage, the expert counts.  Only NAME.osmium is
needed.
"""

import contextlib
import fcntl
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

from osmium.errors import CheckpointError, ConfigError
from osmium.weights.checkpoint import Formats
from osmium.weights.own_files import open_own
from osmium.weights.packed import open_packed

__all__ = [
    "LocalModel", "display_name", "folder_name", "local_models", "mark_used", "remove",
    "usage_file",
]  # fmt: skip

SUFFIX = ".osmium"


@dataclass(frozen=True)
class LocalModel:
    """A packed file, or the part that an interrupted packing has written."""

    name: str
    """The name in commands; unique in its folder."""
    path: Path
    """Path of the packed file, existing or not."""
    nbytes: int
    """Bytes on disk."""
    total: int
    """Bytes of the complete file."""
    formats: Formats | None
    """None if the file cannot be read."""
    fingerprint: str | None
    """None if the file cannot be read."""
    last_used: float | None
    """Seconds since 1970; None if it was never loaded."""
    problem: str = ""
    """Why it cannot be loaded; empty if it can."""


def local_models(folder: Path) -> list[LocalModel]:
    """The packed models of a folder, the most recently used first.  Raises: ConfigError."""
    try:
        files = sorted(folder.glob(f"*{SUFFIX}")) if folder.is_dir() else []
        partial = sorted(folder.glob(f"*{SUFFIX}.partial")) if folder.is_dir() else []
    except OSError as error:
        raise ConfigError(f"{folder} cannot be read ({error.strerror}).") from None
    paths = [path for path in files if path.is_file()]
    stopped = [path.with_name(path.name.removesuffix(".partial")) for path in partial]
    stopped = [path for path in stopped if path not in paths]
    names = [display_name(path) for path in (*paths, *stopped)]
    models = []
    for path in (*paths, *stopped):
        name = display_name(path)
        if names.count(name) > 1:  # the same model in several formats
            name = path.name.removesuffix(SUFFIX)
        models.append(_stopped(name, path) if path in stopped else _packed(name, path))
    return sorted(models, key=lambda model: (-(model.last_used or 0), model.name))


def _packed(name: str, path: Path) -> LocalModel:
    size = path.stat().st_size
    try:
        packed = open_packed(path)
    except CheckpointError as error:
        return LocalModel(name, path, size, size, None, None, _last_used(path), str(error))
    return LocalModel(name, path, size, size, packed.formats, packed.fingerprint, _last_used(path))


def _stopped(name: str, path: Path) -> LocalModel:
    partial = path.with_name(path.name + ".partial")
    total = partial.stat().st_size  # the full size is allocated when packing starts
    done = _journaled(path.with_name(path.name + ".journal"), total)
    problem = "being packed" if _is_locked(path) else "not finished"
    return LocalModel(name, path, done, total, None, None, None, problem)


def _journaled(journal: Path, total: int) -> int:
    """Bytes of the parts that a journal lists."""
    try:
        first, *lines = (json.loads(line) for line in journal.read_bytes().split(b"\n")[:-1])
        sizes: dict[str, int] = first["nbytes"]
        return min(total, sum(sizes[name] for line in lines for name in line))
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def display_name(path: Path) -> str:
    """The model's name from a packed file's name: without hash and formats."""
    stem = path.name.removesuffix(SUFFIX)
    parts = stem.split("-")
    formats = [i for i, part in enumerate(parts) if part.startswith("experts")]
    return "-".join(parts[: formats[-1] - 1]) if formats and formats[-1] > 1 else stem


def folder_name(folder: Path) -> str:
    """The model's name from a checkpoint folder: the folder's name.

    NAME for a snapshot in the hub's cache, models--OWNER--NAME/snapshots/REVISION.
    """
    folder = folder.resolve()
    repository = folder.parent.parent.name
    if folder.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.rpartition("--")[2]
    return folder.name


def usage_file(folder: Path, fingerprint: str) -> Path:
    """The path of a model's expert counts."""
    return folder / f"{hashlib.sha256(fingerprint.encode()).hexdigest()[:16]}.usage"


def mark_used(path: Path, folder: Path) -> None:
    """Record that a packed file in the cache folder was loaded now.

    Other files, and errors on writing, are ignored.
    """
    with contextlib.suppress(OSError, ConfigError):
        if path.is_file() and path.resolve().parent == folder.resolve():
            handle = open_own(path.with_name(path.name + ".used"), os.O_WRONLY | os.O_CREAT)
            os.utime(handle)
            os.close(handle)


def _last_used(path: Path) -> float | None:
    try:
        return path.with_name(path.name + ".used").stat().st_mtime
    except OSError:
        return None


def remove(model: LocalModel, others: list[LocalModel]) -> int:
    """Delete a model's files; returns the bytes of disk space that this frees.

    The expert counts are deleted too, unless one of `others` has the same checkpoint.
    Raises: ConfigError if the model is being packed, or a file cannot be deleted.
    """
    path = model.path
    if _is_locked(path):
        raise ConfigError(f"{model.name} is being packed by another process; stop that first.")
    names = [path.name + suffix for suffix in ("", ".partial", ".journal", ".used", ".lock")]
    files = [path.with_name(name) for name in names]
    if model.fingerprint and model.fingerprint not in [other.fingerprint for other in others]:
        files.append(usage_file(path.parent, model.fingerprint))
    freed = 0
    for file in files:
        try:
            size = file.stat().st_blocks * 512
            file.unlink()
            freed += size
        except FileNotFoundError:
            pass
        except OSError as error:
            raise ConfigError(f"{file} cannot be deleted ({error.strerror}).") from None
    return freed


def _is_locked(path: Path) -> bool:
    """Whether a process has locked a packed file for writing (packing.locked)."""
    try:
        handle = open_own(path.with_name(path.name + ".lock"), os.O_RDONLY)
    except (OSError, ConfigError):
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(handle)
    return False
