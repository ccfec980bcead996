"""What prefill passes take of memory: sizes of passes and pieces, and bytes of their arrays."""

from osmium.config import ModelConfig
from osmium.engine.runner import LOGIT_ROWS
from osmium.experts.runner import expert_runner_bytes
from osmium.experts.streaming import prefill_expert_bytes
from osmium.models.prefill import prefill_rows_bytes, scratch_bytes
from osmium.models.workspace import workspace_bytes
from osmium.ops.tiling import supports_grouped_experts
from osmium.quant.expert_layout import ExpertLayout

__all__ = [
    "CPU_CHUNK", "PREFILL_CHUNK", "RESIDENT_PIECE_ROWS", "RESIDENT_PREFILL_CHUNK",
    "block_rows", "default_chunk", "default_piece_rows", "prefill_bytes", "step_rows",
    "workspace_bytes_of",
]  # fmt: skip

PREFILL_CHUNK = 10240
"""Most tokens of a pass by default: about where computation takes as long as copying all missing
experts of the 122B over PCIe 5.  Longer passes would only take more VRAM."""

RESIDENT_PREFILL_CHUNK = 8192
"""The same where VRAM holds every expert."""

CPU_CHUNK = 512
"""The same on the CPU."""

PREFILL_FRACTION = 0.008
"""Largest fraction of VRAM for the rows of a pass by default."""

RESIDENT_PIECE_ROWS = 2048
"""Most rows that a mixer computes at once where VRAM holds every expert."""

PIECE_BLOCKS = 264
"""Most blocks of a matrix with the hidden size's outputs, two per multiprocessor of an H100."""


def default_piece_rows(config: ModelConfig) -> int:
    """Most rows that a mixer computes at once: their scratch arrays take VRAM from expert slots.

    A multiple of 64: 704 for a hidden size of 3,072, 1,024 for 2,048.
    """
    columns = -(-config.hidden_size // 128)
    return 64 * min(16, max(4, PIECE_BLOCKS // columns))


def default_chunk(config: ModelConfig, layout: ExpertLayout, vram: int, resident: bool) -> int:
    """Most tokens of a prefill pass without --prefill-chunk, a multiple of 512."""
    row_bytes = prefill_rows_bytes(config, layout, PREFILL_CHUNK, True) // PREFILL_CHUNK
    most = int(PREFILL_FRACTION * vram) // row_bytes // 512 * 512
    return max(512, min(RESIDENT_PREFILL_CHUNK if resident else PREFILL_CHUNK, most))


def block_rows(
    config: ModelConfig, layout: ExpertLayout, rows: int, piece_rows: int, gpu: bool
) -> int:
    """Rows of the expert runner: those of decode steps where passes have their own experts."""
    if gpu and supports_grouped_experts(layout, config.num_experts):
        return rows
    return max(rows, piece_rows)


def step_rows(sequences: int) -> int:
    """Most rows of a step that is no prefill pass."""
    return max(sequences, LOGIT_ROWS)


def workspace_bytes_of(
    config: ModelConfig, layout: ExpertLayout, sequences: int, piece_rows: int, gpu: bool
) -> int:
    """Bytes of the workspace of a step, and of the expert runner's arrays."""
    rows, experts = step_rows(sequences), config.num_experts
    block = block_rows(config, layout, rows, piece_rows, gpu)
    runner = expert_runner_bytes(block, experts, experts, config.top_k, layout, gpu)
    return workspace_bytes(config, rows, gpu, piece_rows) + runner


def prefill_bytes(
    config: ModelConfig,
    layout: ExpertLayout,
    chunk: int,
    piece_rows: int,
    gpu: bool,
) -> int:
    """Bytes of passes of `chunk` tokens in pieces of `piece_rows`, without staging slots."""
    scratch = scratch_bytes(config, layout, piece_rows, gpu)
    grouped = prefill_expert_bytes(layout, config.num_experts, config.top_k, chunk) if gpu else 0
    return scratch + grouped + prefill_rows_bytes(config, layout, chunk, gpu)
