"""Writing the packed file: a checkpoint quantised once.

It is written under a temporary name beside a journal of finished parts, each entered after its
bytes have reached the disk, and renamed when whole: whoever is stopped at any moment goes on from
there.  What lies where is in packed.py.
"""

import contextlib
import errno
import fcntl
import json
import os
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from osmium.config import Progress
from osmium.errors import ConfigError
from osmium.quant.record import PAGE
from osmium.weights.checkpoint import Checkpoint, Part
from osmium.weights.packed import FILES, FIXED, MAGIC, VERSION, Entry

__all__ = ["locked", "write_packed"]

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class _Plan:
    """Where everything will lie, before a byte is written."""

    def __init__(self, checkpoint: Checkpoint, fingerprint: str) -> None:
        self.checkpoint = checkpoint
        config, record = checkpoint.config, checkpoint.record
        folder = checkpoint.shards.folder
        self.files = {n: (folder / n).read_bytes() for n in FILES if (folder / n).is_file()}
        wanted: list[tuple[str, str, tuple[int, ...], int]] = [
            (f"file.{name}", "|u1", (len(raw),), len(raw)) for name, raw in self.files.items()
        ]
        for part in checkpoint.parts:
            for kind, (shape, dtype) in part.arrays.items():
                nbytes = int(np.prod(shape)) * dtype.itemsize
                wanted.append((f"{part.name}.{kind}", dtype.str, shape, nbytes))
        for layer in range(config.layers):
            shape = (config.experts, record.nbytes)
            wanted.append((f"experts.{layer}", "|u1", shape, config.experts * record.nbytes))
        self.head: dict[str, Any] = {
            "fingerprint": fingerprint,
            "formats": vars(checkpoint.formats),
            "sources": _stamps(checkpoint.shards.files),
        }
        # Offsets need the header's length and the header holds the offsets: once round is enough
        # unless a number gains a digit.
        length = 0
        while True:
            self.entries = _lay_out(wanted, -(-(FIXED + length) // PAGE) * PAGE)
            text = self.header({})
            if len(text) <= length:
                break
            length = -(-(FIXED + len(text)) // PAGE) * PAGE - FIXED
        self.size = self.entries[-1].offset + -(-self.entries[-1].nbytes // PAGE) * PAGE

    def header(self, crcs: dict[str, int]) -> bytes:
        """The JSON, of the same length whatever the checksums."""
        parts = [
            {**vars(e), "shape": list(e.shape), "crc": f"{crcs.get(e.name, 0):08x}"}
            for e in self.entries
        ]
        last = self.entries[-1]
        size = last.offset + -(-last.nbytes // PAGE) * PAGE
        return json.dumps({**self.head, "size": size, "parts": parts}).encode()

    @property
    def key(self) -> str:
        """What a journal must be of, to be gone on with."""
        return f"{zlib.crc32(self.header({})):08x}-{self.head['fingerprint']}"


def _lay_out(wanted: list[tuple[str, str, tuple[int, ...], int]], start: int) -> list[Entry]:
    entries = []
    for name, dtype, shape, nbytes in wanted:
        entries.append(Entry(name, dtype, shape, start, nbytes))
        start += -(-nbytes // PAGE) * PAGE
    return entries


def _stamps(files: list[Path]) -> dict[str, list[int]]:
    found = {file.name: file.stat() for file in files}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in found.items()}


def write_packed(
    path: Path, checkpoint: Checkpoint, fingerprint: str, progress: Progress | None
) -> None:
    """Quantise a checkpoint into `path`.  What a stopped run has finished is kept and gone on from.

    Holds one layer's experts beyond what is mapped.
    Raises: ConfigError where the disk is full or the folder cannot be written, CheckpointError.
    """
    plan = _Plan(checkpoint, fingerprint)
    partial, journal = (
        path.with_name(path.name + ".partial"),
        path.with_name(path.name + ".journal"),
    )
    try:
        crcs = _resume(partial, journal, plan)
        _room_for(path, plan.size, partial)
        with open(partial, "r+b" if partial.exists() else "w+b") as file:
            with contextlib.suppress(AttributeError):
                os.posix_fallocate(file.fileno(), 0, plan.size)
            with open(journal, "ab") as notes:
                if not crcs:
                    _note(notes, {"key": plan.key})
                _write_parts(file, notes, plan, crcs, progress)
            text = plan.header(crcs)
            fixed = MAGIC + VERSION.to_bytes(4, "little") + zlib.crc32(text).to_bytes(4, "little")
            file.seek(0)
            file.write(fixed + len(text).to_bytes(8, "little") + text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        _sync_folder(path.parent)
        journal.unlink()
    except OSError as error:
        if error.errno in _FULL:
            raise ConfigError(
                f"The disk of {path.parent} is full; the packed file takes "
                f"{plan.size / 1e9:.2f} GB. Free space, or choose another disk with "
                "--cache-dir; what is packed is kept."
            ) from None
        raise ConfigError(
            f"{path.parent} cannot be written ({error}); choose another folder with --cache-dir."
        ) from None


def _resume(partial: Path, journal: Path, plan: _Plan) -> dict[str, int]:
    """Checksums of the parts that an earlier run finished; none if it packed another model."""
    crcs: dict[str, int] = {}
    lines = journal.read_bytes().split(b"\n")[:-1] if journal.is_file() else []
    notes = []
    for line in lines:  # a line cut short has no end and is left out above
        with contextlib.suppress(ValueError):
            notes.append(json.loads(line))
    if partial.is_file() and notes and notes[0].get("key") == plan.key:
        for note in notes[1:]:
            crcs.update(note)
        return crcs
    journal.unlink(missing_ok=True)
    partial.unlink(missing_ok=True)
    return {}


def _room_for(path: Path, size: int, partial: Path) -> None:
    """Raises: ConfigError where the disk has too little."""
    stat = os.statvfs(path.parent)
    free = stat.f_bavail * stat.f_frsize
    have = partial.stat().st_blocks * 512 if partial.is_file() else 0
    if size - have > free:
        raise ConfigError(
            f"The packed file takes {size / 1e9:.2f} GB and {path.parent} has {free / 1e9:.2f} GB "
            "free. Free space, or choose another disk with --cache-dir."
        )


def _write_parts(
    file: BinaryIO, notes: BinaryIO, plan: _Plan, crcs: dict[str, int], progress: Progress | None
) -> None:
    """Every part that `crcs` lacks, a layer's worth at a time; the journal follows the disk."""
    total = sum(e.nbytes for e in plan.entries)
    done = sum(e.nbytes for e in plan.entries if e.name in crcs)
    entries = {e.name: e for e in plan.entries}
    for names, make in _units(plan):
        if progress:
            progress("packing", done, total)
        if all(name in crcs for name in names):
            continue
        fresh: dict[str, int] = {}
        for name, array in make():
            entry = entries[name]
            raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
            assert raw.nbytes == entry.nbytes, f"{name}: {raw.nbytes} bytes, {entry.nbytes} planned"
            _pwrite(file, raw, entry.offset)
            fresh[name] = zlib.crc32(raw)
            done += entry.nbytes if name not in crcs else 0
        os.fdatasync(file.fileno())
        _note(notes, fresh)
        crcs.update(fresh)
    if progress:
        progress("packing", total, total)


Unit = tuple[list[str], Callable[[], Iterator[tuple[str, npt.NDArray[Any]]]]]


def _units(plan: _Plan) -> Iterator[Unit]:
    """What is made and journalled together: the small files, each part, each layer's experts."""
    checkpoint = plan.checkpoint

    def files() -> Iterator[tuple[str, npt.NDArray[Any]]]:
        for name, raw in plan.files.items():
            yield f"file.{name}", np.frombuffer(raw, np.uint8)

    yield [f"file.{name}" for name in plan.files], files
    for part in checkpoint.parts:

        def arrays(part: Part = part) -> Iterator[tuple[str, npt.NDArray[Any]]]:
            for kind, array in checkpoint.arrays(part).items():
                yield f"{part.name}.{kind}", array

        yield [f"{part.name}.{kind}" for kind in part.arrays], arrays
    for layer in range(checkpoint.config.layers):

        def experts(layer: int = layer) -> Iterator[tuple[str, npt.NDArray[Any]]]:
            yield f"experts.{layer}", _pack_layer(checkpoint, layer)

        yield [f"experts.{layer}"], experts


def _pack_layer(checkpoint: Checkpoint, layer: int) -> npt.NDArray[np.uint8]:
    """The records of one layer, u8 [E, nbytes]; NumPy lets go of the GIL, so threads help."""
    count = checkpoint.config.experts
    out = np.empty((count, checkpoint.record.nbytes), np.uint8)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        list(pool.map(lambda e: checkpoint.pack_expert(out[e], layer, e), range(count)))
    return out


def _pwrite(file: BinaryIO, raw: memoryview, offset: int) -> None:
    while raw.nbytes:
        written = os.pwrite(file.fileno(), raw[: 256 << 20], offset)
        raw, offset = raw[written:], offset + written


def _note(notes: BinaryIO, what: dict[str, Any]) -> None:
    notes.write(json.dumps(what).encode() + b"\n")
    notes.flush()
    os.fsync(notes.fileno())


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def locked(path: Path, progress: Progress | None) -> Iterator[None]:
    """Hold the right to write `path`; waits for whoever has it, and says so."""
    lock = path.with_name(path.name + ".lock")
    try:
        handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise ConfigError(
            f"{path.parent} cannot be written ({error}); choose another folder with --cache-dir."
        ) from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            who = os.pread(handle, 64, 0).decode(errors="replace").strip()
            if progress:
                progress(f"waiting for process {who or '?'}", 0, 0)
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as error:
            raise ConfigError(
                f"{lock} cannot be locked ({error}); choose another folder with --cache-dir."
            ) from None
        os.ftruncate(handle, 0)
        os.pwrite(handle, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(handle)
