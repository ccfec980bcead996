"""The packed file: a model quantised once, laid out as it is loaded.

    0        magic "OSMIUM\\0\\1", u32 format version, u32 crc32 of the JSON, u64 its length
    24       JSON: fingerprint, formats, parts, sources; padded to 4 KiB
    ...      parts, each from a multiple of 4 KiB on

A part is an array [name, dtype, shape, offset, nbytes, crc32].  Matrices are `name.data` and
`name.scale`; the routed experts are one part a layer, `experts.{i}`, of records [E, nbytes] as
quant/record.py lays them out; `file.config.json` and its like are what a start needs besides, so
that the packed file stands alone.

It is written under a temporary name beside a journal of finished parts, each entered after its
bytes have reached the disk, and renamed when whole: whoever is stopped at any moment goes on from
there.
"""

import contextlib
import errno
import fcntl
import json
import os
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from osmium.config import ModelConfig, Progress
from osmium.errors import CheckpointError, ConfigError
from osmium.ops import Linear
from osmium.quant.record import PAGE, Record
from osmium.weights.checkpoint import Checkpoint, Formats, Part, inventory

__all__ = ["FILES", "Packed", "open_packed", "write_packed"]

MAGIC = b"OSMIUM\0\1"
VERSION = 1
_FIXED = 24
"""Bytes before the JSON."""

FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "chat_template.jinja",
)  # fmt: skip
"""Small files of a checkpoint that travel along."""

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Entry:
    """One part of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


# -- reading ---------------------------------------------------------------------------------------


class Packed:
    """An open packed file, mapped."""

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        self.path = path
        self.fingerprint: str = header["fingerprint"]
        self.sources: dict[str, list[int]] = header["sources"]
        """Size and time of change of each shard that it was made from."""
        self.formats = Formats(**header["formats"])
        self._entries = {e["name"]: _entry(e) for e in header["parts"]}
        self._crcs = {e["name"]: int(e["crc"], 16) for e in header["parts"]}
        self._map = np.memmap(path, np.uint8, mode="r")
        self._checked: set[str] = set()
        config, generation = (self.json(name) for name in FILES[:2])
        if config is None:
            raise CheckpointError(f"{path} carries no config.json.")
        self.config = ModelConfig.from_hf(config, generation)
        self.record = Record(self.formats.expert_bits, self.config.hidden, self.config.expert_size)
        self.parts: dict[str, Part] = {p.name: p for p in inventory(self.config, self.formats)}
        self._check()

    def _check(self) -> None:
        """Raises: CheckpointError where the table is not that of the config."""
        wanted: dict[str, tuple[tuple[int, ...], np.dtype[Any]]] = {
            f"{part.name}.{kind}": (shape, dtype)
            for part in self.parts.values()
            for kind, (shape, dtype) in part.arrays.items()
        }
        records = (self.config.experts, self.record.nbytes)
        for layer in range(self.config.layers):
            wanted[f"experts.{layer}"] = (records, np.dtype(np.uint8))
        for name, (shape, dtype) in wanted.items():
            entry = self._entries.get(name)
            if entry is None or (entry.shape, np.dtype(entry.dtype)) != (shape, dtype):
                found = f"{entry.dtype} {list(entry.shape)}" if entry else "missing"
                raise CheckpointError(
                    f"{self.path}: {name} is {found}; its config makes it {dtype.str} "
                    f"{list(shape)}. Pack it again."
                )

    def names(self) -> list[str]:
        """Everything but the routed experts."""
        return list(self.parts)

    def tensor(self, name: str) -> Linear | npt.NDArray[Any]:
        """A Linear, or an array: f32, or bf16 for the embedding.  Raises: CheckpointError."""
        part = self.parts[name]
        data = self._array(f"{name}.data")
        if not part.matrix:
            return data
        scale = self._array(f"{name}.scale") if "scale" in part.arrays else None
        rows, columns = part.shape
        group = columns // scale.shape[1] if scale is not None and scale.ndim == 2 else 0
        assert part.format != "f32", "matrices are bf16, int8 or int4"
        return Linear(part.format, rows, columns, data, scale, group)

    def records(self, layer: int) -> npt.NDArray[np.uint8]:
        """The experts of a layer, u8 [E, nbytes], mapped.  Raises: CheckpointError."""
        return self._array(f"experts.{layer}")

    def all_records(self) -> npt.NDArray[np.uint8]:
        """The experts of all layers, u8 [L, E, nbytes], mapped.  Raises: CheckpointError."""
        for layer in range(self.config.layers):
            self.records(layer)
        first = self._entries["experts.0"]
        shape = (self.config.layers, *first.shape)
        end = first.offset + first.nbytes * self.config.layers
        return self._map[first.offset : end].reshape(shape)

    def read_records(self, layer: int, out: npt.NDArray[np.uint8]) -> None:
        """Read a layer's experts straight into u8 [E, nbytes]; any thread may call this.

        Raises: CheckpointError where the bytes are not those that were written.
        """
        entry = self._entries[f"experts.{layer}"]
        assert out.nbytes == entry.nbytes, f"{entry.nbytes} bytes into {out.nbytes}"
        view, done, crc = out.reshape(-1).data, 0, 0
        with open(self.path, "rb", buffering=0) as file:
            while done < entry.nbytes:
                piece = view[done : done + (64 << 20)]
                got = os.preadv(file.fileno(), [piece], entry.offset + done)
                if not got:
                    raise CheckpointError(f"{self.path} ends inside {entry.name}.")
                # Read back from the map, not from `out`: write-combined memory is slow to read.
                at = entry.offset + done
                crc = zlib.crc32(self._map[at : at + got].data, crc)
                done += got
        self._hold(entry.name, crc)

    def file(self, name: str) -> bytes | None:
        """A small file of the checkpoint, or None.  Raises: CheckpointError."""
        key = f"file.{name}"
        return self._array(key).tobytes() if key in self._entries else None

    def json(self, name: str) -> dict[str, Any] | None:
        """The same, parsed: an object.  Raises: CheckpointError."""
        raw = self.file(name)
        try:
            value = None if raw is None else json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{name} in {self.path} is not JSON: {error}") from None
        if value is not None and not isinstance(value, dict):
            raise CheckpointError(f"{name} in {self.path} holds no object.")
        return value

    def verify(self) -> None:
        """Check every part's checksum.  Raises: CheckpointError."""
        for name in self._entries:
            self._array(name)

    def _array(self, name: str) -> npt.NDArray[Any]:
        entry = self._entries[name]
        raw = self._map[entry.offset : entry.offset + entry.nbytes]
        if name not in self._checked:
            self._hold(name, zlib.crc32(raw.data))
        return np.asarray(raw).view(entry.dtype).reshape(entry.shape)

    def _hold(self, name: str, crc: int) -> None:
        if crc != self._crcs[name]:
            raise CheckpointError(
                f"{self.path}: {name} has checksum {crc:08x}, {self._crcs[name]:08x} was written. "
                "The file is damaged; delete it and pack again."
            )
        self._checked.add(name)


def _entry(e: dict[str, Any]) -> Entry:
    return Entry(e["name"], e["dtype"], tuple(e["shape"]), e["offset"], e["nbytes"])


def open_packed(path: Path) -> Packed:
    """Open and check header, version and size; parts are checked as they are read.

    Raises: CheckpointError.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            fixed = file.read(_FIXED)
            if len(fixed) < _FIXED or fixed[:8] != MAGIC:
                raise CheckpointError(f"{path} is not a packed file of Osmium.")
            version, crc = (int.from_bytes(fixed[i : i + 4], "little") for i in (8, 12))
            length = int.from_bytes(fixed[16:24], "little")
            if version != VERSION:
                raise CheckpointError(
                    f"{path} has format {version}, this version reads {VERSION}; pack it again."
                )
            if length > min(size, 1 << 28):
                raise CheckpointError(f"{path} is cut short: its header has {length} bytes.")
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if zlib.crc32(text) != crc:
        raise CheckpointError(f"{path}: the header is damaged; delete it and pack again.")
    header = json.loads(text)
    if header["size"] != size:
        raise CheckpointError(
            f"{path} has {size} bytes, {header['size']} were written; delete it and pack again."
        )
    return Packed(path, header)


# -- writing ---------------------------------------------------------------------------------------


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
            self.entries = _lay_out(wanted, -(-(_FIXED + length) // PAGE) * PAGE)
            text = self.header({})
            if len(text) <= length:
                break
            length = -(-(_FIXED + len(text)) // PAGE) * PAGE - _FIXED
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
