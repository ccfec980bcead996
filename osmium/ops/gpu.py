"""GpuOps: the list of operations on kernels.

Each method is one or two launches.  A kernel's signature is the contract at the top of its file in
ptx/ and is not repeated here.  Operations do not allocate or wait.  Results reach host memory
through `copy_d2h`, which counts its bytes, and through the token ring.
"""

import numpy as np

from osmium.kernels.adjust_logits import ADJUST_LOGITS
from osmium.kernels.logit_histogram import LOGIT_HISTOGRAM, SLICE_MAX
from osmium.kernels.ptx import Kernel, kernel
from osmium.kernels.sample import ADVANCE_STEP, SAMPLE_TOKEN
from osmium.kernels.top_logprobs import TOP_LOGPROBS
from osmium.ops import gpu_experts, gpu_grouped, gpu_rows, mma_rate
from osmium.ops.controls import SamplingControls
from osmium.ops.gpu_experts import GpuExperts
from osmium.ops.runtime import DeviceRuntime
from osmium.ops.tiling import (
    DELTA_CHUNK_MAX_SEQS,
    KV_DTYPES,
    KV_SPLITS,
    PREFILL_HEAD_DIMS,
    PREFILL_PART,
    SPLIT_KV_MAX_SEQS,
    copies_kv_ahead,
    delta_chunk_units,
    is_decode,
    kv_format,
    max_kv_pollers,
    prefill_attention_tokens,
    supports_matvec,
)
from osmium.ops.types import (
    FETCH_BLOCKS,
    Array,
    AttentionWeights,
    AttentionWorkspace,
    DecodeState,
    DeltaNetWorkspace,
    DeltaWeights,
    MatmulInput,
    PagedKV,
    StepInputs,
)

__all__ = ["DeviceRuntime", "GpuOps", "check_kernels"]

ROPE_APPEND = {name: kernel(f"rope_append_{name}") for name in KV_DTYPES}
GQA_ATTENTION = {name: kernel(f"gqa_attention_{name}") for name in KV_DTYPES}
GQA_PREFILL = {
    f"{name}_{dim}{ahead}": kernel(f"gqa_prefill_{name}_{dim}{ahead}")
    for name in KV_DTYPES
    for dim in PREFILL_HEAD_DIMS
    for ahead in ("", "_ahead")
}
GQA_DECODE_SPLIT_KV = {name: kernel(f"gqa_decode_split_kv_{name}") for name in KV_DTYPES}
SIGMOID_GATE = kernel("sigmoid_gate_f32")
SIGMOID_GATE_DIGITS = kernel("sigmoid_gate_digits_f32")
CAUSAL_CONV1D = kernel("causal_conv1d_silu_f32")
DELTA_GATES = kernel("delta_gates_f32")
DELTA_RULE_RECURRENT = kernel("delta_rule_recurrent_f32")
DELTA_NET_DECODE = kernel("delta_net_decode_f32")
DELTA_RULE_CHUNK = kernel("delta_rule_chunk_f32")
DELTA_CHUNK_PREPARE = kernel("delta_chunk_prepare_f32")
DELTA_CHUNK_SCAN = kernel("delta_chunk_scan_f32")
GATED_RMS_NORM = kernel("gated_rms_norm_f32")
GATED_RMS_NORM_DIGITS = kernel("gated_rms_norm_digits_f32")


def check_kernels() -> int:
    """Read and parse the PTX text of every kernel that GpuOps launches; returns their number.

    Takes 60 ms the first time; contracts are cached.
    Raises: KernelError if a text is missing, broken or stale.
    """
    kernels: dict[str, Kernel] = {}
    for module in (
        vars(gpu_rows), vars(gpu_experts), vars(gpu_grouped), vars(mma_rate), globals(),
    ):  # fmt: skip
        for value in module.values():
            for item in value.values() if isinstance(value, dict) else (value,):
                if isinstance(item, Kernel):
                    kernels[item.name] = item
    for item in kernels.values():
        _ = item.contract
    return len(kernels)


class GpuOps(GpuExperts):
    """See ops.Ops for every method's formula, shapes and source."""

    def __init__(self, runtime: DeviceRuntime) -> None:
        """Checks all kernels first, before anything is loaded.  Raises: KernelError."""
        check_kernels()
        super().__init__(runtime)

    def is_decode(self, step: StepInputs) -> bool:
        """Whether the decode kernels take this step: each sequence has one row."""
        return not self.is_prefill and is_decode(step)

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
        tokens, heads, dim = q.shape
        ROPE_APPEND[kv_format(kv)](
            self.stream, tokens, q, *_arrays(kv), qgkv, norms, frequencies,
            step.positions, step.sequence_ids, step.page_table,
            heads, kv.k.shape[2], dim, 2 * frequencies.shape[0],
            step.page_size, step.page_table.shape[1], eps,
        )  # fmt: skip

    def attention(
        self, out: Array, q: Array, kv: PagedKV, step: StepInputs, scale: float,
        context_turns: Array, context_sums: Array,
    ) -> None:  # fmt: skip
        tokens, heads, dim = q.shape
        tokens_per_block = prefill_attention_tokens(q, kv, step, self.is_prefill)
        if tokens_per_block:
            assert step.max_context, "a step that uses prefill attention has a max_context"
            ahead = "_ahead" if copies_kv_ahead(self.runtime) else ""
            GQA_PREFILL[f"{kv_format(kv)}_{dim}{ahead}"](
                self.stream, out, q, *_arrays(kv), step.positions, step.query_start_loc,
                step.page_table, tokens, step.sequences, heads, kv.k.shape[2], tokens_per_block,
                step.page_size, step.page_table.shape[1], scale, context_turns, context_sums,
                -(-step.max_context // PREFILL_PART),
            )  # fmt: skip
            return
        GQA_ATTENTION[kv_format(kv)](
            self.stream, tokens, out, q, *_arrays(kv), step.positions, step.sequence_ids,
            step.page_table, heads, kv.k.shape[2], dim, step.page_size, step.page_table.shape[1],
            scale,
        )  # fmt: skip

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
        w, attn_out = weights, workspace.attn_out
        (tokens, heads, dim), groups = workspace.q.shape, kv.k.shape[2]
        if not self.is_decode(step) or tokens > min(SPLIT_KV_MAX_SEQS, workspace.partial.shape[0]):
            heads_out = attn_out.f32.reshape(tokens, heads, dim)
            self.rope_append(workspace.q, kv, qgkv, w.norms, w.frequencies, step, w.eps)
            turns, sums = workspace.context_turns, workspace.context_sums
            self.attention(heads_out, workspace.q, kv, step, w.scale, turns, sums)
            if self.uses_digits(attn_out, w.out):
                SIGMOID_GATE_DIGITS(
                    self.stream, tokens, attn_out.digits, attn_out.units, heads_out, qgkv,
                    heads * dim, dim, qgkv.shape[1],
                )  # fmt: skip
            else:
                self.sigmoid_gate(heads_out, qgkv)
                self.prepare_input_of(w.out, attn_out)
            self.linear_add_rms_norm(x, attn_out, w.out, h, norm)
            return
        splits = min(KV_SPLITS, workspace.partial.shape[0] // tokens)
        pollers = max_kv_pollers(self.runtime, FETCH_BLOCKS if self.prefetch_is_active else 0)
        # A block computes 128 values of a head, one group of digits: it stores the digits once.
        store_digits = dim % 128 == 0 and w.out.format == "int4" and supports_matvec(w.out)
        GQA_DECODE_SPLIT_KV[kv_format(kv)](
            self.stream, tokens, attn_out.hi_lo, workspace.partial, workspace.split_counters,
            *_arrays(kv), qgkv, w.norms, w.frequencies, step.positions, step.sequence_ids,
            step.page_table, heads, groups, dim, 2 * w.frequencies.shape[0], step.page_size,
            step.page_table.shape[1], splits, pollers, int(store_digits), w.eps, w.scale,
        )  # fmt: skip
        if store_digits:
            self.matvec(x, attn_out, w.out, h, norm, has_digits=True)
        else:
            self.linear_add_rms_norm(x, attn_out, w.out, h, norm)

    def sigmoid_gate(self, out: Array, qgkv: Array) -> None:
        tokens, heads, dim = out.shape
        SIGMOID_GATE(self.stream, tokens, out, qgkv, heads, dim, qgkv.shape[1])

    # -- gated delta net ---------------------------------------------------------------------------

    def causal_conv1d(self, out: Array, u: Array, w: Array, state: Array, step: StepInputs) -> None:
        (tokens, channels), stride = out.shape, u.shape[1]
        CAUSAL_CONV1D(
            self.stream, out, u, w, state, step.sequence_ids, step.query_start_loc,
            step.context_lens, step.state_slots, tokens, channels, stride,
        )  # fmt: skip

    def delta_gates(
        self, decay: Array, beta: Array, ab: Array, a_log: Array, dt_bias: Array
    ) -> None:
        tokens, heads = decay.shape
        DELTA_GATES(self.stream, tokens, decay, beta, ab, a_log, dt_bias, heads)

    def delta_rule_recurrent(
        self, out: Array, qkv: Array, decay: Array, beta: Array, state: Array, step: StepInputs
    ) -> None:
        self._delta(DELTA_RULE_RECURRENT, out, qkv, decay, beta, state, step)

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
        w, qkv, delta_out = weights, workspace.qkv, workspace.delta_out
        _, value_heads, dk, dv = state.shape
        if not self.is_decode(step) or w.ab.format != "bf16":
            heads = delta_out.f32.reshape(delta_out.f32.shape[0], value_heads, dv)
            self.linear(workspace.ab, h, w.ab)
            self.causal_conv1d(qkv, u, w.conv, conv_state, step)
            self.delta_gates(workspace.decay, workspace.beta, workspace.ab, w.a_log, w.dt_bias)
            rule = heads, qkv, workspace.decay, workspace.beta, state, step
            scratch = workspace.chunk_scratch
            # With scratch the bits of a prompt's rows do not depend on how many a step has.
            if chunked or (scratch is not None and not self.is_decode(step)):
                self.delta_rule_chunk(*rule, scratch)
            else:
                self.delta_rule_recurrent(*rule)
            if dv == 128 and self.uses_digits(delta_out, w.out):
                tokens, width = delta_out.f32.shape
                GATED_RMS_NORM_DIGITS(
                    self.stream, tokens, delta_out.digits, delta_out.units, heads, u, w.norm,
                    width, u.shape[1], qkv.shape[1], w.eps,
                )  # fmt: skip
            else:
                self.gated_rms_norm(heads, heads, u, qkv.shape[1], w.norm, w.eps)
                self.prepare_input_of(w.out, delta_out)
            self.linear_add_rms_norm(x, delta_out, w.out, h, norm)
            return
        key_heads = (qkv.shape[1] - value_heads * dv) // (2 * dk)
        # A block computes a head of 128 values, one group of digits: it stores the digits once.
        store_digits = dv == 128 and w.out.format == "int4" and supports_matvec(w.out)
        DELTA_NET_DECODE(
            self.stream, step.sequences, delta_out.hi_lo, u, h.hi_lo, h.square_sums or 0, w.conv,
            conv_state, w.ab.data, w.a_log, w.dt_bias, state, w.norm, step.context_lens,
            step.state_slots, key_heads, value_heads, dk, dv, u.shape[1], w.ab.in_features,
            int(store_digits), h.eps, w.eps,
        )  # fmt: skip
        if store_digits:
            self.matvec(x, delta_out, w.out, h, norm, has_digits=True)
        else:
            if self.uses_digits(delta_out, w.out):  # more than 8 sequences
                self.split_digits_hi_lo(delta_out)
            self.linear_add_rms_norm(x, delta_out, w.out, h, norm)

    def delta_rule_chunk(
        self, out: Array, qkv: Array, decay: Array, beta: Array, state: Array, step: StepInputs,
        scratch: Array | None = None,
    ) -> None:  # fmt: skip
        if scratch is None:
            self._delta(DELTA_RULE_CHUNK, out, qkv, decay, beta, state, step)
            return
        tokens, value_heads, dv = out.shape
        key_heads, units = (qkv.shape[1] // dv - value_heads) // 2, delta_chunk_units(tokens)
        ends = (value_heads * 4096, value_heads * 4096 + key_heads * 2048)
        fragments = scratch[: units * ends[0]].reshape(units, value_heads, 4096)
        keys = scratch[units * ends[0] : units * ends[1]].reshape(units, key_heads, 2048)
        gains = scratch[units * ends[1] : units * (ends[1] + value_heads)]
        gains = gains.view(np.float32).reshape(units, value_heads)
        for first in range(0, step.sequences, DELTA_CHUNK_MAX_SEQS):
            count = min(DELTA_CHUNK_MAX_SEQS, step.sequences - first)
            starts = step.query_start_loc[first : first + count + 1]
            past = step.context_lens[first : first + count]
            # The rows of each sequence are on the device: these are the most chunks that they have.
            chunks = min(tokens, tokens // 64 + 2 * count)
            DELTA_CHUNK_PREPARE(
                self.stream, chunks, fragments, keys, gains, out, qkv, decay, beta, starts, past,
                count, key_heads, value_heads,
            )  # fmt: skip
            DELTA_CHUNK_SCAN(
                self.stream, count, out, state, fragments, keys, gains, qkv, starts, past,
                step.state_slots[first : first + count], key_heads, value_heads,
            )  # fmt: skip

    def _delta(
        self, rule: Kernel, out: Array, qkv: Array, decay: Array, beta: Array, state: Array,
        step: StepInputs,
    ) -> None:  # fmt: skip
        _, value_heads, dk, dv = state.shape
        key_heads = (qkv.shape[1] - value_heads * dv) // (2 * dk)
        rule(
            self.stream, step.sequences, out, qkv, decay, beta, state,
            step.query_start_loc, step.context_lens, step.state_slots, key_heads, value_heads, dk,
            dv,
        )  # fmt: skip

    def gated_rms_norm(
        self, out: Array, x: Array, z: Array, column: int, w: Array, eps: float
    ) -> None:
        tokens, heads, dim = x.shape
        GATED_RMS_NORM(self.stream, tokens, out, x, z, w, heads, dim, z.shape[1], column, eps)

    # -- sampling ----------------------------------------------------------------------------------

    def sample(self, logits: Array, decode_state: DecodeState) -> None:
        r, (rows, vocab) = decode_state, logits.shape
        SLICE_MAX(
            self.stream, rows, r.slice_max, r.slice_argmax, r.bin_counts, r.bin_weights, logits,
            vocab, r.slice_max.shape[1],
        )  # fmt: skip
        self._sample_slices(logits, decode_state)

    def _sample_slices(self, logits: Array, decode_state: DecodeState) -> None:
        """Sample the tokens, once the largest logit of each slice is known."""
        r, (rows, vocab) = decode_state, logits.shape
        slices = r.slice_max.shape[1]
        LOGIT_HISTOGRAM(
            self.stream, rows, r.token, r.bin_counts, r.bin_weights, r.slice_bin_ends,
            r.bin_order, logits, r.slice_max,
            r.slice_argmax, r.sampler_params, vocab, slices,
        )  # fmt: skip
        SAMPLE_TOKEN(
            self.stream, rows, r.token, logits, r.slice_max, r.sampler_params, r.uniforms,
            r.decode_step, r.bin_counts, r.bin_weights, r.slice_bin_ends, r.bin_order, vocab,
            slices, r.ring_size,
        )  # fmt: skip

    def sample_controlled(
        self, logits: Array, step: StepInputs, decode_state: DecodeState,
        controls: SamplingControls,
    ) -> None:  # fmt: skip
        r, c, (rows, vocab) = decode_state, controls, logits.shape
        slices = r.slice_max.shape[1]
        ADJUST_LOGITS(
            self.stream, rows, c.adjusted, r.slice_max, r.slice_argmax, r.bin_counts,
            r.bin_weights, c.raw_max, c.raw_argmax, c.raw_sums, c.blocks_done, c.token_counts,
            logits, c.flags, c.penalties, c.logit_bias, c.token_mask, step.ids, step.positions,
            step.state_slots, vocab, slices, c.token_mask.shape[1],
        )  # fmt: skip
        self._sample_slices(c.adjusted, decode_state)
        TOP_LOGPROBS(
            self.stream, rows, c.logprobs, c.logprob_tokens, c.top_logits, c.top_tokens,
            c.blocks_done, r.token, logits, c.raw_max, c.raw_argmax, c.raw_sums, c.flags,
            step.state_slots, r.decode_step, vocab, slices, r.ring_size,
        )  # fmt: skip

    def advance_step(self, step: StepInputs, decode_state: DecodeState) -> None:
        ADVANCE_STEP(
            self.stream, step.ids, step.positions, step.context_lens, step.state_slots,
            step.page_table, decode_state.token, decode_state.tokens_left, decode_state.stop_on_eos,
            decode_state.eos, decode_state.decode_step, decode_state.token_ring, step.tokens,
            step.page_table.shape[1], decode_state.eos.shape[0], decode_state.ring_size,
            decode_state.null_page,
        )  # fmt: skip


def _arrays(kv: PagedKV) -> tuple[Array, ...]:
    """The arrays in the order of the kernels' parameters."""
    return (kv.k, kv.v) if kv.k_scales is None else (kv.k, kv.v, kv.k_scales, kv.v_scales)
