"""The operations on experts, on kernels: routing, the cache, what is fetched, and both halves."""

from typing import Literal

from osmium.kernels.assign_slots import ASSIGN_SLOTS
from osmium.kernels.ptx import kernel
from osmium.ops.gpu_rows import GpuRows
from osmium.ops.tiling import (
    EXPERT_TILES,
    MATVEC_MAX_TOKENS,
    fits_shared,
    supports_fused_experts,
    supports_matvec,
    tile_expert_down,
    tile_matrix,
)
from osmium.ops.types import (
    FETCH_BLOCKS,
    FETCH_WARPS,
    Array,
    ExpertCache,
    HostExperts,
    LinearWeight,
    MatmulInput,
    PrefetchState,
    SharedExpert,
    SlotAssignment,
)

__all__ = ["GpuExperts"]

ROUTER_TOPK = kernel("router_topk_f32")
TOPK_SOFTMAX = kernel("topk_softmax_f32")
REPLAY_ROUTING = kernel("replay_routing_u16")
FETCH_EXPERTS = kernel("fetch_experts")
PREFETCH_EXPERTS = kernel("prefetch_experts")
MOE_UP_GENERIC = {
    16: kernel("bf16_moe_up_generic_f32"),
    8: kernel("int8_moe_up_generic_f32"),
    4: kernel("int4_moe_up_generic_f32"),
}
MOE_DOWN_GENERIC = {
    16: kernel("bf16_moe_down_generic_f32"),
    8: kernel("int8_moe_down_generic_f32"),
    4: kernel("int4_moe_down_generic_f32"),
}
MOE_UP_FUSED = kernel("int4_moe_up_fused_f32")
MOE_DOWN_FUSED = kernel("int4_moe_down_fused_f32")
GATE_UP_SILU = kernel("int8_gate_up_silu_f32")
SILU_AND_MUL = kernel("silu_and_mul_f32")
ADD_SIGMOID_GATED = kernel("add_sigmoid_gated_f32")

ROUTER_EXPERTS = 256
"""Experts up to which the router picks, too: eight a lane."""

EXPERT_SUBSETS = ("all", "there", "rest")
"""Of the experts, by the number that kernels know them by."""


class GpuExperts(GpuRows):
    """See ops.Ops for every method's formula, shapes and source."""

    # -- experts -----------------------------------------------------------------------------------

    def router(
        self,
        ids: Array,
        weights: Array,
        scores: Array,
        h: MatmulInput,
        w: LinearWeight,
        experts: int,
        counters: Array,
        arrived: Array,
        trace: Array | None,
        layer: int,
        positions: Array,
        guess: PrefetchState | None = None,
        after: LinearWeight | None = None,
        predicted: Array | None = None,
    ) -> None:
        (tokens, top_k), form = ids.shape, (w.format, w.out_features, w.in_features)
        few = tokens <= MATVEC_MAX_TOKENS and experts <= ROUTER_EXPERTS
        alike = after is None or (after.format, after.out_features, after.in_features) == form
        if not (few and alike and w.format == "bf16" and supports_matvec(w) and self.fits(h)):
            self._plain_router(
                ids, weights, scores, h, w, experts, counters, trace, layer, positions
            )
            if guess is not None and after is not None:
                self._plain_router(
                    guess.ids[:tokens], guess.weights[:tokens], guess.scores[:tokens], h, after,
                    experts, guess.counters, predicted, layer + 1, positions,
                )  # fmt: skip
            return
        sets, second, matrix = 1, (0, 0, 0, 0, 0), 0
        if guess is not None and after is not None:
            second = guess.ids, guess.weights, guess.scores, guess.counters, guess.arrived
            sets, matrix = 2, after.data
        told = predicted if trace is None else trace
        count, layers = (0, 0) if told is None else told.shape[:2]
        assert predicted is None or predicted.shape[:2] == (count, layers), "one N, L for both"
        some = self.share(w)
        ROUTER_TOPK(
            self.stream, some.blocks, sets, ids, weights, scores, counters, arrived, *second,
            h.hi_lo, h.square_sums or 0, w.data, matrix, 0 if trace is None else trace,
            0 if predicted is None else predicted, positions, tokens, some.rows(tokens),
            w.out_features,
            w.in_features, experts, top_k, count, layers, layer, h.eps,
        )  # fmt: skip

    def _plain_router(
        self,
        ids: Array,
        weights: Array,
        scores: Array,
        h: MatmulInput,
        w: LinearWeight,
        experts: int,
        counters: Array,
        trace: Array | None,
        layer: int,
        positions: Array,
    ) -> None:
        """What `router` does with one matrix, of any form, and for any number of tokens."""
        self.linear(scores, h, w)
        self.topk_softmax(ids, weights, scores, experts, counters)
        if trace is not None:
            self.replay_routing(ids, trace, layer, positions)

    def topk_softmax(
        self, ids: Array, weights: Array, logits: Array, experts: int, counters: Array
    ) -> None:
        tokens, top_k = ids.shape
        TOPK_SOFTMAX(
            self.stream, tokens, ids, weights, logits, counters, experts, top_k, logits.shape[1]
        )

    def replay_routing(self, ids: Array, trace: Array, layer: int, positions: Array) -> None:
        tokens, top_k = ids.shape
        count, layers, _ = trace.shape
        REPLAY_ROUTING(self.stream, tokens, ids, trace, positions, count, layers, layer, top_k)

    def assign_slots(
        self,
        plan: SlotAssignment,
        cache: ExpertCache,
        layer: int,
        ids: Array,
        guess: PrefetchState | None = None,
    ) -> None:
        fading, on = cache.fading, layer + 1
        last = on == cache.expert_to_slot.shape[0]
        after: tuple[Array | int, ...] = (0,) * 5
        guessed: tuple[Array | int, ...] = (0,) * 7
        blocks, capacity, first = 1, 0, 0
        if guess is not None:
            guessed = (guess.ids, guess.weights, guess.expert, guess.slot, guess.state,
            guess.segments_done,
                       guess.start_signal)  # fmt: skip
            if not last:
                blocks, capacity = 2, cache.slots[on].shape[0]
                first = sum(cache.slots[i].shape[0] for i in range(on))
                after = (cache.expert_to_slot[on], cache.slot_to_expert[on], cache.short_count[on],
                         cache.long_count[on], cache.last_used[on])  # fmt: skip
        ASSIGN_SLOTS(
            self.stream, blocks, plan.count, plan.expert, plan.slot, plan.fetch_flags, plan.uses,
            plan.pair_slots, plan.fetch_progress, cache.expert_to_slot[layer],
            cache.slot_to_expert[layer],
            cache.short_count[layer], cache.long_count[layer], cache.last_used[layer], cache.step,
            cache.counters, ids, *after, *guessed, ids.nbytes // 2, cache.experts,
            cache.slots[layer].shape[0], capacity, first, plan.expert.shape[0], layer, int(last),
            int(guess is not None), FETCH_WARPS, fading.prior_steps, 1 / fading.half_life,
            1 / fading.long_half_life, fading.long_scale,
        )  # fmt: skip

    def fetch_experts(
        self,
        cache: ExpertCache,
        plan: SlotAssignment,
        arena: HostExperts,
        layer: int,
        l2_prefetch: Array | None = None,
        guess: PrefetchState | None = None,
    ) -> None:
        near = 0 if l2_prefetch is None else min(l2_prefetch.nbytes, self.machine.l2 // 2)
        guessed: tuple[Array | int, ...] = (0, 0, 0)
        if guess is not None:
            last = layer + 1 == cache.expert_to_slot.shape[0]
            guessed = (
                guess.state[layer],
                guess.segments_done[layer],
                0 if last else guess.start_signal[layer + 1],
            )
        FETCH_EXPERTS(
            self.stream, FETCH_BLOCKS, cache.slots[layer], arena.records[layer],
            plan.expert, plan.slot, plan.fetch_flags, plan.uses, plan.count, cache.counters,
            plan.fetch_progress, *guessed, 0 if l2_prefetch is None else l2_prefetch,
            plan.expert.shape[0],
            cache.record.nbytes, cache.record.down, near,
        )  # fmt: skip

    def prefetch_experts(
        self, cache: ExpertCache, guess: PrefetchState, arena: HostExperts
    ) -> None:
        layers, experts, _ = arena.records.shape
        PREFETCH_EXPERTS(
            self.stream, FETCH_BLOCKS, cache.slots[0], arena.records, guess.expert, guess.slot,
            guess.state, guess.segments_done, guess.start_signal, cache.step, cache.record.nbytes,
            layers, experts,
        )  # fmt: skip

    def expert_up(
        self,
        inner: MatmulInput,
        shared_inner: MatmulInput,
        h: MatmulInput,
        ids: Array,
        plan: SlotAssignment | None,
        cache: ExpertCache,
        layer: int,
        part: Literal["all", "there", "rest"],
        shared: SharedExpert,
        both: Array,
    ) -> None:
        record, (tokens, top_k) = cache.record, ids.shape
        if not supports_fused_experts(record, tokens):
            if part != "there":
                self._plain_up(inner, h, ids, cache, layer)
            if part != "rest":
                self.gate_up_silu(shared_inner, h, shared.up, both)
            return
        wide, size, part_of = 0, shared.up.out_features // 2, 0.0
        if part != "rest":
            if fits_shared(shared):
                # a tile of INT8 is twice the bytes of one of INT4
                part_of = 2 * size / (2 * size + top_k * record.inner)
                wide = tile_matrix(self.machine, size, record.hidden, 4, False, part_of).blocks
            else:
                self.gate_up_silu(shared_inner, h, shared.up, both)
        some = tile_matrix(
            self.machine, top_k * record.inner, record.hidden, 4, True, 1 - part_of, EXPERT_TILES
        )
        MOE_UP_FUSED(
            self.stream, some.blocks + wide, tokens, inner.hi_lo, shared_inner.hi_lo, h.hi_lo,
            h.square_sums or 0, ids, *_placed(plan, part), cache.slots[layer],
            *((shared.up.data, shared.up.scale) if wide else (0, 0)),
            record.hidden, record.inner, size, top_k, record.nbytes, record.up_scale,
            EXPERT_SUBSETS.index(part), wide, some.tiles, FETCH_WARPS, h.eps,
        )  # fmt: skip

    def _plain_up(
        self, inner: MatmulInput, h: MatmulInput, ids: Array, cache: ExpertCache, layer: int
    ) -> None:
        record, (tokens, top_k) = cache.record, ids.shape
        more: tuple[int, ...] = ()
        if record.bits != 16:
            more = (record.up_scale,) if record.bits == 8 else (record.up_scale, record.up_group)
        MOE_UP_GENERIC[record.bits](
            self.stream, tokens, inner.f32, self.merge_hi_lo(h), ids, cache.slots[layer],
            cache.expert_to_slot[layer], record.hidden, record.inner, top_k, record.nbytes, *more,
        )  # fmt: skip

    def expert_down(
        self,
        x: Array,
        inner: MatmulInput,
        shared_inner: MatmulInput,
        ids: Array,
        weights: Array,
        plan: SlotAssignment | None,
        cache: ExpertCache,
        layer: int,
        part: Literal["all", "there", "rest"],
        shared: SharedExpert,
        scores: Array,
        said: Array,
        y: Array,
        h: MatmulInput,
        norm: Array,
    ) -> None:
        record, (tokens, top_k) = cache.record, ids.shape
        if not supports_fused_experts(record, tokens):
            if part == "there":
                return
            self._plain_down(y, inner, ids, weights, cache, layer)
            self.linear(said, shared_inner, shared.down)
            self.add_sigmoid_gated(y, said, scores, shared.column)
            self.add(x, y)
            self.rms_norm(h, x, norm)
            return
        wide = fits_shared(shared)
        if not wide and part != "rest":
            self.linear(said, shared_inner, shared.down)
        own = shared.down.in_features if wide else 0
        some, ring = tile_expert_down(self.machine, record, tokens, top_k, own)
        MOE_DOWN_FUSED(
            self.stream, some.blocks, tokens, x, inner.hi_lo, ids,
            *_placed(plan, part), weights, cache.slots[layer], shared_inner.hi_lo,
            *((shared.down.data, shared.down.scale, 0) if wide else (0, 0, said)),
            scores, y, h.hi_lo, norm, h.square_sums, record.hidden, record.inner, own, top_k,
            record.nbytes, record.down, record.down_scale, shared.column, scores.shape[1],
            some.tiles, EXPERT_SUBSETS.index(part), FETCH_WARPS, ring,
        )  # fmt: skip

    def _plain_down(
        self,
        y: Array,
        inner: MatmulInput,
        ids: Array,
        weights: Array,
        cache: ExpertCache,
        layer: int,
    ) -> None:
        record, (tokens, top_k) = cache.record, ids.shape
        more: tuple[int, ...] = (record.down,)
        if record.bits == 8:
            more += (record.down_scale,)
        elif record.bits == 4:
            more += (record.down_scale, record.down_group)
        MOE_DOWN_GENERIC[record.bits](
            self.stream, tokens, y, inner.f32, ids, weights, cache.slots[layer],
            cache.expert_to_slot[layer], record.hidden, record.inner, top_k, record.nbytes, *more,
        )  # fmt: skip

    def gate_up_silu(
        self, inner: MatmulInput, a: MatmulInput, w: LinearWeight, both: Array
    ) -> None:
        tokens, size = inner.f32.shape
        if w.format != "int8" or w.in_features % 64 or size % 4 or not self.fits(a):
            self.linear(both, a, w)
            self.silu_and_mul(inner.f32, both)
            self.prepare_input(inner)
            return
        some = tile_matrix(self.machine, size, w.in_features, 4, False)
        GATE_UP_SILU(
            self.stream, some.blocks, inner.hi_lo, a.hi_lo, a.square_sums or 0, w.data, w.scale,
            tokens,
            some.rows(tokens), size, w.in_features, some.tiles, a.eps,
        )  # fmt: skip

    def silu_and_mul(self, out: Array, x: Array) -> None:
        tokens, inner = out.shape
        SILU_AND_MUL(self.stream, tokens, out, x, inner)

    def add_sigmoid_gated(self, out: Array, x: Array, gate: Array, column: int) -> None:
        tokens, dim = out.shape
        ADD_SIGMOID_GATED(self.stream, tokens, out, x, gate, dim, gate.shape[1], column)


def _placed(plan: SlotAssignment | None, part: str) -> tuple[Array | int, Array | int]:
    """Where experts are, and of those that are being fetched what says that they have arrived."""
    if plan is None:
        return 0, 0
    return plan.pair_slots, plan.fetch_progress if part == "rest" else 0
