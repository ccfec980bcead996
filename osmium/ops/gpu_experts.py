"""The expert operations of GpuOps: routing, slot assignment, fetch, prefetch, and the experts."""

from typing import Literal

import numpy as np

from osmium.kernels.assign_slots import ASSIGN_SLOTS
from osmium.kernels.ptx import kernel
from osmium.ops.gpu_grouped import GpuGrouped
from osmium.ops.grouped import GroupedExperts
from osmium.ops.tiling import (
    MATVEC_MAX_TOKENS,
    MAX_EXPERT_TILES,
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
SILU_AND_MUL_DIGITS = kernel("silu_and_mul_digits_f32")
ADD_SIGMOID_GATED = kernel("add_sigmoid_gated_f32")

ROUTER_EXPERTS = 256
"""Most experts of the fused router kernel: eight per lane.  More use two kernels."""

EXPERT_SUBSETS = ("all", "hits", "rest")
"""A subset's index is the kernels' `subset` parameter."""


class GpuExperts(GpuGrouped):
    """See ops.Ops for every method's formula, shapes and source."""

    # -- experts -----------------------------------------------------------------------------------

    def router(
        self,
        ids: Array,
        weights: Array,
        router_logits: Array,
        h: MatmulInput,
        w: LinearWeight,
        num_experts: int,
        counters: Array,
        barrier: Array,
        trace: Array | None,
        layer: int,
        positions: Array,
        prefetch: PrefetchState | None = None,
        next_router: LinearWeight | None = None,
        predicted_trace: Array | None = None,
    ) -> None:
        (tokens, top_k), shape = ids.shape, (w.format, w.out_features, w.in_features)
        is_decode_sized = (
            not self.is_prefill and tokens <= MATVEC_MAX_TOKENS and num_experts <= ROUTER_EXPERTS
        )
        same_shape = (
            next_router is None
            or (next_router.format, next_router.out_features, next_router.in_features) == shape
        )
        if not (
            is_decode_sized
            and same_shape
            and w.format == "bf16"
            and supports_matvec(w)
            and self.fits_norm(h)
        ):
            self._generic_router(
                ids, weights, router_logits, h, w, num_experts, counters, trace, layer, positions
            )
            if prefetch is not None and next_router is not None:
                self._generic_router(
                    prefetch.ids[:tokens], prefetch.weights[:tokens],
                    prefetch.router_logits[:tokens], h, next_router, num_experts, prefetch.counters,
                    predicted_trace, layer + 1, positions,
                )  # fmt: skip
            return
        num_routers, next_outputs, next_data = 1, (0, 0, 0, 0, 0), 0
        if prefetch is not None and next_router is not None:
            next_outputs = (
                prefetch.ids,
                prefetch.weights,
                prefetch.router_logits,
                prefetch.counters,
                prefetch.barrier,
            )
            num_routers, next_data = 2, next_router.data
        any_trace = predicted_trace if trace is None else trace
        trace_tokens, layers = (0, 0) if any_trace is None else any_trace.shape[:2]
        assert predicted_trace is None or predicted_trace.shape[:2] == (trace_tokens, layers), (
            "one N, L for both"
        )
        tiling = self.tile(w)
        ROUTER_TOPK(
            self.stream, tiling.blocks, num_routers, ids, weights, router_logits, counters, barrier,
            *next_outputs, h.hi_lo, h.square_sums or 0, w.data, next_data,
            0 if trace is None else trace, 0 if predicted_trace is None else predicted_trace,
            positions, tokens, tiling.tokens_per_block(tokens), w.out_features, w.in_features,
            num_experts, top_k, trace_tokens, layers, layer, h.eps,
        )  # fmt: skip

    def _generic_router(
        self,
        ids: Array,
        weights: Array,
        router_logits: Array,
        h: MatmulInput,
        w: LinearWeight,
        num_experts: int,
        counters: Array,
        trace: Array | None,
        layer: int,
        positions: Array,
    ) -> None:
        """`router` for one matrix, of any format and any number of tokens."""
        self.linear(router_logits, h, w)
        self.topk_softmax(ids, weights, router_logits, num_experts, counters)
        if trace is not None:
            self.replay_routing(ids, trace, layer, positions)

    def topk_softmax(
        self, ids: Array, weights: Array, logits: Array, num_experts: int, counters: Array
    ) -> None:
        tokens, top_k = ids.shape
        TOPK_SOFTMAX(
            self.stream, tokens, ids, weights, logits, counters, num_experts, top_k, logits.shape[1]
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
        prefetch: PrefetchState | None = None,
    ) -> None:
        decay, next_layer = cache.decay, layer + 1
        is_last = next_layer == cache.expert_to_slot.shape[0]
        next_tables: tuple[Array | int, ...] = (0,) * 5
        prefetch_arrays: tuple[Array | int, ...] = (0,) * 7
        blocks, capacity, first_slot = 1, 0, 0
        if prefetch is not None:
            p = prefetch
            prefetch_arrays = (
                p.ids, p.weights, p.expert, p.slot, p.state, p.segments_done, p.start_signal,
            )  # fmt: skip
            if not is_last:
                blocks, capacity = 2, cache.slots[next_layer].shape[0]
                first_slot = sum(cache.slots[i].shape[0] for i in range(next_layer))
                next_tables = (
                    cache.expert_to_slot[next_layer], cache.slot_to_expert[next_layer],
                    cache.short_count[next_layer], cache.long_count[next_layer],
                    cache.last_used[next_layer],
                )  # fmt: skip
        ASSIGN_SLOTS(
            self.stream, blocks, plan.count, plan.expert, plan.slot, plan.fetch_flags, plan.uses,
            plan.pair_slots, plan.fetch_progress, cache.expert_to_slot[layer],
            cache.slot_to_expert[layer], cache.short_count[layer], cache.long_count[layer],
            cache.last_used[layer], cache.step, cache.counters, ids, *next_tables, *prefetch_arrays,
            ids.nbytes // 2, cache.num_experts, cache.slots[layer].shape[0], capacity, first_slot,
            plan.expert.shape[0], layer, int(is_last), int(prefetch is not None), FETCH_WARPS,
            decay.prior_steps, 1 / decay.half_life, 1 / decay.long_half_life, decay.long_scale,
        )  # fmt: skip

    def fetch_experts(
        self,
        cache: ExpertCache,
        plan: SlotAssignment,
        host_experts: HostExperts,
        layer: int,
        l2_prefetch: Array | None = None,
        prefetch: PrefetchState | None = None,
    ) -> None:
        l2_bytes = 0 if l2_prefetch is None else min(l2_prefetch.nbytes, self.runtime.l2 // 2)
        prefetch_arrays: tuple[Array | int, ...] = (0, 0, 0)
        if prefetch is not None:
            is_last = layer + 1 == cache.expert_to_slot.shape[0]
            prefetch_arrays = (
                prefetch.state[layer],
                prefetch.segments_done[layer],
                0 if is_last else prefetch.start_signal[layer + 1],
            )
        FETCH_EXPERTS(
            self.stream, FETCH_BLOCKS, cache.slots[layer], host_experts.packed[layer], plan.expert,
            plan.slot, plan.fetch_flags, plan.uses, plan.count, cache.counters, plan.fetch_progress,
            *prefetch_arrays, 0 if l2_prefetch is None else l2_prefetch.view(np.uint8),
            plan.expert.shape[0],
            cache.layout.nbytes, cache.layout.down, l2_bytes,
        )  # fmt: skip

    def prefetch_experts(
        self, cache: ExpertCache, prefetch: PrefetchState, host_experts: HostExperts
    ) -> None:
        layers, experts, _ = host_experts.packed.shape
        PREFETCH_EXPERTS(
            self.stream, FETCH_BLOCKS, cache.slots[0], host_experts.packed, prefetch.expert,
            prefetch.slot, prefetch.state, prefetch.segments_done, prefetch.start_signal,
            cache.step, cache.layout.nbytes, layers, experts,
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
        subset: Literal["all", "hits", "rest"],
        shared: SharedExpert,
        gate_up: Array,
        grouped: GroupedExperts | None = None,
    ) -> None:
        layout, (tokens, top_k) = cache.layout, ids.shape
        if not supports_fused_experts(layout, tokens):
            if subset != "hits":
                if grouped is not None and tokens > MATVEC_MAX_TOKENS:
                    self.grouped_up(grouped, inner, h, ids, cache, layer)
                else:
                    self._generic_up(inner, h, ids, cache, layer)
            if subset != "rest":
                self.gate_up_silu(shared_inner, h, shared, gate_up)
            return
        shared_blocks, shared_size, shared_fraction = 0, shared.up.out_features // 2, 0.0
        if subset != "rest":
            if fits_shared(shared):
                # an INT8 tile has twice the bytes of an INT4 tile
                shared_fraction = 2 * shared_size / (2 * shared_size + top_k * layout.inner)
                shared_blocks = tile_matrix(
                    self.runtime, shared_size, layout.hidden, 4, False, shared_fraction
                ).blocks
            else:
                self.gate_up_silu(shared_inner, h, shared, gate_up)
        tiling = tile_matrix(
            self.runtime,
            top_k * layout.inner,
            layout.hidden,
            4,
            True,
            1 - shared_fraction,
            MAX_EXPERT_TILES,
        )
        MOE_UP_FUSED(
            self.stream, tiling.blocks + shared_blocks, tokens, inner.hi_lo, shared_inner.hi_lo,
            h.hi_lo, h.square_sums or 0, ids, *_placed(plan, subset), cache.slots[layer],
            *((shared.up.data, shared.up.scale) if shared_blocks else (0, 0)), layout.hidden,
            layout.inner, shared_size, top_k, layout.nbytes, layout.up_scale,
            EXPERT_SUBSETS.index(subset), shared_blocks, tiling.tiles, FETCH_WARPS, h.eps,
        )  # fmt: skip

    def _generic_up(
        self, inner: MatmulInput, h: MatmulInput, ids: Array, cache: ExpertCache, layer: int
    ) -> None:
        layout, (tokens, top_k) = cache.layout, ids.shape
        offsets: tuple[int, ...] = ()
        if layout.bits != 16:
            offsets = (layout.up_scale,) if layout.bits == 8 else (layout.up_scale, layout.up_group)
        MOE_UP_GENERIC[layout.bits](
            self.stream, tokens, inner.f32, self.merge_hi_lo(h), ids, cache.slots[layer],
            cache.expert_to_slot[layer], layout.hidden, layout.inner, top_k, layout.nbytes,
            *offsets,
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
        subset: Literal["all", "hits", "rest"],
        shared: SharedExpert,
        router_logits: Array,
        shared_out: Array,
        y: Array,
        h: MatmulInput,
        norm: Array,
        grouped: GroupedExperts | None = None,
    ) -> None:
        layout, (tokens, top_k) = cache.layout, ids.shape
        if not supports_fused_experts(layout, tokens):
            if subset == "hits":
                return
            self.linear(shared_out, shared_inner, shared.down)
            if grouped is not None and tokens > MATVEC_MAX_TOKENS:
                self.grouped_down(grouped, inner, ids, cache, layer)
                self.gather_add(
                    x, grouped.pair_out[: tokens * top_k], weights, grouped.groups.position, 0,
                    shared_out, router_logits, shared.gate_column,
                )  # fmt: skip
            else:
                self._generic_down(y, inner, ids, weights, cache, layer)
                self.add_sigmoid_gated(y, shared_out, router_logits, shared.gate_column)
                self.add(x, y)
            self.rms_norm(h, x, norm)
            return
        is_fused = fits_shared(shared)
        if not is_fused and subset != "rest":
            self.linear(shared_out, shared_inner, shared.down)
        shared_size = shared.down.in_features if is_fused else 0
        tiling, stage_bytes = tile_expert_down(self.runtime, layout, tokens, top_k, shared_size)
        partial_out: Array | int = 0
        if subset != "all":
            assert plan is not None and plan.partial_out is not None, "subsets have partial sums"
            partial_out = plan.partial_out[:tokens]
        MOE_DOWN_FUSED(
            self.stream, tiling.blocks, tokens, x, inner.hi_lo, ids, *_placed(plan, subset),
            weights, cache.slots[layer], shared_inner.hi_lo,
            *((shared.down.data, shared.down.scale, 0) if is_fused else (0, 0, shared_out)),
            router_logits, partial_out, h.hi_lo, norm, h.square_sums, layout.hidden, layout.inner,
            shared_size, top_k, layout.nbytes, layout.down, layout.down_scale, shared.gate_column,
            router_logits.shape[1], tiling.tiles, EXPERT_SUBSETS.index(subset), FETCH_WARPS,
            stage_bytes,
        )  # fmt: skip

    def _generic_down(
        self,
        y: Array,
        inner: MatmulInput,
        ids: Array,
        weights: Array,
        cache: ExpertCache,
        layer: int,
    ) -> None:
        layout, (tokens, top_k) = cache.layout, ids.shape
        offsets: tuple[int, ...] = (layout.down,)
        if layout.bits == 8:
            offsets += (layout.down_scale,)
        elif layout.bits == 4:
            offsets += (layout.down_scale, layout.down_group)
        MOE_DOWN_GENERIC[layout.bits](
            self.stream, tokens, y, inner.f32, ids, weights, cache.slots[layer],
            cache.expert_to_slot[layer], layout.hidden, layout.inner, top_k, layout.nbytes,
            *offsets,
        )  # fmt: skip

    def gate_up_silu(
        self, inner: MatmulInput, a: MatmulInput, shared: SharedExpert, gate_up: Array
    ) -> None:
        (tokens, shared_size), w = inner.f32.shape, shared.up
        fits = w.format == "int8" and w.in_features % 64 == 0 and shared_size % 4 == 0
        if self.uses_digits(inner, shared.down):
            self.linear(gate_up, a, w)
            SILU_AND_MUL_DIGITS(
                self.stream, tokens, inner.digits, inner.units, gate_up, shared_size
            )
            return
        if self.uses_gemm(a, w) or not fits or not self.fits_norm(a):
            self.linear(gate_up, a, w)
            self.silu_and_mul(inner.f32, gate_up)
            self.prepare_input_of(shared.down, inner)
            return
        tiling = tile_matrix(self.runtime, shared_size, w.in_features, 4, False)
        GATE_UP_SILU(
            self.stream, tiling.blocks, inner.hi_lo, a.hi_lo, a.square_sums or 0, w.data, w.scale,
            tokens, tiling.tokens_per_block(tokens), shared_size, w.in_features, tiling.tiles,
            a.eps,
        )  # fmt: skip

    def silu_and_mul(self, out: Array, x: Array) -> None:
        tokens, inner = out.shape
        SILU_AND_MUL(self.stream, tokens, out, x, inner)

    def add_sigmoid_gated(self, out: Array, x: Array, gate: Array, column: int) -> None:
        tokens, dim = out.shape
        ADD_SIGMOID_GATED(self.stream, tokens, out, x, gate, dim, gate.shape[1], column)


def _placed(plan: SlotAssignment | None, subset: str) -> tuple[Array | int, Array | int]:
    """The kernels' arguments for the experts' slots and for the fetch's progress; 0 for absent."""
    if plan is None:
        return 0, 0
    return plan.pair_slots, plan.fetch_progress if subset == "rest" else 0
