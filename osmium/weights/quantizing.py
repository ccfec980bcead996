"""A checkpoint quantised by kernels, while what comes next is read.

Two buffers of page-locked memory are read into by turns, by several threads past the mapped file;
a copy, a kernel for each matrix and a copy back take a tenth of the time that a disk takes to fill
one.  All memory is taken at the start and given back at the end.  The bytes are those that
Checkpoint makes with NumPy.
"""

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from osmium.ops import Array, Ops
from osmium.quant import int4
from osmium.weights.checkpoint import Checkpoint, TensorSpec

__all__ = ["GpuQuantizer"]

ROOM = 256 << 20
"""Bytes of bf16 in one turn, at most, unless a single expert has more."""

_READERS = 8
_PIECE = 16 << 20
"""Bytes of one read."""


class GpuQuantizer:
    """A checkpoint with bf16 tensors, made into parts and records by `ops`; close it at the end."""

    def __init__(self, ops: Ops, checkpoint: Checkpoint, room: int = ROOM) -> None:
        """Raises: OutOfMemory."""
        self.ops, self.checkpoint = ops, checkpoint
        self.config, self.formats = checkpoint.config, checkpoint.formats
        self.record = checkpoint.record
        self.one = 3 * self.record.inner * self.record.hidden
        """Values of an expert."""
        self.count = max(1, min(self.config.num_experts, room // (2 * self.one)))
        """Experts a turn."""
        widest = max((part.shape[1] for part in checkpoint.parts if part.matrix), default=0)
        size = max(self.count * self.one, 16 * widest)
        nbytes = -(-max(self.count * self.record.nbytes, size) // 16) * 16
        self._w, self._out = ops.empty((size,), np.uint16), ops.empty((nbytes,), np.uint8)
        self._clips = ops.to_device(np.array(int4.CLIPS, np.float32))
        self._in = [ops.zeros_mapped((size,), np.uint16) for _ in range(2)]
        self._back = ops.zeros_mapped((nbytes,), np.uint8)
        self._views: list[npt.NDArray[Any]] = [ops.host_view(array) for array in self._in]
        self._made: Any = ops.host_view(self._back)

    def close(self) -> None:
        """Give the memory back; more than once is harmless."""
        held, self._in, self._views = self._in, [], []
        for array in [*held, *([self._back] if held else [])]:
            self.ops.release(array)
        self._w = self._out = self._clips = self._back = self._made = None

    # -- parts -------------------------------------------------------------------------------------

    def arrays(self, part: TensorSpec) -> dict[str, npt.NDArray[Any]]:
        """A part in its format: data, and a matrix's scale."""
        if part.format in ("int8", "int4"):
            joined = self.checkpoint.concatenated(part)
            if joined.dtype == np.uint16:
                return self._matrix(part, joined)
        return self.checkpoint.arrays(part)

    def _matrix(self, part: TensorSpec, w: npt.NDArray[Any]) -> dict[str, npt.NDArray[Any]]:
        """bf16 [N, K] in as many turns as it takes."""
        rows, columns = w.shape
        kinds = part.arrays
        made = {kind: np.empty(shape, dtype) for kind, (shape, dtype) in kinds.items()}
        widths = {
            kind: math.prod(shape[1:]) * dtype.itemsize for kind, (shape, dtype) in kinds.items()
        }
        some = min(rows, self._w.shape[0] // columns, self._out.shape[0] // sum(widths.values()))
        while some > 1 and _spread(some, widths)[1] > self._out.shape[0]:
            some -= 1
        for start in range(0, rows, some):
            mine = w[start : start + some]
            at, nbytes = _spread(len(mine), widths)
            self._views[0][: mine.size] = mine.reshape(-1)
            self._send(0, mine.size)
            out = self._out[:nbytes].reshape(1, nbytes)
            matrix = self._w[: mine.size].reshape(1, len(mine), columns)
            self._quantize(part.format == "int4", out, 0, at, matrix)
            self._fetch(nbytes)
            for kind, first in (("data", 0), ("scale", at)):
                raw = self._made[first : first + len(mine) * widths[kind]]
                room = made[kind][start : start + some]
                room[...] = raw.view(room.dtype).reshape(room.shape)
        return made

    # -- experts -----------------------------------------------------------------------------------

    def layers(self, wanted: Sequence[int]) -> Iterator[npt.NDArray[np.uint8]]:
        """The experts of some layers, u8 [E, nbytes] each; good until the next but one."""
        experts, shape = self.config.num_experts, (2, self.config.num_experts, self.record.nbytes)
        turns = [(layer, e) for layer in wanted for e in range(0, experts, self.count)]
        out = np.empty(shape, np.uint8)
        with ThreadPoolExecutor(_READERS, thread_name_prefix="osmium-shard") as pool:

            def begin(turn: int) -> list[Future[None]]:
                layer, first = turns[turn]
                last = min(experts, first + self.count)
                room = self._views[turn % 2]
                pieces = self._pieces(layer, first, last, room.view(np.uint8))
                read = self.checkpoint.shards.read_into
                return [pool.submit(read, *piece) for piece in pieces]

            coming = [begin(turn) for turn in range(min(2, len(turns)))]
            for turn, (layer, first) in enumerate(turns):
                for piece in coming[turn]:
                    piece.result()
                last = min(experts, first + self.count)
                records = out[wanted.index(layer) % 2]
                self._records(turn % 2, records[first:last])
                if turn + 2 < len(turns):
                    coming.append(begin(turn + 2))
                if last == experts:
                    yield records

    def _pieces(
        self, layer: int, first: int, last: int, room: npt.NDArray[np.uint8]
    ) -> Iterator[tuple[str, int, npt.NDArray[np.uint8]]]:
        """Tensor, first byte and where to: gate and up of every expert, then down of every one."""
        third = 2 * self.record.inner * self.record.hidden
        names, at = self.checkpoint.expert_names(layer), 0
        wanted: list[tuple[str, int, int]] = []
        if self.checkpoint.fused:
            both, down = names[0]
            wanted = [(both, 2 * third * first, 2 * third * (last - first))]
            wanted.append((down, third * first, third * (last - first)))
        else:
            for columns in (slice(0, 2), slice(2, 3)):
                wanted += [(n, 0, third) for one in names[first:last] for n in one[columns]]
        for name, start, nbytes in wanted:
            for i in range(0, nbytes, _PIECE):
                size = min(_PIECE, nbytes - i)
                yield name, start + i, room[at + i : at + i + size]
            at += nbytes

    def _records(self, turn: int, records: npt.NDArray[np.uint8]) -> None:
        """Quantise what has been read in a turn into u8 [n, nbytes]."""
        count, nbytes = records.shape
        record = self.record
        ups = count * 2 * record.inner * record.hidden
        self._send(turn, count * self.one)
        out = self._out[: count * nbytes].reshape(count, nbytes)
        self.ops.memset(out, 0)  # the padding too: the same expert is the same bytes
        up = self._w[:ups].reshape(count, 2 * record.inner, record.hidden)
        down = self._w[ups : count * self.one].reshape(count, record.hidden, record.inner)
        four = record.bits == 4
        self._quantize(four, out, 0, record.up_scale, up)
        self._quantize(four, out, record.down, record.down_scale, down)
        self._fetch(count * nbytes)
        records[...] = self._made[: count * nbytes].reshape(count, nbytes)

    # -- both --------------------------------------------------------------------------------------

    def _send(self, turn: int, size: int) -> None:
        self.ops.copy(self._w[:size], self._in[turn][:size])

    def _fetch(self, nbytes: int) -> None:
        self.ops.copy(self._back[:nbytes], self._out[:nbytes])
        self.ops.synchronize()

    def _quantize(self, four: bool, out: Array, data: int, scale: int, w: Array) -> None:
        if four:
            self.ops.quantize_int4(out, data, scale, w, self._clips)
        else:
            self.ops.quantize_int8(out, data, scale, w)


def _spread(rows: int, widths: dict[str, int]) -> tuple[int, int]:
    """Where the scales of so many rows begin, and where they end, in sixteens of bytes."""
    at = -(-rows * widths["data"] // 16) * 16
    return at, at + -(-rows * widths["scale"] // 16) * 16
