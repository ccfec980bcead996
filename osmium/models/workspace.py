"""The arrays that a forward pass writes on its way, made once for the longest step."""

import math
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from osmium.config import ModelConfig
from osmium.ops import Array, MatmulInput, Ops
from osmium.ops.tiling import SPLIT_KV_MAX_SEQS
from osmium.ops.types import ROUTER_BARRIER_SHAPE, rows_bytes

__all__ = ["Workspace", "make_workspace", "workspace_bytes"]

SPLITS = 160
"""Most blocks a key head that share the contexts of a step: with two key heads they are two a
multiprocessor of a GPU with 160.  A short context uses as many as it has tiles."""


@dataclass(frozen=True)
class Workspace:
    """What a step writes on its way, a row a token.  Letters are in ops/types.py and config.py."""

    x: Array
    """f32 [T, D], the residual stream."""
    h: MatmulInput
    """[T, D], what a block reads: x, normed."""
    y: Array
    """f32 [T, D], scratch of the experts."""
    qgkv: Array
    """f32 [T, (2H + 2G) d]."""
    q: Array
    """f32 [T, H, d], of steps whose attention does not turn its own."""
    attn_out: MatmulInput
    """[T, H d]."""
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
    delta_out: MatmulInput
    """[T, V dv], what the delta rule reads from its state, normed and gated."""
    router_logits: Array
    """f32 [T, E + 1], router logits, then the shared expert's gate."""
    ids: Array
    """u16 [T, A], the experts of a token."""
    weights: Array
    """f32 [T, A], their weights."""
    shared_gate_up: Array
    """f32 [T, 2 Is], the shared expert's gate and up."""
    shared_inner: MatmulInput
    """[T, Is]."""
    shared_out: Array
    """f32 [T, D], what the shared expert says."""

    partial: Array
    """f32 [SPLITS, H, d + 2], partial results of split-KV blocks."""
    split_counters: Array
    """i32 [SPLIT_KV_MAX_SEQS, H, 8], zero between kernels: arrival counters of split-KV blocks."""
    router_barrier: Array
    """i32 [8, 288], zero between kernels; of ROUTER_BARRIER_SHAPE."""

    def first_rows(self, tokens: int) -> "Workspace":
        """The same, cut to a step's rows."""
        whole = {
            name: getattr(self, name) for name in ("partial", "split_counters", "router_barrier")
        }
        cut = {f.name: getattr(self, f.name)[:tokens] for f in fields(self) if f.name not in whole}
        return Workspace(**cut, **whole)


def make_workspace(ops: Ops, config: ModelConfig, rows: int) -> Workspace:
    """Room for steps of at most `rows` tokens.  Raises: OutOfMemory."""
    split_counters, router_barrier = (
        ops.empty(_split_counters(config), np.int32),
        ops.empty(ROUTER_BARRIER_SHAPE, np.int32),
    )
    for words in (split_counters, router_barrier):
        ops.memset(words, 0)
    arrays = {name: ops.empty((rows, *s), t) for name, (s, t) in _shapes(config).items()}
    return Workspace(
        **arrays,
        **{name: ops.empty_input(rows, width, eps) for name, (width, eps) in _rows(config).items()},
        partial=ops.empty(_partial(config), np.float32),
        split_counters=split_counters,
        router_barrier=router_barrier,
    )


def workspace_bytes(config: ModelConfig, rows: int, gpu: bool) -> int:
    """Bytes that make_workspace asks for on a backend."""
    wide = sum(math.prod(s) * np.dtype(t).itemsize for s, t in _shapes(config).values())
    read = sum(rows_bytes(1, width, eps is not None, gpu) for width, eps in _rows(config).values())
    whole = (_partial(config), _split_counters(config), ROUTER_BARRIER_SHAPE)
    return rows * (wide + read) + 4 * sum(map(math.prod, whole))


def _partial(config: ModelConfig) -> tuple[int, ...]:
    return (SPLITS, config.num_heads, config.head_dim + 2)


def _split_counters(config: ModelConfig) -> tuple[int, ...]:
    return (SPLIT_KV_MAX_SEQS, config.num_heads, 8)


def _shapes(config: ModelConfig) -> dict[str, tuple[tuple[int, ...], npt.DTypeLike]]:
    """One row of each array, by name."""
    hidden = config.hidden_size
    heads = (config.num_heads, config.head_dim)
    values = (config.value_heads, config.value_dim)
    f32: dict[str, tuple[int, ...]] = {
        "x": (hidden,),
        "y": (hidden,),
        "qgkv": (2 * (config.num_heads + config.num_kv_heads) * config.head_dim,),
        "q": heads,
        "qkvz": (config.channels + math.prod(values),),
        "qkv": (config.channels,),
        "ab": (2 * config.value_heads,),
        "decay": (config.value_heads,),
        "beta": (config.value_heads,),
        "router_logits": (config.num_experts + 1,),
        "weights": (config.top_k,),
        "shared_gate_up": (2 * config.shared_intermediate_size,),
        "shared_out": (hidden,),
    }
    return {"ids": ((config.top_k,), np.uint16), **{n: (s, np.float32) for n, s in f32.items()}}


def _rows(config: ModelConfig) -> dict[str, tuple[int, float | None]]:
    """Width of each of the rows that matrices read, and the eps of those that are normed."""
    return {
        "h": (config.hidden_size, config.eps),
        "attn_out": (config.num_heads * config.head_dim, None),
        "delta_out": (config.value_heads * config.value_dim, None),
        "shared_inner": (config.shared_intermediate_size, None),
    }
