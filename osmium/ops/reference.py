"""ReferenceOps: the list of operations in NumPy.  The specification, and the CPU backend.

Written to be believed: each method is its formula from ops/__init__.py.  The one thing done for
speed is to keep matrices in f32 once they have been read, within a budget of bytes.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt

from osmium.ops import sampling, slot_assignment
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
    write_kv,
)
from osmium.ops.reference_quant import ReferenceQuantOps
from osmium.ops.types import (
    FETCH_BLOCKS,
    FETCH_SEGMENT_BYTES,
    STOP,
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
)
from osmium.quant.floats import f32_from_bf16

__all__ = ["ReferenceOps"]


class ReferenceOps(ReferenceQuantOps):
    """See ops.Ops for every method's formula, shapes and source."""

    def __init__(self, keep: int = 4 << 30) -> None:
        """`keep` bytes may hold f32 copies of matrices; past that they are made at each use."""
        self.bytes_to_host = 0
        self._room = keep
        self._kept: dict[int, tuple[LinearWeight, F32]] = {}
        self._experts: dict[int, tuple[Array, F32, F32]] = {}
        """By the address of a slot, which it keeps from being used again."""

    # -- memory ----------------------------------------------------------------------------------

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        return np.empty(shape, dtype)

    def to_device(self, array: npt.NDArray[Any]) -> Array:
        return array  # kernels are NumPy: a mapped file serves as it is

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
        assert out.shape == source.shape, f"copy_in of {source.shape} into {out.shape}"
        out[...] = source

    def copy_d2h(self, source: Array) -> npt.NDArray[Any]:
        self.bytes_to_host += source.nbytes
        return np.array(source)

    def copy(self, out: Array, source: Array) -> None:
        out[...] = source
        self._forget(out)

    def memset(self, out: Array, byte: int) -> None:
        out.view(np.uint8)[...] = byte

    def synchronize(self) -> None:
        pass

    @contextlib.contextmanager
    def on_side_stream(self, early: bool = False) -> Iterator[None]:
        yield

    def join_side_stream(self, early: bool = False) -> None:
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
        kept = self._kept.get(id(w))
        if kept is not None:
            return kept[1]
        made = matrix(w.format, w.data, w.scale)
        if made.nbytes <= self._room:
            self._room -= made.nbytes
            self._kept[id(w)] = w, made  # holding w keeps its id from being used again
        return made

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
        page = step.page_table[step.sequence_ids, step.positions // step.page]
        row = step.positions % step.page
        write_kv(kv.k, kv.k_scales, page, row, k)
        write_kv(kv.v, kv.v_scales, page, row, new[:, 1])

    def attention(self, out: Array, q: Array, kv: PagedKV, step: StepInputs, scale: float) -> None:
        _, heads, size = q.shape
        groups = kv.k.shape[2]
        for s in range(step.sequences):
            rows = slice(int(step.query_start_loc[s]), int(step.query_start_loc[s + 1]))
            positions = step.positions[rows]
            length = int(positions[-1]) + 1
            pages = step.page_table[s, : -(-length // step.page)]
            k = gather_kv(kv.k, kv.k_scales, pages, length)  # [G, n, d]
            v = gather_kv(kv.v, kv.v_scales, pages, length)
            mine = q[rows].reshape(-1, groups, heads // groups, size).transpose(1, 2, 0, 3)
            keys = k[:, None].swapaxes(-1, -2)
            scores = np.matmul(mine, keys) * np.float32(scale)  # [G, r, t, n]
            if len(positions) > 1:
                scores[..., np.arange(length) > positions[:, None]] = -np.inf
            scores -= scores.max(axis=-1, keepdims=True)
            np.exp(scores, out=scores)
            scores /= scores.sum(axis=-1, keepdims=True)
            mixed = np.matmul(scores, v[:, None])  # [G, r, t, d]
            out[rows] = mixed.transpose(2, 0, 1, 3).reshape(-1, heads, size)

    def gated_attention(
        self,
        x: Array,
        h: MatmulInput,
        norm: Array,
        qgkv: Array,
        weights: AttentionWeights,
        kv: PagedKV,
        room: AttentionWorkspace,
        step: StepInputs,
    ) -> None:
        w, heads = weights, room.attn_out.f32.reshape(room.q.shape)
        self.rope_append(room.q, kv, qgkv, w.norms, w.frequencies, step, w.eps)
        self.attention(heads, room.q, kv, step, w.scale)
        self.sigmoid_gate(heads, qgkv)
        self.linear_add_rms_norm(x, room.attn_out, w.out, h, norm)

    def sigmoid_gate(self, out: Array, qgkv: Array) -> None:
        tokens, heads, size = out.shape
        out *= sigmoid(qgkv[:, : 2 * heads * size].reshape(tokens, heads, 2, size)[:, :, 1])

    # -- gated delta net ---------------------------------------------------------------------------

    def causal_conv1d(self, out: Array, u: Array, w: Array, state: Array, step: StepInputs) -> None:
        channels = out.shape[1]
        for s in range(step.sequences):
            rows = slice(int(step.query_start_loc[s]), int(step.query_start_loc[s + 1]))
            slot = int(step.state_slots[s])
            past = int(step.context_lens[s])
            recent = (past + np.arange(4)) % 4  # where positions past - 4 and on are
            before = state[slot].T[recent] if past else np.zeros((4, channels), np.float32)
            window = np.concatenate([before, u[rows, :channels]])  # [4 + t, C]
            t = len(window) - 4
            out[rows] = silu(sum(w[:, i] * window[i + 1 : i + 1 + t] for i in range(4)))
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
        for s, rows, past in sequences_of(step):
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
        self, x: Array, h: MatmulInput, norm: Array, u: Array, weights: DeltaWeights, inputs: Array,
        state: Array, room: DeltaNetWorkspace, step: StepInputs, chunks: bool,
    ) -> None:  # fmt: skip
        w, qkv = weights, room.qkv
        read = room.read.f32.reshape(-1, state.shape[1], state.shape[3])
        self.linear(room.ab, h, w.ab)
        self.causal_conv1d(qkv, u, w.conv, inputs, step)
        self.delta_gates(room.decay, room.beta, room.ab, w.a_log, w.dt_bias)
        rule = self.delta_rule_chunk if chunks else self.delta_rule_recurrent
        rule(read, qkv, room.decay, room.beta, state, step)
        self.gated_rms_norm(read, read, u, qkv.shape[1], w.norm, w.eps)
        self.linear_add_rms_norm(x, room.read, w.out, h, norm)

    def delta_rule_chunk(
        self, out: Array, qkv: Array, decay: Array, beta: Array, state: Array, step: StepInputs
    ) -> None:
        for s, rows, past in sequences_of(step):
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
        self.linear(scores, h, w)
        self.topk_softmax(ids, weights, scores, experts, counters)
        if trace is not None:
            self.replay_routing(ids, trace, layer, positions)
        if guess is not None and after is not None:
            of, likely = ids.shape[0], guess.scores[: ids.shape[0]]
            self.linear(likely, h, after)
            self.topk_softmax(guess.ids[:of], guess.weights[:of], likely, experts, guess.counters)
            if predicted is not None:
                self.replay_routing(guess.ids[:of], predicted, layer + 1, positions)

    def topk_softmax(
        self, ids: Array, weights: Array, logits: Array, experts: int, counters: Array
    ) -> None:
        top_k = ids.shape[1]
        scores = logits[:, :experts]
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
        guess: PrefetchState | None = None,
    ) -> None:
        slot_assignment.assign_slots(plan, cache, layer, ids, guess)

    def fetch_experts(
        self,
        cache: ExpertCache,
        plan: SlotAssignment,
        arena: HostExperts,
        layer: int,
        l2_prefetch: Array | None = None,
        guess: PrefetchState | None = None,
    ) -> None:
        for u in np.flatnonzero(plan.fetch_flags[: int(plan.count[0])]):
            slot = int(plan.slot[u])
            cache.slots[layer][slot] = arena.records[layer, plan.expert[u]]
            self._forget(cache.slots[layer][slot])
            cache.counters[2] += int(plan.uses[u])
            cache.counters[3] += 1
            if guess is not None and plan.fetch_flags[u] == 2:
                cache.counters[6] += int(guess.segments_done[layer].sum())
        if guess is not None and layer + 1 < cache.expert_to_slot.shape[0]:
            guess.start_signal[layer + 1] |= 8 * (guess.start_signal[layer + 1] % 16 < 8)

    def prefetch_experts(
        self, cache: ExpertCache, guess: PrefetchState, arena: HostExperts
    ) -> None:
        pieces, blocks = -(-cache.record.nbytes // FETCH_SEGMENT_BYTES), np.arange(FETCH_BLOCKS)
        first = 0
        for layer, slots in enumerate(cache.slots):
            expert, slot = int(guess.expert[layer]), int(guess.slot[layer]) - first
            first += len(slots)
            said = int(guess.start_signal[layer][0]) - 16 * (int(cache.step[0]) + 1)
            if not layer or said == 15:
                continue
            if said != 8:
                return
            stopped = guess.state[layer][0] & STOP
            guess.state[layer] += 1 + (1 << 15)
            if not stopped and expert >= 0:
                slots[slot] = arena.records[layer, expert]
                self._forget(slots[slot])
                guess.segments_done[layer] = np.repeat(
                    (pieces - blocks + len(blocks) - 1) // len(blocks), 8
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
        part: Literal["all", "there", "rest"],
        shared: SharedExpert,
        both: Array,
    ) -> None:
        top_k, size = ids.shape[1], cache.record.inner
        slots = slots_of(ids, plan)
        for slot in np.unique(slots):
            if (part == "there" and slot < 0) or (part == "rest" and slot >= 0):
                continue
            up, _ = self._expert(cache, layer, int(slot if slot >= 0 else ~slot))
            mine = np.flatnonzero(slots == slot)
            gates = h.f32[mine // top_k] @ up.T
            inner.f32[mine] = silu(gates[:, :size]) * gates[:, size:]
        if part != "rest":
            self.gate_up_silu(shared_inner, h, shared.up, both)

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
        if part == "there":
            return
        slots = slots_of(ids, plan)
        pairs = np.empty((ids.size, x.shape[1]), np.float32)
        for slot in np.unique(slots):
            _, down = self._expert(cache, layer, int(slot if slot >= 0 else ~slot))
            mine = np.flatnonzero(slots == slot)
            pairs[mine] = inner.f32[mine] @ down.T
        pairs *= weights.reshape(-1, 1)
        by_token = pairs.reshape(*ids.shape, -1)
        y[...] = by_token[:, 0]
        for a in range(1, ids.shape[1]):
            y += by_token[:, a]
        self.linear(said, shared_inner, shared.down)
        self.add_sigmoid_gated(y, said, scores, shared.column)
        x += y
        self.rms_norm(h, x, norm)

    def gate_up_silu(
        self, inner: MatmulInput, a: MatmulInput, w: LinearWeight, both: Array
    ) -> None:
        self.linear(both, a, w)
        self.silu_and_mul(inner.f32, both)

    def _expert(self, cache: ExpertCache, layer: int, slot: int) -> tuple[F32, F32]:
        there = cache.slots[layer][slot]
        kept = self._experts.get(there.ctypes.data)
        if kept is not None:
            return kept[1], kept[2]
        up, down = expert_matrices(cache.record, there)
        if up.nbytes + down.nbytes <= self._room:
            self._room -= up.nbytes + down.nbytes
            self._experts[there.ctypes.data] = there, up, down
        return up, down

    def _forget(self, slot: Array) -> None:
        """Its bytes have changed."""
        kept = self._experts.pop(slot.ctypes.data, None)
        if kept is not None:
            self._room += kept[1].nbytes + kept[2].nbytes

    def silu_and_mul(self, out: Array, x: Array) -> None:
        size = out.shape[1]
        np.multiply(silu(x[:, :size]), x[:, size:], out=out)

    def add_sigmoid_gated(self, out: Array, x: Array, gate: Array, column: int) -> None:
        out += sigmoid(gate[:, column : column + 1]) * x

    # -- replies -----------------------------------------------------------------------------------

    def sample(self, logits: Array, replies: DecodeState) -> None:
        chances = replies.uniforms[int(replies.decode_step[0]) % replies.ring]
        for row, scores in enumerate(logits):
            if not np.isfinite(scores.max()):
                replies.token[row] = -1
                continue
            temperature, top_k, top_p, min_p = (float(x) for x in replies.sampler_params[row])
            wide, lot = scores.astype(np.float64), float(chances[row])
            token = sampling.sample_from_logits(wide, temperature, top_k, top_p, min_p, lot)
            replies.token[row] = token

    def advance_step(self, step: StepInputs, replies: DecodeState) -> None:
        sampling.advance_step(step, replies)
