"""The list of operations: formula, shapes, dtypes, source, and nothing else.

Models compute through this list alone.  `ReferenceOps` (reference.py) is the specification in NumPy
and the CPU backend; `GpuOps` (gpu.py) is the same list on kernels.  Outputs come first; operations
allocate nothing.  Sums and activations are f32 on both backends.  Weights are bf16, int8 or int4
(types.LinearWeight), KV pages f32, bf16 or e4m3 (types.PagedKV).

Why f32 activations: in decode they are a thousandth of the bytes, and a router's near-ties flip
experts when the residual stream is rounded.

Letters, and how to read shapes, are in types.py.  Arrays that several operations share are passed
whole; `[T, >= n]` may have more columns than are read.
"""

from typing import Literal, Protocol, runtime_checkable

from osmium.ops.controls import SamplingControls
from osmium.ops.grouped import ExpertGroups, GroupedExperts, GroupedOps, TileRange
from osmium.ops.memory import MemoryOps
from osmium.ops.types import (
    Array,
    AttentionWeights,
    AttentionWorkspace,
    DecayConfig,
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
from osmium.quant.random_fill import BitPattern

__all__ = [
    "Array", "AttentionWeights", "AttentionWorkspace", "DecayConfig", "DecodeState",
    "DeltaNetWorkspace", "DeltaWeights", "ExpertCache", "ExpertGroups", "Fill", "GroupedExperts",
    "HostExperts",
    "LinearWeight", "MatmulInput", "Ops", "PagedKV", "PrefetchState", "SamplingControls",
    "SharedExpert", "SlotAssignment", "StepInputs", "TileRange",
]  # fmt: skip


@runtime_checkable
class Ops(MemoryOps, GroupedOps, Protocol):
    """The operations of a backend.  `MemoryOps` has those on memory, `GroupedOps` those on experts
    of many tokens."""

    # -- rows ------------------------------------------------------------------------------------

    def embed(self, out: Array, ids: Array, table: Array) -> None:
        """out[t] = table[ids[t]].

        out f32 [T, D]    ids i32 [T]    table bf16 [vocab, D] in VRAM or host memory    D % 8 == 0
        """

    def gather_rows(self, out: Array, x: Array, rows: Array) -> None:
        """out[i] = x[rows[i]].

        out f32 [R, D]    x f32 [T, D]    rows i32 [R]    D % 4 == 0
        """

    def add(self, out: Array, x: Array) -> None:
        """out += x.

        out, x f32, same shape, size % 4 == 0
        """

    def prepare_input(self, a: MatmulInput) -> None:
        """Split a.f32 [T, K], not normed, into the forms that matrices read.  No-op on the CPU."""

    def rms_norm(self, h: MatmulInput, x: Array, w: Array) -> None:
        """h = x * rsqrt(mean(x^2 over K) + h.eps) * (1 + w).

        x f32 [T, K]    w f32 [K]    K % 8 == 0
        Zhang & Sennrich 2019, arXiv:1910.07467; zero-centred weight as in Qwen3-Next.
        """

    def linear(self, out: Array, a: MatmulInput, w: LinearWeight) -> None:
        """out = a @ W.T.

        out f32 [T, N]    a [T, K]    w [N, K], see types.LinearWeight
        """

    def linear_add_rms_norm(
        self, x: Array, a: MatmulInput, w: LinearWeight, h: MatmulInput, norm: Array
    ) -> None:
        """x += a @ W.T; h = rms_norm(x, norm).

        x f32 [T, N]    a [T, K]    w [N, K]    h [T, N]    norm f32 [N]
        """

    # -- attention -------------------------------------------------------------------------------

    def rope_append(
        self,
        q: Array,
        kv: PagedKV,
        qgkv: Array,
        norms: Array,
        frequencies: Array,
        step: StepInputs,
        eps: float,
    ) -> None:
        """Norm and rotate q and k; write k and v to their pages.

        qgkv f32 [T, (2H + 2G) * d]: for each query head d query values, then d gate values; behind
        them G key heads, then G value heads.
        q[t, h] = rope(norm(query h, norms[0])), k = rope(norm(key g, norms[1])), with
        norm(x, w) = x * rsqrt(mean(x^2) + eps) * (1 + w).  rope rotates the pairs
        (j, j + rotary / 2): a' = a cos - b sin, b' = b cos + a sin.  The angle is
        positions[t] * frequencies[j] in f32; values from `rotary` on pass through.  k and v are
        rounded once to the dtype of `kv`: bf16 to nearest, e4m3 by floats.quantize_e4m3_rows.

        q f32 [T, H, d]    norms f32 [2, d]    frequencies f32 [rotary / 2]
        d % 32 == 0, d <= 256    rotary % 2 == 0
        Su et al. 2021, arXiv:2104.09864; partial rotary and q/k norms as in Qwen3-Next.
        """

    def attention(
        self, out: Array, q: Array, kv: PagedKV, step: StepInputs, scale: float,
        context_turns: Array, context_sums: Array,
    ) -> None:  # fmt: skip
        """out[t, h] = sum of v[p] * softmax over p <= positions[t] of q[t, h] . k[p] * scale,
        k and v of head h // (H / G).

        out, q f32 [T, H, d]    context_turns i32 [>= T, G]    context_sums f32 [T, 2, H, 2]
        GPU prefill divides contexts into parts of fixed positions, and adds them up in order.
        context_turns are 0 before and after; context_sums is scratch.
        Softmax in f32, running maximum.  Ainslie et al. 2023, arXiv:2305.13245 (grouped queries);
        Kwon et al. 2023, arXiv:2309.06180 (pages).
        """

    def gated_attention(
        self,
        x: Array,
        h: MatmulInput,
        norm: Array,
        qgkv: Array,
        weights: AttentionWeights,
        kv: PagedKV,
        workspace: AttentionWorkspace,
        step: StepInputs,
    ) -> None:
        """q = rope_append(qgkv);  attn_out = sigmoid_gate(attention(q));
        x += attn_out @ weights.out.T;  h = rms_norm(x, norm)

        x f32 [T, D]    h [T, D]    norm f32 [D]    qgkv f32 [T, (2H + 2G) * d]
        GPU decode steps of at most 8 sequences use split-KV attention, which leaves workspace.q.
        """

    def sigmoid_gate(self, out: Array, qgkv: Array) -> None:
        """out[t, h] *= sigmoid(gate of head h in qgkv).

        out f32 [T, H, d]    qgkv f32 [T, >= 2H * d], see rope_append
        """

    # -- gated delta net ---------------------------------------------------------------------------

    def causal_conv1d(self, out: Array, u: Array, w: Array, state: Array, step: StepInputs) -> None:
        """out[t, c] = silu(sum over i < 4 of w[c, i] * u[t - 3 + i, c]), each sequence by itself.

        The three rows before a sequence's first come from state[slot], or are zero if its context
        length is 0.  Afterwards the state holds the last four rows of u: position p at p % 4.
        A sequence with a slot below 0 starts from zeros and stores no state.

        out f32 [T, C]    u f32 [T, >= C], its first C columns    w f32 [C, 4]
        state f32 [slots, C, 4]
        """

    def delta_gates(
        self, decay: Array, beta: Array, ab: Array, a_log: Array, dt_bias: Array
    ) -> None:
        """decay = -exp(a_log) * softplus(a + dt_bias), the log of the decay; beta = sigmoid(b).

        decay, beta f32 [T, V]    ab f32 [T, 2V], a then b    a_log, dt_bias f32 [V]
        softplus(x) = x for x > 20.  Dao & Gu 2024, arXiv:2405.21060 (the gate).
        """

    def delta_rule_recurrent(
        self, out: Array, qkv: Array, decay: Array, beta: Array, state: Array, step: StepInputs
    ) -> None:
        """The gated delta rule, token by token; value head j uses key head j // (V / U).

        q = l2(q) * dk^-0.5, k = l2(k), l2(x) = x * rsqrt(sum(x^2) + 1e-6); then for each token
            S = exp(decay) S;  d = beta (v - S^T k);  S = S + k d^T;  out = S^T q
        S is state[slot], or zero if the context length is 0; it is written back at the end.  For a
        sequence with a slot below 0, out is zero and no state is read or written.

        out f32 [T, V, dv]    qkv f32 [T, 2U * dk + V * dv]: U queries, U keys, V values
        decay, beta f32 [T, V]    state f32 [slots, V, dk, dv]    dk % 32 == 0, dk, dv <= 128
        Yang et al. 2024, arXiv:2412.06464.
        """

    def delta_net(
        self,
        x: Array,
        h: MatmulInput,
        norm: Array,
        u: Array,
        weights: DeltaWeights,
        conv_state: Array,
        state: Array,
        workspace: DeltaNetWorkspace,
        step: StepInputs,
        chunked: bool,
    ) -> None:
        """A delta net behind its first matrix:
            qkv = causal_conv1d(u);  decay, beta = delta_gates(h @ ab.T)
            x += gated_rms_norm(rule(qkv, decay, beta), z, weights.norm) @ out.T
            h = rms_norm(x, norm)
        z is u from column C on.  The rule is delta_rule_chunk if `chunked`, else recurrent.  With
        workspace.chunk_scratch it is delta_rule_chunk unless each sequence has one row.  Rows of a
        sequence with a state slot below 0 add nothing to x; no state is read or written for them.

        x f32 [T, D]    h [T, D], at least two launches old    norm f32 [D]
        u f32 [T, C + V * dv]    conv_state f32 [slots, C, 4]
        state f32 [slots, V, dk, dv]    dv % 32 == 0
        """

    def delta_rule_chunk(
        self, out: Array, qkv: Array, decay: Array, beta: Array, state: Array, step: StepInputs,
        scratch: Array | None = None,
    ) -> None:  # fmt: skip
        """The function of delta_rule_recurrent, in chunks of tokens, for prefill.

        With G the running sum of the decay inside a chunk and D[i, j] = exp(G_i - G_j) for i >= j:
            A = I + strictly lower part of (beta k) k^T * D, solved by forward substitution:
            A U = beta v;  A W = beta exp(G) k
            N = U - W S;  out = (q exp(G)) S + lower part of (q k^T * D) N
            S = S exp(G_last) + (k exp(G_last - G))^T N
        With `scratch` the GPU cuts chunks at multiples of 64 positions.  A sequence that is cut
        there into several steps gets the same bits as in one.  `scratch` has
        tiling.delta_chunk_words u32.  Without it the GPU uses the kernel for any head size.

        Other arguments as for delta_rule_recurrent; the values in qkv may be overwritten.
        Yang et al. 2024, arXiv:2412.06464, section 3.3.
        """

    def gated_rms_norm(
        self, out: Array, x: Array, z: Array, column: int, w: Array, eps: float
    ) -> None:
        """out = x * rsqrt(mean(x^2 over dv) + eps) * w * silu(z), head by head.

        out, x f32 [T, V, dv], may be one array    z f32 [T, Z], from `column` on, V * dv columns
        w f32 [dv]    dv % 32 == 0, dv <= 128    Z % 4 == 0    column % 4 == 0
        """

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
        """router_logits = h @ W.T; topk_softmax; then replay_routing if there is a `trace`.

        With `prefetch`, does the same with `next_router` into prefetch.ids, weights and
        router_logits; `predicted_trace` then replaces prefetch.ids, at layer + 1.

        ids u16 [T, A]    weights f32 [T, A]    router_logits f32 [T, N]    h [T, D]
        w, next_router [N, D]    barrier i32 [8, 288], zero before and after
        trace, predicted_trace u16 [trace_tokens, L, A]    positions i32 [T]
        """

    def topk_softmax(
        self, ids: Array, weights: Array, logits: Array, num_experts: int, counters: Array
    ) -> None:
        """p = softmax(logits[:, :experts]); ids the A largest, descending, ties to the lower id;
        weights = p[ids] / sum(p[ids]).

        ids u16 [T, A]    weights f32 [T, A]    logits f32 [T, >= E]    counters[0] += T * A
        """

    def replay_routing(self, ids: Array, trace: Array, layer: int, positions: Array) -> None:
        """ids[t] = trace[positions[t] % trace_tokens, layer]: recorded routing, for benchmarks.

        ids u16 [T, A]    trace u16 [trace_tokens, L, A]    positions i32 [T]    A <= 32
        """

    def assign_slots(
        self,
        plan: SlotAssignment,
        cache: ExpertCache,
        layer: int,
        ids: Array,
        prefetch: PrefetchState | None = None,
    ) -> None:
        """Assign a slot of `layer` to every expert of `ids`; update plan, cache and counters.

        plan.expert: unique ids, ascending; plan.fetch_flags: 1 for misses.  Misses take free slots,
        lowest first, then those of the lowest eviction scores.  counters[1] += pairs that hit.
        With `prefetch`, also resolve this layer's prefetch and pick the next layer's.
        docs/expert-cache.md and docs/prefetch.md have both algorithms.

        ids u16 [T, A]    Raises: AssertionError if the unique ids exceed the slots.
        """

    def fetch_experts(
        self,
        cache: ExpertCache,
        plan: SlotAssignment,
        host_experts: HostExperts,
        layer: int,
        l2_prefetch: Array | None = None,
        prefetch: PrefetchState | None = None,
    ) -> None:
        """slots[layer, plan.slot] = host_experts.packed[layer, plan.expert] for each entry with a
        fetch flag; flag 2 skips the segments that prefetch.segments_done counts.

        counters[2] += uses of the copied experts, counters[3] += experts copied.  Reads
        `l2_prefetch` into L2 at the end.  With `prefetch`, waits for the layer's prefetch blocks,
        adds their segments' eighths to counters[6], and raises prefetch.start_signal[layer + 1].
        """

    def prefetch_experts(
        self, cache: ExpertCache, prefetch: PrefetchState, host_experts: HostExperts
    ) -> None:
        """slots[prefetch.slot[layer]] = host_experts.packed[layer, prefetch.expert[layer]] for each
        layer from 1 on with an expert >= 0.  A layer starts at its prefetch.start_signal and stops
        when prefetch.state has PREFETCH_STOP.  Ends if no signal comes within 20 ms."""

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
        """inner[t, a] = silu(gate_e h[t]) * (up_e h[t]), e = ids[t, a], from the experts' slots;
        shared_inner = gate_up_silu(h, shared).

        Without a plan expert e is in slot e.  "hits" computes the shared expert and any of the
        pairs whose expert was resident before the plan; "rest" computes the other pairs.

        With `grouped`, rows of inner may be in another order, which `expert_down` expects.

        inner [T * A, I]    shared_inner [T, Is]    h [T, D]    ids u16 [T, A]
        gate_up f32 [T, 2Is], scratch    grouped: from `empty_grouped`
        """

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
        """x[t] += sum over a of weights[t, a] * down_e inner[t, a], in a fixed order, plus
        sigmoid(router_logits[t, gate_column]) * (shared.down shared_inner[t]);
        then h = rms_norm(x, norm).

        "hits" may sum the shared expert and resident experts into y; "rest" adds the others.

        x f32 [T, D]    inner [T * A, I]    ids u16 [T, A]    weights f32 [T, A]
        router_logits f32 [T, columns]    shared_out f32 [T, D], scratch
        y f32 [T, D], kept from "hits" to "rest"    h [T, D]    norm f32 [D]
        """

    def gate_up_silu(
        self, inner: MatmulInput, a: MatmulInput, shared: SharedExpert, gate_up: Array
    ) -> None:
        """inner = silu(a @ gate.T) * (a @ up.T), gate the first half of the rows of shared.up, up
        the second.  On the GPU only in the form that shared.down reads.

        inner [T, I]    a [T, K]    shared.up [2I, K]    gate_up f32 [T, 2I], scratch
        """

    def silu_and_mul(self, out: Array, x: Array) -> None:
        """out[t, i] = silu(x[t, i]) * x[t, I + i].

        out f32 [T, I]    x f32 [T, 2I]    I % 4 == 0
        """

    def add_sigmoid_gated(self, out: Array, x: Array, gate: Array, column: int) -> None:
        """out[t] += sigmoid(gate[t, column]) * x[t].

        out, x f32 [T, D]    gate f32 [T, >= 1], column < its columns    D % 4 == 0
        """

    # -- sampling ----------------------------------------------------------------------------------

    def sample(self, logits: Array, decode_state: DecodeState) -> None:
        """decode_state.token[r] = a token sampled from row r; -1 if its maximum is not finite.

        Temperature 0: the largest logit, ties to the lower id.  Else p = softmax(logits /
        temperature), sorted, ties to the lower id; top_k, top_p and min_p cut it in this order.
        The token is the first of the rest whose cumulative p exceeds the row's uniform number.

        logits f32 [R, vocab]    docs/sampling.md
        """

    def sample_controlled(
        self, logits: Array, step: StepInputs, decode_state: DecodeState,
        controls: SamplingControls,
    ) -> None:  # fmt: skip
        """Sample from adjusted logits; store log-probabilities of the logits themselves.

        First counts the step's ids in controls.token_counts.  Then controls.adjusted = the logits
        with penalties, bias and mask, and `sample` of those.  Row r of decode step i gets its
        log-probabilities in entry i % ring_size of controls.logprobs and logprob_tokens: the
        sampled token, then the num_logprobs largest, ties to the lower id.

        logits f32 [R, vocab], not modified    docs/sampling.md
        """

    def advance_step(self, step: StepInputs, decode_state: DecodeState) -> None:
        """Write each row's token into the next step's inputs and into the token ring.

        A row ends at its last token, at -1, or at a token of `eos` if stop_on_eos is set.  Ended
        rows write -2 to the ring and run on the null page without a state slot, at position 0.  The
        step has one row per sequence; all its arrays but sequence_ids and query_start_loc change.
        """

    # -- quantisation and synthetic weights: while loading ---------------------------------------

    def quantize_int4(self, out: Array, data: int, scale: int, w: Array, clips: Array) -> None:
        """INT4 of w[e] into out[e]: packed nibbles from byte `data` on, f16 scales from byte
        `scale` on, with groups of group_of(K) inputs; see quant/int4.py.

        out u8 [E, nbytes]    w bf16 [E, N, K]    clips f32 [num_clips]
        data, scale, nbytes % 16 == 0
        """

    def quantize_int8(self, out: Array, data: int, scale: int, w: Array) -> None:
        """INT8 of w[e] into out[e], with f32 scales; see quant/int8.py.  K % 8 == 0

        out u8 [E, nbytes]    w bf16 [E, N, K]    data, scale, nbytes % 16 == 0
        """

    def random_fill(
        self, out: Array, start: int, nbytes: int, seed: int, pattern: BitPattern
    ) -> None:
        """Bytes start to start + nbytes - 1 of each row of `out` = words of the stream of `seed`;
        word i of `out` is word i of the stream.  See quant/random_fill.py.

        out u8 [E, bytes], in VRAM or host memory    start, nbytes, bytes % 16 == 0
        """
