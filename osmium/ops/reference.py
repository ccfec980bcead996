"""ReferenceOps: the list of operations in NumPy.  The specification, and the CPU backend.

Each method is its formula from ops/__init__.py.  The only optimisation is a cache of dequantised
f32 matrices, within a budget of bytes.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt

from osmium.ops import sampling, slot_assignment
from osmium.ops.controls import SamplingControls
from osmium.ops.formulas import (
    CHUNK,
    F32,
    delta_chunk,
    expert_matrices,
    gather_kv,
    heads_of,
    matrix,
    normed,
    rope,
    sequences_of,
    sigmoid,
    silu,
    slots_of,
    stateful_sequences,
    write_kv,
)  # fmt: skip
from osmium.ops.grouped import GroupedExperts
from osmium.ops.reference_grouped import ReferenceGroupedOps
from osmium.ops.reference_quant import ReferenceQuantOps
from osmium.ops.types import (
    FETCH_BLOCKS,
    FETCH_SEGMENT_BYTES,
    PREFETCH_STOP,
    Array,
    AttentionWeights,
    AttentionWorkspace,
    DecodeState,
    DeltaNetWorkspace,
    DeltaWeights,
    ExpertCache,
    Fill,
    HostExperts,
    LinearWeight,
    MatmulInput,
    PagedKV,
    PrefetchState,
    SharedExpert,
    SlotAssignment,
    StepInputs,
)  # fmt: skip
from osmium.quant.floats import f32_from_bf16

__all__ = ["ReferenceOps"]


class ReferenceOps(ReferenceQuantOps, ReferenceGroupedOps):
    """See ops.Ops for every method's formula, shapes and source."""

    def __init__(self, cache_bytes: int = 4 << 30) -> None:
        """Keep at most `cache_bytes` of f32 matrices; others are dequantised at each use."""
        self.d2h_bytes = 0
        self._cache_bytes_left = cache_bytes
        self._matrices: dict[int, tuple[LinearWeight, F32]] = {}
        self._experts: dict[int, tuple[Array, F32, F32]] = {}
        """Keyed by the slot's address; holding the slot keeps the address from being reused."""

    # -- memory ----------------------------------------------------------------------------------

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        return np.empty(shape, dtype)

    def to_device(self, array: npt.NDArray[Any]) -> Array:
        return array  # a memory-mapped file serves as it is

    def empty_mapped(
        self, shape: tuple[int, ...], dtype: npt.DTypeLike, fill: Fill | None = None
    ) -> Array:
        made = np.empty(shape, dtype)
        if fill is not None:
            fill(made.reshape(-1).view(np.uint8))
        return made

    def zeros_mapped(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        return np.zeros(shape, dtype)

    def host_view(self, array: Array) -> npt.NDArray[Any]:
        return cast(npt.NDArray[Any], array)

    def release(self, array: Array) -> None:
        pass

    def empty_input(self, tokens: int, width: int, eps: float | None = None) -> MatmulInput:
        return MatmulInput(self.empty((tokens, width), np.float32), eps=eps or 0.0)

    def copy_h2d(self, out: Array, source: npt.NDArray[Any]) -> None:
        assert out.shape == source.shape, f"copy_h2d of {source.shape} into {out.shape}"
        out[...] = source

    def copy_d2h(self, source: Array) -> npt.NDArray[Any]:
        self.d2h_bytes += source.nbytes
        return np.array(source)

    def copy(self, out: Array, source: Array) -> None:
        out[...] = source
        self._drop_cached(out)

    def memset(self, out: Array, byte: int) -> None:
        out.view(np.uint8)[...] = byte

    def synchronize(self) -> None:
        pass

    @contextlib.contextmanager
    def on_side_stream(self, prefetch: bool = False) -> Iterator[None]:
        yield

    def join_side_stream(self, prefetch: bool = False) -> None:
        pass

    def capture_graph(self, run: Callable[[], None]) -> Callable[[], None]:
        return run

    # -- rows ------------------------------------------------------------------------------------

    def embed(self, out: Array, ids: Array, table: Array) -> None:
        out[...] = f32_from_bf16(table[ids])

    def gather_rows(self, out: Array, x: Array, rows: Array) -> None:
        out[...] = x[rows]

    def add(self, out: Array, x: Array) -> None:
        out += x

    def prepare_input(self, a: MatmulInput) -> None:
        pass

    def rms_norm(self, h: MatmulInput, x: Array, w: Array) -> None:
        np.multiply(normed(x, h.eps), 1 + w, out=h.f32)

    def linear(self, out: Array, a: MatmulInput, w: LinearWeight) -> None:
        np.matmul(a.f32, self._f32(w).T, out=out)

    def linear_add_rms_norm(
        self, x: Array, a: MatmulInput, w: LinearWeight, h: MatmulInput, norm: Array
    ) -> None:
        x += np.matmul(a.f32, self._f32(w).T)
        self.rms_norm(h, x, norm)

    def _f32(self, w: LinearWeight) -> F32:
        cached = self._matrices.get(id(w))
        if cached is not None:
            return cached[1]
        matrix_f32 = matrix(w.format, w.data, w.scale)
        if matrix_f32.nbytes <= self._cache_bytes_left:
            self._cache_bytes_left -= matrix_f32.nbytes
            self._matrices[id(w)] = w, matrix_f32  # holding w keeps its id from being used again
        return matrix_f32

    # -- attention -------------------------------------------------------------------------------

    def rope_append(
        self,
        q: Array, kv: PagedKV, qgkv: Array, norms: Array, frequencies: Array, step: StepInputs,
        eps: float,
    ) -> None:  # fmt: skip
        tokens, heads, size = q.shape
        gated = qgkv[:, : 2 * heads * size].reshape(tokens, heads, 2, size)
        new = qgkv[:, 2 * heads * size :].reshape(tokens, 2, kv.k.shape[2], size)
        angle = step.positions[:, None, None].astype(np.float32) * frequencies  # [T, 1, R/2]
        cos, sin = np.cos(angle), np.sin(angle)
        q[...] = rope(normed(gated[:, :, 0], eps) * (1 + norms[0]), cos, sin)
        k = rope(normed(new[:, 0], eps) * (1 + norms[1]), cos, sin)
        page = step.page_table[step.sequence_ids, step.positions // step.page_size]
        row = step.positions % step.page_size
        write_kv(kv.k, kv.k_scales, page, row, k)
        write_kv(kv.v, kv.v_scales, page, row, new[:, 1])

    def attention(
        self, out: Array, q: Array, kv: PagedKV, step: StepInputs, scale: float,
        context_turns: Array, context_sums: Array,
    ) -> None:  # fmt: skip
        _, heads, size = q.shape
        groups = kv.k.shape[2]
        for s in range(step.sequences):
            rows = slice(int(step.query_start_loc[s]), int(step.query_start_loc[s + 1]))
            positions = step.positions[rows]
            length = int(positions[-1]) + 1
            pages = step.page_table[s, : -(-length // step.page_size)]
            k = gather_kv(kv.k, kv.k_scales, pages, length)  # [G, n, d]
            v = gather_kv(kv.v, kv.v_scales, pages, length)
            queries = q[rows].reshape(-1, groups, heads // groups, size).transpose(1, 2, 0, 3)
            keys = k[:, None].swapaxes(-1, -2)
            scores = np.matmul(queries, keys) * np.float32(scale)  # [G, r, t, n]
            if len(positions) > 1:
                scores[..., np.arange(length) > positions[:, None]] = -np.inf
            scores -= scores.max(axis=-1, keepdims=True)
            np.exp(scores, out=scores)
            scores /= scores.sum(axis=-1, keepdims=True)
            values = np.matmul(scores, v[:, None])  # [G, r, t, d]
            out[rows] = values.transpose(2, 0, 1, 3).reshape(-1, heads, size)

    def gated_attention(
        self, x: Array, h: MatmulInput, norm: Array, qgkv: Array, weights: AttentionWeights,
        kv: PagedKV, workspace: AttentionWorkspace, step: StepInputs,
    ) -> None:  # fmt: skip
        w, heads = weights, workspace.attn_out.f32.reshape(workspace.q.shape)
        self.rope_append(workspace.q, kv, qgkv, w.norms, w.frequencies, step, w.eps)
        turns, sums = workspace.context_turns, workspace.context_sums
        self.attention(heads, workspace.q, kv, step, w.scale, turns, sums)
        self.sigmoid_gate(heads, qgkv)
        self.linear_add_rms_norm(x, workspace.attn_out, w.out, h, norm)

    def sigmoid_gate(self, out: Array, qgkv: Array) -> None:
        tokens, heads, size = out.shape
        out *= sigmoid(qgkv[:, : 2 * heads * size].reshape(tokens, heads, 2, size)[:, :, 1])

    # -- gated delta net ---------------------------------------------------------------------------

    def causal_conv1d(self, out: Array, u: Array, w: Array, state: Array, step: StepInputs) -> None:
        channels = out.shape[1]
        for slot, rows, past in sequences_of(step):
            recent = (past + np.arange(4)) % 4  # entries of positions past - 4 to past - 1
            reads = past > 0 and slot >= 0
            before = state[slot].T[recent] if reads else np.zeros((4, channels), np.float32)
            window = np.concatenate([before, u[rows, :channels]])  # [4 + t, C]
            t = len(window) - 4
            out[rows] = silu(sum(w[:, i] * window[i + 1 : i + 1 + t] for i in range(4)))
            if slot >= 0:
                state[slot][:, (past + t + np.arange(4)) % 4] = window[-4:].T

    def delta_gates(
        self, decay: Array, beta: Array, ab: Array, a_log: Array, dt_bias: Array
    ) -> None:
        a, b = np.split(ab, 2, axis=1)
        x = a + dt_bias
        softplus = np.where(x > 20, x, np.log1p(np.exp(np.minimum(x, 20))))
        decay[...] = -np.exp(a_log) * softplus
        beta[...] = sigmoid(b)

    def delta_rule_recurrent(
        self, out: Array, qkv: Array, decay: Array, beta: Array, state: Array, step: StepInputs
    ) -> None:
        for s, rows, past in stateful_sequences(out, step):
            q, k, v = heads_of(qkv[rows], state.shape)
            carried = state[s] if past else np.zeros(state.shape[1:], np.float32)
            gain = np.exp(decay[rows])[..., None, None]  # [t, V, 1, 1]
            for t in range(len(q)):
                carried = carried * gain[t]
                read = np.matmul(k[t, :, None], carried)[:, 0]  # S^T k, [V, dv]
                d = beta[rows][t, :, None] * (v[t] - read)
                carried += k[t, :, :, None] * d[:, None]
                out[rows][t] = np.matmul(q[t, :, None], carried)[:, 0]
            state[s] = carried

    def delta_net(
        self, x: Array, h: MatmulInput, norm: Array, u: Array, weights: DeltaWeights,
        conv_state: Array, state: Array, workspace: DeltaNetWorkspace, step: StepInputs,
        chunked: bool,
    ) -> None:  # fmt: skip
        w, qkv = weights, workspace.qkv
        rule_out = workspace.delta_out.f32.reshape(-1, state.shape[1], state.shape[3])
        self.linear(workspace.ab, h, w.ab)
        self.causal_conv1d(qkv, u, w.conv, conv_state, step)
        self.delta_gates(workspace.decay, workspace.beta, workspace.ab, w.a_log, w.dt_bias)
        rule = self.delta_rule_chunk if chunked else self.delta_rule_recurrent
        rule(rule_out, qkv, workspace.decay, workspace.beta, state, step)
        self.gated_rms_norm(rule_out, rule_out, u, qkv.shape[1], w.norm, w.eps)
        self.linear_add_rms_norm(x, workspace.delta_out, w.out, h, norm)

    def delta_rule_chunk(
        self, out: Array, qkv: Array, decay: Array, beta: Array, state: Array, step: StepInputs,
        scratch: Array | None = None,
    ) -> None:  # fmt: skip
        for s, rows, past in stateful_sequences(out, step):
            q, k, v = (x.swapaxes(0, 1) for x in heads_of(qkv[rows], state.shape))  # [V, t, d]
            g, b = decay[rows].T, beta[rows].T  # [V, t]
            carried = state[s] if past else np.zeros(state.shape[1:], np.float32)
            for start in range(0, q.shape[1], CHUNK):
                c = slice(start, start + CHUNK)
                o, carried = delta_chunk(q[:, c], k[:, c], v[:, c], g[:, c], b[:, c], carried)
                out[rows][c] = o.swapaxes(0, 1)
            state[s] = carried

    def gated_rms_norm(
        self, out: Array, x: Array, z: Array, column: int, w: Array, eps: float
    ) -> None:
        gate = z[:, column : column + x.shape[1] * x.shape[2]].reshape(x.shape)
        np.multiply(normed(x, eps) * w, silu(gate), out=out)

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
        self.linear(router_logits, h, w)
        self.topk_softmax(ids, weights, router_logits, num_experts, counters)
        if trace is not None:
            self.replay_routing(ids, trace, layer, positions)
        if prefetch is not None and next_router is not None:
            next_ids, next_weights, next_logits = (
                array[: len(ids)]
                for array in (prefetch.ids, prefetch.weights, prefetch.router_logits)
            )
            self.linear(next_logits, h, next_router)
            self.topk_softmax(next_ids, next_weights, next_logits, num_experts, prefetch.counters)
            if predicted_trace is not None:
                self.replay_routing(next_ids, predicted_trace, layer + 1, positions)

    def topk_softmax(
        self, ids: Array, weights: Array, logits: Array, num_experts: int, counters: Array
    ) -> None:
        top_k = ids.shape[1]
        scores = logits[:, :num_experts]
        chosen = np.argsort(-scores, axis=1, kind="stable")[:, :top_k]
        top = np.take_along_axis(scores, chosen, axis=1)
        p = np.exp(top - top[:, :1])  # the softmax's denominator over all E cancels
        ids[...] = chosen
        weights[...] = p / p.sum(axis=1, keepdims=True)
        counters[0] += ids.size

    def replay_routing(self, ids: Array, trace: Array, layer: int, positions: Array) -> None:
        ids[...] = trace[positions % len(trace), layer]

    def assign_slots(
        self,
        plan: SlotAssignment,
        cache: ExpertCache,
        layer: int,
        ids: Array,
        prefetch: PrefetchState | None = None,
    ) -> None:
        slot_assignment.assign_slots(plan, cache, layer, ids, prefetch)

    def fetch_experts(
        self,
        cache: ExpertCache,
        plan: SlotAssignment,
        host_experts: HostExperts,
        layer: int,
        l2_prefetch: Array | None = None,
        prefetch: PrefetchState | None = None,
    ) -> None:
        for u in np.flatnonzero(plan.fetch_flags[: int(plan.count[0])]):
            slot = int(plan.slot[u])
            cache.slots[layer][slot] = host_experts.packed[layer, plan.expert[u]]
            self._drop_cached(cache.slots[layer][slot])
            cache.counters[2] += int(plan.uses[u])
            cache.counters[3] += 1
            if prefetch is not None and plan.fetch_flags[u] == 2:
                cache.counters[6] += int(prefetch.segments_done[layer].sum())
        if prefetch is not None and layer + 1 < cache.expert_to_slot.shape[0]:
            prefetch.start_signal[layer + 1] |= 8 * (prefetch.start_signal[layer + 1] % 16 < 8)

    def prefetch_experts(
        self, cache: ExpertCache, prefetch: PrefetchState, host_experts: HostExperts
    ) -> None:
        segments, blocks = -(-cache.layout.nbytes // FETCH_SEGMENT_BYTES), np.arange(FETCH_BLOCKS)
        first_slot = 0
        for layer, slots in enumerate(cache.slots):
            expert, slot = int(prefetch.expert[layer]), int(prefetch.slot[layer]) - first_slot
            first_slot += len(slots)
            signal = int(prefetch.start_signal[layer][0]) - 16 * (int(cache.step[0]) + 1)
            if not layer or signal == 15:
                continue
            if signal != 8:
                return
            stopped = prefetch.state[layer][0] & PREFETCH_STOP
            prefetch.state[layer] += 1 + (1 << 15)
            if not stopped and expert >= 0:
                slots[slot] = host_experts.packed[layer, expert]
                self._drop_cached(slots[slot])
                prefetch.segments_done[layer] = np.repeat(
                    (segments - blocks + len(blocks) - 1) // len(blocks), 8
                )

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
        top_k, inner_size = ids.shape[1], cache.layout.inner
        slots = slots_of(ids, plan)
        for slot in np.unique(slots):
            if (subset == "hits" and slot < 0) or (subset == "rest" and slot >= 0):
                continue
            up, _ = self._expert(cache, layer, int(slot if slot >= 0 else ~slot))
            pairs_of_slot = np.flatnonzero(slots == slot)
            projected = h.f32[pairs_of_slot // top_k] @ up.T
            inner.f32[pairs_of_slot] = silu(projected[:, :inner_size]) * projected[:, inner_size:]
        if subset != "rest":
            self.gate_up_silu(shared_inner, h, shared, gate_up)

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
        if subset == "hits":
            return
        slots = slots_of(ids, plan)
        outputs = np.empty((ids.size, x.shape[1]), np.float32)
        for slot in np.unique(slots):
            _, down = self._expert(cache, layer, int(slot if slot >= 0 else ~slot))
            pairs_of_slot = np.flatnonzero(slots == slot)
            outputs[pairs_of_slot] = inner.f32[pairs_of_slot] @ down.T
        outputs *= weights.reshape(-1, 1)
        by_token = outputs.reshape(*ids.shape, -1)
        y[...] = by_token[:, 0]
        for a in range(1, ids.shape[1]):
            y += by_token[:, a]
        self.linear(shared_out, shared_inner, shared.down)
        self.add_sigmoid_gated(y, shared_out, router_logits, shared.gate_column)
        x += y
        self.rms_norm(h, x, norm)

    def gate_up_silu(
        self, inner: MatmulInput, a: MatmulInput, shared: SharedExpert, gate_up: Array
    ) -> None:
        self.linear(gate_up, a, shared.up)
        self.silu_and_mul(inner.f32, gate_up)

    def _expert(self, cache: ExpertCache, layer: int, slot: int) -> tuple[F32, F32]:
        data = cache.slots[layer][slot]
        cached = self._experts.get(data.ctypes.data)
        if cached is not None:
            return cached[1], cached[2]
        up, down = expert_matrices(cache.layout, data)
        if up.nbytes + down.nbytes <= self._cache_bytes_left:
            self._cache_bytes_left -= up.nbytes + down.nbytes
            self._experts[data.ctypes.data] = data, up, down
        return up, down

    def _drop_cached(self, data: Array) -> None:
        """Drop the cached matrices of a slot whose bytes have changed."""
        cached = self._experts.pop(data.ctypes.data, None)
        if cached is not None:
            self._cache_bytes_left += cached[1].nbytes + cached[2].nbytes

    # -- sampling ----------------------------------------------------------------------------------

    def sample(self, logits: Array, decode_state: DecodeState) -> None:
        sampling.sample(logits, decode_state)

    def sample_controlled(
        self, logits: Array, step: StepInputs, decode_state: DecodeState,
        controls: SamplingControls,
    ) -> None:  # fmt: skip
        sampling.sample_controlled(logits, step, decode_state, controls)

    def advance_step(self, step: StepInputs, decode_state: DecodeState) -> None:
        sampling.advance_step(step, decode_state)
