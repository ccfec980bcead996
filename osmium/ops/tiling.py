"""Which shapes the kernels for few tokens support, and how their blocks divide the work."""

import math
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np

from osmium.errors import ConfigError
from osmium.kernels.group_by_expert import MAX_EXPERTS
from osmium.ops.runtime import DeviceRuntime
from osmium.ops.types import DIGIT_GROUP, Array, LinearWeight, PagedKV, SharedExpert, StepInputs
from osmium.quant.expert_layout import ExpertLayout

__all__ = [
    "DELTA_CHUNK_MAX_SEQS", "KV_DTYPES", "KV_SPLITS", "MATVEC_MAX_TOKENS", "MAX_EXPERT_TILES",
    "PREFILL_HEAD_DIMS", "SPLIT_KV_MAX_SEQS", "Tiling", "bf16_gemm_kind", "bf16_gemm_stages",
    "bf16_narrow_stages", "copies_kv_ahead", "delta_chunk_units", "delta_chunk_words",
    "fits_shared", "gemm_stages", "input_shapes", "is_decode", "kv_format", "max_kv_pollers",
    "prefill_attention_tokens", "rows_bytes", "supports_fused_experts", "supports_gemm",
    "supports_grouped_experts", "supports_matvec", "tile_expert_down", "tile_matrix",
    "wgmma_stages",
]  # fmt: skip

MATVEC_K_MULTIPLE = {"bf16": 64, "int8": 64, "int4": 128}
"""The matvec kernels need K to be a multiple of this; the generic kernels take other K."""

MATVEC_MAX_TOKENS = 8
"""Most tokens per block of a matvec kernel: half of the 16 rows of an mma tile."""

MAX_EXPERT_TILES = 32
"""Most expert tiles per block: one lane holds the address of one tile."""

INT4_MAX_TOKENS = 5
"""Most tokens per block of the INT4 matvec kernel: three digits each in an mma tile's 16 rows."""

MAX_NORM_K = 4096
"""Largest K for which the kernels for few tokens apply the norm of their input."""

WEIGHT_STAGE_BYTES = 32 << 10
"""Bytes of shared memory for a block's weight loads in flight."""

REDUCTION_BYTES = 2 << 10
"""Bytes of shared memory per token for the sums of a block's warps."""

DOWN_REDUCTION_BYTES = 8832
"""Bytes of shared memory of the expert down kernel for its sums, the first warp's state, a flag."""

MAX_SCALE_BYTES = 16 << 10
"""Most bytes of shared memory for a block's INT4 scales."""

GEMM_STAGE_BYTES = {4: 24832, 8: 33024}
"""Bytes of one stage of gemm_digits.ptx, by bits of a weight."""

WGMMA_STAGE_BYTES = {4: 25600, 8: 33792}
"""Bytes of one stage of gemm_wgmma.ptx, by bits of a weight."""

MAX_GRID_ROWS = 65535
"""Most thread blocks along axis y of a grid."""

BF16_GEMM_K = 32
"""Inputs of one stage of gemm_bf16.ptx; K must be a multiple of it."""

BF16_GEMM_STAGE_BYTES = 16384
"""Bytes of one stage of a block of 64 x 128 of gemm_bf16.ptx."""

BF16_NARROW_STAGE_BYTES = 32768
"""Bytes of one stage of all parts of a block of bf16_gemm_narrow_f32."""

BF16_NARROW_OUTPUTS = 320
"""Most rows of a BF16 matrix of bf16_gemm_narrow_f32: routers of up to 319 experts, the delta net's
gates.  The matrix alone decides, as this kernel's order of sums is its own.  An estimate."""

KV_DTYPES = {"bf16": np.uint16, "fp8": np.uint8}
"""Dtype of keys and values, by the suffix of the kernels' names."""

SPLIT_KV_MAX_SEQS = 8
"""Most sequences of a split-KV step; more sequences fill a GPU without splits."""

SPLIT_KV_SHARED_BYTES = 96 << 10
"""Most bytes of shared memory of a split-KV block."""

PREFILL_HEAD_DIMS = (128, 256)
"""Head sizes of the prefill attention kernels."""

PREFILL_ROWS = {"bf16": 32, "fp8": 64}
"""Matrix rows of a block of prefill attention: query heads of a KV head times tokens."""

PREFILL_AHEAD_SHARED_BYTES = 109840
"""Most bytes of shared memory of a prefill attention block that copies keys and values ahead."""

PREFILL_PART = 4096
"""Positions of a part of a context in prefill attention: PART of ptx/gqa_prefill.ptx.

Blocks of different parts run at once, so few rows of a long context use all multiprocessors."""

PREFILL_MIN_TOKENS = 9
"""Fewest tokens of a step for which prefill attention is used; a decode step never uses it."""

KV_SPLITS = 128
"""Blocks per context in decode attention.

Every GPU, and a step of any number of rows, divides a context like this, so the sums' order is the
same.  With two KV heads, as Qwen3.5 has, 256 blocks fill an H200, two per multiprocessor."""

DELTA_CHUNK_MAX_SEQS = 8
"""Most sequences per launch of the chunked delta rule, which bounds its scratch.  More sequences
take turns."""


@dataclass(frozen=True)
class Tiling:
    """How a kernel's blocks divide a matrix."""

    blocks: int
    """Thread blocks per group of tokens."""
    tiles: int
    """Most tiles per block."""
    max_tokens: int
    """Most tokens per block."""

    def tokens_per_block(self, tokens: int) -> int:
        """Tokens per block in a step of `tokens`."""
        return min(tokens, self.max_tokens)


def tile_matrix(
    runtime: DeviceRuntime,
    out_features: int,
    in_features: int,
    tile_rows: int,
    has_digits: bool,
    fraction: float = 1.0,
    max_tiles: int | None = None,
) -> Tiling:
    """Divide a matrix [out_features, in_features] into tiles of `tile_rows` rows.

    Two blocks per multiprocessor, or one if two do not fit; `fraction` of them.  Two keep enough
    loads in flight, and leave room for a block of the next kernel, which starts early (PDL).
    `has_digits`: INT4 with scales per 128 inputs.  A block has at most `max_tiles` tiles.
    """
    num_tiles = -(-out_features // tile_rows)
    shared_bytes, token_bytes = WEIGHT_STAGE_BYTES, REDUCTION_BYTES + 4 * in_features
    max_tokens = MATVEC_MAX_TOKENS
    if has_digits:
        shared_bytes += MAX_SCALE_BYTES
        token_bytes += 2 * REDUCTION_BYTES
        max_tokens = INT4_MAX_TOKENS
    blocks_per_sm = 2 if runtime.max_shared_per_block >= 2 * (shared_bytes + token_bytes) else 1
    blocks = min(num_tiles, max(1, round(fraction * blocks_per_sm * runtime.sm_count)))
    if has_digits:
        blocks = max(blocks, -(-num_tiles * in_features // (8 * MAX_SCALE_BYTES)))
    if max_tiles is not None:
        blocks = max(blocks, -(-num_tiles // max_tiles))
    return Tiling(
        blocks,
        -(-num_tiles // blocks),
        max(1, min(max_tokens, (runtime.max_shared_per_block - shared_bytes) // token_bytes)),
    )


def tile_expert_down(
    runtime: DeviceRuntime, layout: ExpertLayout, tokens: int, top_k: int, shared_size: int
) -> tuple[Tiling, int]:
    """The tiling of the expert down kernel, and its bytes of shared memory for loads in flight.

    `shared_size` is the shared expert's inner size, or 0.  One block per multiprocessor and token,
    so that the digits of each input are computed once per multiprocessor.  The kernel has twice the
    warps of a matvec kernel, so it has two weight stages, or one where two do not fit.  Where the
    scales of a block's tiles do not fit, there are more blocks, with fewer tiles.
    """
    num_tiles = layout.hidden // 8
    routed_groups = top_k * (layout.inner // 128)
    input_bytes = DOWN_REDUCTION_BYTES + 544 * (routed_groups + shared_size // 64)
    tile_bytes = 16 * routed_groups + 32
    room = runtime.max_shared_per_block - WEIGHT_STAGE_BYTES - input_bytes
    blocks = min(num_tiles, runtime.sm_count)
    tiles = min(-(-num_tiles // blocks), max(1, room // tile_bytes))
    blocks = -(-num_tiles // tiles)
    tiles = -(-num_tiles // blocks)
    other_bytes = input_bytes + tiles * tile_bytes
    two_rings = 2 * WEIGHT_STAGE_BYTES
    has_room = runtime.max_shared_per_block >= min(tokens, 2) * (two_rings + other_bytes)
    return Tiling(blocks, tiles, 1), two_rings if has_room else WEIGHT_STAGE_BYTES


def input_shapes(
    tokens: int, width: int, normed: bool, gpu: bool
) -> dict[str, tuple[tuple[int, ...], type[np.generic]]]:
    """Shape and dtype of each array of a MatmulInput on a backend."""
    shapes: dict[str, tuple[tuple[int, ...], type[np.generic]]] = {
        "f32": ((tokens, width), np.float32)
    }
    if gpu:
        shapes["hi_lo"] = (tokens, width // 2, 4), np.uint16
        if normed:
            shapes["square_sums"] = (tokens, width // 8), np.float32
        if width % DIGIT_GROUP == 0:
            shapes["digits"] = (tokens, width // DIGIT_GROUP, 2, DIGIT_GROUP), np.int8
            shapes["units"] = (tokens, width // DIGIT_GROUP), np.float32
    return shapes


def rows_bytes(tokens: int, width: int, normed: bool, gpu: bool) -> int:
    """Bytes of a MatmulInput of `tokens` rows of `width` values on a backend."""
    shapes = input_shapes(tokens, width, normed, gpu).values()
    return sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in shapes)


def delta_chunk_units(rows: int) -> int:
    """Units of 16 tokens in the scratch of the chunked delta rule, for steps of `rows` tokens."""
    return rows // 16 + 2 * DELTA_CHUNK_MAX_SEQS


def delta_chunk_words(rows: int, key_heads: int, value_heads: int, dk: int, dv: int) -> int:
    """32-bit words of that scratch; 0 where the kernels do not take the head sizes."""
    if dk != 128 or dv != 128:
        return 0
    return delta_chunk_units(rows) * (value_heads * 4097 + key_heads * 2048)


def is_decode(step: StepInputs) -> bool:
    """Whether each sequence has one row."""
    return step.tokens == step.sequences


def supports_matvec(w: LinearWeight) -> bool:
    """Whether the matvec kernel of the format takes this matrix."""
    whole_tiles = w.format != "int4" or w.out_features % 8 == 0
    return whole_tiles and w.in_features % MATVEC_K_MULTIPLE[w.format] == 0 and w.group in (0, 128)


def supports_gemm(w: LinearWeight) -> bool:
    """Whether the kernels for many tokens take this matrix."""
    if w.format == "bf16":
        return w.in_features % BF16_GEMM_K == 0
    group = w.group in (0, DIGIT_GROUP)
    return group and w.in_features % DIGIT_GROUP == 0 and w.out_features % 2 == 0


def supports_grouped_experts(layout: ExpertLayout, num_experts: int) -> bool:
    """Whether the expert kernels for many tokens take this layout."""
    if layout.bits == 16:
        whole = layout.hidden % BF16_GEMM_K == 0 and layout.inner % BF16_GEMM_K == 0
        return whole and num_experts <= MAX_EXPERTS
    groups = layout.bits == 8 or layout.up_group == layout.down_group == DIGIT_GROUP
    whole = layout.hidden % DIGIT_GROUP == 0 and layout.inner % DIGIT_GROUP == 0
    return groups and whole and num_experts <= MAX_EXPERTS


def gemm_stages(runtime: DeviceRuntime, bits: int, in_features: int) -> int:
    """Stages in shared memory of a block of gemm_digits.ptx: three if two blocks then fit."""
    stage_bytes = GEMM_STAGE_BYTES[bits]
    scale_bytes = in_features // DIGIT_GROUP * 256 if bits == 4 else 0
    fits = 2 * (3 * stage_bytes + scale_bytes) <= runtime.max_shared_per_block
    return 3 if fits else 2


def wgmma_stages(runtime: DeviceRuntime, bits: int, in_features: int, row_tiles: int) -> int:
    """Stages in shared memory of a block of gemm_wgmma.ptx; 0: gemm_digits.ptx is used instead.

    Three if two blocks then fit.  `row_tiles`: tiles of 64 rows in a launch, axis y of its grid.
    """
    if not runtime.has_wgmma or row_tiles > MAX_GRID_ROWS:
        return 0
    scale_bytes = in_features // DIGIT_GROUP * 256 if bits == 4 else 0
    for stages, blocks in ((3, 2), (2, 1)):
        block_bytes = stages * WGMMA_STAGE_BYTES[bits] + scale_bytes
        if blocks * block_bytes <= runtime.max_shared_per_block:
            return stages
    return 0


def bf16_gemm_stages(runtime: DeviceRuntime) -> int:
    """Stages in shared memory of a block of gemm_bf16.ptx: five if two blocks then fit."""
    fits = 2 * (5 * BF16_GEMM_STAGE_BYTES + 256) <= runtime.max_shared_per_block
    return 5 if fits else 3


def bf16_narrow_stages(runtime: DeviceRuntime) -> int:
    """Stages in shared memory of a block of bf16_gemm_narrow_f32: five if a block then fits."""
    return 5 if 5 * BF16_NARROW_STAGE_BYTES + 512 <= runtime.max_shared_per_block else 3


def bf16_gemm_kind(
    runtime: DeviceRuntime, tokens: int, out_features: int
) -> Literal["large", "small", "narrow"]:
    """Which kernel of gemm_bf16.ptx multiplies a dense BF16 matrix."""
    if out_features <= BF16_NARROW_OUTPUTS:
        return "narrow"
    return "small" if takes_small_gemm_blocks(runtime, tokens, out_features) else "large"


def takes_small_gemm_blocks(runtime: DeviceRuntime, tokens: int, out_features: int) -> bool:
    """Whether blocks of 64 x 128 would leave multiprocessors of a dense BF16 matrix idle.

    Blocks of 32 x 64 then compute the same bits.  They read shared memory twice as often, so they
    are used below three quarters of a block per multiprocessor.  An estimate.
    """
    blocks = -(-tokens // 64) * -(-out_features // 128)
    return 4 * blocks < 3 * runtime.sm_count


def supports_fused_experts(layout: ExpertLayout, tokens: int) -> bool:
    """Whether the fused expert kernels, for few tokens, take this layout."""
    groups = layout.up_group == layout.down_group == 128
    return (
        layout.bits == 4 and tokens <= MATVEC_MAX_TOKENS and groups and layout.hidden <= MAX_NORM_K
    )


def fits_shared(shared: SharedExpert) -> bool:
    """Whether the fused expert kernels also take this shared expert."""
    return shared.up.format == shared.down.format == "int8" and shared.down.in_features % 64 == 0


def kv_format(kv: PagedKV) -> str:
    """The suffix of the kernels for this dtype of keys and values.  Raises: ConfigError."""
    dtype = cast(np.dtype[Any], kv.k.dtype)
    for name, kind in KV_DTYPES.items():
        if dtype == kind:
            return name
    raise ConfigError(f"KV is {dtype}; the GPU keeps fp8_e4m3 or bf16, --kv-dtype f32 is for CPUs.")


def max_kv_pollers(runtime: DeviceRuntime, copy_blocks: int) -> int:
    """Most blocks of a context that poll for the sums of all others, in decode attention.

    They are half of those that are resident at once, so others go on meanwhile.  `copy_blocks`
    prefetch blocks run in parallel; where a multiprocessor fits one block, each of them takes a
    whole multiprocessor.
    """
    if runtime.max_shared_per_block >= 2 * SPLIT_KV_SHARED_BYTES:
        capacity = 2 * runtime.sm_count
    else:
        capacity = runtime.sm_count - copy_blocks
    return max(1, capacity // 2)


def copies_kv_ahead(runtime: DeviceRuntime) -> bool:
    """Whether prefill attention copies keys and values a tile ahead: if two blocks then fit.

    Such multiprocessors are of sm_90 and sm_100, which also convert e4m3 to f16.
    """
    return runtime.max_shared_per_block >= 2 * (PREFILL_AHEAD_SHARED_BYTES + 1024)


def prefill_attention_tokens(
    q: Array, kv: PagedKV, step: StepInputs, is_prefill: bool = False
) -> int:
    """Tokens per block of the prefill attention kernel; 0 where attention takes one token a block.

    q is f32 [T, H, d].  A block has all query heads of a KV head.  `is_prefill`: also of few rows.
    """
    tokens, heads, dim = q.shape
    is_short = is_decode(step) or tokens < PREFILL_MIN_TOKENS
    if dim not in PREFILL_HEAD_DIMS or (is_short and not is_prefill):
        return 0
    return int(PREFILL_ROWS[kv_format(kv)] * kv.k.shape[2] // heads)
