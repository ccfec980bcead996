"""The packed file: a model quantised once, in the layout that a start loads.

    0        magic "OSMIUM\\0\\1", u32 format version, u32 crc32 of the JSON, u64 its length
    24       JSON: fingerprint, formats, parts, sources; padded to 4 KiB
    ...      parts, each from a multiple of 4 KiB on

A part is an array [name, dtype, shape, offset, nbytes, crc32].  A matrix is `name.data` and
`name.scale`.  A layer's routed experts are one part, `experts.{i}`: packed experts u8 [E, nbytes]
in the layout of quant/expert_layout.py.  Small files such as `file.config.json` are parts too, so
that a start needs no other file.
"""

import json
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt

from osmium.config import ModelConfig, Progress
from osmium.errors import CheckpointError
from osmium.ops import LinearWeight
from osmium.quant.expert_layout import IO_ALIGNMENT, ExpertLayout
from osmium.weights.checkpoint import Formats, TensorSpec, tensor_specs
from osmium.weights.own_files import MAX_SMALL_FILE
from osmium.weights.reading import BLOCK, Reader, crc32_combine, huge_pages

__all__ = ["FILES", "PackedModel", "PackedReader", "open_packed"]

MAGIC = b"OSMIUM\0\1"
VERSION = 1
PREAMBLE_BYTES = 24
"""Bytes before the JSON."""

MAX_HEADER = 16 << 20
"""Longest JSON, bytes; that of the largest model of the family has 400 kB."""

FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "chat_template.jinja", "chat_template.json", "additional_chat_templates/tool_use.jinja",
)  # fmt: skip
"""Small files of a checkpoint that the packed file contains."""


_Count = Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)]
_Matrix = Literal["bf16", "int8", "int4"]


@dataclass(frozen=True)
class Entry:
    """One part of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class _Row(msgspec.Struct, frozen=True):
    """A part's entry in the header's JSON."""

    name: str
    dtype: Literal["|u1", "|i1", "<u2", "<f2", "<f4"]
    shape: Annotated[list[_Count], msgspec.Meta(max_length=8)]
    offset: _Count
    nbytes: _Count
    crc: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{8}$")]

    @property
    def entry(self) -> Entry:
        return Entry(self.name, self.dtype, tuple(self.shape), self.offset, self.nbytes)


class _Formats(msgspec.Struct, frozen=True):
    expert_bits: Literal[16, 8, 4]
    attention: _Matrix
    shared: _Matrix
    head: _Matrix


class _Hub(msgspec.Struct, frozen=True):
    id: str
    revision: str
    etags: dict[str, str]


class _Header(msgspec.Struct, frozen=True):
    """The header's JSON."""

    fingerprint: str
    formats: _Formats
    sources: dict[str, list[int]]
    size: int
    parts: list[_Row]
    hub: _Hub | None = None


class PackedModel:
    """An open packed file; every array is read into memory and its checksum verified.

    Nothing is mapped: a mapped file that is cut while it is served ends the process by SIGBUS.
    """

    def __init__(self, path: Path, header: _Header) -> None:
        self.path = path
        self.fingerprint = header.fingerprint
        self.sources = header.sources
        """Size and modification time of each shard of the checkpoint."""
        self.hub: dict[str, Any] | None = msgspec.to_builtins(header.hub)
        """Of a hub model: its id, commit, and the etag of each file; else None."""
        formats = header.formats
        self.formats = Formats(formats.expert_bits, formats.attention, formats.shared, formats.head)
        self._entries = {row.name: row.entry for row in header.parts}
        self._crcs = {row.name: int(row.crc, 16) for row in header.parts}
        config, generation = (self.json(name) for name in FILES[:2])
        if config is None:
            raise CheckpointError(f"{path} contains no config.json; pack the model again.")
        model = ModelConfig.from_hf(config, generation)
        tied = model.tie_word_embeddings and "head.data" not in self._entries
        self.config = replace(model, tie_word_embeddings=tied)
        self.layout = ExpertLayout(
            self.formats.expert_bits, self.config.hidden_size, self.config.moe_intermediate_size
        )
        self.parts: dict[str, TensorSpec] = {
            p.name: p for p in tensor_specs(self.config, self.formats)
        }
        self._check()

    def _check(self) -> None:
        """Raises: CheckpointError if the parts differ from those that the config requires."""
        expected: dict[str, tuple[tuple[int, ...], np.dtype[Any]]] = {
            f"{part.name}.{kind}": (shape, dtype)
            for part in self.parts.values()
            for kind, (shape, dtype) in part.arrays.items()
        }
        layer_shape = (self.config.num_experts, self.layout.nbytes)
        for layer in range(self.config.num_layers):
            expected[f"experts.{layer}"] = (layer_shape, np.dtype(np.uint8))
        for name, (shape, dtype) in expected.items():
            entry = self._entries.get(name)
            if entry is None or (entry.shape, np.dtype(entry.dtype)) != (shape, dtype):
                found = f"{entry.dtype} {list(entry.shape)}" if entry else "missing"
                raise CheckpointError(
                    f"{self.path}: {name} is {found}; its config.json requires {dtype.str} "
                    f"{list(shape)}. Pack it again."
                )

    def names(self) -> list[str]:
        """Names of all tensors but the routed experts'."""
        return list(self.parts)

    def tensor(self, name: str) -> LinearWeight | npt.NDArray[Any]:
        """A LinearWeight, or an array: f32, or bf16 for the embedding.  Raises: CheckpointError."""
        return self.assembled(name, self._array)

    def assembled(
        self, name: str, array: Callable[[str], npt.NDArray[Any]]
    ) -> LinearWeight | npt.NDArray[Any]:
        """Like `tensor`, from the arrays that `array` returns for `name.data` and `name.scale`."""
        part = self.parts[name]
        data = array(f"{name}.data")
        if not part.matrix:
            return data
        scale = array(f"{name}.scale") if "scale" in part.arrays else None
        rows, columns = part.shape
        group = columns // scale.shape[1] if scale is not None and len(scale.shape) == 2 else 0
        assert part.format != "f32", "matrices are bf16, int8 or int4"
        return LinearWeight(part.format, rows, columns, data, scale, group)

    def packed_experts(self, layer: int) -> npt.NDArray[np.uint8]:
        """The packed experts of a layer, u8 [E, nbytes].  Raises: CheckpointError."""
        return self._array(f"experts.{layer}")

    def all_packed_experts(self, progress: Progress | None = None) -> npt.NDArray[np.uint8]:
        """The packed experts of all layers, u8 [L, E, nbytes].  Raises: CheckpointError."""
        layers = self.config.num_layers
        shape = (layers, self.config.num_experts, self.layout.nbytes)
        experts = huge_pages(math.prod(shape)).reshape(shape)
        with Reader(self.path) as reader:
            for layer in range(layers):
                if progress:
                    progress("experts", layer, layers)
                self._read(reader, f"experts.{layer}", experts[layer].reshape(-1))
        return _read_only(experts)

    def read_packed_experts(self, layer: int, out: npt.NDArray[np.uint8]) -> None:
        """Read a layer's packed experts into u8 [E, nbytes].

        Raises: CheckpointError if the checksum differs.
        """
        with self.reading() as reading:
            reading.packed_experts(layer, 0, out)()

    def reading(self, write_only: bool = False) -> "PackedReader":
        """A reader of experts and tensors into other memory, past the page cache.

        `write_only` declares that the destination is slow to read back.  Raises: CheckpointError.
        """
        return PackedReader(self, write_only)

    def entry(self, name: str) -> Entry:
        """Offset, shape and dtype of an array."""
        return self._entries[name]

    def file(self, name: str) -> bytes | None:
        """A small file of the checkpoint, or None.  Raises: CheckpointError."""
        entry = self._entries.get(f"file.{name}")
        if entry is not None and entry.nbytes > MAX_SMALL_FILE:
            raise CheckpointError(
                f"{self.path}: {name} has {entry.nbytes} bytes; at most {MAX_SMALL_FILE >> 20} MiB "
                "are supported. Pack it again."
            )
        return None if entry is None else self._array(entry.name).tobytes()

    def json(self, name: str) -> dict[str, Any] | None:
        """A small file parsed as a JSON object, or None.  Raises: CheckpointError."""
        raw = self.file(name)
        try:
            value = None if raw is None else json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{name} in {self.path} is not JSON: {error}") from None
        if value is not None and not isinstance(value, dict):
            raise CheckpointError(f"{name} in {self.path} is no JSON object.")
        return value

    def verify(self) -> None:
        """Check every part's checksum.  Raises: CheckpointError."""
        with Reader(self.path) as reader:
            for name, entry in self._entries.items():
                self.verify_crc(name, reader.checksum(entry.offset, entry.nbytes))

    def _array(self, name: str) -> npt.NDArray[Any]:
        """An array, after its checksum has been verified.  Raises: CheckpointError."""
        entry = self._entries[name]
        raw = (
            huge_pages(entry.nbytes) if entry.nbytes >= BLOCK else np.empty(entry.nbytes, np.uint8)
        )
        with Reader(self.path) as reader:
            self._read(reader, name, raw)
        return _read_only(raw.view(entry.dtype).reshape(entry.shape))

    def _read(self, reader: Reader, name: str, out: npt.NDArray[np.uint8]) -> None:
        self.verify_crc(name, reader.read(out, self._entries[name].offset))

    def verify_crc(self, name: str, crc: int) -> None:
        """Compare a part's crc32 with the header's.  Raises: CheckpointError."""
        if crc != self._crcs[name]:
            raise CheckpointError(
                f"{self.path}: {name} has checksum {crc:08x}, its header {self._crcs[name]:08x}. "
                "The file is damaged; delete it and pack again."
            )


class PackedReader:
    """Reads a packed file into memory that stays (reading.Reader), and verifies checksums.

    A layer's experts are verified when the last of them has been read.
    """

    def __init__(self, packed: PackedModel, write_only: bool) -> None:
        self._packed = packed
        self._reader = Reader(packed.path, write_only)
        self._sums: dict[str, dict[int, tuple[int, int]]] = {}
        """crc32 and length by offset, of arrays that have been read in part."""

    def __enter__(self) -> "PackedReader":
        return self

    def __exit__(self, *_: object) -> None:
        self._reader.close()

    @property
    def io_mode(self) -> str | None:
        """How bytes reach their memory: direct, bounced or cached; None before the first read."""
        return self._reader.io_mode

    def packed_experts(
        self, layer: int, first: int, out: npt.NDArray[np.uint8]
    ) -> Callable[[], None]:
        """Start to read the packed experts of a layer from number `first` on into u8 [n, nbytes].

        Returns a function that waits for them; it raises CheckpointError.
        """
        entry = self._packed.entry(f"experts.{layer}")
        start = first * out.shape[1]
        assert out.shape[1:] == entry.shape[1:], f"packed experts of {out.shape[1:]} bytes"
        assert start + out.nbytes <= entry.nbytes, f"{len(out)} experts from {first} on"
        return self.part(entry, start, out.reshape(-1))

    def part(self, entry: Entry, start: int, out: npt.NDArray[np.uint8]) -> Callable[[], None]:
        """Start to read an array from its byte `start` on into u8 [n].

        `out` may exceed the rest of the array by less than a page.
        Returns a function that waits for the bytes; it raises CheckpointError.
        """
        length = min(out.nbytes, entry.nbytes - start)
        finish = self._reader.begin(out, entry.offset + start, length)

        def wait() -> None:
            sums = self._sums.setdefault(entry.name, {})
            sums[start] = finish(), length
            if sum(size for _, size in sums.values()) == entry.nbytes:
                total = 0
                for _, (crc, size) in sorted(self._sums.pop(entry.name).items()):
                    total = crc32_combine(total, crc, size)
                self._packed.verify_crc(entry.name, total)

        return wait


def _read_only(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    array.flags.writeable = False
    return array


def _header(path: Path, text: bytes, size: int) -> _Header:
    """Decode the header's JSON, and check that its parts lie inside the file.

    Raises: CheckpointError.
    """
    try:
        header = msgspec.json.decode(text, type=_Header)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: the header is not that of a packed file ({str(error)[:300]}); pack it again."
        ) from None
    if header.size != size:
        raise CheckpointError(
            f"{path} has {size} bytes, its header {header.size}; delete it and pack again."
        )
    end = PREAMBLE_BYTES + len(text)
    for row in sorted(header.parts, key=lambda row: row.offset):
        nbytes = math.prod(row.shape) * np.dtype(row.dtype).itemsize
        inside = end <= row.offset and row.offset + row.nbytes <= size
        if nbytes != row.nbytes or not inside or row.offset % IO_ALIGNMENT:
            raise CheckpointError(
                f"{path}: {row.name[:80]} is {row.dtype} {row.shape} in {row.nbytes} bytes from "
                f"{row.offset} on, which does not fit between byte {end} and the file's end at "
                f"{size}. Pack it again."
            )
        end = row.offset + row.nbytes
    if len({row.name for row in header.parts}) != len(header.parts):
        raise CheckpointError(f"{path}: the header has a part twice. Pack it again.")
    return header


def open_packed(path: Path) -> PackedModel:
    """Open a packed file; check header, version and size.  A part is checked at its first read.

    Raises: CheckpointError.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            preamble = file.read(PREAMBLE_BYTES)
            if len(preamble) < PREAMBLE_BYTES or preamble[:8] != MAGIC:
                raise CheckpointError(f"{path} is not a packed file of Osmium.")
            version, crc = (int.from_bytes(preamble[i : i + 4], "little") for i in (8, 12))
            length = int.from_bytes(preamble[16:24], "little")
            if version != VERSION:
                raise CheckpointError(
                    f"{path} has format {version}, this version reads {VERSION}; pack it again."
                )
            if length > min(size, MAX_HEADER):
                raise CheckpointError(
                    f"{path} is truncated or damaged: its header has {length} bytes, the file "
                    f"{size}. Delete it and pack again."
                )
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if zlib.crc32(text) != crc:
        raise CheckpointError(f"{path}: the header is damaged; delete it and pack again.")
    return PackedModel(path, _header(path, text, size))
