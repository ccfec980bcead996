"""Parts of the longer formulas, in NumPy.  Letters are in types.py."""

from typing import cast

import numpy as np
import numpy.typing as npt

from osmium.ops.types import Array, SlotAssignment, StepInputs
from osmium.quant import int4, int8
from osmium.quant.expert_layout import ExpertLayout
from osmium.quant.floats import bf16_from_f32, f32_from_bf16, f32_from_e4m3, quantize_e4m3_rows

__all__ = [
    "CHUNK", "F32", "delta_chunk", "expert_matrices", "gather_kv", "heads_of", "matrix",
    "normed", "rope", "sequences_of", "sigmoid", "silu", "slots_of",
    "stateful_sequences", "unit", "write_kv",
]  # fmt: skip

F32 = npt.NDArray[np.float32]

CHUNK = 64
"""Tokens per chunk of the delta rule."""


def sigmoid(x: F32) -> F32:
    return cast(F32, 0.5 * (1 + np.tanh(0.5 * x)))


def silu(x: F32) -> F32:
    return x * sigmoid(x)


def unit(x: F32) -> F32:
    """x / ||x||, with 1e-6 inside the root, along the last axis."""
    return cast(F32, x / np.sqrt((x * x).sum(axis=-1, keepdims=True) + np.float32(1e-6)))


def normed(x: F32, eps: float) -> F32:
    """x / sqrt(mean(x^2) + eps) along the last axis."""
    mean = np.einsum("...i,...i->...", x, x)[..., None] / np.float32(x.shape[-1])
    return cast(F32, x / np.sqrt(mean + np.float32(eps)))


def matrix(format: str, data: Array, scale: Array | None) -> F32:  # noqa: A002
    """A stored matrix (types.LinearWeight) as f32 [N, K]."""
    if format == "bf16":
        return f32_from_bf16(data)
    assert scale is not None, f"an {format} matrix has scales"
    return int8.dequantize(data, scale) if format == "int8" else int4.dequantize(data, scale)


def expert_matrices(layout: ExpertLayout, data: npt.NDArray[np.uint8]) -> tuple[F32, F32]:
    """Gate and up f32 [2I, D], and down f32 [D, I], of a packed expert u8 [nbytes]."""
    up, down = (2 * layout.inner, layout.hidden), (layout.hidden, layout.inner)
    matrices = []
    for (n, k), start, scales in ((up, 0, layout.up_scale), (down, layout.down, layout.down_scale)):
        data_bytes = data[start : start + n * k * layout.bits // 8]
        if layout.bits == 16:
            matrices.append(matrix("bf16", data_bytes.view(np.uint16).reshape(n, k), None))
        elif layout.bits == 8:
            scale = data[scales : scales + 4 * n].view(np.float32)
            matrices.append(matrix("int8", data_bytes.view(np.int8).reshape(n, k), scale))
        else:
            groups = k // (
                layout.up_group if k == layout.hidden and start == 0 else layout.down_group
            )
            scale16 = data[scales : scales + 2 * n * groups].view(np.float16).reshape(n, groups)
            matrices.append(matrix("int4", data_bytes.reshape(n, k // 2), scale16))
    return matrices[0], matrices[1]


def slots_of(ids: Array, plan: SlotAssignment | None) -> Array:
    """i32 [T * A], the slot of each routed pair; ~slot if this call fetches its expert."""
    if plan is None:
        return ids.reshape(-1).astype(np.int32)
    return plan.pair_slots.reshape(-1)[: ids.size]


def rope(x: F32, cos: F32, sin: F32) -> F32:
    """Rotate the pairs (j, j + rotary / 2) of x [T, heads, d]; cos, sin [T, 1, rotary / 2]."""
    half = cos.shape[-1]
    a, b = x[..., :half], x[..., half : 2 * half]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin, x[..., 2 * half :]], axis=-1)


def write_kv(pages: Array, scales: Array | None, page: Array, row: Array, x: F32) -> None:
    """pages[page[t], row[t]] = x[t], rounded to the dtype of pages [pages, page_size, G, d].

    page, row i32 [T]    x f32 [T, G, d]
    """
    if scales is not None:
        pages[page, row], scales[page, row] = quantize_e4m3_rows(x)
    else:
        pages[page, row] = bf16_from_f32(x) if pages.dtype == np.uint16 else x


def gather_kv(pages: Array, scales: Array | None, table: Array, length: int) -> F32:
    """f32 [G, length, d]: the first `length` positions of a sequence with page table `table`."""
    rows = pages[table].reshape(-1, *pages.shape[2:])[:length].swapaxes(0, 1)
    if scales is not None:
        row_scales = scales[table].reshape(-1, pages.shape[2])[:length].swapaxes(0, 1)
        return cast(F32, f32_from_e4m3(rows) * row_scales.astype(np.float32)[..., None])
    return f32_from_bf16(rows) if pages.dtype == np.uint16 else cast(F32, rows)


def sequences_of(step: StepInputs) -> list[tuple[int, slice, int]]:
    """(state slot, rows, context length) of each sequence of a step."""
    edges = [int(x) for x in step.query_start_loc[: step.sequences + 1]]
    return [
        (int(step.state_slots[s]), slice(edges[s], edges[s + 1]), int(step.context_lens[s]))
        for s in range(step.sequences)
    ]


def stateful_sequences(out: F32, step: StepInputs) -> list[tuple[int, slice, int]]:
    """`sequences_of` without those that have no state slot; their rows of `out` become zeros."""
    sequences = sequences_of(step)
    for slot, rows, _ in sequences:
        if slot < 0:
            out[rows] = 0
    return [sequence for sequence in sequences if sequence[0] >= 0]


def heads_of(qkv: F32, state: tuple[int, ...]) -> tuple[F32, F32, F32]:
    """q, k [t, V, dk], normalised, q also scaled by dk^-0.5, and v [t, V, dv]."""
    _, value_heads, dk, dv = state
    key_width = (qkv.shape[1] - value_heads * dv) // 2
    key_heads = key_width // dk
    t = len(qkv)
    q = unit(qkv[:, :key_width].reshape(t, key_heads, dk)) * np.float32(dk**-0.5)
    k = unit(qkv[:, key_width : 2 * key_width].reshape(t, key_heads, dk))
    v = qkv[:, 2 * key_width :].reshape(t, value_heads, dv)
    repeats = value_heads // key_heads
    return np.repeat(q, repeats, axis=1), np.repeat(k, repeats, axis=1), v


def delta_chunk(q: F32, k: F32, v: F32, g: F32, beta: F32, state: F32) -> tuple[F32, F32]:
    """One chunk of the gated delta rule: out [V, c, dv] and the state after it [V, dk, dv].

    q, k [V, c, dk], v [V, c, dv], g, beta [V, c], state [V, dk, dv].
    """
    size = q.shape[1]
    total = np.cumsum(g, axis=1, dtype=np.float64)  # differences of large sums: f32 would cancel
    lower = np.tri(size, dtype=bool)
    log_decay = np.where(lower, total[:, :, None] - total[:, None], -np.inf)
    decay = np.exp(log_decay).astype(np.float32)  # D
    a = np.tril(np.matmul(beta[..., None] * k, k.swapaxes(1, 2)) * decay, -1)
    decay_from_start = np.exp(total).astype(np.float32)[..., None]
    u_and_w = np.concatenate([v, decay_from_start * k], axis=2) * beta[..., None]
    for i in range(1, size):  # forward substitution: row i needs the rows above it
        u_and_w[:, i] -= np.matmul(a[:, i, None, :i], u_and_w[:, :i])[:, 0]
    u, w = u_and_w[..., : v.shape[2]], u_and_w[..., v.shape[2] :]
    new = u - np.matmul(w, state)
    out = np.matmul(q * decay_from_start, state)
    out += np.matmul(np.matmul(q, k.swapaxes(1, 2)) * decay, new)
    decay_to_end = decay[:, -1, :, None]  # exp(G_last - G)
    state = state * decay_from_start[:, -1:]
    state += np.matmul((k * decay_to_end).swapaxes(1, 2), new)
    return out, state
