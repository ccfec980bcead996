"""A model's weights by our names, checked as they are taken.

name                        what                                            shape
embed                       bf16                                            [vocab, D]
head                        a matrix; absent where it is the embedding      [vocab, D]
norm                        f32                                             [D]
layers.{i}.mixer_norm       f32                                             [D]
layers.{i}.moe_norm         f32                                             [D]
layers.{i}.router           a matrix, bf16; last the shared expert's gate   [E + 1, D]
layers.{i}.shared_up        a matrix, gate then up                          [2 Is, D]
layers.{i}.shared_down      a matrix                                        [D, Is]
of an attention layer:
layers.{i}.qgkv             a matrix, as ops.rope_append reads it           [(2H + 2G) d, D]
layers.{i}.attention_norms  f32, of q, of k                                 [2, d]
layers.{i}.attention_out    a matrix                                        [D, H d]
of a delta-net layer:
layers.{i}.qkvz             a matrix: queries, keys, values, gates          [C + V dv, D]
layers.{i}.ab               a matrix                                        [2V, D]
layers.{i}.conv             f32                                             [C, 4]
layers.{i}.a_log            f32                                             [V]
layers.{i}.dt_bias          f32                                             [V]
layers.{i}.gated_norm       f32                                             [dv]
layers.{i}.delta_out        a matrix                                        [D, V dv]
"""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from osmium.errors import CheckpointError
from osmium.ops import Array, Linear, Ops

__all__ = ["Weights", "upload"]


class Weights:
    """A view of the mapping that says which name is missing or has the wrong shape."""

    def __init__(self, values: Mapping[str, Linear | Array], prefix: str = "") -> None:
        self._values, self._prefix = values, prefix

    def layer(self, index: int) -> "Weights":
        """The weights of one layer."""
        return Weights(self._values, f"layers.{index}.")

    def has(self, name: str) -> bool:
        return self._prefix + name in self._values

    def linear(self, name: str, rows: int, columns: int) -> Linear:
        """A matrix [rows, columns].  Raises: CheckpointError."""
        w = self._take(name)
        if not isinstance(w, Linear) or (w.rows, w.columns) != (rows, columns):
            found = (
                f"[{w.rows}, {w.columns}]" if isinstance(w, Linear) else f"an array {list(w.shape)}"
            )
            raise CheckpointError(
                f"{self._prefix}{name} is {found}; the model's config makes it a matrix "
                f"[{rows}, {columns}]."
            )
        return w

    def array(self, name: str, *shape: int, dtype: npt.DTypeLike = np.float32) -> Array:
        """An array, f32 unless told otherwise.  Raises: CheckpointError."""
        w = self._take(name)
        if isinstance(w, Linear) or tuple(w.shape) != shape or w.dtype != dtype:
            found = "a matrix" if isinstance(w, Linear) else f"{w.dtype} {list(w.shape)}"
            raise CheckpointError(
                f"{self._prefix}{name} is {found}; the model's config makes it "
                f"{np.dtype(dtype)} {list(shape)}."
            )
        return w

    def _take(self, name: str) -> Linear | Array:
        try:
            return self._values[self._prefix + name]
        except KeyError:
            raise CheckpointError(f"The weights lack {self._prefix}{name}.") from None


def upload(
    ops: Ops, values: Mapping[str, Linear | Array], *, embed_on_host: bool
) -> dict[str, Linear | Array]:
    """Weights from the host's memory to where kernels reach them fast.

    With `embed_on_host` the embedding goes to `ops.host` memory, as its table is large and a step
    reads one row a token; a head that is the embedding then gets a copy of its own, as it is read
    whole.  Raises: OutOfMemory.
    """
    placed: dict[str, Linear | Array] = {}
    for name, value in values.items():
        if isinstance(value, Linear):
            scale = None if value.scale is None else ops.put(value.scale)
            placed[name] = replace(value, data=ops.put(value.data), scale=scale)
        elif name == "embed" and embed_on_host:
            placed[name] = ops.host(value.shape, value.dtype)
            ops.host_view(placed[name])[...] = value
            if "head" not in values:
                rows, columns = value.shape
                placed["head"] = Linear("bf16", rows, columns, ops.put(value))
        else:
            placed[name] = ops.put(value)
    return placed
