"""Tests of the quick groups with more seeds: uneven layers, blocks that wait, Numba kernels."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from osmium.quant.expert_layout import ExpertLayout
from tests.experts.test_interpreted import (
    test_interpreted_kernels_equal_the_reference_with_uneven_layers as compare_layers,
)
from tests.ptx.test_barriers import cases_of, is_right

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    "layout", [ExpertLayout(16, 32, 16), ExpertLayout(4, 128, 128)], ids=lambda r: r.bits
)
@pytest.mark.parametrize("with_prefetch", [False, True])
def test_interpreted_kernels_equal_the_reference_with_uneven_layers(
    layout: ExpertLayout, with_prefetch: bool, seed: int
) -> None:
    for offset in range(2):
        compare_layers(np.random.default_rng(seed + offset), layout, with_prefetch)


@pytest.mark.parametrize(
    "name", ["router_topk_f32", "gqa_decode_split_kv_fp8", "gqa_decode_split_kv_bf16"]
)
def test_kernels_whose_blocks_wait_for_each_other_are_right_in_any_order(
    name: str, seed: int
) -> None:
    for make in cases_of(name)[:4]:
        for offset in range(4):
            assert is_right(make, seed + offset, None)


@pytest.mark.parametrize("name", ["few", "more", "odd", "odd", "odd"])
def test_sampling_kernels_equal_the_reference(name: str, seed: int) -> None:
    pytest.importorskip("numba.cuda", reason="the Numba kernels need the build extra")
    result = subprocess.run(
        [sys.executable, "-m", "tests.nogpu.test_sample", str(seed), name], cwd=ROOT,
        env=os.environ | {"NUMBA_ENABLE_CUDASIM": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
