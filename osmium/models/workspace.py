"""The workspace: scratch arrays of a forward pass, allocated once for the longest step."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from osmium.config import ModelConfig
from osmium.models.scratch import Scratch, aligned_bytes
from osmium.ops import Array, MatmulInput, Ops
from osmium.ops.tiling import KV_SPLITS, SPLIT_KV_MAX_SEQS, delta_chunk_words, input_shapes
from osmium.ops.types import ROUTER_BARRIER_SHAPE

__all__ = ["Workspace", "cut_bytes", "cut_workspace", "make_workspace", "workspace_bytes"]

OVERLAPPING = (
    ("h",),
    ("qgkv", "q", "attn_out", "context_sums"),
    ("qkvz", "qkv", "ab", "decay", "beta", "delta_out", "chunk_scratch"),
    (
        "x", "router_logits", "ids", "weights", "shared_gate_up", "shared_inner", "shared_out", "y",
    ),
)  # fmt: skip
"""The fields of a Workspace that are scratch of a step: used throughout a layer, by attention, by
the delta net, and by the experts."""

SHARED = ("partial", "split_counters", "context_turns", "router_barrier")
"""The fields that all workspaces of a model share: 0 between kernels, or larger than a row's."""


@dataclass(frozen=True)
class Workspace:
    """Scratch arrays of a step, one row per token.  Letters are in ops/types.py and config.py."""

    x: Array
    """f32 [T, D], the residual stream."""
    h: MatmulInput
    """[T, D], norm(x): the input of a mixer, a router and experts."""
    y: Array
    """f32 [T, D], scratch of the experts."""
    qgkv: Array
    """f32 [T, (2H + 2G) d]."""
    q: Array
    """f32 [T, H, d], rotated queries; unused where the attention kernel applies RoPE itself."""
    attn_out: MatmulInput
    """[T, H d]."""
    context_sums: Array
    """f32 [T, 2, H, 2], softmax reference and total over parts of contexts."""
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
    """[T, V dv], output of the delta rule, normed and gated."""
    router_logits: Array
    """f32 [T, E + 1], router logits, then the shared expert's gate."""
    ids: Array
    """u16 [T, A], top-k expert ids."""
    weights: Array
    """f32 [T, A], top-k weights."""
    shared_gate_up: Array
    """f32 [T, 2 Is], the shared expert's gate and up."""
    shared_inner: MatmulInput
    """[T, Is]."""
    shared_out: Array
    """f32 [T, D], output of the shared expert."""

    partial: Array
    """f32 [splits, H, d + 2], partial results of split-KV blocks: KV_SPLITS for each row, of at
    most SPLIT_KV_MAX_SEQS rows."""
    split_counters: Array
    """i32 [SPLIT_KV_MAX_SEQS, H, 8], 0 between kernels: split-KV blocks that have finished."""
    context_turns: Array
    """i32 [>= T, G], 0 between kernels: parts of contexts that prefill attention has added up."""
    router_barrier: Array
    """i32 [8, 288], 0 between kernels: logit keys and arrivals of router blocks."""
    chunk_scratch: Array | None
    """Scratch of the chunked delta rule on a GPU: u32, tiling.delta_chunk_words of them."""

    def first_rows(self, tokens: int) -> "Workspace":
        """The same arrays, cut to the first `tokens` rows."""
        shared = {name: getattr(self, name) for name in (*SHARED, "chunk_scratch")}
        rows = {
            f.name: getattr(self, f.name)[:tokens] for f in fields(self) if f.name not in shared
        }
        return Workspace(**rows, **shared)


def make_workspace(
    ops: Ops, config: ModelConfig, rows: int, piece_rows: int | None = None
) -> Workspace:
    """A workspace for steps of at most `rows` tokens.

    piece_rows: most rows of those that cut_workspace makes from it; None: `rows`
    Raises: OutOfMemory.
    """
    split_counters = ops.empty(_split_counters_shape(config), np.int32)
    router_barrier = ops.empty(ROUTER_BARRIER_SHAPE, np.int32)
    context_turns = ops.empty(_context_turns_shape(config, rows, piece_rows), np.int32)
    for counters in (split_counters, context_turns, router_barrier):
        ops.memset(counters, 0)
    arrays = {
        name: ops.empty((rows, *shape), dtype)
        for name, (shape, dtype) in _row_shapes(config).items()
    }
    inputs = {
        name: ops.empty_input(rows, width, eps)
        for name, (width, eps) in _matmul_inputs(config).items()
    }
    words = _chunk_scratch_words(config, rows, gpu=inputs["h"].hi_lo is not None)
    return Workspace(
        **arrays,
        **inputs,
        partial=ops.empty(_partial_shape(config, rows), np.float32),
        split_counters=split_counters,
        context_turns=context_turns,
        router_barrier=router_barrier,
        chunk_scratch=ops.empty((words,), np.uint32) if words else None,
    )


def cut_workspace(
    config: ModelConfig, rows: int, buffer: Array, counters: Workspace, kept: Mapping[str, Array]
) -> Workspace:
    """A workspace for steps of at most `rows` tokens, cut from `buffer`, u8 [>= cut_bytes].

    The arrays of attention, of the delta net and of the experts overlap: a layer uses one after the
    other.  `x` overlaps them, too: it is that of a pass.  So are the arrays `kept` of `h`.  What
    must be 0 between kernels, and `partial`, are those of `counters`.
    """
    gpu = counters.h.hi_lo is not None
    common = Scratch(buffer)
    made: dict[str, Any] = {}
    for number, names in enumerate(OVERLAPPING):
        scratch = common if number == 0 else common.rest()
        for name in names:
            if name in (shapes := _row_shapes(config)):
                shape, dtype = shapes[name]
                made[name] = scratch.empty((rows, *shape), dtype)
            elif name in (inputs := _matmul_inputs(config)):
                width, eps = inputs[name]
                arrays = {
                    field: None if name == "h" and field in kept else scratch.empty(*shape)
                    for field, shape in input_shapes(rows, width, eps is not None, gpu).items()
                }
                made[name] = MatmulInput(eps=eps or 0.0, **arrays)
            else:
                words = _chunk_scratch_words(config, rows, gpu)
                made[name] = scratch.empty((words,), np.uint32) if words else None
    assert rows <= counters.context_turns.shape[0], "make_workspace has enough turns for pieces"
    return Workspace(**made, **{name: getattr(counters, name) for name in SHARED})


def cut_bytes(config: ModelConfig, rows: int, gpu: bool, kept: Collection[str]) -> int:
    """Bytes of the buffer of cut_workspace."""
    sizes = [sum(_aligned(config, name, rows, gpu) for name in names) for names in OVERLAPPING]
    shapes = input_shapes(rows, config.hidden_size, True, gpu)
    return sizes[0] - sum(aligned_bytes(*shapes[name]) for name in kept) + max(sizes[1:])


def _aligned(config: ModelConfig, name: str, rows: int, gpu: bool) -> int:
    """Bytes of a field of a workspace in a Scratch."""
    row_shapes, inputs = _row_shapes(config), _matmul_inputs(config)
    if name in row_shapes:
        shape, dtype = row_shapes[name]
        return aligned_bytes((rows, *shape), dtype)
    if name in inputs:
        width, eps = inputs[name]
        shapes = input_shapes(rows, width, eps is not None, gpu).values()
        return sum(aligned_bytes(*shape) for shape in shapes)
    return aligned_bytes((_chunk_scratch_words(config, rows, gpu),), np.uint32)


def workspace_bytes(
    config: ModelConfig, rows: int, gpu: bool, piece_rows: int | None = None
) -> int:
    """Bytes that make_workspace allocates on a backend, each array rounded up as in a Scratch."""
    fields = sum(_aligned(config, name, rows, gpu) for names in OVERLAPPING for name in names)
    shared = (
        _partial_shape(config, rows), _split_counters_shape(config),
        _context_turns_shape(config, rows, piece_rows), ROUTER_BARRIER_SHAPE,
    )  # fmt: skip
    return fields + sum(aligned_bytes(shape, np.float32) for shape in shared)


def _partial_shape(config: ModelConfig, rows: int) -> tuple[int, ...]:
    return (KV_SPLITS * min(rows, SPLIT_KV_MAX_SEQS), config.num_heads, config.head_dim + 2)


def _chunk_scratch_words(config: ModelConfig, rows: int, gpu: bool) -> int:
    heads = config.key_heads, config.value_heads
    return delta_chunk_words(rows, *heads, config.key_dim, config.value_dim) if gpu else 0


def _split_counters_shape(config: ModelConfig) -> tuple[int, ...]:
    return (SPLIT_KV_MAX_SEQS, config.num_heads, 8)


def _context_turns_shape(config: ModelConfig, rows: int, piece_rows: int | None) -> tuple[int, ...]:
    return (max(rows, piece_rows or rows), config.num_kv_heads)


def _row_shapes(config: ModelConfig) -> dict[str, tuple[tuple[int, ...], npt.DTypeLike]]:
    """Shape of one row and dtype of each plain array, by name."""
    hidden = config.hidden_size
    heads = (config.num_heads, config.head_dim)
    values = (config.value_heads, config.value_dim)
    f32: dict[str, tuple[int, ...]] = {
        "x": (hidden,),
        "y": (hidden,),
        "qgkv": (2 * (config.num_heads + config.num_kv_heads) * config.head_dim,),
        "q": heads,
        "context_sums": (2, config.num_heads, 2),
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


def _matmul_inputs(config: ModelConfig) -> dict[str, tuple[int, float | None]]:
    """Width of each MatmulInput, and its eps if it is the output of a norm, by name."""
    return {
        "h": (config.hidden_size, config.eps),
        "attn_out": (config.num_heads * config.head_dim, None),
        "delta_out": (config.value_heads * config.value_dim, None),
        "shared_inner": (config.shared_intermediate_size, None),
    }
