"""What the kernels for few tokens take, and how their blocks share it out."""

from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from osmium.errors import ConfigError
from osmium.ops.runtime import DeviceRuntime
from osmium.ops.types import LinearWeight, PagedKV, SharedExpert, StepInputs
from osmium.quant.expert_layout import ExpertLayout

__all__ = [
    "EXPERT_TILES", "KV_DTYPES", "MATVEC_MAX_TOKENS", "SPLIT_KV_MAX_SEQS", "Tiling",
    "fits_shared", "is_decode", "kv_format", "num_kv_splits", "supports_fused_experts",
    "supports_matvec", "tile_expert_down", "tile_matrix",
]  # fmt: skip

MATVEC_INPUTS = {"bf16": 64, "int8": 64, "int4": 128}
"""What the inputs of a matrix must be a multiple of for MATVEC; LINEAR takes the others."""

MATVEC_MAX_TOKENS = 8
"""Tokens that a block of MATVEC multiplies at once: half the rows of a tensor core's tile."""

EXPERT_TILES = 32
"""Tiles of experts that a block does at most: a lane knows where one of them is."""

INT4_MAX_TOKENS = 5
"""Tokens that a block of INT4 multiplies at once: three digits each, of a tile's 16 rows."""

MATVEC_NORM = 4096
"""Inputs up to which the kernels for few tokens take rows that are normed."""

WEIGHT_STAGE_BYTES = 32 << 10
"""Bytes of shared memory for the pieces of weights that a block has on their way."""

REDUCTION_BYTES = 2 << 10
"""Bytes of it, a token, for what the warps of a block add up."""

SUMS_DOWN = 4608
"""The same of the experts' second half, of one token and twice the warps, with what they keep."""

SCALES = 16 << 10
"""Bytes of it for a block's scales, at most."""

KV_DTYPES = {"bf16": np.uint16, "fp8": np.uint8}
"""What kernels keep keys and values in, by what their names end with."""

SPLIT_KV_MAX_SEQS = 8
"""Sequences up to which a step shares out each context over blocks; more fill a GPU as they are."""

SPLIT_SHARED = 96 << 10
"""Bytes of shared memory of a block that does a part of a context, at most."""

MIN_KV_SPLITS = 4
"""Blocks that a context is shared out over, however small the GPU."""


@dataclass(frozen=True)
class Tiling:
    """A matrix, shared out over blocks."""

    blocks: int
    tiles: int
    """Tiles that a block does, at most."""
    max_tokens: int
    """Tokens that a block does, at most."""

    def tokens_per_block(self, tokens: int) -> int:
        """Tokens that a block does, of so many."""
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
    """Tiles of `high` rows of a matrix [rows, columns] over two blocks a multiprocessor, or one
    where two do not fit, or over a part of them.  Two have enough on its way, and leave room for a
    block of the next kernel, which begins while they end.  `scaled`: with scales of 128 inputs,
    so in digits.  No block does more than `tiles`, if that is said."""
    num_tiles = -(-out_features // tile_rows)
    shared_bytes, token_bytes = WEIGHT_STAGE_BYTES, REDUCTION_BYTES + 4 * in_features
    max_tokens = MATVEC_MAX_TOKENS
    if has_digits:
        shared_bytes += SCALES
        token_bytes += 2 * REDUCTION_BYTES
        max_tokens = INT4_MAX_TOKENS
    blocks_per_sm = 2 if runtime.max_shared_per_block >= 2 * (shared_bytes + token_bytes) else 1
    blocks = min(num_tiles, max(1, round(fraction * blocks_per_sm * runtime.sm_count)))
    if has_digits:
        blocks = max(blocks, -(-num_tiles * in_features // (8 * SCALES)))
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
    """The experts' second half and that of a shared expert of `own` values: a block a
    multiprocessor for each token, whose warps make the digits of every input once.  And bytes of
    shared memory for the pieces on their way: two rings, as it has twice the warps, or one where a
    multiprocessor has no room for that, with two tokens twice."""
    num_tiles = layout.hidden // 8
    blocks = min(num_tiles, runtime.sm_count)
    tiles = -(-num_tiles // blocks)
    routed_groups = top_k * (layout.inner // 128)
    other_bytes = (
        SUMS_DOWN + 544 * (routed_groups + shared_size // 64) + tiles * (16 * routed_groups + 32)
    )
    two_rings = 2 * WEIGHT_STAGE_BYTES
    has_room = runtime.max_shared_per_block >= min(tokens, 2) * (two_rings + other_bytes)
    return Tiling(blocks, tiles, 1), two_rings if has_room else WEIGHT_STAGE_BYTES


def is_decode(step: StepInputs) -> bool:
    """Whether row s is the one row of sequence s."""
    return step.tokens == step.sequences


def supports_matvec(w: LinearWeight) -> bool:
    whole_tiles = w.format != "int4" or w.out_features % 8 == 0
    return whole_tiles and w.in_features % MATVEC_INPUTS[w.format] == 0 and w.group in (0, 128)


def supports_fused_experts(layout: ExpertLayout, tokens: int) -> bool:
    """Whether the experts' kernels for few tokens do it."""
    groups = layout.up_group == layout.down_group == 128
    return (
        layout.bits == 4 and tokens <= MATVEC_MAX_TOKENS and groups and layout.hidden <= MATVEC_NORM
    )


def fits_shared(shared: SharedExpert) -> bool:
    """Whether they do the shared expert, too."""
    return shared.up.format == shared.down.format == "int8" and shared.down.in_features % 64 == 0


def kv_format(kv: PagedKV) -> str:
    """What keys and values are kept in, as kernels name it.  Raises: ConfigError."""
    dtype = cast(np.dtype[Any], kv.k.dtype)
    for name, kind in KV_DTYPES.items():
        if dtype == kind:
            return name
    raise ConfigError(f"KV is {dtype}; the GPU keeps fp8_e4m3 or bf16, --kv-dtype f32 is for CPUs.")


def num_kv_splits(runtime: DeviceRuntime, max_splits: int, blocks: int, copy_blocks: int) -> int:
    """Blocks to share out each context over, `most` at most, where `blocks` is how many there are
    without: all of them at once, so that none runs alone at the end, nor waits in vain for those
    it adds up; on the smallest GPUs at least those of one context.  `beside`: blocks that copy
    meanwhile; on a multiprocessor that has room for one of these they leave none."""
    if runtime.max_shared_per_block >= 2 * SPLIT_SHARED:
        capacity = 2 * runtime.sm_count
    else:
        capacity = runtime.sm_count - copy_blocks
    return min(max_splits, max(MIN_KV_SPLITS, capacity // blocks))
