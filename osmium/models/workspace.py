"""The arrays that a forward pass writes on its way, made once for the longest step."""

import math
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from osmium.config import ModelConfig
from osmium.ops import Array, Ops

__all__ = ["Workspace", "make_workspace", "workspace_bytes"]

SPLITS = 32
"""Blocks that share the context of a query: 32 of 32 heads fill a large GPU several times, and a
short context uses as many as it has tiles of 256 tokens."""

FEW_ROWS = 8
"""Steps of up to so many rows, one a sequence, share contexts out."""


@dataclass(frozen=True)
class Workspace:
    """Rows are the tokens of a step.  Letters are in ops/values.py and config.py."""

    x: Array
    """f32 [T, D], the residual stream."""
    h: Array
    """f32 [T, D], what a block reads: x, normed."""
    y: Array
    """f32 [T, D], scratch of the experts."""
    qgkv: Array
    """f32 [T, (2H + 2G) d]."""
    q: Array
    """f32 [T, H, d]."""
    attended: Array
    """f32 [T, H, d]."""
    qkvz: Array
    """f32 [T, C + V dv]."""
    qkv: Array
    """f32 [T, C], after the convolution."""
    ab: Array
    """f32 [T, 2V]."""
    decay: Array
    """f32 [T, V]."""
    beta: Array
    """f32 [T, V]."""
    read: Array
    """f32 [T, V, dv], what the delta rule reads from its state."""
    scores: Array
    """f32 [T, E + 1], router logits, then the shared expert's gate."""
    ids: Array
    """u16 [T, A], the experts of a token."""
    weights: Array
    """f32 [T, A], their weights."""
    shared_both: Array
    """f32 [T, 2 Is], the shared expert's gate and up."""
    shared_inner: Array
    """f32 [T, Is]."""
    shared: Array
    """f32 [T, D], what the shared expert says."""

    partial: Array
    """f32 [few rows, H, SPLITS, d + 2], what blocks that share a context leave."""

    def first(self, tokens: int) -> "Workspace":
        """The same arrays, cut to a step's rows."""
        cut = {f.name: getattr(self, f.name)[:tokens] for f in fields(self) if f.name != "partial"}
        return Workspace(**cut, partial=self.partial)


def make_workspace(ops: Ops, config: ModelConfig, rows: int) -> Workspace:
    """Room for steps of at most `rows` tokens.  Raises: OutOfMemory."""
    shapes = _shapes(config)
    return Workspace(
        **{name: ops.empty((rows, *s), t) for name, (s, t) in shapes.items()},
        partial=ops.empty(_partial(config, rows), np.float32),
    )


def workspace_bytes(config: ModelConfig, rows: int) -> int:
    """Bytes that make_workspace asks for."""
    wide = sum(math.prod(s) * np.dtype(t).itemsize for s, t in _shapes(config).values())
    return rows * wide + 4 * math.prod(_partial(config, rows))


def _partial(config: ModelConfig, rows: int) -> tuple[int, ...]:
    return (min(rows, FEW_ROWS), config.heads, SPLITS, config.head_dim + 2)


def _shapes(config: ModelConfig) -> dict[str, tuple[tuple[int, ...], npt.DTypeLike]]:
    """One row of each array, by name."""
    hidden = config.hidden
    heads = (config.heads, config.head_dim)
    values = (config.value_heads, config.value_dim)
    f32: dict[str, tuple[int, ...]] = {
        "x": (hidden,),
        "h": (hidden,),
        "y": (hidden,),
        "qgkv": (2 * (config.heads + config.kv_heads) * config.head_dim,),
        "q": heads,
        "attended": heads,
        "qkvz": (config.channels + math.prod(values),),
        "qkv": (config.channels,),
        "ab": (2 * config.value_heads,),
        "decay": (config.value_heads,),
        "beta": (config.value_heads,),
        "read": values,
        "scores": (config.experts + 1,),
        "weights": (config.top_k,),
        "shared_both": (2 * config.shared_size,),
        "shared_inner": (config.shared_size,),
        "shared": (hidden,),
    }
    return {"ids": ((config.top_k,), np.uint16), **{n: (s, np.float32) for n, s in f32.items()}}
