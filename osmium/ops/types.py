"""The arguments of operations: steps, matrices, the KV cache, the expert cache and its plans.

Dataclasses of arrays.  An array is np.ndarray on the CPU and cuda.DeviceArray on the GPU; both have
shape, dtype, nbytes, slices along the first axis and reshape.  No models, files or CUDA here.

Layouts: an array's docstring starts with its dtype and shape, as in `f32 [T, H, d]`.  Arrays are
row-major.  Names after a colon are the entries of the last axis, in order.  bf16 is stored as
uint16, e4m3 as uint8 (quant/floats.py).  tests/ops/test_layouts.py compares these lines with the
allocated arrays; test_element_order.py compares element orders with the bytes of kernels.

Letters: T tokens and S sequences of a step; D hidden size; N, K outputs and inputs of a matrix; L
layers; E experts; A experts per token; I, Is inner sizes of a routed and the shared expert; H query
heads and G key/value heads of d values; U key heads of dk and V value heads of dv values in a delta
net; C channels of its convolution; R rows of logits, one per sequence.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from osmium.cuda.memory import Fill
from osmium.kernels.logit_histogram import BINS, SLICE
from osmium.quant.expert_layout import ExpertLayout

__all__ = [
    "FETCH_BLOCKS", "FETCH_SEGMENT_BYTES", "FETCH_WARPS", "PREFETCH_DISCARD", "PREFETCH_SCORE_BIAS",
    "PREFETCH_STOP", "ROUTER_BARRIER_SHAPE", "Array", "AttentionWeights", "AttentionWorkspace",
    "DecayConfig", "DecodeState", "DeltaNetWorkspace", "DeltaWeights", "Empty", "ExpertCache",
    "Fill", "HostExperts", "LinearWeight", "MatmulInput", "PagedKV", "PrefetchState",
    "SharedExpert", "SlotAssignment", "StepInputs",
]  # fmt: skip

Array = Any
"""np.ndarray or cuda.DeviceArray; they have no common static type."""

Empty = Callable[[tuple[int, ...], Any], Array]
"""Allocates an array of a shape and dtype, as `Ops.empty` does."""

ROUTER_BARRIER_SHAPE = (8, 288)
"""Shape of the router kernel's barrier, i32 [tokens, words].  Words 0 to 255 of a token are logits
as sortable keys; word 256 counts the blocks that have stored theirs.  Larger steps use other
kernels."""

FETCH_BLOCKS = 16
"""Thread blocks that copy experts.  They reach 50 GB/s, the link's limit, and occupy few
multiprocessors (tools/dma_bandwidth.py, H100, PCIe 5 x16, 2026-11)."""

FETCH_WARPS = 8 * FETCH_BLOCKS
"""Warps of these blocks."""

FETCH_SEGMENT_BYTES = 16 << 10
"""Bytes of a packed expert that a block copies at a time.  Segment i belongs to block
i % FETCH_BLOCKS; each of its eight warps copies an eighth."""

PREFETCH_SCORE_BIAS = 0.02
"""Added to an expert's eviction score when a prefetch is picked: about the score of one old use."""

PREFETCH_STOP, PREFETCH_DISCARD = 1 << 30, 1 << 29
"""Bits of PrefetchState.state.  Stop: the layer's slots are assigned.  Discard: the prefetched
expert was not routed."""

MIN_LOGIT_SLICES = 128
"""Fewest slices into which the sampler cuts a row of logits; one thread block searches each."""


@dataclass(frozen=True)
class LinearWeight:
    """A matrix [N, K] in one of the stored formats; y = x @ W.T.

    bf16  data bf16 [N, K]    w = data    K % 8 == 0
    int8  data i8 [N, K]    scale f32 [N]    w = data * scale    K % 16 == 0
    int4  data u8 [N, K / 2]    scale f16 [N, K / group]    w = (q - 8) * scale    K % 32 == 0

    int4's q is unsigned, two per byte, in the order of quant/int4.py.
    """

    format: Literal["bf16", "int8", "int4"]
    out_features: int
    """N, outputs."""
    in_features: int
    """K, inputs."""
    data: Array
    scale: Array | None = None
    group: int = 0
    """int4: inputs per scale, 128, 64 or 32; 0 in the other formats."""


@dataclass(frozen=True)
class MatmulInput:
    """The activations [T, K] that matrices read, in the backend's form.

    The CPU reads `f32`.  GPU matrices read `hi_lo`, or `digits`.  With `square_sums` those of hi_lo
    divide their sums by the root mean square themselves.  `f32` is then scratch: for kernels that
    read f32, and for those that write it before `Ops.prepare_input`.
    """

    f32: Array
    """f32 [T, K]."""
    hi_lo: Array | None = None
    """bf16 [T, K / 2, 4]: hi, hi, lo, lo.

    Entry [t, k // 2] holds hi, then lo, of the values 2 (k // 2) and 2 (k // 2) + 1.  hi is the
    value rounded to bf16, lo the rounded rest: hi + lo is right to 2^-17.  Of a normed input the
    value is x * (1 + w), before the division by the root mean square.  `GpuOps.matvec` has the
    digits that some kernels store in the same bytes."""
    square_sums: Array | None = None
    """f32 [T, K / 8], the sum of x^2 over inputs 8 i to 8 i + 7 in entry i.  x is the norm's input.
    None: the input is not normed."""
    eps: float = 0.0
    """Epsilon of the norm: it divides by sqrt(mean(x^2) + eps)."""
    digits: Array | None = None
    """i8 [T, K / 128, 2, 128], or None for other K: two digits of each value (split_digits.ptx).

    `GpuRows.has_digits` says when INT4 and INT8 matrices read them."""
    units: Array | None = None
    """f32 [T, K / 128], the unit of each group of 128 values."""

    def __getitem__(self, part: slice) -> "MatmulInput":
        """A view of some rows."""
        parts = (self.hi_lo, self.square_sums, self.digits, self.units)
        hi_lo, square_sums, digits, units = (None if a is None else a[part] for a in parts)
        return MatmulInput(self.f32[part], hi_lo, square_sums, self.eps, digits, units)


DIGIT_GROUP = 128
"""Inputs that share a unit of their digits, and an INT4 scale."""


@dataclass(frozen=True)
class DeltaWeights:
    """A delta net's weights behind its first matrix."""

    conv: Array
    """f32 [C, 4], the tap of the oldest input first."""
    ab: LinearWeight
    """[2V, D], the gates' a rows, then b rows."""
    a_log: Array
    """f32 [V]."""
    dt_bias: Array
    """f32 [V]."""
    norm: Array
    """f32 [dv]."""
    out: LinearWeight
    """[D, V * dv]."""
    eps: float


@dataclass(frozen=True)
class DeltaNetWorkspace:
    """Intermediate arrays of a delta net."""

    qkv: Array
    """f32 [T, C], the convolution's output: U queries, U keys, V values."""
    ab: Array
    """f32 [T, 2V], the gates' a, then b."""
    decay: Array
    """f32 [T, V], log of the decay."""
    beta: Array
    """f32 [T, V]."""
    delta_out: MatmulInput
    """[T, V * dv], the rule's output, normed and gated."""
    chunk_scratch: Array | None = None
    """Scratch of delta_rule_chunk: u32, tiling.delta_chunk_words of them."""


@dataclass(frozen=True)
class AttentionWeights:
    """An attention layer's weights behind its first matrix; `rotary` values of a head rotate."""

    norms: Array
    """f32 [2, d], the weights of the query norm, then of the key norm."""
    frequencies: Array
    """f32 [rotary / 2], radians per position."""
    out: LinearWeight
    """[D, H * d]."""
    eps: float
    """Epsilon of both norms."""
    scale: float
    """Factor of q . k."""


@dataclass(frozen=True)
class AttentionWorkspace:
    """Intermediate arrays of an attention layer."""

    q: Array
    """f32 [T, H, d], normed and rotated queries; unused by the split-KV kernel."""
    attn_out: MatmulInput
    """[T, H * d], the gated attention output."""
    partial: Array
    """f32 [splits, H, d + 2], the capacity of the split-KV partial sums, one flat array.

    A step of T tokens with s parts per context uses T * s of the splits.  First come the sums of
    v * 2^(score - largest), [T, H, s, d].  Behind them come [T, H, s, 2]: largest, total.  total is
    the sum of 2^(score - largest); with e4m3 pages `largest` includes log2 of v's scale."""
    context_turns: Array
    """i32 [>= T, G], zero between steps; parts of contexts that prefill attention has added.

    Entry (b, g) is that of block b of rows and KV head g.  It is 0 again after the last part."""
    context_sums: Array
    """f32 [T, 2, H, 2], the softmax's reference and total after an even part and an odd one."""
    split_counters: Array
    """i32 [SPLIT_KV_MAX_SEQS, H, 8], zero between steps; split-KV arrival counters, one flat array.

    Entry (t * g + b) * 8 counts the blocks of token t and head group b that have stored their sums.
    g is the number of head groups, G * ceil(H / (16 G)).  A counter has 32 bytes of its own."""


@dataclass(frozen=True)
class SharedExpert:
    """The expert that every token uses."""

    up: LinearWeight
    """[2Is, D], gate rows, then up rows."""
    down: LinearWeight
    """[D, Is]."""
    gate_column: int
    """Column of the router logits whose sigmoid is this expert's weight."""


@dataclass(frozen=True)
class PagedKV:
    """The keys and values of one attention layer, in pages.

    k and v are f32, bf16 or e4m3.  An e4m3 row of d values is multiplied by its scale.
    `StepInputs` has the place of a position.
    """

    k: Array
    """[pages, page_size, G, d], after norm and rotation."""
    v: Array
    """[pages, page_size, G, d]."""
    k_scales: Array | None = None
    """f16 [pages, page_size, G]; None unless k is e4m3."""
    v_scales: Array | None = None
    """f16 [pages, page_size, G]; None unless v is e4m3."""


@dataclass(frozen=True)
class StepInputs:
    """The tokens that one forward pass computes.

    Sequence s has rows query_start_loc[s] to query_start_loc[s + 1] - 1 of each [T, ...] array: at
    least one, in order of position.  Position p of sequence s is row p % page_size of KV page
    page_table[s, p // page_size].
    """

    tokens: int
    """T."""
    sequences: int
    """S."""
    page_size: int
    """Tokens per KV page."""
    ids: Array
    """i32 [T], token ids."""
    positions: Array
    """i32 [T], from 0 in each sequence."""
    sequence_ids: Array
    """i32 [T], the sequence of each row, 0 to S - 1."""
    query_start_loc: Array
    """i32 [S + 1], the first row of each sequence, then T."""
    context_lens: Array
    """i32 [S], tokens of the sequence before this step.  0: its recurrent state counts as zero,
    whatever the state slot holds."""
    state_slots: Array
    """i32 [S], the recurrent-state slot of each sequence.

    Below 0: it has no state.  None is read or written, and the output of its delta rule is zero."""
    page_table: Array
    """i32 [S, max_pages_per_seq]; entries past the sequence's end are never read."""
    max_context: int = 0
    """At least the longest context's positions, the step's own included.  0: unknown to the host,
    as in decode steps; prefill attention needs it."""


@dataclass(frozen=True)
class HostExperts:
    """All routed experts in host memory; on the GPU, the device's view of mapped host memory."""

    layout: ExpertLayout
    """Offsets inside a packed expert."""
    packed: Array
    """u8 [L, E, nbytes], a packed expert each; nbytes is `layout.nbytes`."""


@dataclass(frozen=True)
class DecayConfig:
    """How an expert's eviction score follows from its two decayed use counts.

    score = short_scale * short_count + long_scale * long_count, in f32, counts decayed to now
    short_scale = 1 - 2^(-(step + prior_steps) / long_half_life)
    long_scale = long_weight * (1 - 2^(-1 / long_half_life)) / (1 - 2^(-1 / half_life))

    This orders experts by short rate + `long_weight` * long rate, in uses per step.  A rate is the
    count over the sum of its weights: docs/expert-cache.md.
    """

    half_life: float
    """Steps in which the short count halves."""
    long_half_life: float
    """Steps in which the long count halves."""
    long_weight: float
    """Weight of the long rate; the short rate has weight 1."""
    prior_steps: int
    """Steps without uses that count as counted before the first, so that the first uses are not
    taken for a rate."""

    @property
    def long_scale(self) -> float:
        """Factor of the long count."""
        return (
            self.long_weight
            * (1 - 2 ** (-1 / self.long_half_life))
            / (1 - 2 ** (-1 / self.half_life))
        )


@dataclass(frozen=True)
class ExpertCache:
    """The experts in VRAM: slots per layer, the expert in each slot, and use counts.

    `step` counts forward passes from 1, so last_used == 0 means never used.  Counts are stored as
    of last_used.  Decayed to now, in f32: count * exp2((last_used - step) * (1 / half_life)).
    """

    layout: ExpertLayout
    """Offsets inside a slot."""
    num_experts: int
    """E."""
    decay: DecayConfig
    """How eviction scores follow from the counts."""
    slots: Sequence[Array]
    """u8 [slots, nbytes], one array per layer; layers may differ in slots.  nbytes is
    `layout.nbytes`."""
    expert_to_slot: Array
    """i32 [L, E], the slot of an expert in its layer, or -1."""
    slot_to_expert: Sequence[Array]
    """i32 [slots], one array per layer: the expert in a slot, or -1."""
    short_count: Array
    """f32 [L, E], uses decayed by `decay.half_life`."""
    long_count: Array
    """f32 [L, E], uses decayed by `decay.long_half_life`."""
    last_used: Array
    """i32 [L, E], the step of the last use."""
    step: Array
    """i32 [1], forward passes done; the last layer's slot assignment, or count_uses, adds one."""
    counters: Array
    """i64 [7]: routed, hit, missed, copied, prefetched, prefetch_hits, prefetched_eighths.

    The first three count routed pairs, and routed == hit + missed; the next three count experts.
    The router writes routed; slot assignment hit, prefetched and prefetch_hits; the fetch missed,
    copied and prefetched_eighths; count_uses hit, missed and copied.  The last counts eighths of
    segments, 2 KiB each, that a prefetch hit had copied before its slot was assigned."""
    storage: tuple[Array, Array] | None = None
    """`slots` and `slot_to_expert` of all layers as one array each, in order of layers.
    `experts.cache.resize_layers` cuts them anew.  Staging slots follow the slots of all layers."""

    @property
    def capacity(self) -> int:
        """Mean slots per layer, rounded down; E if all layers are wholly resident."""
        slots: int = sum(layer.shape[0] for layer in self.slots)
        return slots // len(self.slots)


@dataclass(frozen=True)
class PrefetchState:
    """The prefetch of at most one expert per layer, before the layer's slots are assigned.

    This layer's router kernel also applies the next layer's router.  Slot assignment of this layer
    picks one predicted expert that has no slot, and reserves a slot for it.  The expert enters the
    cache's tables only if its own layer routes it: docs/prefetch.md.
    """

    ids: Array
    """u16 [rows, A], the experts that the next layer's router predicts."""
    weights: Array
    """f32 [rows, A], their routing weights."""
    router_logits: Array
    """f32 [rows, E + 1], scratch of the next layer's router."""
    counters: Array
    """i64 [4], scratch of the next layer's router."""
    barrier: Array
    """i32 [8, 288], zero between steps; of ROUTER_BARRIER_SHAPE."""
    expert: Array
    """i32 [L], the prefetched expert, or -1; -1 again once the layer's slots are assigned."""
    slot: Array
    """i32 [L], its slot, numbered over all layers; the cache's tables list it as free."""
    state: Array
    """i32 [L, FETCH_BLOCKS], progress of each prefetch block: 1 once it has begun the layer, plus
    2^15 once it has ended it.  Slot assignment adds PREFETCH_STOP, and PREFETCH_DISCARD if the
    expert was not routed."""
    segments_done: Array
    """i32 [L, FETCH_WARPS], segments of which the prefetch has copied each fetch warp's eighth."""
    start_signal: Array
    """i32 [L, FETCH_BLOCKS], 16 * step + n.

    step is the step, from 1, in which the previous layer's slots were last assigned.  n counts the
    warps of the fetch's block that are done with the previous layer; at 8 the prefetch may use the
    link.  n is 15 once the layer's own slots are assigned."""


@dataclass(frozen=True)
class SlotAssignment:
    """The plan of one layer: its experts, their slots, and which must be fetched.

    `unique` is the most experts that one call can need: min(E, rows * A).  Entries past `count` are
    unspecified, but for `expert`.
    """

    count: Array
    """i32 [1], unique experts of this call."""
    expert: Array
    """i32 [unique], their ids, ascending, but a prefetch hit is first; -1 past the count."""
    slot: Array
    """i32 [unique], their slots."""
    fetch_flags: Array
    """i32 [unique], 1: copy the expert into its slot; 2: copy what the prefetch has not copied; 0:
    it is in its slot."""
    uses: Array
    """i32 [unique], routed pairs of this call per expert."""
    pair_slots: Array
    """i32 [rows, A], the slot of each routed pair; ~slot, below 0, if this call fetches it."""
    fetch_progress: Array
    """i32 [2]: up_stored, done.

    Counts fetch warps: those that have stored their bytes of gate and up, and those that are done.
    Slot assignment clears both.  Expert kernels poll them, so they run while the rest arrives."""
    partial_out: Array | None = None
    """i64 [few, D], exact sums of hits and shared expert, which the rest is added to; see
    ptx/int4_moe_down_fused_f32.ptx.  Only on a GPU, for steps of up to `few` rows."""


@dataclass(frozen=True)
class DecodeState:
    """What decode steps pass to the next on the device; a row is a sequence.

    `uniforms` and `token_ring` are mapped host memory.  Decode step i uses entry i % ring_size of
    both.  The arrays from `slice_max` on are scratch of the sampler: docs/sampling.md.
    """

    ring_size: int
    """Most steps in flight."""
    null_page: int
    """KV page of no sequence; ended rows write to it."""
    sampler_params: Array
    """f32 [R, 4]: temperature, top_k, top_p, min_p.

    temperature 0 is greedy; a top_k below 1 keeps all tokens."""
    uniforms: Array
    """f64 [ring_size, R], a random number in [0, 1) per sample."""
    token: Array
    """i32 [R], the sampled tokens; -1 if the row's largest logit was not finite."""
    tokens_left: Array
    """i32 [R], tokens that a row may still generate; 0 once it has ended."""
    stop_on_eos: Array
    """i32 [R], 1 if a token of `eos` ends the row."""
    eos: Array
    """i32 [num_eos], the end-of-sequence tokens."""
    decode_step: Array
    """i32 [1], decode steps done."""
    token_ring: Array
    """i32 [1 + ring_size * R], decode steps done, then [ring_size, R] tokens.

    -2 stands for a row that had ended before the step."""
    slice_max: Array
    """f32 [R, slices], the largest logit of a slice of the row."""
    slice_argmax: Array
    """i32 [R, slices], the first token that has it; -1 if a logit is not finite."""
    bin_counts: Array
    """u32 [R, bins], tokens in each bin below the row's largest logit."""
    bin_weights: Array
    """u64 [R, bins + 1], the sum of probabilities in each bin, then of those that min_p keeps.  The
    unit is 2^-40 of the largest."""
    slice_bin_ends: Array
    """u16 [R, slices, bins], tokens of the slice in this and earlier bins."""
    bin_order: Array
    """u16 [R, vocab], each slice's tokens by bin, counted from the slice's first token."""

    @staticmethod
    def scratch(rows: int, vocab: int) -> dict[str, tuple[tuple[int, ...], type[np.generic]]]:
        """Shape and dtype of each array from `slice_max` on, for `rows` rows of `vocab` logits."""
        slices = max(MIN_LOGIT_SLICES, -(-vocab // SLICE))
        return {
            "slice_max": ((rows, slices), np.float32),
            "slice_argmax": ((rows, slices), np.int32),
            "bin_counts": ((rows, BINS), np.uint32),
            "bin_weights": ((rows, BINS + 1), np.uint64),
            "slice_bin_ends": ((rows, slices, BINS), np.uint16),
            "bin_order": ((rows, vocab), np.uint16),
        }

    def first_rows(self, rows: int) -> "DecodeState":
        """A view for fewer rows.  Rings are re-cut, so their contents do not carry over."""
        names = ("sampler_params", "token", "tokens_left", "stop_on_eos", *self.scratch(1, 1))
        cut = {name: getattr(self, name)[:rows] for name in names}
        count = self.ring_size * rows
        uniforms = self.uniforms.reshape(-1)[:count].reshape(self.ring_size, rows)
        return replace(self, uniforms=uniforms, token_ring=self.token_ring[: 1 + count], **cut)
