"""Writing the packed file: a checkpoint quantised once, or a made-up model.

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
from osmium.weights.packed import FILES, FIXED, MAGIC, VERSION, Entry

__all__ = [
    "CpuQuantizer",
    "PackSource",
    "Provenance",
    "Shapes",
    "locked",
    "packed_size",
    "write_packed",
]

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Shapes(Protocol):
    """What the size of a packed file follows from."""

    @property
    def config(self) -> ModelConfig: ...

    @property
    def formats(self) -> Formats: ...

    @property
    def record(self) -> ExpertLayout: ...


class PackSource(Shapes, Protocol):
    """What a packed file is made from."""

    def arrays(self, part: TensorSpec) -> dict[str, npt.NDArray[Any]]:
        """A part in its format: data, and a matrix's scale."""

    def layers(self, wanted: Sequence[int]) -> Iterator[npt.NDArray[np.uint8]]:
        """The experts of some layers, u8 [E, nbytes] each; good until the next but one."""


@dataclass(frozen=True)
class Provenance:
    """What a packed file says of where it comes from."""

    fingerprint: str
    files: dict[str, bytes]
    """Small files that travel along."""
    stamps: dict[str, list[int]] = field(default_factory=dict)
    """Size and time of change of each shard."""
    hub: dict[str, Any] | None = None
    """Of a model from the hub: its id, commit, and the etag of each file."""

    @classmethod
    def of(
        cls, checkpoint: Checkpoint, fingerprint: str, hub: dict[str, Any] | None = None
    ) -> "Provenance":
        """A checkpoint's."""
        folder = checkpoint.shards.folder
        files = {n: (folder / n).read_bytes() for n in FILES if (folder / n).is_file()}
        return cls(fingerprint, files, _stamps(checkpoint.shards.files), hub)


class CpuQuantizer:
    """A checkpoint quantised with NumPy."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.config, self.formats = checkpoint.config, checkpoint.formats
        self.record = checkpoint.record
        self.arrays = checkpoint.arrays

    def layers(self, wanted: Sequence[int]) -> Iterator[npt.NDArray[np.uint8]]:
        """The records of each layer; NumPy lets go of the GIL, so threads help."""
        count, pack = self.config.num_experts, self.checkpoint.pack_expert
        out = np.empty((2, count, self.record.nbytes), np.uint8)
        for i, layer in enumerate(wanted):
            records = out[i % 2]

            def one(expert: int, layer: int = layer, records: Any = records) -> None:
                pack(records[expert], layer, expert)

            with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
                list(pool.map(one, range(count)))
            yield records


class _FileLayout:
    """Where everything will lie, before a byte is written."""

    def __init__(self, source: Shapes, origin: Provenance) -> None:
        self.files = origin.files
        config, record = source.config, source.record
        self.parts = tensor_specs(config, source.formats)
        wanted: list[tuple[str, str, tuple[int, ...], int]] = [
            (f"file.{name}", "|u1", (len(raw),), len(raw)) for name, raw in self.files.items()
        ]
        for part in self.parts:
            for kind, (shape, dtype) in part.arrays.items():
                nbytes = int(np.prod(shape)) * dtype.itemsize
                wanted.append((f"{part.name}.{kind}", dtype.str, shape, nbytes))
        for layer in range(config.num_layers):
            shape = (config.num_experts, record.nbytes)
            wanted.append((f"experts.{layer}", "|u1", shape, config.num_experts * record.nbytes))
        self.head: dict[str, Any] = {
            "fingerprint": origin.fingerprint,
            "formats": vars(source.formats),
            "sources": origin.stamps,
            **({} if origin.hub is None else {"hub": origin.hub}),
        }
        # Offsets need the header's length and the header holds the offsets: once round is enough
        # unless a number gains a digit.
        length = 0
        while True:
            self.entries = _lay_out(wanted, -(-(FIXED + length) // IO_ALIGNMENT) * IO_ALIGNMENT)
            text = self.header({})
            if len(text) <= length:
                break
            length = -(-(FIXED + len(text)) // IO_ALIGNMENT) * IO_ALIGNMENT - FIXED
        self.size = (
            self.entries[-1].offset + -(-self.entries[-1].nbytes // IO_ALIGNMENT) * IO_ALIGNMENT
        )

    def header(self, crcs: dict[str, int]) -> bytes:
        """The JSON, of the same length whatever the checksums."""
        parts = [
            {**vars(e), "shape": list(e.shape), "crc": f"{crcs.get(e.name, 0):08x}"}
            for e in self.entries
        ]
        last = self.entries[-1]
        size = last.offset + -(-last.nbytes // IO_ALIGNMENT) * IO_ALIGNMENT
        return json.dumps({**self.head, "size": size, "parts": parts}).encode()

    @property
    def key(self) -> str:
        """What a journal must be of, to be gone on with."""
        return f"{zlib.crc32(self.header({})):08x}-{self.head['fingerprint']}"


def packed_size(shapes: Shapes, files: Mapping[str, int]) -> int:
    """Bytes of a model's packed file, to within its header's few hundred kB.

    `files` are the bytes of the small files that travel along.
    """
    return _FileLayout(
        shapes, Provenance("", {name: bytes(size) for name, size in files.items()})
    ).size


def _lay_out(wanted: list[tuple[str, str, tuple[int, ...], int]], start: int) -> list[Entry]:
    entries = []
    for name, dtype, shape, nbytes in wanted:
        entries.append(Entry(name, dtype, shape, start, nbytes))
        start += -(-nbytes // IO_ALIGNMENT) * IO_ALIGNMENT
    return entries


def _stamps(files: list[Path]) -> dict[str, list[int]]:
    found = {file.name: file.stat() for file in files}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in found.items()}


def write_packed(
    path: Path, source: PackSource, origin: Provenance, progress: Progress | None
) -> None:
    """Write a model to `path`.  What a stopped run has finished is kept and gone on from.

    One layer is made while the one before it is written; two are held beyond what is mapped.
    Raises: ConfigError where the disk is full or the folder cannot be written, CheckpointError.
    """
    plan = _FileLayout(source, origin)
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
                    _note(
                        notes, {"key": plan.key, "nbytes": {e.name: e.nbytes for e in plan.entries}}
                    )
                _write_parts(file, notes, plan, source, crcs, progress)
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


def _resume(partial: Path, journal: Path, plan: _FileLayout) -> dict[str, int]:
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


Unit = list[tuple[str, npt.NDArray[Any]]]
"""Arrays by name, that are made, written and entered in the journal together."""


def _write_parts(
    file: BinaryIO,
    notes: BinaryIO,
    plan: _FileLayout,
    source: PackSource,
    crcs: dict[str, int],
    progress: Progress | None,
) -> None:
    """Every part that `crcs` lacks, each written while the next is made."""
    total = sum(e.nbytes for e in plan.entries)
    entries = {e.name: e for e in plan.entries}
    done = sum(entry.nbytes for name, entry in entries.items() if name in crcs)
    made = _units(plan, source, set(crcs))
    with (
        ThreadPoolExecutor(2, thread_name_prefix="osmium-pack") as pool,  # one writes, one sums
        contextlib.closing(made),
    ):
        going = None
        if progress:
            progress("packing", done, total)
        try:
            for unit in made:
                if going is not None:
                    crcs.update(going.result())
                going = pool.submit(_write, file, notes, entries, unit, pool)
                done += sum(entries[name].nbytes for name, _ in unit)
                if progress:
                    progress("packing", done, total)
        finally:  # after Ctrl-C, too: a pool that is shut down takes no more work from `_write`
            if going is not None:
                crcs.update(going.result())


def _write(
    file: BinaryIO, notes: BinaryIO, entries: dict[str, Entry], unit: Unit, pool: Executor
) -> dict[str, int]:
    """Bytes to the disk, then their names into the journal.  Returns their checksums."""
    fresh: dict[str, int] = {}
    for name, array in unit:
        raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        entry = entries[name]
        assert raw.nbytes == entry.nbytes, f"{name}: {raw.nbytes} bytes, {entry.nbytes} planned"
        total = pool.submit(zlib.crc32, raw)
        _pwrite(file, raw, entry.offset)
        fresh[name] = total.result()
    os.fdatasync(file.fileno())
    _note(notes, fresh)
    return fresh


def _units(plan: _FileLayout, source: PackSource, done: set[str]) -> Generator[Unit]:
    """What is not done: the small files, each part, each layer's experts."""
    files = [(f"file.{name}", np.frombuffer(raw, np.uint8)) for name, raw in plan.files.items()]
    if not done.issuperset(name for name, _ in files):
        yield files
    for part in plan.parts:
        if not done.issuperset(f"{part.name}.{kind}" for kind in part.arrays):
            arrays = source.arrays(part)
            yield [(f"{part.name}.{kind}", array) for kind, array in arrays.items()]
    left = [i for i in range(source.config.num_layers) if f"experts.{i}" not in done]
    for layer, records in zip(left, source.layers(left), strict=True):
        yield [(f"experts.{layer}", records)]


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
