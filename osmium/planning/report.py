"""The report of `osmium plan`: memory plan, speed, times and alternatives, as values."""

import math
from dataclasses import dataclass
from typing import Any

from osmium.config import EngineConfig
from osmium.engine.plan import DoesNotFit, HardwareInfo, MemoryPlan
from osmium.errors import ConfigError
from osmium.planning.alternatives import Change
from osmium.weights import ModelInfo
from osmium.weights.disk import check_disk

__all__ = ["DISK_GB_S", "PlanReport"]

DISK_GB_S = 2.0
"""Assumed rate of the disk, reading and writing: a usual NVMe drive.  The report prints it."""

NUMPY_WEIGHTS_S = 70e6 * 8
"""Weights per second that NumPy quantises to INT4 on eight cores (70 million on each, 2026-11)."""


@dataclass(frozen=True)
class PlanReport:
    """A model on a machine: its plan, or why it does not fit, and alternatives."""

    model: ModelInfo
    config: EngineConfig
    hardware: HardwareInfo
    assumptions: tuple[str, ...]
    """Assumptions instead of measurements, in sentences."""
    plan: MemoryPlan | None
    """None if the model does not fit."""
    misfit: DoesNotFit | None
    """Why it does not fit; None if it does."""
    changes: tuple[Change, ...]
    """Changes that make the plan faster or, without a plan, changes that fit."""
    max_context: int = 0
    """The longest context that fits, tokens."""
    max_context_tokens_per_s: float | None = None
    """Decode speed of one sequence with `max_context` tokens."""

    @property
    def binds(self) -> str:
        """The largest part of a token's time: link, vram or overhead.

        "memory" without a plan, "cpu" on a CPU, "unknown" for a GPU that was not measured.
        """
        time = None if self.plan is None else self.plan.token_time()
        if self.plan is None:
            return "memory"
        if time is None:
            return "cpu" if self.plan.device == "cpu" else "unknown"
        parts = {
            "link": time.link_ms - time.overlap_ms,
            "vram": time.vram_ms,
            "overhead": time.overhead_ms,
        }
        return max(parts, key=lambda name: parts[name])

    @property
    def disk_fits(self) -> bool:
        """Whether the disks have space for the files that loading writes."""
        try:
            check_disk(self.model.disk_needs)
        except ConfigError:
            return False
        return True

    @property
    def pack_s(self) -> float:
        """Seconds to pack, at DISK_GB_S; 0 for a packed model."""
        if self.model.is_packed:
            return 0.0
        read = self.model.checkpoint_bytes or self.weights * 2
        disk_s = (read + self.model.packed_bytes) / DISK_GB_S / 1e9
        on_gpu = self.hardware.gpu and self.config.gpu_expert_bits != 16
        return disk_s if on_gpu else max(disk_s, self.weights / NUMPY_WEIGHTS_S)

    @property
    def load_s(self) -> float:
        """Seconds from a start to the first token.

        Loading reaches .9 of DISK_GB_S if all experts are in VRAM, else .8 (LOG.md, 2026-11-26).
        """
        fraction = 0.9 if self.plan is not None and self.plan.resident else 0.8
        return self.model.packed_bytes / (fraction * DISK_GB_S) / 1e9

    @property
    def weights(self) -> int:
        """Number of the model's weights, all experts included."""
        config = self.model.config
        expert = 3 * config.hidden_size * config.moe_intermediate_size
        rest = sum(math.prod(part.shape) for part in self.model.parts.values())
        return config.num_layers * config.num_experts * expert + rest

    def as_dict(self) -> dict[str, Any]:
        """A document for JSON; names are stable and end in their units."""
        model, hardware, plan = self.model, self.hardware, self.plan
        time = None if plan is None else plan.token_time()
        return {
            "runs": plan is not None,
            "reason": None if self.misfit is None else str(self.misfit),
            "model": {
                "name": model.name,
                "kind": model.kind,
                "is_packed": model.is_packed,
                "checkpoint_bytes": model.checkpoint_bytes,
                "download_bytes": model.download_bytes,
                "download_to": None if model.download_to is None else str(model.download_to),
                "packed_bytes": model.packed_bytes,
                "packed_path": None if model.packed_path is None else str(model.packed_path),
                "weights": self.weights,
                "formats": vars(model.formats),
            },
            "hardware": {
                "name": hardware.name,
                "measured": hardware.gpu and not self.assumptions,
                "vram_total_bytes": hardware.vram_total,
                "vram_free_bytes": hardware.vram_free,
                "ram_total_bytes": hardware.ram_total,
                "ram_available_bytes": hardware.ram_available,
                "link_gb_s": hardware.link_gb_s,
                "vram_gb_s": hardware.memory_gb_s,
                "compute_capability": list(hardware.capability),
            },
            "assumptions": list(self.assumptions),
            "need_bytes": None if self.misfit is None else self.misfit.need,
            "limit_bytes": None if self.misfit is None else self.misfit.limit,
            **({} if plan is None else plan.as_dict()),
            "token_time_ms": None
            if time is None
            else {
                "link": time.link_ms,
                "vram": time.vram_ms,
                "overhead": time.overhead_ms,
                "overlap": time.overlap_ms,
                "total": time.total_ms,
            },
            "binds": self.binds,
            "max_context_tokens": self.max_context,
            "max_context_tokens_per_s": self.max_context_tokens_per_s,
            "disk_needed_bytes": sum(need.nbytes for need in self.model.disk_needs),
            "disk_fits": self.disk_fits,
            "assumed_disk_gb_s": DISK_GB_S,
            "pack_s": self.pack_s,
            "load_s": self.load_s,
            "changes": [vars(change) for change in self.changes],
        }
