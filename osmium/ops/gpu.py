"""GpuOps: the list of operations on kernels.

Each method is one launch, or two; a kernel's signature is the contract at the top of its file in
ptx/ and is not repeated here.  Nothing is allocated and nothing waits inside an operation: what a
caller sees in host memory comes through `copy_out` alone, which counts its bytes.
"""

from typing import Literal

from osmium.kernels.place import PLACE
from osmium.kernels.ptx import Kernel, kernel
from osmium.kernels.sample import ADVANCE, DRAW
from osmium.kernels.weigh import PEAKS, WEIGH
from osmium.ops.fit import (
    EXPERT_TILES,
    KEPT,
    MATVEC_ROWS,
    SPLIT_ROWS,
    fits_experts,
    fits_matvec,
    fits_shared,
    kept,
    one_each,
    share,
    share_context,
    share_down,
)
from osmium.ops.gpu_rows import GpuRows
from osmium.ops.machine import Machine
from osmium.ops.values import (
    Array,
    DeltaRoom,
    DeltaWeights,
    ExpertArena,
    ExpertCache,
    ExpertPlan,
    KeysValues,
    Linear,
    Replies,
    Rows,
    SharedExpert,
    Step,
)

__all__ = ["GpuOps", "Machine"]

ROPE_APPEND = {name: kernel(f"rope_append_{name}") for name in KEPT}
ATTENTION = {name: kernel(f"gqa_attention_{name}") for name in KEPT}
SPLIT = {name: kernel(f"gqa_split_{name}") for name in KEPT}
COMBINE = kernel("gqa_combine_f32")
SIGMOID_GATE = kernel("sigmoid_gate_f32")
CONV = kernel("conv_silu_f32")
DELTA_GATES = kernel("delta_gates_f32")
DELTA_STEP = kernel("delta_step_f32")
DELTA_TOKEN = kernel("delta_token_f32")
DELTA_CHUNK = kernel("delta_chunk_f32")
GATED_NORM = kernel("gated_norm_f32")
ROUTER = kernel("router_f32")
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

FETCH_WARPS = 8 * FETCH_BLOCKS
"""What each of a plan's words of arrival comes to."""

ROUTER_EXPERTS = 256
"""Experts up to which the router picks, too: eight a lane."""

PARTS = ("all", "there", "rest")
"""Of the experts, by the number that kernels know them by."""


class GpuOps(GpuRows):
    """See ops.Ops for every method's formula, shapes and source."""

    # -- attention -------------------------------------------------------------------------------

    def rope_append(
        self,
        q: Array,
        kv: KeysValues,
        qgkv: Array,
        norms: Array,
        frequencies: Array,
        step: Step,
        eps: float,
    ) -> None:
        tokens, heads, dim = q.shape
        ROPE_APPEND[kept(kv)](
            self.stream, tokens, q, *_arrays(kv), qgkv, norms, frequencies,
            step.positions, step.sequence, step.pages,
            heads, kv.k.shape[2], dim, 2 * frequencies.shape[0],
            step.page, step.pages.shape[1], eps,
        )  # fmt: skip

    def attention(self, out: Array, q: Array, kv: KeysValues, step: Step, scale: float) -> None:
        tokens, heads, dim = q.shape
        ATTENTION[kept(kv)](
            self.stream, tokens, out, q, *_arrays(kv), step.positions, step.sequence, step.pages,
            heads, kv.k.shape[2], dim, step.page, step.pages.shape[1], scale,
        )  # fmt: skip

    def gated_attention(
        self,
        x: Array,
        h: Rows,
        norm: Array,
        q: Array,
        kv: KeysValues,
        qgkv: Array,
        out: Linear,
        read: Rows,
        partial: Array,
        step: Step,
        scale: float,
    ) -> None:
        tokens, heads, dim = q.shape
        if not one_each(step) or tokens > min(SPLIT_ROWS, partial.shape[0]):
            seen = read.f32.reshape(tokens, heads, dim)
            self.attention(seen, q, kv, step, scale)
            self.sigmoid_gate(seen, qgkv)
            self.settle(read)
            self.linear_norm(x, read, out, h, norm)
            return
        groups = kv.k.shape[2]
        splits = share_context(self.machine, partial.shape[0] // tokens, tokens * groups)
        SPLIT[kept(kv)](
            self.stream, tokens, partial, q, *_arrays(kv),
            step.positions, step.sequence, step.pages,
            heads, groups, dim, step.page, step.pages.shape[1], splits, scale,
        )  # fmt: skip
        # 128 values of a head are a group of digits, which their block can make for all
        digits = dim % 128 == 0 and out.format == "int4" and fits_matvec(out)
        COMBINE(
            self.stream, tokens, read.split, partial, qgkv, step.positions, heads, dim, splits,
            qgkv.shape[1], int(digits),
        )  # fmt: skip
        if digits:
            self.matvec(x, read, out, h, norm, made=True)
        else:
            self.linear_norm(x, read, out, h, norm)

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

    def delta_step(
        self, out: Array, qkv: Array, decay: Array, beta: Array, state: Array, step: Step
    ) -> None:
        self._delta(DELTA_STEP, out, qkv, decay, beta, state, step)

    def delta_net(
        self,
        x: Array,
        h: Rows,
        norm: Array,
        u: Array,
        weights: DeltaWeights,
        inputs: Array,
        state: Array,
        room: DeltaRoom,
        step: Step,
        chunks: bool,
    ) -> None:
        w, qkv, read, (_, value_heads, dk, dv) = weights, room.qkv, room.read, state.shape
        if not one_each(step) or w.ab.format != "bf16":
            heads = read.f32.reshape(read.f32.shape[0], value_heads, dv)
            self.plain_linear(room.ab, self.joined(h), w.ab, 0)
            self.conv(qkv, u, w.conv, inputs, step)
            self.delta_gates(room.decay, room.beta, room.ab, w.a_log, w.dt_bias)
            rule = self.delta_chunk if chunks else self.delta_step
            rule(heads, qkv, room.decay, room.beta, state, step)
            self.gated_norm(heads, heads, u, qkv.shape[1], w.norm, w.eps)
            self.settle(read)
            self.linear_norm(x, read, w.out, h, norm)
            return
        key_heads = (qkv.shape[1] - value_heads * dv) // (2 * dk)
        # a head of 128 values is a group of digits, which its block can make for all
        digits = dv == 128 and w.out.format == "int4" and fits_matvec(w.out)
        DELTA_TOKEN(
            self.stream, step.sequences, read.split, u, h.split, h.squares or 0, w.conv, inputs,
            w.ab.data, w.a_log, w.dt_bias, state, w.norm, step.past, step.slots, key_heads,
            value_heads, dk, dv, u.shape[1], w.ab.columns, int(digits), h.eps, w.eps,
        )  # fmt: skip
        if digits:
            self.matvec(x, read, w.out, h, norm, made=True)
        else:
            self.linear_norm(x, read, w.out, h, norm)

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

    def router(
        self,
        ids: Array,
        weights: Array,
        scores: Array,
        h: Rows,
        w: Linear,
        experts: int,
        counters: Array,
        arrived: Array,
        trace: Array | None,
        layer: int,
        positions: Array,
    ) -> None:
        tokens, top_k = ids.shape
        few = tokens <= MATVEC_ROWS and experts <= ROUTER_EXPERTS
        if not (few and w.format == "bf16" and fits_matvec(w) and self.fits(h)):
            self.linear(scores, h, w)
            self.route(ids, weights, scores, experts, counters)
            if trace is not None:
                self.replay(ids, trace, layer, positions)
            return
        count, layers = (0, 0) if trace is None else trace.shape[:2]
        some = self.share(w)
        ROUTER(
            self.stream, some.blocks, ids, weights, scores, counters, arrived,
            h.split, h.squares or 0, w.data, 0 if trace is None else trace, positions,
            tokens, some.rows(tokens), w.rows, w.columns, some.tiles, experts, top_k,
            count, layers, layer, h.eps,
        )  # fmt: skip

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
        fading = cache.fading
        PLACE(
            self.stream, plan.count, plan.expert, plan.slot, plan.fetch, plan.uses, plan.pairs,
            plan.arrived, cache.slot_of[layer], cache.expert_in[layer], cache.heat[layer],
            cache.long_heat[layer], cache.stamp[layer], cache.step, cache.counters, ids,
            ids.nbytes // 2, cache.experts, cache.slots[layer].shape[0], plan.expert.shape[0],
            int(layer == 0), fading.earlier, 1 / fading.half_life, 1 / fading.long_half_life,
            fading.share,
        )  # fmt: skip

    def fetch(
        self,
        cache: ExpertCache,
        plan: ExpertPlan,
        arena: ExpertArena,
        layer: int,
        ahead: Array | None = None,
    ) -> None:
        near = 0 if ahead is None else min(ahead.nbytes, self.machine.l2 // 2)
        FETCH(
            self.stream, FETCH_BLOCKS, cache.slots[layer], arena.records[layer],
            plan.expert, plan.slot, plan.fetch, plan.uses, plan.count, cache.counters,
            plan.arrived, 0 if ahead is None else ahead,
            plan.expert.shape[0], cache.record.nbytes, cache.record.down, near,
        )  # fmt: skip

    def expert_up(
        self,
        inner: Rows,
        shared_inner: Rows,
        h: Rows,
        ids: Array,
        plan: ExpertPlan | None,
        cache: ExpertCache,
        layer: int,
        part: Literal["all", "there", "rest"],
        shared: SharedExpert,
        both: Array,
    ) -> None:
        record, (tokens, top_k) = cache.record, ids.shape
        if not fits_experts(record, tokens):
            if part != "there":
                self._plain_up(inner, h, ids, cache, layer)
            if part != "rest":
                self.gated_up(shared_inner, h, shared.up, both)
            return
        wide, size, part_of = 0, shared.up.rows // 2, 0.0
        if part != "rest":
            if fits_shared(shared):
                # a tile of INT8 is twice the bytes of one of INT4
                part_of = 2 * size / (2 * size + top_k * record.inner)
                wide = share(self.machine, size, record.hidden, 4, False, part_of).blocks
            else:
                self.gated_up(shared_inner, h, shared.up, both)
        some = share(
            self.machine, top_k * record.inner, record.hidden, 4, True, 1 - part_of, EXPERT_TILES
        )
        EXPERTS_UP(
            self.stream, some.blocks + wide, tokens, inner.split, shared_inner.split, h.split,
            h.squares or 0, ids, *_placed(plan, part), cache.slots[layer],
            *((shared.up.data, shared.up.scale) if wide else (0, 0)),
            record.hidden, record.inner, size, top_k, record.nbytes, record.up_scale,
            PARTS.index(part), wide, some.tiles, FETCH_WARPS, h.eps,
        )  # fmt: skip

    def _plain_up(self, inner: Rows, h: Rows, ids: Array, cache: ExpertCache, layer: int) -> None:
        record, (tokens, top_k) = cache.record, ids.shape
        more: tuple[int, ...] = ()
        if record.bits != 16:
            more = (record.up_scale,) if record.bits == 8 else (record.up_scale, record.up_group)
        EXPERT_UP[record.bits](
            self.stream, tokens, inner.f32, self.joined(h), ids, cache.slots[layer],
            cache.slot_of[layer], record.hidden, record.inner, top_k, record.nbytes, *more,
        )  # fmt: skip

    def expert_down(
        self,
        x: Array,
        inner: Rows,
        shared_inner: Rows,
        ids: Array,
        weights: Array,
        plan: ExpertPlan | None,
        cache: ExpertCache,
        layer: int,
        part: Literal["all", "there", "rest"],
        shared: SharedExpert,
        scores: Array,
        said: Array,
        y: Array,
        h: Rows,
        norm: Array,
    ) -> None:
        record, (tokens, top_k) = cache.record, ids.shape
        if not fits_experts(record, tokens):
            if part == "there":
                return
            self._plain_down(y, inner, ids, weights, cache, layer)
            self.linear(said, shared_inner, shared.down)
            self.add_gated(y, said, scores, shared.column)
            self.add(x, y)
            self.norm(h, x, norm)
            return
        wide = fits_shared(shared)
        if not wide and part != "rest":
            self.linear(said, shared_inner, shared.down)
        own = shared.down.columns if wide else 0
        some, ring = share_down(self.machine, record, tokens, top_k, own)
        EXPERTS_DOWN(
            self.stream, some.blocks, tokens, x, inner.split, ids,
            *_placed(plan, part), weights, cache.slots[layer], shared_inner.split,
            *((shared.down.data, shared.down.scale, 0) if wide else (0, 0, said)),
            scores, y, h.split, norm, h.squares, record.hidden, record.inner, own, top_k,
            record.nbytes, record.down, record.down_scale, shared.column, scores.shape[1],
            some.tiles, PARTS.index(part), FETCH_WARPS, ring,
        )  # fmt: skip

    def _plain_down(
        self, y: Array, inner: Rows, ids: Array, weights: Array, cache: ExpertCache, layer: int
    ) -> None:
        record, (tokens, top_k) = cache.record, ids.shape
        more: tuple[int, ...] = (record.down,)
        if record.bits == 8:
            more += (record.down_scale,)
        elif record.bits == 4:
            more += (record.down_scale, record.down_group)
        EXPERT_DOWN[record.bits](
            self.stream, tokens, y, inner.f32, ids, weights, cache.slots[layer],
            cache.slot_of[layer], record.hidden, record.inner, top_k, record.nbytes, *more,
        )  # fmt: skip

    def gated_up(self, inner: Rows, a: Rows, w: Linear, both: Array) -> None:
        tokens, size = inner.f32.shape
        if w.format != "int8" or w.columns % 64 or size % 4 or not self.fits(a):
            self.linear(both, a, w)
            self.silu_mul(inner.f32, both)
            self.settle(inner)
            return
        some = share(self.machine, size, w.columns, 4, False)
        GATED_UP(
            self.stream, some.blocks, inner.split, a.split, a.squares or 0, w.data, w.scale, tokens,
            some.rows(tokens), size, w.columns, some.tiles, a.eps,
        )  # fmt: skip

    def silu_mul(self, out: Array, x: Array) -> None:
        tokens, inner = out.shape
        SILU_MUL(self.stream, tokens, out, x, inner)

    def add_gated(self, out: Array, x: Array, gate: Array, column: int) -> None:
        tokens, dim = out.shape
        ADD_GATED(self.stream, tokens, out, x, gate, dim, gate.shape[1], column)

    # -- replies -----------------------------------------------------------------------------------

    def sample(self, logits: Array, replies: Replies) -> None:
        r, (rows, vocab) = replies, logits.shape
        slices = r.best.shape[1]
        PEAKS(self.stream, rows, r.best, r.where, r.counts, r.masses, logits, vocab, slices)
        WEIGH(
            self.stream, rows, r.token, r.counts, r.masses, r.ends, r.order, logits, r.best,
            r.where, r.settings, vocab, slices,
        )  # fmt: skip
        DRAW(
            self.stream, rows, r.token, logits, r.best, r.settings, r.chance, r.turn, r.counts,
            r.masses, r.ends, r.order, vocab, slices, r.ring,
        )  # fmt: skip

    def advance(self, step: Step, replies: Replies) -> None:
        ADVANCE(
            self.stream, step.ids, step.positions, step.past, step.slots, step.pages,
            replies.token, replies.left, replies.heed, replies.eos, replies.turn, replies.mail,
            step.tokens, step.pages.shape[1], replies.eos.shape[0], replies.ring,
            replies.nobody, replies.nowhere,
        )  # fmt: skip


def _placed(plan: ExpertPlan | None, part: str) -> tuple[Array | int, Array | int]:
    """Where experts are, and of those that are being fetched what says that they have arrived."""
    if plan is None:
        return 0, 0
    return plan.pairs, plan.arrived if part == "rest" else 0


def _arrays(kv: KeysValues) -> tuple[Array, ...]:
    """As kernels take them."""
    return (kv.k, kv.v) if kv.k_scales is None else (kv.k, kv.v, kv.k_scales, kv.v_scales)
