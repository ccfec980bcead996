"""The cases of tools/gpu_report launch every kernel."""

from collections import Counter
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest

from osmium.kernels.numba_kernels import KERNELS
from tests.ops.cases import CASES, TINY, Case, sized
from tests.ops.report import RAGGED
from tests.ptx.geforce import report_kernels
from tests.ptx.kernels import NAMES
from tests.ptx.shape_runtime import ShapeRuntime, launches_of

BENCHMARKS = {"mma_rate_s8", "mma_rate_bf16"}
"""Kernels of no operation: tests/ptx/test_mma_rate.py."""


def launched(make: Callable[[np.random.Generator], Case]) -> set[str]:
    """Kernels that a case launches on a large GPU, on a small one, or on one with wgmma."""
    case = make(np.random.default_rng(0))
    machines = (
        ShapeRuntime(),
        ShapeRuntime(sm_count=3, max_shared_per_block=99 << 10),
        ShapeRuntime(has_wgmma=True),
    )
    return {one.name for machine in machines for one, _, _ in launches_of(case, machine)}


@cache
def ragged_cases() -> Counter[str]:
    """Ragged cases of each kernel."""
    return Counter(name for make in RAGGED.values() for name in launched(make))


FEWER_CASES = {"split_digits_hi_lo_f32": 1, "bf16_gemm_f32": 4, "bf16_gemm_small_f32": 4}
"""Ragged cases of kernels of few shapes: decode of more than eight sequences, many columns."""


def test_every_kernel_is_in_a_case_of_the_gpu_report() -> None:
    found = {kernel for name in CASES for kernel in launched(sized(name, TINY))}
    found |= set(ragged_cases())
    assert found == {*NAMES, *KERNELS} - BENCHMARKS


@pytest.mark.parametrize(
    "name", [*report_kernels(), *(name for name in NAMES if "_wgmma_" in name)]
)
def test_a_prefill_kernel_has_several_ragged_cases(name: str) -> None:
    assert ragged_cases()[name] >= FEWER_CASES.get(name, 5)
