"""Writes the packed file of a quantised checkpoint or of a synthetic model.

The file has a temporary name until it is complete.  A part enters a journal beside it after its
bytes have reached the disk, and an interrupted run continues from there.  packed.py describes the
format.
"""

import contextlib
import errno
import fcntl
import json
import logging
import os
import zlib
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import numpy.typing as npt

from osmium.config import ModelConfig, Progress
from osmium.errors import ConfigError
from osmium.quant.expert_layout import IO_ALIGNMENT, ExpertLayout
from osmium.weights.checkpoint import Checkpoint, Formats, TensorSpec, tensor_specs
from osmium.weights.own_files import open_own, read_small_file
from osmium.weights.packed import FILES, MAGIC, PREAMBLE_BYTES, VERSION, Entry
from osmium.weights.reading import Reader

__all__ = [
    "CpuQuantizer",
    "PackSource",
    "Provenance",
    "Shapes",
    "locked",
    "packed_size",
    "write_packed",
]

LOG = logging.getLogger("osmium.weights")

MAX_JOURNAL = 64 << 20
"""Most bytes of a journal that are read; one of 1,200 parts has 100 kB."""

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Shapes(Protocol):
    """Shapes and formats, which determine the size of a packed file."""

    @property
    def config(self) -> ModelConfig: ...

    @property
    def formats(self) -> Formats: ...

    @property
    def layout(self) -> ExpertLayout: ...


class PackSource(Shapes, Protocol):
    """The source of a packed file: a checkpoint's quantizer, or a synthetic model."""

    def arrays(self, part: TensorSpec) -> dict[str, npt.NDArray[Any]]:
        """A part in its format: data, and a matrix's scale."""

    def layers(self, wanted: Sequence[int]) -> Iterator[npt.NDArray[np.uint8]]:
        """The packed experts of the layers `wanted`, u8 [E, nbytes] each.

        Two buffers alternate: an array is overwritten two layers later.
        """


@dataclass(frozen=True)
class Provenance:
    """The origin that a packed file's header records."""

    fingerprint: str
    files: dict[str, bytes]
    """Small files that the packed file contains."""
    stamps: dict[str, list[int]] = field(default_factory=dict)
    """Size and modification time of each shard."""
    hub: dict[str, Any] | None = None
    """Of a hub model: its id, commit, and the etag of each file; else None."""

    @classmethod
    def of(
        cls, checkpoint: Checkpoint, fingerprint: str, hub: dict[str, Any] | None = None
    ) -> "Provenance":
        """The origin of a checkpoint."""
        folder = checkpoint.shards.folder
        read = {name: read_small_file(folder / name) for name in FILES}
        files = {name: raw for name, raw in read.items() if raw is not None}
        return cls(fingerprint, files, _stamps(checkpoint.shards.files), hub)


class CpuQuantizer:
    """Quantises a checkpoint with NumPy."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.config, self.formats = checkpoint.config, checkpoint.formats
        self.layout = checkpoint.layout
        self.arrays = checkpoint.arrays

    def layers(self, wanted: Sequence[int]) -> Iterator[npt.NDArray[np.uint8]]:
        """As PackSource.layers; NumPy releases the GIL, so threads are faster."""
        count, pack = self.config.num_experts, self.checkpoint.pack_expert
        out = np.empty((2, count, self.layout.nbytes), np.uint8)
        for i, layer in enumerate(wanted):
            experts = out[i % 2]

            def pack_one(expert: int, layer: int = layer, experts: Any = experts) -> None:
                pack(experts[expert], layer, expert)

            with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
                list(pool.map(pack_one, range(count)))
            yield experts


class _FileLayout:
    """Offsets of all parts, computed before a byte is written."""

    def __init__(self, source: Shapes, origin: Provenance) -> None:
        self.files = origin.files
        config, layout = source.config, source.layout
        self.parts = tensor_specs(config, source.formats)
        arrays: list[tuple[str, str, tuple[int, ...], int]] = [
            (f"file.{name}", "|u1", (len(raw),), len(raw)) for name, raw in self.files.items()
        ]
        for part in self.parts:
            for kind, (shape, dtype) in part.arrays.items():
                nbytes = int(np.prod(shape)) * dtype.itemsize
                arrays.append((f"{part.name}.{kind}", dtype.str, shape, nbytes))
        for layer in range(config.num_layers):
            shape = (config.num_experts, layout.nbytes)
            arrays.append((f"experts.{layer}", "|u1", shape, config.num_experts * layout.nbytes))
        self.head: dict[str, Any] = {
            "fingerprint": origin.fingerprint,
            "formats": vars(source.formats),
            "sources": origin.stamps,
            **({} if origin.hub is None else {"hub": origin.hub}),
        }
        # The offsets depend on the header's length, and the header contains the offsets.  One
        # iteration is enough unless an offset gains a digit.
        length = 0
        while True:
            self.entries = _lay_out(
                arrays, -(-(PREAMBLE_BYTES + length) // IO_ALIGNMENT) * IO_ALIGNMENT
            )
            text = self.header({})
            if len(text) <= length:
                break
            length = (
                -(-(PREAMBLE_BYTES + len(text)) // IO_ALIGNMENT) * IO_ALIGNMENT - PREAMBLE_BYTES
            )
        self.size = (
            self.entries[-1].offset + -(-self.entries[-1].nbytes // IO_ALIGNMENT) * IO_ALIGNMENT
        )

    def header(self, crcs: dict[str, int]) -> bytes:
        """The header's JSON; its length does not depend on the checksums."""
        parts = [
            {**vars(e), "shape": list(e.shape), "crc": f"{crcs.get(e.name, 0):08x}"}
            for e in self.entries
        ]
        last = self.entries[-1]
        size = last.offset + -(-last.nbytes // IO_ALIGNMENT) * IO_ALIGNMENT
        return json.dumps({**self.head, "size": size, "parts": parts}).encode()

    @property
    def key(self) -> str:
        """Identifies the model and layout; a journal with another key is discarded."""
        return f"{zlib.crc32(self.header({})):08x}-{self.head['fingerprint']}"


def packed_size(shapes: Shapes, files: Mapping[str, int]) -> int:
    """Bytes of a model's packed file; the header, some hundred kB, is estimated.

    `files` are the sizes of the small files that the packed file contains.
    """
    return _FileLayout(
        shapes, Provenance("", {name: bytes(size) for name, size in files.items()})
    ).size


def _lay_out(arrays: list[tuple[str, str, tuple[int, ...], int]], start: int) -> list[Entry]:
    entries = []
    for name, dtype, shape, nbytes in arrays:
        entries.append(Entry(name, dtype, shape, start, nbytes))
        start += -(-nbytes // IO_ALIGNMENT) * IO_ALIGNMENT
    return entries


def _stamps(files: list[Path]) -> dict[str, list[int]]:
    stats = {file.name: file.stat() for file in files}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}


def write_packed(
    path: Path, source: PackSource, origin: Provenance, progress: Progress | None
) -> None:
    """Write a model to `path`, continuing an interrupted run.

    One layer is quantised while the previous one is written; two are in memory, besides mappings.
    Raises: ConfigError if the disk is full or the folder cannot be written, CheckpointError.
    """
    layout = _FileLayout(source, origin)
    partial = path.with_name(path.name + ".partial")
    journal = path.with_name(path.name + ".journal")
    try:
        crcs = _resume(partial, journal, layout, progress)
        _check_free_space(path, layout.size, partial)
        with open(open_own(partial, os.O_RDWR | os.O_CREAT), "r+b") as file:
            with contextlib.suppress(AttributeError):
                os.posix_fallocate(file.fileno(), 0, layout.size)
            os.ftruncate(file.fileno(), layout.size)
            with open(
                open_own(journal, os.O_WRONLY | os.O_CREAT | os.O_APPEND), "ab"
            ) as journal_file:
                if not crcs:
                    _append_journal(
                        journal_file,
                        {"key": layout.key, "nbytes": {e.name: e.nbytes for e in layout.entries}},
                    )
                _write_parts(file, journal_file, layout, source, crcs, progress)
            text = layout.header(crcs)
            crc = zlib.crc32(text).to_bytes(4, "little")
            length = len(text).to_bytes(8, "little")
            file.seek(0)
            file.write(MAGIC + VERSION.to_bytes(4, "little") + crc + length + text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        _sync_folder(path.parent)
        journal.unlink()
    except OSError as error:
        if error.errno in _DISK_FULL:
            raise ConfigError(
                f"The disk of {path.parent} is full; the packed file takes "
                f"{layout.size / 1e9:.2f} GB. Free space, or choose another disk with "
                "--cache-dir; the next start continues this file."
            ) from None
        raise ConfigError(
            f"{path.parent} cannot be written ({error}); choose another folder with --cache-dir."
        ) from None


def _resume(
    partial: Path, journal: Path, layout: _FileLayout, progress: Progress | None
) -> dict[str, int]:
    """Checksums of the parts that an earlier run finished and that are on the disk.

    A part counts if its bytes have the checksum that the journal records.  Files of another model
    are deleted.
    """
    recorded = _recorded(journal, layout) if partial.is_file() else {}
    crcs: dict[str, int] = {}
    if recorded:
        entries = [entry for entry in layout.entries if entry.name in recorded]
        total, done = sum(entry.nbytes for entry in entries), 0
        with open(open_own(partial, os.O_RDONLY), "rb") as file, Reader(partial) as reader:
            size = os.fstat(file.fileno()).st_size
            for entry in entries:
                if progress:
                    progress("checking", done, total)
                if entry.offset + entry.nbytes <= size:
                    crc = reader.checksum(entry.offset, entry.nbytes)
                    if crc == recorded[entry.name]:
                        crcs[entry.name] = crc
                done += entry.nbytes
        if lost := len(entries) - len(crcs):
            LOG.warning(
                "%s: %d of %d parts are not as they were written; packing them again.", partial,
                lost, len(entries),
            )  # fmt: skip
    if not crcs:
        journal.unlink(missing_ok=True)
        partial.unlink(missing_ok=True)
    return crcs


def _recorded(journal: Path, layout: _FileLayout) -> dict[str, int]:
    """The checksums of a journal of this model; empty for another model's, or without one."""
    if not journal.is_file():
        return {}
    with open(open_own(journal, os.O_RDONLY), "rb") as file:
        raw = file.read(MAX_JOURNAL)
    entries = []
    for line in raw.split(b"\n")[:-1]:  # without the last line, which may be incomplete
        with contextlib.suppress(ValueError, RecursionError):
            entries.append(json.loads(line))
    entries = [entry for entry in entries if isinstance(entry, dict)]
    if not entries or entries[0].get("key") != layout.key:
        return {}
    names = {entry.name for entry in layout.entries}
    return {
        name: crc
        for entry in entries[1:]
        for name, crc in entry.items()
        if name in names and isinstance(crc, int)
    }


def _check_free_space(path: Path, size: int, partial: Path) -> None:
    """Raises: ConfigError if the disk has too little free space."""
    stat = os.statvfs(path.parent)
    free = stat.f_bavail * stat.f_frsize
    written = partial.stat().st_blocks * 512 if partial.is_file() else 0
    if size - written > free:
        raise ConfigError(
            f"The packed file takes {size / 1e9:.2f} GB and {path.parent} has {free / 1e9:.2f} GB "
            "free. Free space, or choose another disk with --cache-dir."
        )


Unit = list[tuple[str, npt.NDArray[Any]]]
"""Arrays by name that are quantised, written and journaled together."""


def _write_parts(
    file: BinaryIO,
    journal_file: BinaryIO,
    layout: _FileLayout,
    source: PackSource,
    crcs: dict[str, int],
    progress: Progress | None,
) -> None:
    """Write every part that `crcs` lacks, each while the next is quantised."""
    total = sum(e.nbytes for e in layout.entries)
    entries = {e.name: e for e in layout.entries}
    done = sum(entry.nbytes for name, entry in entries.items() if name in crcs)
    units = _units(layout, source, set(crcs))
    with (
        ThreadPoolExecutor(
            2, thread_name_prefix="osmium-pack"
        ) as pool,  # one writes, one computes crc32
        contextlib.closing(units),
    ):
        writing = None
        if progress:
            progress("packing", done, total)
        try:
            for unit in units:
                if writing is not None:
                    crcs.update(writing.result())
                writing = pool.submit(_write, file, journal_file, entries, unit, pool)
                done += sum(entries[name].nbytes for name, _ in unit)
                if progress:
                    progress("packing", done, total)
        finally:  # also after Ctrl-C: `_write` submits work, which a pool in shutdown refuses
            if writing is not None:
                crcs.update(writing.result())


def _write(
    file: BinaryIO, journal_file: BinaryIO, entries: dict[str, Entry], unit: Unit, pool: Executor
) -> dict[str, int]:
    """Write a unit to the disk, then journal it; returns its checksums."""
    crcs: dict[str, int] = {}
    for name, array in unit:
        raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        entry = entries[name]
        assert raw.nbytes == entry.nbytes, f"{name}: {raw.nbytes} bytes, {entry.nbytes} planned"
        crc = pool.submit(zlib.crc32, raw)
        _pwrite(file, raw, entry.offset)
        crcs[name] = crc.result()
    os.fdatasync(file.fileno())
    _append_journal(journal_file, crcs)
    return crcs


def _units(layout: _FileLayout, source: PackSource, done: set[str]) -> Generator[Unit]:
    """The units that are not in `done`: the small files, each part, each layer's experts."""
    files = [(f"file.{name}", np.frombuffer(raw, np.uint8)) for name, raw in layout.files.items()]
    if not done.issuperset(name for name, _ in files):
        yield files
    for part in layout.parts:
        if not done.issuperset(f"{part.name}.{kind}" for kind in part.arrays):
            arrays = source.arrays(part)
            yield [(f"{part.name}.{kind}", array) for kind, array in arrays.items()]
    layers = [i for i in range(source.config.num_layers) if f"experts.{i}" not in done]
    for layer, experts in zip(layers, source.layers(layers), strict=True):
        yield [(f"experts.{layer}", experts)]


def _pwrite(file: BinaryIO, raw: memoryview, offset: int) -> None:
    while raw.nbytes:
        written = os.pwrite(file.fileno(), raw[: 256 << 20], offset)
        raw, offset = raw[written:], offset + written


def _append_journal(journal_file: BinaryIO, what: dict[str, Any]) -> None:
    journal_file.write(json.dumps(what).encode() + b"\n")
    journal_file.flush()
    os.fsync(journal_file.fileno())


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def locked(path: Path, progress: Progress | None) -> Iterator[None]:
    """Lock `path` for writing.  Waits for a process that holds the lock, and reports its id.

    Raises: ConfigError.
    """
    lock = path.with_name(path.name + ".lock")
    try:
        handle = open_own(lock, os.O_RDWR | os.O_CREAT)
    except OSError as error:
        raise ConfigError(
            f"{path.parent} cannot be written ({error}); choose another folder with --cache-dir."
        ) from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = os.pread(handle, 64, 0).decode(errors="replace").strip()
            if progress:
                progress(f"waiting for process {pid or '?'}", 0, 0)
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
