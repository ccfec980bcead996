"""The values that operations read: a step, a matrix, an expert cache and its plan.

Plain records of arrays.  An array is np.ndarray on the CPU and cuda.DeviceArray on the GPU; both
have shape, dtype, nbytes, slices along the first axis and reshape.  bf16 is kept as uint16 (see
quant/floats.py).  Knows nothing of models, files or CUDA.

Letters: T tokens of a step, S sequences of a step, D hidden, N x K a matrix, E experts, A activated
experts a token, I inner size of an expert, H heads, C channels of the convolution.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from osmium.cuda.memory import Fill
from osmium.kernels.logit_histogram import BINS, SLICE
from osmium.quant.expert_layout import ExpertLayout

__all__ = [
    "DROP", "FETCH_BLOCKS", "FETCH_SEGMENT_BYTES", "FETCH_WARPS", "PREFETCH_SCORE_BIAS",
    "ROUTER_BARRIER_SHAPE", "STOP", "Array", "AttentionWeights", "AttentionWorkspace",
    "DecayConfig", "DecodeState", "DeltaNetWorkspace", "DeltaWeights", "ExpertCache", "Fill",
    "HostExperts", "LinearWeight", "MatmulInput", "PagedKV", "PrefetchState", "SharedExpert",
    "SlotAssignment", "StepInputs", "rows_bytes",
]  # fmt: skip

Array = Any
"""np.ndarray or cuda.DeviceArray, which share no type that a checker knows."""

ROUTER_BARRIER_SHAPE = (8, 288)
"""Of the words in which a router's blocks meet: tokens of a step, beyond which other kernels do its
work, and of each a key an expert, up to 256, and who has sent them."""

FETCH_BLOCKS = 16
"""Thread blocks that copy records: they move 50 GB/s, all that the link has, and leave the other
multiprocessors alone (tools/dma_bandwidth.py, H100, PCIe 5 x16, 2026-11)."""

FETCH_WARPS = 8 * FETCH_BLOCKS
"""Warps of them."""

FETCH_SEGMENT_BYTES = 16 << 10
"""Bytes of a record that a block copies at once, an eighth of them a warp."""

PREFETCH_SCORE_BIAS = 0.02
"""Added to the warmth of an expert, to weigh a guess: about what a use of long ago is worth."""

STOP, DROP = 1 << 30, 1 << 29
"""In PrefetchState.state: slots of the layer are assigned; and the prefetched expert is unused."""

MIN_LOGIT_SLICES = 128
"""Slices of a row of logits that are searched side by side, at least."""


@dataclass(frozen=True)
class LinearWeight:
    """A matrix [N, K] in one of the stored formats; y = x @ W.T.

    bf16  data u16 [N, K]                                               K % 8 == 0
    int8  data i8 [N, K], scale f32 [N]            w = q * s            K % 16 == 0
    int4  data u8 [N, K/2], scale f16 [N, K/group] w = (q - 8) * s      K % 32 == 0; quant/int4.py
    """

    format: Literal["bf16", "int8", "int4"]
    out_features: int
    """N, outputs."""
    in_features: int
    """K, inputs."""
    data: Array
    scale: Array | None = None
    group: int = 0
    """int4: inputs that share a scale, 128, 64 or 32."""


@dataclass(frozen=True)
class MatmulInput:
    """Rows [T, K] on their way into matrices, in the form in which a backend's matrices read them.

    On the CPU that is `f32`.  On the GPU it is `split`, and where the rows are normed `squares`:
    the matrices divide their sums by the root of the mean square.  `f32` is then room for kernels
    that read f32, and for those that write it before `Ops.prepare_input`.
    """

    f32: Array
    """f32 [T, K]."""
    hi_lo: Array | None = None
    """bf16 [T, 2, K]: hi, then lo; hi + lo is the value to 2^-17, without the division."""
    square_sums: Array | None = None
    """f32 [T, K / 8]: sums of eight squares each of what the norm divides; None: not normed."""
    eps: float = 0.0
    """Of the norm."""

    def __getitem__(self, part: slice) -> "MatmulInput":
        """Some of the rows."""
        split, squares = self.hi_lo, self.square_sums
        return MatmulInput(
            self.f32[part],
            None if split is None else split[part],
            None if squares is None else squares[part],
            self.eps,
        )


def rows_bytes(tokens: int, width: int, normed: bool, gpu: bool) -> int:
    """Bytes of Rows on a backend."""
    halves = 4 * width + (width // 2 if normed else 0)
    return tokens * (4 * width + (halves if gpu else 0))


@dataclass(frozen=True)
class DeltaWeights:
    """A delta net's small weights; V value heads of dv values."""

    conv: Array
    """f32 [C, 4], of the oldest input first."""
    ab: LinearWeight
    """[2V, D], the gates' a, then b."""
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
    """Where a delta net's parts leave what they make."""

    qkv: Array
    """f32 [T, C], after the convolution."""
    ab: Array
    """f32 [T, 2V]."""
    decay: Array
    """f32 [T, V]."""
    beta: Array
    """f32 [T, V]."""
    delta_out: MatmulInput
    """[T, V * dv], what the rule reads from its state, normed and gated."""


@dataclass(frozen=True)
class AttentionWeights:
    """What attention has behind its first matrix; H heads of d values, of which R turn."""

    norms: Array
    """f32 [2, d], of queries, then of keys."""
    frequencies: Array
    """f32 [R / 2], radians a position."""
    out: LinearWeight
    """[D, H * d]."""
    eps: float
    scale: float
    """What scores are multiplied by."""


@dataclass(frozen=True)
class AttentionWorkspace:
    """Where attention's parts leave what they make."""

    q: Array
    """f32 [T, H, d], normed and turned, where steps are not of a few sequences' one row each."""
    attn_out: MatmulInput
    """[T, H * d], what is read from values, gated."""
    partial: Array
    """f32 [splits, H, d + 2], what blocks that share contexts leave."""
    split_counters: Array
    """i32 [SPLIT_ROWS, H, 8], 0 before and after: how many have left theirs."""


@dataclass(frozen=True)
class SharedExpert:
    """The expert that every token uses."""

    up: LinearWeight
    """[2 Is, D], gate then up."""
    down: LinearWeight
    """[D, Is]."""
    gate_column: int
    """Column of the router's scores that, through a sigmoid, is its weight."""


@dataclass(frozen=True)
class PagedKV:
    """The keys and values of one attention layer, in pages that sequences share out.

    f32, bf16, or e4m3 (u8; quant/floats.py): then row [page, token, head] is e4m3 times its scale.
    """

    k: Array
    """[pages, page, G, d], after norm and rotation."""
    v: Array
    """[pages, page, G, d]."""
    k_scales: Array | None = None
    """f16 [pages, page, G]; None unless e4m3."""
    v_scales: Array | None = None
    """f16 [pages, page, G]."""


@dataclass(frozen=True)
class StepInputs:
    """Which tokens of which sequences one forward pass computes.

    Sequence s owns the rows starts[s] .. starts[s + 1] of every [T, ...] array, at least one, in
    order of position.  Position p of sequence s is kept at row p % page of page
    pages[s, p // page].
    """

    tokens: int
    """T."""
    sequences: int
    """S."""
    page_size: int
    """Tokens a page of KV."""
    ids: Array
    """i32 [T], token ids."""
    positions: Array
    """i32 [T], from 0 in each sequence."""
    sequence_ids: Array
    """i32 [T], which sequence a row belongs to, 0 .. S - 1."""
    query_start_loc: Array
    """i32 [S + 1]."""
    context_lens: Array
    """i32 [S], tokens of the sequence before this step; 0 means that its recurrent state is all
    zero, whatever the state slot holds."""
    state_slots: Array
    """i32 [S], the recurrent-state slot of each sequence."""
    page_table: Array
    """i32 [S, P], the page table; entries past the sequence's end are never read."""


@dataclass(frozen=True)
class HostExperts:
    """Every routed expert, as one contiguous record each, in host memory.

    On the GPU `records` is the device's view of mapped host memory.
    """

    layout: ExpertLayout
    packed: Array
    """u8 [L, E, record.nbytes]."""


@dataclass(frozen=True)
class DecayConfig:
    """How two counts of an expert's uses, one that fades fast and one that fades slowly, become
    its warmth.

    warmth = grown * heat + share * long_heat, in f32, both heats as of now
    grown = 1 - 2^(-(step + earlier) / long_half_life)
    long_scale = weight * (1 - 2^(-1 / long_half_life)) / (1 - 2^(-1 / half_life))

    That is the order of heat's uses a step plus `weight` times long heat's.  A count is uses a
    step once it is divided by the sum of its weights, 1 / (1 - 2^(-1 / half_life)) in the end; of
    the long one's, `grown` is there after so many steps.
    """

    half_life: float
    """Steps in which an unused expert loses half of its heat."""
    long_half_life: float
    """The same of its long heat."""
    long_weight: float
    """What a use a step over the long count is worth, beside one over the other."""
    prior_steps: int
    """Steps without a use, said to have been before the first: first uses are no rate yet."""

    @property
    def long_scale(self) -> float:
        """What long heat is multiplied by."""
        return (
            self.long_weight
            * (1 - 2 ** (-1 / self.long_half_life))
            / (1 - 2 ** (-1 / self.half_life))
        )


@dataclass(frozen=True)
class ExpertCache:
    """The experts in VRAM: S slots of each layer, who is in them, how much each expert is used.

    `step` counts forward passes from 1, so that a stamp of 0 means never used.  Heats are stored as
    they were at the stamp; now a heat is heat * exp2((stamp - step) * (1 / half_life)), in f32, and
    a long heat the same with its own half-life.
    """

    layout: ExpertLayout
    num_experts: int
    """E."""
    decay: DecayConfig
    """What makes an expert warm."""
    slots: Sequence[Array]
    """u8 [S, record.nbytes] of each layer, which may have more or fewer than another."""
    expert_to_slot: Array
    """i32 [L, E], the slot of an expert, or -1."""
    slot_to_expert: Sequence[Array]
    """i32 [S] of each layer, the expert in a slot, or -1."""
    short_count: Array
    """f32 [L, E]."""
    long_count: Array
    """f32 [L, E]."""
    last_used: Array
    """i32 [L, E], the step of the last use."""
    step: Array
    """i32 [1], raised by one at the last layer's `place` of a forward pass."""
    counters: Array
    """i64 [7], in pairs of a token and an expert: routed (counted by `route`), hit (by `place`),
    fetched (by `fetch`, for the records that it copied); then records copied; experts that were
    guessed, and those of them that were asked for (both by `place`); and what had come of these
    before their layer was placed, in warps' shares of a piece, 2 KiB (by `fetch`).
    routed == hit + fetched."""
    storage: tuple[Array, Array] | None = None
    """The slots of all layers, one after another, and `expert_in` of them: what is cut into layers
    (experts.cache.resize_layers)."""

    @property
    def capacity(self) -> int:
        """S in the mean; E where all layers are wholly resident."""
        slots: int = sum(layer.shape[0] for layer in self.slots)
        return slots // len(self.slots)


@dataclass(frozen=True)
class PrefetchState:
    """Of each layer at most one expert that is fetched before the layer is placed, while the link
    has nothing else to do.

    The next layer's router, shown what this layer's was, says whom it would choose; `place` of this
    layer picks one of those that are in no slot, and gives it one.  The expert is in none of the
    cache's tables until its own layer is placed: it has then come, wholly or in part, or nobody
    asked for it.  What the routers write is scratch.
    """

    ids: Array
    """u16 [rows, A], whom the next layer's router would choose."""
    weights: Array
    """f32 [rows, A], and by how much."""
    router_logits: Array
    """f32 [rows, N], scratch."""
    counters: Array
    """i64 [4], scratch."""
    barrier: Array
    """i32 [ARRIVED], 0."""
    expert: Array
    """i32 [L], who it is, or -1; -1 again once the layer is placed."""
    slot: Array
    """i32 [L], its slot, which the cache's tables call free; counted over all layers."""
    state: Array
    """i32 [L, FETCH_BLOCKS], per block of `prefetch_experts`: 1 once it has begun with the layer,
    2^15 more once it has left it; STOP is added when the layer is placed, and DROP if the guess was
    wrong."""
    segments_done: Array
    """i32 [L, FETCH_WARPS], the pieces of 16 KiB that each warp has brought its share of."""
    start_signal: Array
    """i32 [L, FETCH_BLOCKS], 16 times the number of the step in which the layer before was placed
    last, from 1 on, and 0, or the warps of `fetch`'s block that have done that layer: with 8 this
    one's guess has the link.  15 when the layer is placed itself."""


@dataclass(frozen=True)
class SlotAssignment:
    """What `place` decided for one layer: which experts are needed, where, and what to fetch.

    U is the most experts that one call can need: min(E, rows * A).
    """

    count: Array
    """i32 [1], unique experts of this call."""
    expert: Array
    """i32 [U], their ids, ascending, but for one that was guessed: it is the first; entries past
    the count are -1."""
    slot: Array
    """i32 [U], their slots."""
    fetch_flags: Array
    """i32 [U], 1 where the record must be copied into the slot, 2 where some of it may be there
    because it was guessed, else 0."""
    uses: Array
    """i32 [U], pairs of this call that use the expert."""
    pair_slots: Array
    """i32 [rows, A], the slot of each pair of a token and an expert; ~slot (below 0) where the
    expert is fetched by this call."""
    fetch_progress: Array
    """i32 [2], 0 from `place`.  On the GPU the warps of `fetch` that have stored all their bytes of
    gates and ups, and that are done: who computes missed experts begins while the rest arrives."""


@dataclass(frozen=True)
class DecodeState:
    """What decoding needs to go on by itself from one step to the next; R rows, one a sequence.

    `chance` and `mail` are memory of the host that both sides reach; turn t uses row t % ring of
    them.
    """

    ring_size: int
    """Turns that may be on their way at once."""
    null_slot: int
    """State slot that is no sequence's: where rows that have ended write."""
    null_page: int
    """Page that is no sequence's."""
    sampler_params: Array
    """f32 [R, 4]: temperature, top-k (below 1: all), top-p, min-p."""
    uniforms: Array
    """f64 [ring, R], a number in [0, 1) for every draw."""
    token: Array
    """i32 [R], what was drawn last; -1 where the largest logit was not finite."""
    tokens_left: Array
    """i32 [R], tokens that a row may still say; 0 once it has ended."""
    stop_on_eos: Array
    """i32 [R], 1 where a token of `eos` ends the row."""
    eos: Array
    """i32 [N]."""
    decode_step: Array
    """i32 [1], turns done."""
    token_ring: Array
    """i32 [1 + ring * R]: turns done, then the tokens of each turn of the ring; -2 for a row that
    had ended before."""
    slice_max: Array
    """f32 [R, slices], scratch."""
    slice_argmax: Array
    """i32 [R, slices], scratch."""
    bin_counts: Array
    """u32 [R, bins], scratch, as are all that follow."""
    bin_weights: Array
    """u64 [R, bins + 1]."""
    slice_bin_ends: Array
    """u16 [R, slices, bins]."""
    bin_order: Array
    """u16 [R, vocab]."""

    @staticmethod
    def scratch(rows: int, vocab: int) -> dict[str, tuple[tuple[int, ...], type[np.generic]]]:
        """Shape and type of each array that is scratch."""
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
        """The same for fewer rows, from the start of every array."""
        return replace(
            self,
            sampler_params=self.sampler_params[:rows],
            uniforms=self.uniforms.reshape(-1)[: self.ring_size * rows].reshape(
                self.ring_size, rows
            ),
            token=self.token[:rows],
            tokens_left=self.tokens_left[:rows],
            stop_on_eos=self.stop_on_eos[:rows],
            token_ring=self.token_ring[: 1 + self.ring_size * rows],
            slice_max=self.slice_max[:rows],
            slice_argmax=self.slice_argmax[:rows],
            bin_counts=self.bin_counts[:rows],
            bin_weights=self.bin_weights[:rows],
            slice_bin_ends=self.slice_bin_ends[:rows],
            bin_order=self.bin_order[:rows],
        )
