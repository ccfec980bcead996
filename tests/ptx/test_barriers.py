"""Every barrier and every wait for other blocks is necessary: without it some case fails."""

import re
from collections.abc import Callable

import numpy as np
import pytest

from osmium.ops import gpu
from osmium.ops.gpu import GpuOps
from osmium.ops.reference import ReferenceOps
from tests.ops.cases import CASES, TINY, Case, allowed, compare, run, sized
from tests.ptx import cases_attention, cases_linear
from tests.ptx.interpreter import InterpretedRuntime, PtxFault, parse_program
from tests.ptx.kernels import NAMES, kernel_text
from tests.ptx.prefill_parts import use_parts

Make = Callable[[np.random.Generator], Case]

ALL_BARRIERS = [
    (name, i, found[1] is not None)
    for name in NAMES
    for i, found in enumerate(
        re.finditer(r"^(fetch_arrived:\n)?\s*bar\.sync", kernel_text(name), re.M)
    )
]

BARRIERS = [(name, i) for name, i, after_wait in ALL_BARRIERS if not after_wait]

BARRIERS_AFTER_WAITS = [(name, i) for name, i, after_wait in ALL_BARRIERS if after_wait]
"""Barriers after a wait for another kernel: tests/ptx/test_fetch_progress.py."""

SEEDS = range(6)


def cases_of(name: str) -> list[Make]:
    """The cases that launch a kernel."""
    ragged = {**cases_attention.CASES, **cases_linear.CASES}
    name = name.removesuffix("_ahead")
    prefix = {
        "merge_hi_lo_f32": ("rms_norm",),
        "router_topk_f32": ("router",),
        "int4_moe_up_fused_f32": ("int4_experts",),
        "int4_moe_down_fused_f32": ("int4_experts",),
        "int8_gate_up_silu_f32": ("gated_up int8",),
        "gqa_attention_bf16": ("attention",),
        "gqa_attention_fp8": ("attention fp8",),
        "gqa_prefill_bf16_128": ("prefill attention bf16 128",),
        "gqa_prefill_bf16_256": ("prefill attention bf16 256",),
        "gqa_prefill_fp8_128": ("prefill attention fp8 128",),
        "gqa_prefill_fp8_256": ("prefill attention fp8 256",),
        "gqa_decode_split_kv_bf16": ("split kv",),
        "gqa_decode_split_kv_fp8": ("split kv fp8",),
        "bf16_matvec_f32": ("bf16_matvec",),
        "bf16_gemm_f32": ("bf16_gemm ",),
        "bf16_gemm_small_f32": ("bf16_gemm ",),
        "bf16_gemm_narrow_f32": ("bf16_gemm_narrow",),
        "int4_gemm_f32": ("int4_gemm",),
        "int8_gemm_f32": ("int8_gemm",),
        "bf16_moe_gemm_up_f32": ("bf16_moe_gemm",),
        "bf16_moe_gemm_down_f32": ("bf16_moe_gemm",),
        "int4_moe_gemm_up_f32": ("int4_moe_gemm",),
        "int4_moe_gemm_down_f32": ("int4_moe_gemm",),
        "int8_moe_gemm_up_f32": ("int8_moe_gemm",),
        "int8_moe_gemm_down_f32": ("int8_moe_gemm",),
        "int4_gemm_wgmma_f32": ("int4_gemm",),
        "int8_gemm_wgmma_f32": ("int8_gemm",),
        "int4_moe_gemm_up_wgmma_f32": ("int4_moe_gemm",),
        "int4_moe_gemm_down_wgmma_f32": ("int4_moe_gemm",),
        "int8_moe_gemm_up_wgmma_f32": ("int8_moe_gemm",),
        "int8_moe_gemm_down_wgmma_f32": ("int8_moe_gemm",),
        "norm_split_digits_f32": ("int4_gemm",),
        "int8_matvec_f32": ("int8_matvec",),
        "int4_matvec_f32": ("int4_matvec",),
        "delta_net_decode_f32": ("delta_net ",),
        "delta_chunk_prepare_f32": ("delta_rule_chunk 128x128",),
        "delta_chunk_scan_f32": ("delta_rule_chunk 128x128",),
        "delta_rule_chunk_f32": ("delta_rule_chunk", "chunk", "delta"),
    }.get(name)
    assert prefix, f"{name} has a barrier: list the cases that launch it in cases_of"
    found: list[Make] = [sized(key, TINY) for key in CASES if key.startswith(prefix)]
    found += [make for key, make in ragged.items() if key.startswith(prefix)]
    return found


def is_right(
    make: Make,
    seed: int,
    without: tuple[str, int] | None,
    text: dict[str, str] | None = None,
    has_wgmma: bool = False,
    max_shared: int = 99,
) -> bool:
    """Whether a case equals its reference, optionally without one barrier or with another kernel
    text.  max_shared: KiB of shared memory per block."""
    wanted = run(make(np.random.default_rng(seed)), ReferenceOps(cache_bytes=0))
    case = make(np.random.default_rng(seed))
    machine = InterpretedRuntime(seed, without, has_wgmma=has_wgmma)
    machine.max_shared_per_block = max_shared << 10
    if without is not None and without[0] == "bf16_gemm_small_f32":
        machine.sm_count = 132  # small blocks are for GPUs that larger ones would not fill
    machine.stream.programs.update({k: parse_program(v) for k, v in (text or {}).items()})
    try:
        found = run(case, GpuOps(machine))
    except PtxFault:
        return False
    return all(
        compare(found[k], wanted[k], kind) <= allowed(kind) for k, kind in case.writes.items()
    )


@pytest.mark.parametrize(("name", "which"), BARRIERS)
def test_a_kernel_without_one_of_its_barriers_fails(
    name: str, which: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name.startswith("gqa_prefill") and which == max(i for one, i in BARRIERS if one == name):
        use_parts(monkeypatch, 64)  # only contexts of several parts need the last barrier
    makes, wgmma = cases_of(name), "_wgmma_" in name
    max_shared = 227 if name.endswith("_ahead") else 99
    assert makes, "there is a case"
    assert is_right(makes[0], 0, None, None, wgmma, max_shared), "it is right with all barriers"
    assert any(
        not is_right(make, seed, (name, which), None, wgmma, max_shared)
        for seed in SEEDS
        for make in makes
    )


@pytest.mark.parametrize("key", sorted(gpu.GQA_PREFILL))
def test_prefill_attention_without_its_wait_for_the_part_before_fails(
    key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_parts(monkeypatch, 64)
    text = gpu.GQA_PREFILL[key].contract.text
    without_wait, replacements = re.subn(
        r"setp.eq.u32 +%more, %turn, %context_part;", "setp.eq.u32 %more, %lane, %lane;", text
    )
    name = f"gqa_prefill_{key}"
    makes, size = cases_of(name), 227 if key.endswith("_ahead") else 99
    assert replacements == 1 and is_right(makes[0], 0, None, {name: text}, max_shared=size)
    assert any(
        not is_right(make, seed, None, {name: without_wait}, max_shared=size)
        for seed in SEEDS
        for make in makes
    )


@pytest.mark.parametrize("name", ["gqa_decode_split_kv_bf16", "gqa_decode_split_kv_fp8"])
def test_split_kv_without_its_wait_for_other_blocks_fails(name: str) -> None:
    text = kernel_text(name)
    without_wait, replacements = re.subn(r"setp.ge.u32 +%more_partials, %num_arrived, %num_active;",
                          "setp.eq.u32 %more_partials, %lane, %lane;", text)  # fmt: skip
    makes = cases_of(name)[:4]
    assert replacements == 1 and all(
        is_right(make, seed, None) for seed in range(2) for make in makes
    )
    assert any(not is_right(make, s, None, {name: without_wait}) for s in SEEDS for make in makes)


def test_a_router_without_its_wait_for_all_scores_fails() -> None:
    text = kernel_text("router_topk_f32")
    without_wait, replacements = re.subn(r"@%more bra +poll_keys;", "", text)
    makes = cases_of("router_topk_f32")[:3]
    assert replacements == 1 and all(
        is_right(make, seed, None) for seed in range(2) for make in makes
    )
    assert any(
        not is_right(make, s, None, {"router_topk_f32": without_wait})
        for s in SEEDS
        for make in makes
    )
