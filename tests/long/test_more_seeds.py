"""What the quick rings look at once, with more seeds: routers, draws, experts' kernels."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from osmium.quant.expert_layout import ExpertLayout
from tests.experts.test_interpreted import test_layers_with_slots_of_their_own as layers
from tests.ptx.test_barriers import cases_of, right

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    "record", [ExpertLayout(16, 32, 16), ExpertLayout(4, 128, 128)], ids=lambda r: r.bits
)
@pytest.mark.parametrize("guessed", [False, True])
def test_layers_with_slots_of_their_own(record: ExpertLayout, guessed: bool, seed: int) -> None:
    for turn in range(2):
        layers(np.random.default_rng(seed + turn), record, guessed)


@pytest.mark.parametrize(
    "name", ["router_topk_f32", "gqa_decode_split_kv_fp8", "gqa_decode_split_kv_bf16"]
)
def test_blocks_that_wait_for_each_other_are_right_in_any_order(name: str, seed: int) -> None:
    for make in cases_of(name)[:4]:
        for turn in range(4):
            assert right(make, seed + turn, None)


@pytest.mark.parametrize("name", ["few", "more", "odd", "odd", "odd"])
def test_the_kernels_draw_and_advance_as_the_reference_does(name: str, seed: int) -> None:
    pytest.importorskip("numba.cuda", reason="the Numba kernels need the build extra")
    run = subprocess.run(
        [sys.executable, "-m", "tests.nogpu.test_sample", str(seed), name], cwd=ROOT,
        env=os.environ | {"NUMBA_ENABLE_CUDASIM": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
