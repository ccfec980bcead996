"""GpuOps: the list of operations on kernels.

Each method is one launch, or two; a kernel's signature is the contract at the top of its file in
ptx/ and is not repeated here.  Nothing is allocated and nothing waits inside an operation: what a
caller sees in host memory comes through `copy_out` alone, which counts its bytes.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from osmium.kernels.place import PLACE
from osmium.kernels.ptx import Kernel, kernel
from osmium.kernels.sample import ADVANCE, DRAW, PEAKS
from osmium.ops.fit import (
    MATVEC_NORM,
    MATVEC_ROWS,
    fits_experts,
    fits_matvec,
    need_bf16,
    one_each,
    rows_at_once,
)
from osmium.ops.machine import Machine
from osmium.ops.values import Array, ExpertArena, ExpertCache, ExpertPlan, Linear, Replies, Step

__all__ = ["GpuOps", "Machine"]

EMBED = kernel("embed_bf16")
TAKE = kernel("take_f32")
ADD = kernel("add_f32")
RMS_NORM = kernel("rms_norm_f32")
LINEAR = {name: kernel(f"{name}_linear_f32") for name in ("bf16", "int8", "int4")}
MATVEC = {name: kernel(f"{name}_matvec_f32") for name in ("bf16", "int8", "int4")}
ROPE_APPEND = kernel("rope_append_bf16")
ATTENTION = kernel("gqa_attention_bf16")
SPLIT = kernel("gqa_split_bf16")
COMBINE = kernel("gqa_combine_f32")
SIGMOID_GATE = kernel("sigmoid_gate_f32")
CONV = kernel("conv_silu_f32")
DELTA_GATES = kernel("delta_gates_f32")
CONV_GATES = kernel("conv_gates_f32")
DELTA_STEP = kernel("delta_step_f32")
DELTA_STEP_GATED = kernel("delta_step_gated_f32")
DELTA_CHUNK = kernel("delta_chunk_f32")
GATED_NORM = kernel("gated_norm_f32")
ROUTE = kernel("route_f32")
REPLAY = kernel("replay_u16")
FETCH = kernel("fetch_records")
EXPERT_UP = {
    16: kernel("bf16_expert_up_f32"),
    8: kernel("int8_expert_up_f32"),
    4: kernel("int4_expert_up_f32"),
}
EXPERT_DOWN = {
    16: kernel("bf16_expert_down_f32"),
    8: kernel("int8_expert_down_f32"),
    4: kernel("int4_expert_down_f32"),
}
EXPERTS_UP = kernel("int4_experts_up_f32")
EXPERTS_DOWN = kernel("int4_experts_down_f32")
GATED_UP = kernel("int8_gated_up_f32")
SILU_MUL = kernel("silu_mul_f32")
ADD_GATED = kernel("add_gated_f32")

FETCH_BLOCKS = 16
"""Thread blocks of a fetch, whatever it copies: sixteen move 50 GB/s, all that the link has, and
leave the other multiprocessors alone (tools/dma_bandwidth.py, H100, PCIe 5 x16, 2026-11)."""

CONV_GATES_MOST = 8
"""Sequences up to which conv_gates is one kernel, which reads the gates' matrix once a sequence."""


class GpuOps:
    """See ops.Ops for every method's formula, shapes and source."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.stream = machine.stream
        self.bytes_to_host = 0

    # -- memory ----------------------------------------------------------------------------------

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        return self.machine.empty(shape, dtype)

    def put(self, array: npt.NDArray[Any]) -> Array:
        made = self.machine.empty(array.shape, array.dtype)
        self.machine.copy_in(made, np.ascontiguousarray(array))
        return made

    def host(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        return self.machine.host(shape, dtype)

    def mailbox(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        return self.machine.mailbox(shape, dtype)

    def host_view(self, array: Array) -> npt.NDArray[Any]:
        return self.machine.host_view(array)

    def copy_in(self, out: Array, source: npt.NDArray[Any]) -> None:
        self.machine.copy_in(out, source)

    def copy_out(self, source: Array) -> npt.NDArray[Any]:
        self.bytes_to_host += source.nbytes
        return self.machine.copy_out(source)

    def copy(self, out: Array, source: Array) -> None:
        self.machine.copy(out, source)

    def fill(self, out: Array, byte: int) -> None:
        self.machine.fill(out, byte)

    def synchronize(self) -> None:
        self.machine.synchronize()

    @contextlib.contextmanager
    def beside(self) -> Iterator[None]:
        self.stream = self.machine.fork()
        try:
            yield
        finally:
            self.stream = self.machine.stream

    def join(self) -> None:
        self.machine.join()

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        return self.machine.record(run)

    # -- rows ------------------------------------------------------------------------------------

    def embed(self, out: Array, ids: Array, table: Array) -> None:
        tokens, dim = out.shape
        EMBED(self.stream, tokens, out, ids, table, dim)

    def take(self, out: Array, x: Array, rows: Array) -> None:
        count, dim = out.shape
        TAKE(self.stream, count, out, x, rows, dim)

    def add(self, out: Array, x: Array) -> None:
        ADD(self.stream, out, x, out.nbytes // 4)

    def rms_norm(self, out: Array, x: Array, w: Array, eps: float) -> None:
        rows, dim = x.shape
        RMS_NORM(self.stream, rows, out, x, w, dim, eps)

    def linear(self, out: Array, x: Array, w: Linear) -> None:
        if fits_matvec(w):
            self._matvec(out, None, x, None, w, 0, 0.0)
        else:
            self._linear(out, x, w, 0)

    def linear_add(self, out: Array, x: Array, w: Linear) -> None:
        if fits_matvec(w):
            self._matvec(out, None, x, None, w, 1, 0.0)
        else:
            self._linear(out, x, w, 1)

    def norm_linear(
        self, out: Array, h: Array, x: Array, norm: Array, w: Linear, eps: float
    ) -> None:
        if fits_matvec(w) and x.shape[0] <= MATVEC_ROWS and w.columns <= MATVEC_NORM:
            self._matvec(out, h, x, norm, w, 0, eps)
        else:
            self.rms_norm(h, x, norm, eps)
            self.linear(out, h, w)

    def _linear(self, out: Array, x: Array, w: Linear, add: int) -> None:
        sizes = (x.shape[0], w.rows, w.columns)
        if w.format == "bf16":
            LINEAR["bf16"](self.stream, out, x, w.data, *sizes, add)
        elif w.format == "int8":
            LINEAR["int8"](self.stream, out, x, w.data, w.scale, *sizes, add)
        else:
            LINEAR["int4"](self.stream, out, x, w.data, w.scale, *sizes, w.group, add)

    def _matvec(
        self,
        out: Array,
        h: Array | None,
        x: Array,
        norm: Array | None,
        w: Linear,
        add: int,
        eps: float,
    ) -> None:
        tokens = x.shape[0]
        rows = rows_at_once(tokens, w.columns)
        tiles = -(-w.rows // 16)
        fit = 3 if w.format == "int8" else 2  # blocks on a multiprocessor at once, by registers
        turns = -(-tiles // (fit * self.machine.multiprocessors))
        MATVEC[w.format](
            self.stream, -(-tiles // turns), out, 0 if h is None else h, x,
            0 if norm is None else norm, w.data, *([] if w.scale is None else [w.scale]),
            tokens, rows, w.rows, w.columns, add, eps,
        )  # fmt: skip

    # -- attention -------------------------------------------------------------------------------

    def rope_append(
        self,
        q: Array,
        k_pages: Array,
        v_pages: Array,
        qgkv: Array,
        norms: Array,
        frequencies: Array,
        step: Step,
        eps: float,
    ) -> None:
        need_bf16(k_pages)
        tokens, heads, dim = q.shape
        ROPE_APPEND(
            self.stream, tokens, q, k_pages, v_pages, qgkv, norms, frequencies,
            step.positions, step.sequence, step.pages,
            heads, k_pages.shape[2], dim, 2 * frequencies.shape[0],
            step.page, step.pages.shape[1], eps,
        )  # fmt: skip

    def attention(
        self, out: Array, q: Array, k_pages: Array, v_pages: Array, step: Step, scale: float
    ) -> None:
        need_bf16(k_pages)
        tokens, heads, dim = q.shape
        ATTENTION(
            self.stream, tokens, out, q, k_pages, v_pages,
            step.positions, step.sequence, step.pages,
            heads, k_pages.shape[2], dim, step.page, step.pages.shape[1], scale,
        )  # fmt: skip

    def gated_attention(
        self,
        out: Array,
        q: Array,
        k_pages: Array,
        v_pages: Array,
        qgkv: Array,
        step: Step,
        scale: float,
        partial: Array,
    ) -> None:
        tokens, heads, dim = q.shape
        if not one_each(step) or tokens > partial.shape[0]:
            self.attention(out, q, k_pages, v_pages, step, scale)
            self.sigmoid_gate(out, qgkv)
            return
        need_bf16(k_pages)
        splits = partial.shape[2]
        SPLIT(
            self.stream, tokens, partial, q, k_pages, v_pages,
            step.positions, step.sequence, step.pages,
            heads, k_pages.shape[2], dim, step.page, step.pages.shape[1], splits, scale,
        )  # fmt: skip
        COMBINE(
            self.stream, tokens, out, partial, qgkv, step.positions, heads, dim, splits,
            qgkv.shape[1],
        )  # fmt: skip

    def sigmoid_gate(self, out: Array, qgkv: Array) -> None:
        tokens, heads, dim = out.shape
        SIGMOID_GATE(self.stream, tokens, out, qgkv, heads, dim, qgkv.shape[1])

    # -- gated delta net ---------------------------------------------------------------------------

    def conv(self, out: Array, u: Array, w: Array, state: Array, step: Step) -> None:
        channels, stride = out.shape[1], u.shape[1]
        CONV(
            self.stream, step.sequences, out, u, w, state,
            step.starts, step.past, step.slots, channels, stride,
        )  # fmt: skip

    def delta_gates(
        self, decay: Array, beta: Array, ab: Array, a_log: Array, dt_bias: Array
    ) -> None:
        tokens, heads = decay.shape
        DELTA_GATES(self.stream, tokens, decay, beta, ab, a_log, dt_bias, heads)

    def conv_gates(
        self,
        out: Array,
        decay: Array,
        beta: Array,
        ab: Array,
        u: Array,
        h: Array,
        w: Array,
        state: Array,
        ab_matrix: Linear,
        a_log: Array,
        dt_bias: Array,
        step: Step,
    ) -> None:
        if not (
            one_each(step) and step.sequences <= CONV_GATES_MOST and ab_matrix.format == "bf16"
        ):
            self._linear(ab, h, ab_matrix, 0)  # a gate is an exponential: all of f32's bits
            self.conv(out, u, w, state, step)
            self.delta_gates(decay, beta, ab, a_log, dt_bias)
            return
        CONV_GATES(
            self.stream, step.sequences, out, decay, beta, u, h, w, state, ab_matrix.data,
            a_log, dt_bias, step.past, step.slots,
            out.shape[1], u.shape[1], decay.shape[1], ab_matrix.columns,
        )  # fmt: skip

    def delta_step(
        self, out: Array, qkv: Array, decay: Array, beta: Array, state: Array, step: Step
    ) -> None:
        self._delta(DELTA_STEP, out, qkv, decay, beta, state, step)

    def delta_step_gated(
        self,
        out: Array,
        qkv: Array,
        decay: Array,
        beta: Array,
        state: Array,
        z: Array,
        column: int,
        w: Array,
        eps: float,
        step: Step,
    ) -> None:
        if not one_each(step):
            self.delta_step(out, qkv, decay, beta, state, step)
            self.gated_norm(out, out, z, column, w, eps)
            return
        _, value_heads, dk, dv = state.shape
        key_heads = (qkv.shape[1] - value_heads * dv) // (2 * dk)
        DELTA_STEP_GATED(
            self.stream, step.sequences, out, qkv, decay, beta, state, z, w, step.past, step.slots,
            key_heads, value_heads, dk, dv, z.shape[1], column, eps,
        )  # fmt: skip

    def delta_chunk(
        self, out: Array, qkv: Array, decay: Array, beta: Array, state: Array, step: Step
    ) -> None:
        self._delta(DELTA_CHUNK, out, qkv, decay, beta, state, step)

    def _delta(
        self, kernel: Kernel, out: Array, qkv: Array, decay: Array, beta: Array, state: Array,
        step: Step,
    ) -> None:  # fmt: skip
        _, value_heads, dk, dv = state.shape
        key_heads = (qkv.shape[1] - value_heads * dv) // (2 * dk)
        kernel(
            self.stream, step.sequences, out, qkv, decay, beta, state,
            step.starts, step.past, step.slots, key_heads, value_heads, dk, dv,
        )  # fmt: skip

    def gated_norm(self, out: Array, x: Array, z: Array, column: int, w: Array, eps: float) -> None:
        tokens, heads, dim = x.shape
        GATED_NORM(self.stream, tokens, out, x, z, w, heads, dim, z.shape[1], column, eps)

    # -- experts -----------------------------------------------------------------------------------

    def route(
        self, ids: Array, weights: Array, logits: Array, experts: int, counters: Array
    ) -> None:
        tokens, top_k = ids.shape
        ROUTE(self.stream, tokens, ids, weights, logits, counters, experts, top_k, logits.shape[1])

    def replay(self, ids: Array, trace: Array, layer: int, positions: Array) -> None:
        tokens, top_k = ids.shape
        count, layers, _ = trace.shape
        REPLAY(self.stream, tokens, ids, trace, positions, count, layers, layer, top_k)

    def place(self, plan: ExpertPlan, cache: ExpertCache, layer: int, ids: Array) -> None:
        PLACE(
            self.stream, plan.count, plan.expert, plan.slot, plan.fetch, plan.uses, plan.pairs,
            cache.slot_of[layer], cache.expert_in[layer], cache.heat[layer], cache.stamp[layer],
            cache.step, cache.counters, ids, ids.nbytes // 2, cache.experts, cache.capacity,
            plan.expert.shape[0], int(layer == 0), 1 / cache.half_life,
        )  # fmt: skip

    def fetch(self, cache: ExpertCache, plan: ExpertPlan, arena: ExpertArena, layer: int) -> None:
        FETCH(
            self.stream, FETCH_BLOCKS, cache.slots[layer], arena.records[layer],
            plan.expert, plan.slot, plan.fetch, plan.uses, plan.count, cache.counters,
            plan.expert.shape[0], cache.record.nbytes,
        )  # fmt: skip

    def expert_up(
        self,
        inner: Array,
        x: Array,
        ids: Array,
        plan: ExpertPlan | None,
        cache: ExpertCache,
        layer: int,
        part: Literal["all", "there", "rest"],
    ) -> None:
        record, (tokens, top_k) = cache.record, ids.shape
        slots = cache.slots[layer]
        if fits_experts(record, tokens) and record.up_group == 128:
            tiles = top_k * record.inner // 8
            turns = -(-tiles // (2 * self.machine.multiprocessors))
            EXPERTS_UP(
                self.stream, -(-tiles // turns), tokens, inner, x, ids,
                0 if plan is None else plan.pairs, slots, record.hidden, record.inner, top_k,
                record.nbytes, record.up_scale, ("all", "there", "rest").index(part),
            )  # fmt: skip
            return
        if part == "there":
            return
        more: tuple[int, ...] = ()
        if record.bits != 16:
            more = (record.up_scale,) if record.bits == 8 else (record.up_scale, record.up_group)
        EXPERT_UP[record.bits](
            self.stream, tokens, inner, x, ids, slots, cache.slot_of[layer], record.hidden,
            record.inner, top_k, record.nbytes, *more,
        )  # fmt: skip

    def expert_down(
        self,
        out: Array,
        inner: Array,
        ids: Array,
        weights: Array,
        plan: ExpertPlan | None,
        cache: ExpertCache,
        layer: int,
        shared: Array,
        scores: Array,
        column: int,
        y: Array,
    ) -> None:
        record, (tokens, top_k) = cache.record, ids.shape
        slots = cache.slots[layer]
        if fits_experts(record, tokens) and record.down_group == 128 and record.hidden % 16 == 0:
            tiles = record.hidden // 16
            turns = -(-tiles // (2 * self.machine.multiprocessors))
            EXPERTS_DOWN(
                self.stream, -(-tiles // turns), tokens, out, inner, ids,
                0 if plan is None else plan.pairs, weights, slots, shared, scores, record.hidden,
                record.inner, top_k, record.nbytes, record.down, record.down_scale, column,
                scores.shape[1],
            )  # fmt: skip
            return
        more: tuple[int, ...] = (record.down,)
        if record.bits == 8:
            more += (record.down_scale,)
        elif record.bits == 4:
            more += (record.down_scale, record.down_group)
        EXPERT_DOWN[record.bits](
            self.stream, tokens, y, inner, ids, weights, slots, cache.slot_of[layer],
            record.hidden, record.inner, top_k, record.nbytes, *more,
        )  # fmt: skip
        self.add_gated(y, shared, scores, column)
        self.add(out, y)

    def gated_up(self, inner: Array, x: Array, w: Linear, both: Array) -> None:
        tokens, size = inner.shape
        if w.format != "int8" or tokens > MATVEC_ROWS or w.columns % 64 or size % 8:
            self.linear(both, x, w)
            self.silu_mul(inner, both)
            return
        rows = rows_at_once(tokens, w.columns)
        turns = -(-(size // 8) // (3 * self.machine.multiprocessors))
        GATED_UP(
            self.stream, -(-(size // 8) // turns), inner, x, w.data, w.scale, tokens, rows, size,
            w.columns,
        )  # fmt: skip

    def silu_mul(self, out: Array, x: Array) -> None:
        tokens, inner = out.shape
        SILU_MUL(self.stream, tokens, out, x, inner)

    def add_gated(self, out: Array, x: Array, gate: Array, column: int) -> None:
        tokens, dim = out.shape
        ADD_GATED(self.stream, tokens, out, x, gate, dim, gate.shape[1], column)

    # -- replies -----------------------------------------------------------------------------------

    def sample(self, logits: Array, replies: Replies) -> None:
        rows, vocab = logits.shape
        slices = replies.best.shape[1]
        PEAKS(self.stream, rows, replies.best, replies.where, logits, vocab, slices)
        DRAW(
            self.stream, rows, replies.token, logits, replies.best, replies.where,
            replies.settings, replies.chance, replies.turn, vocab, slices, replies.ring,
        )  # fmt: skip

    def advance(self, step: Step, replies: Replies) -> None:
        ADVANCE(
            self.stream, step.ids, step.positions, step.past, step.slots, step.pages,
            replies.token, replies.left, replies.heed, replies.eos, replies.turn, replies.mail,
            step.tokens, step.pages.shape[1], replies.eos.shape[0], replies.ring,
            replies.nobody, replies.nowhere,
        )  # fmt: skip
