"""The list of operations: formula, shapes, dtypes, source, and nothing else.

Everything a model computes goes through this list.  `ReferenceOps` (reference.py) is the
specification in NumPy and the CPU backend; `GpuOps` (gpu.py) is the same list on kernels.  Outputs
come first; nothing is allocated inside an operation; sums are in f32 and every activation is f32 on
both backends.  Weights are bf16, int8 or int4 (types.LinearWeight), KV pages f32, bf16 or e4m3
(types.PagedKV).

Why f32 activations: in decode they are a thousandth of the bytes, and a router's near-ties flip
experts when the residual stream is rounded.

Letters are in types.py.  A wide array that several operations share is passed whole, with the
column where the wanted part starts.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

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
    "DeltaNetWorkspace", "DeltaWeights", "ExpertCache", "Fill", "HostExperts", "LinearWeight",
    "MatmulInput", "Ops", "PagedKV", "PrefetchState", "SharedExpert", "SlotAssignment",
    "StepInputs",
]  # fmt: skip


@runtime_checkable
class Ops(Protocol):
    """What a backend must do."""

    # -- memory: called while loading and around a forward pass, never inside one ----------------

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        """A new array with unspecified contents, in VRAM on the GPU.  Raises: OutOfMemory."""

    def to_device(self, array: npt.NDArray[np.generic]) -> Array:
        """A copy of a host array where kernels reach it fast (VRAM).  Raises: OutOfMemory."""

    def empty_mapped(
        self, shape: tuple[int, ...], dtype: npt.DTypeLike, fill: Fill | None = None
    ) -> Array:
        """A new array in host memory that kernels can read: NumPy, or mapped page-locked memory.
        `fill` writes its bytes, u8 [n], first.  Raises: OutOfMemory, and what `fill` raises."""

    def host_view(self, array: Array) -> npt.NDArray[np.generic]:
        """The host's NumPy view of what `host` or `mailbox` gave.  Memory of `host` may be
        write-combined and slow to read: only write there."""

    def zeros_mapped(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        """A new array of zeros in host memory that both sides read and write.  Raises:
        OutOfMemory."""

    def release(self, array: Array) -> None:
        """Give back what `host` or `mailbox` gave, once all that uses it is done."""

    def empty_input(self, tokens: int, width: int, eps: float | None = None) -> MatmulInput:
        """New rows; with `eps` they are normed.  width % 8 == 0.  Raises: OutOfMemory."""

    def copy_h2d(self, out: Array, source: npt.NDArray[np.generic]) -> None:
        """out = source, same shape and dtype, ordered before what is launched next."""

    def copy_d2h(self, source: Array) -> npt.NDArray[np.generic]:
        """A NumPy copy of `source`; waits for what was launched.  Its bytes are added to
        `bytes_to_host`."""

    def copy(self, out: Array, source: Array) -> None:
        """out = source, both on the device, or `source` in `host` memory.  Same bytes."""

    def memset(self, out: Array, byte: int) -> None:
        """Every byte of `out` = byte."""

    def synchronize(self) -> None:
        """Wait for everything launched, and raise what failed."""

    def capture_graph(self, run: Callable[[], None]) -> Callable[[], None]:
        """Something that does what `run` does, on the same arrays, as often as it is called.

        On the GPU `run` is only recorded now, its launches as one graph; it must neither allocate
        nor wait, and everything in it must have been launched once before.
        """

    def on_side_stream(self, prefetch: bool = False) -> AbstractContextManager[None]:
        """What is launched inside follows all that was launched before, but what is launched
        outside, until `join`, does not wait for it.  Two such ways do not wait for each other."""

    def join_side_stream(self, prefetch: bool = False) -> None:
        """What is launched from here on waits for all that was launched beside, that way."""

    bytes_to_host: int
    """Bytes that `copy_out` has brought back so far."""

    # -- rows ------------------------------------------------------------------------------------

    def embed(self, out: Array, ids: Array, table: Array) -> None:
        """out[t] = table[ids[t]].

        out f32 [T, D]    ids i32 [T]    table bf16 [V, D] in VRAM or host memory    D % 8 == 0
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
        """a.f32 has been written: make of it what matrices read.  `a` is not normed."""

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
        """x += a @ W.T; h = norm(x).

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
        """Norm and rotate q and k; keep k and v.

        qgkv f32 [T, (2H + 2G) * d]: for each of H query heads d query values then d gate values;
        then G key heads, then G value heads of d values each.
        q[t, h] = rope(norm(query h, norms[0])), k = rope(norm(key g, norms[1])), with
        norm(x, w) = x * rsqrt(mean(x^2) + eps) * (1 + w).  rope turns the pairs (j, j + R/2),
        j < R/2: a' = a cos - b sin, b' = b cos + a sin, the angle being
        positions[t] * frequencies[j] in f32; values from R on pass through.  k and v are rounded
        to what `kv` keeps, once, by rows of d: bf16 to nearest, e4m3 by floats.quantize_e4m3_rows.

        q f32 [T, H, d]    norms f32 [2, d]    frequencies f32 [R / 2]
        d % 32 == 0, d <= 256    R % 2 == 0
        Su et al. 2021, arXiv:2104.09864; partial rotary and q/k norms as in Qwen3-Next.
        """

    def attention(self, out: Array, q: Array, kv: PagedKV, step: StepInputs, scale: float) -> None:
        """out[t, h] = sum of v[p] * softmax over p <= positions[t] of q[t, h] . k[p] * scale,
        k and v of head h // (H / G).

        out, q f32 [T, H, d]
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
        """q = rope_append(qgkv);  read = sigmoid_gate(attention(q));
        x += read @ weights.out.T;  h = norm(x)

        x f32 [T, D]    h [T, D]    norm f32 [D].  In steps of one row a sequence, 8 at most,
        contexts are shared out over up to splits / T blocks each, and q stays as it was.
        """

    def sigmoid_gate(self, out: Array, qgkv: Array) -> None:
        """out[t, h] *= sigmoid(the gate of head h in qgkv).

        out f32 [T, H, d]    qgkv f32 [T, >= 2Hd], as in rope_append
        """

    # -- gated delta net ---------------------------------------------------------------------------

    def causal_conv1d(self, out: Array, u: Array, w: Array, state: Array, step: StepInputs) -> None:
        """out[t, c] = silu(sum over i < 4 of w[c, i] * u[t - 3 + i, c]), each sequence by itself.

        The three rows before a sequence's first come from state[slot] (zeros where past is 0); at
        the end the state holds the sequence's last four rows of u, that of position p at p % 4.

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
        """The gated delta rule, token by token; V value heads, U key heads, value head j uses key
        head j // (V / U).

        q = l2(q) * dk^-0.5, k = l2(k), l2(x) = x * rsqrt(sum(x^2) + 1e-6); then for each token
            S = exp(decay) S;  d = beta (v - S^T k);  S = S + k d^T;  out = S^T q
        S is state[slot] (zeros where past is 0) and is written back after the last token.

        out f32 [T, V, dv]    qkv f32 [T, 2U*dk + V*dv]: U queries, U keys, V values
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
            qkv = conv(u);  decay, beta = delta_gates(h @ ab.T)
            x += gated_norm(rule(qkv, decay, beta), z, weights.norm) @ out.T;  h = norm(x)
        z are u's columns from C on; the rule is delta_chunk with `chunks`, else delta_step.

        x f32 [T, D]    h [T, D], not made by the last operation    norm f32 [D]
        u f32 [T, C + V*dv]    inputs f32 [slots, C, 4], conv's state
        state f32 [slots, V, dk, dv]    dv % 32 == 0    What each does is said there.
        """

    def delta_rule_chunk(
        self, out: Array, qkv: Array, decay: Array, beta: Array, state: Array, step: StepInputs
    ) -> None:
        """The same function as delta_step, in chunks of tokens, for prefill.

        With G the running sum of the decay inside a chunk and D[i, j] = exp(G_i - G_j) for i >= j:
            A = I + strictly lower part of (beta k) k^T * D, solved by forward substitution:
            A U = beta v;  A W = beta exp(G) k
            N = U - W S;  out = (q exp(G)) S + lower part of (q k^T * D) N
            S = S exp(G_last) + (k exp(G_last - G))^T N
        Same arguments as delta_step.  Yang et al. 2024, arXiv:2412.06464, section 3.3.
        """

    def gated_rms_norm(
        self, out: Array, x: Array, z: Array, column: int, w: Array, eps: float
    ) -> None:
        """out = x * rsqrt(mean(x^2 over dv) + eps) * w * silu(z), head by head.

        out, x f32 [T, V, dv], may be one array    z f32 [T, Z], columns column .. column + V*dv
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
        """scores = h @ W.T; route; and where there is a trace, replay.  With a guess the same once
        more with `after`, the next layer's router, into guess.ids, of which `predicted` is a trace.

        scores f32 [T, N]    h [T, D]    w, after [N, D]    arrived i32 [ARRIVED], 0 before and
        after    predicted u16 [N, L, A], of whose next layer
        """

    def topk_softmax(
        self, ids: Array, weights: Array, logits: Array, num_experts: int, counters: Array
    ) -> None:
        """p = softmax(logits[:, :experts]); ids the A largest, descending, ties to the lower id;
        weights = p[ids] / sum(p[ids]).

        ids u16 [T, A]    weights f32 [T, A]    logits f32 [T, >= experts]    counters[0] += T * A
        """

    def replay_routing(self, ids: Array, trace: Array, layer: int, positions: Array) -> None:
        """ids[t] = trace[positions[t] % N, layer]: routing that is told, not computed.

        ids u16 [T, A]    trace u16 [N, L, A]    positions i32 [T]    A <= 32
        """

    def assign_slots(
        self,
        plan: SlotAssignment,
        cache: ExpertCache,
        layer: int,
        ids: Array,
        prefetch: PrefetchState | None = None,
    ) -> None:
        """Assign a slot of `layer` to every expert of `ids`; updates plan, cache and counters.

        plan.expert: unique ids, ascending; plan.fetch_flags: 1 for misses.  Misses take free slots,
        lowest first, then the slots with the lowest eviction scores.  counters[1] += pairs that
        hit.  With `guess`, also resolve this layer's prefetch and pick the next layer's.
        docs/expert-cache.md has both algorithms.

        ids u16 [T, A], guess.ids too; unique ids at most the capacity
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
        """slots[layer, plan.slot] = records[layer, plan.expert] wherever plan.fetch_flags is set;
        where it is 2, without the segments that guess.segments_done counts.

        counters[2] += uses of the copied experts, counters[3] += experts copied.  `l2_prefetch` is
        read into L2 at the end; it changes nothing.  With `guess`, wait for the prefetch blocks of
        this layer, add their bytes to counters[6], and raise guess.start_signal[layer + 1] by 8.
        """

    def prefetch_experts(
        self, cache: ExpertCache, prefetch: PrefetchState, host_experts: HostExperts
    ) -> None:
        """slots[guess.slot[layer]] = records[layer, guess.expert[layer]] for each layer but the
        first whose expert is not -1, from its guess.start_signal until guess.state has STOP.  Ends
        where no signal comes within 20 ms."""

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
    ) -> None:
        """inner[t, a] = silu(gate_e h[t]) * (up_e h[t]), e = ids[t, a], from the experts' slots;
        shared_inner = gated_up(h, shared.up).

        Without a plan every expert is in the slot of its number.  "hits" may do the pairs whose
        expert was in its slot before this call, and nothing of the others, and does the shared
        expert; "rest" does what "hits" has left.

        inner [T * A, I]    shared_inner [T, Is]    h [T, D]    ids u16 [T, A]
        both f32 [T, 2 Is], scratch
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
    ) -> None:
        """x[t] += sum over a of weights[t, a] * down_e inner[t, a], in a fixed order, plus
        sigmoid(scores[t, column]) * (shared.down shared_inner[t]); then h = norm(x).

        "hits" may leave in y the shared expert's and those of the pairs whose expert was in its
        slot before; "rest" then does what is left.

        x f32 [T, D]    inner [T * A, I]    ids u16 [T, A]    weights f32 [T, A]
        scores f32 [T, > column]    said f32 [T, D], scratch; y too, but between the two parts
        h [T, D]    norm f32 [D]
        """

    def gate_up_silu(
        self, inner: MatmulInput, a: MatmulInput, w: LinearWeight, gate_up: Array
    ) -> None:
        """inner = silu(a @ gate.T) * (a @ up.T), gate the first half of w's rows, up the second.

        inner [T, I]    a [T, K]    w [2I, K]    both f32 [T, 2I], scratch
        """

    def silu_and_mul(self, out: Array, x: Array) -> None:
        """out[t, i] = silu(x[t, i]) * x[t, I + i].

        out f32 [T, I]    x f32 [T, 2I]    I % 4 == 0
        """

    def add_sigmoid_gated(self, out: Array, x: Array, gate: Array, column: int) -> None:
        """out[t] += sigmoid(gate[t, column]) * x[t].

        out, x f32 [T, D]    gate f32 [T, >= column + 1]    D % 4 == 0
        """

    # -- replies -----------------------------------------------------------------------------------

    def sample(self, logits: Array, decode_state: DecodeState) -> None:
        """replies.token[r] = a token drawn from row r: the likeliest (the lower id of equals) at
        temperature 0; else with p = softmax(logits / temperature), in order of p, ties to the lower
        id: the top-k likeliest; of these as few as reach top-p of their sum; of these what has at
        least min-p times the largest p; and the first of them whose running sum of p passes the
        row's chance.  -1 where the largest logit is not finite.

        logits f32 [R, vocab]
        """

    def advance_step(self, step: StepInputs, decode_state: DecodeState) -> None:
        """Write each row's token where the next step reads it, one position on, and mail it.

        A row whose token is of `eos` and heeded, or its last, or -1, ends: from then on it mails -2
        and computes as nobody, at position 0 of a page and slot that are no sequence's.  The step
        has one row a sequence; ids, positions, past, slots and pages of it are written.
        """

    # -- making weights: while loading -----------------------------------------------------------

    def quantize_int4(self, out: Array, data: int, scale: int, w: Array, clips: Array) -> None:
        """out[e]: from byte `data` the nibbles, from byte `scale` the f16 scales of w[e], with the
        groups of group_of(K); see quant/int4.py.

        out u8 [E, bytes]    w bf16 [E, N, K]    clips f32 [C]    data, scale, bytes % 16 == 0
        """

    def quantize_int8(self, out: Array, data: int, scale: int, w: Array) -> None:
        """The same with bytes and f32 scales; see quant/int8.py.  K % 8 == 0"""

    def random_fill(
        self, out: Array, start: int, nbytes: int, seed: int, pattern: BitPattern
    ) -> None:
        """Bytes start .. start + nbytes of each row of `out`: words of the stream of `seed`, each
        by its place in `out`; see quant/random_fill.py.

        out u8 [E, bytes], in VRAM or host memory    start, nbytes, bytes % 16 == 0
        """
