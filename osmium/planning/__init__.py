"""Memory and speed of a model on a machine, before it is downloaded, packed or loaded.

`plan_report` is the report of `osmium plan`; a load follows `memory_plan`.
"""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from osmium.config import EngineConfig, Progress
from osmium.engine.plan import CUDA_CONTEXT_BYTES, DoesNotFit, HardwareInfo, MemoryPlan
from osmium.planning.alternatives import (
    Change,
    alternatives,
    faster,
    longest_context,
    plan_shapes,
    with_context,
)
from osmium.planning.hardware import config_of, hardware_for, hardware_of
from osmium.planning.report import PlanReport
from osmium.weights import DEMO, ModelInfo, inspect_model

__all__ = [
    "Change", "PlanReport", "config_of", "hardware_of", "memory_plan", "plan_for", "plan_report",
]  # fmt: skip

GIB = 1 << 30

LOG = logging.getLogger("osmium.planning")

DEMO_MAX_CONTEXT = 262144
"""Longest --context of the demo, in tokens; it was trained for 4,096."""


def with_demo_context(model: ModelInfo, config: EngineConfig) -> ModelInfo:
    """The model with DEMO_MAX_CONTEXT, if it is the demo and --context exceeds its training.

    Logs a warning.  This allows tests of clients with long prompts; other models raise an error.
    """
    trained, context = model.config.max_context, config.context
    if model.packed_path != DEMO or context is None:
        return model
    if not trained < context <= DEMO_MAX_CONTEXT:
        return model
    LOG.warning(
        "--context is %d; the demo was trained for %d tokens: its text after longer prompts makes "
        "no sense.", context, trained,
    )  # fmt: skip
    return replace(model, config=replace(model.config, max_context=DEMO_MAX_CONTEXT))


def memory_plan(model: ModelInfo, config: EngineConfig, hardware: HardwareInfo) -> MemoryPlan:
    """The memory plan of a model.

    Raises: DoesNotFit, with alternatives that fit; ConfigError for invalid options.
    """
    model = with_demo_context(model, config)
    try:
        return plan_shapes(model, config, hardware)
    except DoesNotFit as error:
        fixes = [change.name for change in alternatives(model, config, hardware, error)][:4]
        used = hardware.vram_total - hardware.vram_free - CUDA_CONTEXT_BYTES
        if error.memory == "VRAM" and config.vram is None and error.need <= error.limit + used:
            fixes.append(f"other programs closed, which use {used / GIB:.2f} GiB of VRAM")
        advice = f" What helps: {'; '.join(fixes)}." if fixes else " No option makes it fit."
        raise DoesNotFit(str(error) + advice, error.memory, error.need, error.limit) from None


def plan_for(
    path: str | Path | None = None,
    device: str = "auto",
    *,
    gpu: str | None = None,
    link_gb_s: float | None = None,
    **options: Any,
) -> MemoryPlan:
    """The memory plan of `load` with the same arguments; downloads no weights, packs nothing.

    `gpu` is a GPU's name to plan for ("RTX 4090"), instead of this machine's; `link_gb_s` the rate
    of its link; `options` are EngineConfig's fields.  Raises: ConfigError, CheckpointError,
    DeviceError; DoesNotFit, a ConfigError, if memory is too small.
    """
    config = config_of(device, options)
    hardware, _ = hardware_for(config, gpu, link_gb_s)
    return memory_plan(inspect_model(path, config), config, hardware)


def plan_report(
    path: str | Path | None = None,
    device: str = "auto",
    *,
    gpu: str | None = None,
    link_gb_s: float | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> PlanReport:
    """Like `plan_for`, with alternatives; also for a model that does not fit.

    Raises: ConfigError, CheckpointError, DeviceError.
    """
    config = config_of(device, options)
    hardware, assumptions = hardware_for(config, gpu, link_gb_s)
    model = with_demo_context(inspect_model(path, config, progress), config)
    try:
        plan = plan_shapes(model, config, hardware)
    except DoesNotFit as error:
        changes = tuple(alternatives(model, config, hardware, error, everything=True))
        return PlanReport(model, config, hardware, assumptions, None, error, changes)
    longest = longest_context(model, config, hardware)
    longest_plan = plan_shapes(model, with_context(config, longest), hardware)
    return PlanReport(
        model, config, hardware, assumptions, plan, None,
        tuple(faster(model, config, hardware, plan)), longest,
        longest_plan.tokens_per_s_at(longest),
    )  # fmt: skip
