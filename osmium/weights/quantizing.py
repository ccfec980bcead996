"""Quantises a checkpoint on the GPU, while the disk reads the next batch of experts.

Several threads read into two page-locked buffers in alternation.  A copy, a kernel per matrix and a
copy back take a tenth of the time that a disk takes to fill a buffer.  All memory is allocated at
the start and freed at the end.  The result equals Checkpoint's with NumPy, byte for byte.
"""

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from osmium.ops import Array, Ops
from osmium.quant import int4
from osmium.quant.finite import is_finite, packed_is_finite
from osmium.weights.checkpoint import Checkpoint, TensorSpec

__all__ = ["GpuQuantizer"]

BATCH_BYTES = 256 << 20
"""The largest batch, bytes of bf16, unless a single expert has more."""

_READERS = 8
_PIECE = 16 << 20
"""Bytes of one read."""


class GpuQuantizer:
    """Quantises a checkpoint with bf16 tensors by the kernels of `ops`; close it at the end."""

    def __init__(self, ops: Ops, checkpoint: Checkpoint, batch_bytes: int = BATCH_BYTES) -> None:
        """Raises: OutOfMemory."""
        self.ops, self.checkpoint = ops, checkpoint
        self.config, self.formats = checkpoint.config, checkpoint.formats
        self.layout = checkpoint.layout
        self.expert_values = 3 * self.layout.inner * self.layout.hidden
        """Values of an expert's three matrices."""
        self.batch_experts = max(
            1, min(self.config.num_experts, batch_bytes // (2 * self.expert_values))
        )
        """Experts of a batch."""
        widest = max((part.shape[1] for part in checkpoint.parts if part.matrix), default=0)
        size = max(self.batch_experts * self.expert_values, 16 * widest)
        nbytes = -(-max(self.batch_experts * self.layout.nbytes, size) // 16) * 16
        self._w, self._out = ops.empty((size,), np.uint16), ops.empty((nbytes,), np.uint8)
        self._clips = ops.to_device(np.array(int4.CLIPS, np.float32))
        self._in = [ops.zeros_mapped((size,), np.uint16) for _ in range(2)]
        self._back = ops.zeros_mapped((nbytes,), np.uint8)
        self._views: list[npt.NDArray[Any]] = [ops.host_view(array) for array in self._in]
        self._back_view: Any = ops.host_view(self._back)

    def close(self) -> None:
        """Free the memory; a second call does nothing."""
        buffers, self._in, self._views = self._in, [], []
        for array in [*buffers, *([self._back] if buffers else [])]:
            self.ops.release(array)
        self._w = self._out = self._clips = self._back = self._back_view = None

    # -- parts -------------------------------------------------------------------------------------

    def arrays(self, part: TensorSpec) -> dict[str, npt.NDArray[Any]]:
        """A part in its format: data, and a matrix's scale."""
        if part.format in ("int8", "int4"):
            matrix = self.checkpoint.concatenated(part)
            if matrix.dtype == np.uint16:
                return self._matrix(part, matrix)
        return self.checkpoint.arrays(part)

    def _matrix(self, part: TensorSpec, w: npt.NDArray[Any]) -> dict[str, npt.NDArray[Any]]:
        """Quantise bf16 [N, K] in batches of rows."""
        rows, columns = w.shape
        kinds = part.arrays
        arrays = {kind: np.empty(shape, dtype) for kind, (shape, dtype) in kinds.items()}
        widths = {
            kind: math.prod(shape[1:]) * dtype.itemsize for kind, (shape, dtype) in kinds.items()
        }
        batch = min(rows, self._w.shape[0] // columns, self._out.shape[0] // sum(widths.values()))
        while batch > 1 and _scale_bounds(batch, widths)[1] > self._out.shape[0]:
            batch -= 1
        for start in range(0, rows, batch):
            values = w[start : start + batch]
            scale, nbytes = _scale_bounds(len(values), widths)
            self._views[0][: values.size] = values.reshape(-1)
            self._copy_in(0, values.size)
            out = self._out[:nbytes].reshape(1, nbytes)
            matrix = self._w[: values.size].reshape(1, len(values), columns)
            self._quantize(part.format == "int4", out, 0, scale, matrix)
            self._copy_out(nbytes)
            for kind, offset in (("data", 0), ("scale", scale)):
                raw = self._back_view[offset : offset + len(values) * widths[kind]]
                target = arrays[kind][start : start + batch]
                target[...] = raw.view(target.dtype).reshape(target.shape)
        if not is_finite(arrays["scale"]):
            self.checkpoint.refuse_part(part)
        return arrays

    # -- experts -----------------------------------------------------------------------------------

    def layers(self, wanted: Sequence[int]) -> Iterator[npt.NDArray[np.uint8]]:
        """The packed experts of the layers `wanted`, u8 [E, nbytes] each.

        Two buffers alternate: an array is overwritten two layers later.
        """
        experts, shape = self.config.num_experts, (2, self.config.num_experts, self.layout.nbytes)
        batches = [(layer, e) for layer in wanted for e in range(0, experts, self.batch_experts)]
        out = np.empty(shape, np.uint8)
        with ThreadPoolExecutor(_READERS, thread_name_prefix="osmium-shard") as pool:

            def begin(batch: int) -> list[Future[None]]:
                layer, first = batches[batch]
                last = min(experts, first + self.batch_experts)
                buffer = self._views[batch % 2]
                pieces = self._pieces(layer, first, last, buffer.view(np.uint8))
                read = self.checkpoint.shards.read_into
                return [pool.submit(read, *piece) for piece in pieces]

            reads = [begin(batch) for batch in range(min(2, len(batches)))]
            for batch, (layer, first) in enumerate(batches):
                for piece in reads[batch]:
                    piece.result()
                last = min(experts, first + self.batch_experts)
                packed = out[wanted.index(layer) % 2]
                self._pack(batch % 2, packed[first:last])
                if not packed_is_finite(packed[first:last], self.layout):
                    for expert in range(first, last):
                        self.checkpoint.check_packed_expert(packed[expert], layer, expert)
                if batch + 2 < len(batches):
                    reads.append(begin(batch + 2))
                if last == experts:
                    yield packed

    def _pieces(
        self, layer: int, first: int, last: int, buffer: npt.NDArray[np.uint8]
    ) -> Iterator[tuple[str, int, npt.NDArray[np.uint8]]]:
        """Reads (tensor, first byte, target): gate and up of all experts, then down of all."""
        matrix_bytes = 2 * self.layout.inner * self.layout.hidden
        names, at = self.checkpoint.expert_names(layer), 0
        wanted: list[tuple[str, int, int]] = []
        if self.checkpoint.fused:
            gate_up, down = names[0]
            wanted = [(gate_up, 2 * matrix_bytes * first, 2 * matrix_bytes * (last - first))]
            wanted.append((down, matrix_bytes * first, matrix_bytes * (last - first)))
        else:
            for columns in (slice(0, 2), slice(2, 3)):
                matrices = [name for expert in names[first:last] for name in expert[columns]]
                wanted += [(name, 0, matrix_bytes) for name in matrices]
        for name, start, nbytes in wanted:
            for i in range(0, nbytes, _PIECE):
                size = min(_PIECE, nbytes - i)
                yield name, start + i, buffer[at + i : at + i + size]
            at += nbytes

    def _pack(self, buffer: int, packed: npt.NDArray[np.uint8]) -> None:
        """Quantise the experts in buffer 0 or 1 into u8 [n, nbytes]."""
        count, nbytes = packed.shape
        layout = self.layout
        ups = count * 2 * layout.inner * layout.hidden
        self._copy_in(buffer, count * self.expert_values)
        out = self._out[: count * nbytes].reshape(count, nbytes)
        self.ops.memset(out, 0)  # also the padding, so that equal experts have equal bytes
        up = self._w[:ups].reshape(count, 2 * layout.inner, layout.hidden)
        down = self._w[ups : count * self.expert_values].reshape(count, layout.hidden, layout.inner)
        int4_experts = layout.bits == 4
        self._quantize(int4_experts, out, 0, layout.up_scale, up)
        self._quantize(int4_experts, out, layout.down, layout.down_scale, down)
        self._copy_out(count * nbytes)
        packed[...] = self._back_view[: count * nbytes].reshape(count, nbytes)

    # -- parts and experts -------------------------------------------------------------------------

    def _copy_in(self, buffer: int, size: int) -> None:
        self.ops.copy(self._w[:size], self._in[buffer][:size])

    def _copy_out(self, nbytes: int) -> None:
        self.ops.copy(self._back[:nbytes], self._out[:nbytes])
        self.ops.synchronize()

    def _quantize(self, to_int4: bool, out: Array, data: int, scale: int, w: Array) -> None:
        if to_int4:
            self.ops.quantize_int4(out, data, scale, w, self._clips)
        else:
            self.ops.quantize_int8(out, data, scale, w)


def _scale_bounds(rows: int, widths: dict[str, int]) -> tuple[int, int]:
    """First byte and end of the scales behind the data of `rows` rows, multiples of 16."""
    start = -(-rows * widths["data"] // 16) * 16
    return start, start + -(-rows * widths["scale"] // 16) * 16
