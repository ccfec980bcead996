"""A model's weights by Osmium's names, checked when they are looked up.

name                        what                                            shape
embed                       bf16                                            [vocab, D]
head                        a matrix; absent where it is the embedding      [vocab, D]
norm                        f32                                             [D]
layers.{i}.mixer_norm       f32                                             [D]
layers.{i}.moe_norm         f32                                             [D]
layers.{i}.router           a matrix, bf16; row E is the shared gate        [E + 1, D]
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
from osmium.ops import Array, LinearWeight, Ops

__all__ = ["WeightView", "upload"]


class WeightView:
    """A view of the weights; errors name a weight that is missing or has the wrong shape."""

    def __init__(self, values: Mapping[str, LinearWeight | Array], prefix: str = "") -> None:
        self._values, self._prefix = values, prefix

    def layer(self, index: int) -> "WeightView":
        """The weights of one layer."""
        return WeightView(self._values, f"layers.{index}.")

    def has(self, name: str) -> bool:
        return self._prefix + name in self._values

    def linear(self, name: str, rows: int, columns: int) -> LinearWeight:
        """A matrix [rows, columns].  Raises: CheckpointError."""
        w = self._lookup(name)
        if not isinstance(w, LinearWeight) or (w.out_features, w.in_features) != (rows, columns):
            actual = (
                f"[{w.out_features}, {w.in_features}]"
                if isinstance(w, LinearWeight)
                else f"an array {list(w.shape)}"
            )
            raise CheckpointError(
                f"{self._prefix}{name} is {actual}; by the model's config it must be a matrix "
                f"[{rows}, {columns}]."
            )
        return w

    def array(self, name: str, *shape: int, dtype: npt.DTypeLike = np.float32) -> Array:
        """An array, f32 by default.  Raises: CheckpointError."""
        w = self._lookup(name)
        if isinstance(w, LinearWeight) or tuple(w.shape) != shape or w.dtype != dtype:
            actual = "a matrix" if isinstance(w, LinearWeight) else f"{w.dtype} {list(w.shape)}"
            raise CheckpointError(
                f"{self._prefix}{name} is {actual}; by the model's config it must be "
                f"{np.dtype(dtype)} {list(shape)}."
            )
        return w

    def _lookup(self, name: str) -> LinearWeight | Array:
        try:
            return self._values[self._prefix + name]
        except KeyError:
            raise CheckpointError(f"The weights lack {self._prefix}{name}.") from None


def upload(
    ops: Ops, values: Mapping[str, LinearWeight | Array], *, embed_on_host: bool
) -> dict[str, LinearWeight | Array]:
    """Copy weights from host memory to device memory.

    With `embed_on_host` the embedding goes to mapped host memory: the table is large and a step
    reads one row per token.  A head tied to the embedding then gets its own copy in VRAM, because
    each step reads all of it.  Raises: OutOfMemory.
    """
    uploaded: dict[str, LinearWeight | Array] = {}
    for name, value in values.items():
        if isinstance(value, LinearWeight):
            scale = None if value.scale is None else ops.to_device(value.scale)
            uploaded[name] = replace(value, data=ops.to_device(value.data), scale=scale)
        elif name == "embed" and embed_on_host:
            uploaded[name] = ops.empty_mapped(value.shape, value.dtype)
            ops.host_view(uploaded[name])[...] = value
            if "head" not in values:
                rows, columns = value.shape
                uploaded["head"] = LinearWeight("bf16", rows, columns, ops.to_device(value))
        else:
            uploaded[name] = ops.to_device(value)
    return uploaded
