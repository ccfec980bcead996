"""Logits of prefill against teacher-forced decode, with channels of 100 times the others.

Prefill reads its inputs as two digits of base 256, decode as three; so they differ by more than
order of sums.  tests/long/test_interpreted_model.py runs the small models by the kernels.
"""

from dataclasses import replace

import numpy as np
import pytest

from osmium.ops import Array, LinearWeight, MatmulInput, Ops
from osmium.ops.gpu import GpuOps
from osmium.ops.reference import ReferenceOps
from tests.models.build import Case, prompt
from tests.models.outliers import (
    LARGE,
    LIMITS,
    SMALL,
    Outliers,
    logits_and_experts,
    outlier_model,
    prefill_against_decode,
)
from tests.tolerance import TOLERANCE

each_kind = pytest.mark.parametrize("outliers", ["none", "residual", "norm"])


@each_kind
@pytest.mark.parametrize("bits", [4, 8])
def test_prefill_on_the_cpu_gives_the_logits_of_decode(bits: int, outliers: Outliers) -> None:
    case = replace(SMALL, prompt=40)
    errors = prefill_against_decode(case, ReferenceOps, bits, "f32", outliers)
    assert errors.max() <= TOLERANCE["logits"]


class Watching(ReferenceOps):
    """Records the rows that each matrix reads."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[Array] = []

    def linear(self, out: Array, a: MatmulInput, w: LinearWeight) -> None:
        self.rows.append(a.f32.copy())
        super().linear(out, a, w)


def largest_to_median(outliers: Outliers) -> float:
    """The largest value of a row to its median one, in the rows of the first matrix."""
    ops = Watching()
    model = outlier_model(SMALL, ops, 4, "f32", outliers)
    model.expert_runner.seen = []  # type: ignore[attr-defined]
    model.step({0: prompt(SMALL)})
    rows = np.abs(ops.rows[0])
    return float(np.median(rows.max(axis=1) / np.median(rows, axis=1)))


def test_the_outliers_are_in_the_rows_that_matrices_read() -> None:
    assert largest_to_median("none") < 10
    assert largest_to_median("residual") > 50 and largest_to_median("norm") > 50


@pytest.mark.gpu
@each_kind
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kv", ["bf16", "fp8_e4m3"])
def test_prefill_on_a_gpu_gives_the_logits_of_decode(
    gpu: GpuOps, bits: int, kv: str, outliers: Outliers
) -> None:
    errors = prefill_against_decode(LARGE, lambda: gpu, bits, kv, outliers)
    assert np.median(errors) <= LIMITS[outliers, kv], np.quantile(errors, (0.5, 0.9, 1))


@pytest.mark.gpu
@each_kind
@pytest.mark.parametrize("bits", [4, 8])
def test_a_prompt_cut_at_multiples_of_64_has_the_same_bits(
    gpu: GpuOps, bits: int, outliers: Outliers
) -> None:
    case: Case = replace(LARGE, prompt=256)
    ops: Ops = gpu
    model = outlier_model(case, ops, bits, "fp8_e4m3", outliers)
    whole, _ = logits_and_experts(model, prompt(case), 256)
    for chunk in (64, 128, 192):
        parts, _ = logits_and_experts(model, prompt(case), chunk)
        assert parts.tobytes() == whole.tobytes(), f"steps of {chunk}"
