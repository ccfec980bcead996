"""A packed file's weights, all but the experts, to where kernels reach them fast.

The embedding is read into the host memory in which it stays.  The rest goes through a room of host
memory in two halves: while one is uploaded the other is read, so that the disk never waits.
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
    """Bytes of an array of the file, and where they go."""

    entry: Entry
    start: int
    out: Array
    """u8 [n], on the device."""
    room: slice
    """Of the half that it is read into, in whole pages."""


def upload_packed(
    ops: Ops,
    packed: PackedModel,
    reading: PackedReader,
    room: Array,
    progress: Progress | None = None,
) -> dict[str, LinearWeight | Array]:
    """Every part by its name, as models/weights.upload would place it.

    room u8 [n], page-locked; nobody must read into it any more when it is given back, so leave
    `reading` first.  Raises: OutOfMemory; CheckpointError where bytes are not those written.
    """
    placed: dict[str, LinearWeight | Array] = {}
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
        placed[name] = packed.assembled(name, arrays.__getitem__)
    half = room.nbytes // 2 // IO_ALIGNMENT * IO_ALIGNMENT
    view = np.asarray(ops.host_view(room), np.uint8)
    halves = [view[:half], view[half : 2 * half]]
    begun: deque[tuple[list[_Piece], npt.NDArray[np.uint8], list[Any]]] = deque()
    embed = packed.entry("embed.data")

    uploaded, total = 0, sum(entry.nbytes for entry, _ in entries)

    def upload() -> None:
        nonlocal uploaded
        pieces, side, waits = begun.popleft()
        for wait in waits:
            wait()
        for piece in pieces:
            ops.copy_h2d(piece.out, side[piece.room][: piece.out.nbytes])
        if progress:
            uploaded += sum(piece.out.nbytes for piece in pieces)
            progress("uploading", uploaded, total)

    def fill(there: npt.NDArray[np.uint8]) -> None:
        """The embedding, and all others meanwhile."""
        wait = reading.part(embed, 0, there)
        with waited_for([wait]):
            for number, pieces in enumerate(_filling(entries, half)):
                ops.synchronize()  # what was in this half has been uploaded
                side = halves[number % 2]
                waits = [reading.part(one.entry, one.start, side[one.room]) for one in pieces]
                begun.append((pieces, side, waits))
                if number:
                    upload()
            while begun:
                upload()
        wait()

    placed["embed"] = ops.empty_mapped(embed.shape, embed.dtype, fill)
    if "head" not in placed:  # it is the embedding, and is read whole: a copy of its own
        rows, columns = embed.shape
        head = ops.empty(embed.shape, embed.dtype)
        ops.copy(head, placed["embed"])
        placed["head"] = LinearWeight("bf16", rows, columns, head)
    ops.synchronize()
    return placed


def _filling(entries: list[tuple[Entry, Array]], half: int) -> Iterator[list[_Piece]]:
    """Arrays cut into what a half of the room takes at once, in the file's order."""
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
