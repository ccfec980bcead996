"""Prefill of a small model in the interpreter: against teacher-forced decode, and cut at 64."""

from dataclasses import replace

import numpy as np
import pytest

from osmium.ops.gpu import GpuOps
from tests.models.build import prompt
from tests.models.outliers import (
    LIMITS,
    SMALL,
    Outliers,
    logits_and_experts,
    outlier_model,
    prefill_against_decode,
)
from tests.ptx.interpreter import InterpretedRuntime


@pytest.mark.parametrize("outliers", ["none", "residual", "norm"])
@pytest.mark.parametrize("kv", ["bf16", "fp8_e4m3"])
def test_interpreted_prefill_gives_the_logits_of_interpreted_decode(
    kv: str, outliers: Outliers
) -> None:
    bits = 4 if kv == "bf16" else 8
    errors = prefill_against_decode(SMALL, lambda: GpuOps(InterpretedRuntime()), bits, kv, outliers)
    assert np.median(errors) <= LIMITS[outliers, kv]


@pytest.mark.parametrize("kv", ["bf16", "fp8_e4m3"])
def test_an_interpreted_prompt_cut_at_64_has_the_same_bits(kv: str) -> None:
    case = replace(SMALL, prompt=80)
    model = outlier_model(case, GpuOps(InterpretedRuntime()), 4, kv, "residual")
    whole, _ = logits_and_experts(model, prompt(case), 80)
    parts, _ = logits_and_experts(model, prompt(case), 64)
    assert parts.tobytes() == whole.tobytes()
