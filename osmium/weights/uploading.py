"""Uploads a packed file's weights, all but the experts, to VRAM.

The embedding is read into the host memory in which it stays.  The rest passes through a staging
buffer of two halves: one half is uploaded while the disk fills the other.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from osmium.config import Progress
from osmium.cuda.memory import waited_for
from osmium.ops import Array, LinearWeight, Ops
from osmium.quant.expert_layout import IO_ALIGNMENT
from osmium.weights.packed import Entry, PackedModel, PackedReader

__all__ = ["upload_packed"]


@dataclass(frozen=True)
class _Piece:
    """Bytes of an array of the file, and their destination."""

    entry: Entry
    start: int
    out: Array
    """u8 [n], on the device."""
    staging: slice
    """Bytes of a staging half, in multiples of IO_ALIGNMENT."""


def upload_packed(
    ops: Ops,
    packed: PackedModel,
    reading: PackedReader,
    staging: Array,
    progress: Progress | None = None,
) -> dict[str, LinearWeight | Array]:
    """Every part by its name, in the memory where models/weights.upload places it.

    staging u8 [n], page-locked; close `reading` before it is freed, as its threads write to it.
    Raises: OutOfMemory, or CheckpointError if a checksum differs.
    """
    uploaded: dict[str, LinearWeight | Array] = {}
    entries: list[tuple[Entry, Array]] = []
    for name, part in packed.parts.items():
        if name == "embed":
            continue
        arrays = {}
        for kind in part.arrays:
            entry = packed.entry(f"{name}.{kind}")
            arrays[entry.name] = ops.empty(entry.shape, entry.dtype)
            flat: Any = arrays[entry.name].reshape(-1)
            entries.append((entry, flat.view(np.uint8)))
        uploaded[name] = packed.assembled(name, arrays.__getitem__)
    half = staging.nbytes // 2 // IO_ALIGNMENT * IO_ALIGNMENT
    view = np.asarray(ops.host_view(staging), np.uint8)
    halves = [view[:half], view[half : 2 * half]]
    pending: deque[tuple[list[_Piece], npt.NDArray[np.uint8], list[Any]]] = deque()
    embed = packed.entry("embed.data")

    uploaded_bytes, total = 0, sum(entry.nbytes for entry, _ in entries)

    def upload() -> None:
        nonlocal uploaded_bytes
        pieces, staged, waits = pending.popleft()
        for wait in waits:
            wait()
        for piece in pieces:
            ops.copy_h2d(piece.out, staged[piece.staging][: piece.out.nbytes])
        if progress:
            uploaded_bytes += sum(piece.out.nbytes for piece in pieces)
            progress("uploading", uploaded_bytes, total)

    def fill(embedding: npt.NDArray[np.uint8]) -> None:
        """Read the embedding, and meanwhile upload all other parts."""
        wait = reading.part(embed, 0, embedding)
        with waited_for([wait]):
            for number, pieces in enumerate(_batches(entries, half)):
                ops.synchronize()  # the copies out of this half have ended
                staged = halves[number % 2]
                waits = [reading.part(p.entry, p.start, staged[p.staging]) for p in pieces]
                pending.append((pieces, staged, waits))
                if number:
                    upload()
            while pending:
                upload()
        wait()

    uploaded["embed"] = ops.empty_mapped(embed.shape, embed.dtype, fill)
    if "head" not in uploaded:  # tied to the embedding; matmuls read a copy in VRAM
        rows, columns = embed.shape
        head = ops.empty(embed.shape, embed.dtype)
        ops.copy(head, uploaded["embed"])
        uploaded["head"] = LinearWeight("bf16", rows, columns, head)
    ops.synchronize()
    return uploaded


def _batches(entries: list[tuple[Entry, Array]], half: int) -> Iterator[list[_Piece]]:
    """Pieces of arrays that fill one half of `half` bytes after another, in the file's order."""
    pieces: list[_Piece] = []
    used = 0
    for entry, out in entries:
        start = 0
        while start < entry.nbytes:
            if used == half:
                yield pieces
                pieces, used = [], 0
            length = min(entry.nbytes - start, half - used)
            end = used + -(-length // IO_ALIGNMENT) * IO_ALIGNMENT
            pieces.append(_Piece(entry, start, out[start : start + length], slice(used, end)))
            start, used = start + length, end
    if pieces:
        yield pieces
