"""Numba sampling kernels against ReferenceOps: the same tokens, steps and token ring.

Like in test_assign_slots.py, Numba's simulator runs the kernels in a separate process. `python -m
tests.nogpu.test_sample SEED ROWS VOCAB` compares random calls.
"""

import os
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from osmium.kernels.logit_histogram import LOGIT_HISTOGRAM, SLICE_MAX
from osmium.kernels.numba_kernels import cuda
from osmium.kernels.sample import ADVANCE_STEP, SAMPLE_TOKEN
from osmium.ops.reference import ReferenceOps
from tests import needs
from tests.nogpu.simulator import prepare_simulator
from tests.ops.cases import TINY, Case, advance_step, as_decode_state, decode_arrays, sample

ROOT = Path(__file__).resolve().parents[2]

BINS, MAX_CANDIDATES = 32, 16

CASES = {"few": TINY, "more": replace(TINY, outputs=90)}


class Simulated(ReferenceOps):
    """ReferenceOps with the kernels under test in the simulator."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels = simulated("slice_max", "logit_histogram", "sample_token", "advance_step")

    def sample(self, logits: Any, replies: Any) -> None:
        r, (rows, vocab) = replies, logits.shape
        slices = r.slice_max.shape[1]
        flat = logits.reshape(-1)
        slice_max, slice_argmax = r.slice_max.reshape(-1), r.slice_argmax.reshape(-1)
        settings, uniforms = r.sampler_params.reshape(-1), r.uniforms.reshape(-1)
        counts, bin_weights = r.bin_counts.reshape(-1), r.bin_weights.reshape(-1)
        bin_ends, order = r.slice_bin_ends.reshape(-1), r.bin_order.reshape(-1)
        self.kernels["slice_max"][(slices, rows), 16](
            slice_max, slice_argmax, counts, bin_weights, flat, vocab, slices
        )
        self.kernels["logit_histogram"][(slices, rows), BINS // 2](
            r.token,
            counts,
            bin_weights,
            bin_ends,
            order,
            flat,
            slice_max,
            slice_argmax,
            settings,
            vocab,
            slices,
        )
        self.kernels["sample_token"][rows, BINS](
            r.token,
            flat,
            slice_max,
            settings,
            uniforms,
            r.decode_step,
            counts,
            bin_weights,
            bin_ends,
            order,
            vocab,
            slices,
            r.ring_size,
        )

    def advance(self, step: Any, replies: Any) -> None:
        r = replies
        self.kernels["advance_step"][1, 32](
            step.ids,
            step.positions,
            step.context_lens,
            step.state_slots,
            step.page_table.reshape(-1),
            r.token,
            r.tokens_left,
            r.stop_on_eos,
            r.eos,
            r.decode_step,
            r.token_ring,
            step.tokens,
            step.page_table.shape[1],
            len(r.eos),
            r.ring_size,
            r.null_slot,
            r.null_page,
        )


def atomic_add(array: Any, index: int, value: Any) -> None:
    """The kernels' atomic_add in the simulator."""
    cuda.atomic.add(array, index, value)


def simulated(*chosen: str) -> dict[str, Any]:
    """Kernels for Numba's simulator, launched as kernel[blocks, threads](...).

    The numbers of bins and list entries are small, so that a few tokens overflow them.
    """
    import numba
    from numba import cuda

    from osmium.kernels.numba_kernels import DEVICE_FUNCTIONS, KERNELS

    kinds = ("int32", "int64", "uint16", "uint32", "uint64", "float32", "float64")
    known = {kind: getattr(numba, kind) for kind in kinds}
    known |= {"cuda": cuda, "exp2": np.exp2}
    called = DEVICE_FUNCTIONS | {"atomic_add": atomic_add}
    functions = {name: KERNELS[name].function for name in chosen} | called
    namespace: dict[str, Any] = {}
    for function in functions.values():
        namespace |= function.__globals__
    namespace |= known | {"BINS": BINS, "MAX_CANDIDATES": MAX_CANDIDATES}
    for name, function in functions.items():
        simulated_function = types.FunctionType(function.__code__, namespace, name)
        namespace[name] = cuda.jit(simulated_function, device=name in called)
    return {name: namespace[name] for name in chosen}


def compare(case: Any, seed: int, size: Any) -> None:
    simulated_function: list[Case] = [case(np.random.default_rng(seed), size) for _ in range(2)]
    simulated_function[0].call(ReferenceOps(), simulated_function[0].arrays)
    simulated_function[1].call(Simulated(), simulated_function[1].arrays)
    for name in simulated_function[0].writes:
        np.testing.assert_array_equal(
            simulated_function[1].arrays[name], simulated_function[0].arrays[name], name
        )


def compare_odd(rng: np.random.Generator) -> None:
    """Ties, few distinct logits, all equal, some minus infinity; top-k at limits; extreme
    temperatures.

    Greedy rows are mixed with sampled ones. Each case samples twice, the second time from used
    scratch. Logits are equal, or far enough apart for the few bins to separate them.
    """
    rows, vocab = 3, int(rng.integers(40, 130))
    arrays = decode_arrays(rng, rows, vocab)
    many = (
        1,
        2,
        MAX_CANDIDATES - 1,
        MAX_CANDIDATES,
        MAX_CANDIDATES + 1,
        BINS,
        vocab - 1,
        vocab,
        vocab + 1,
    )
    logits = rng.standard_normal((rows, vocab)) * rng.choice([0.1, 1, 5])
    shape = rng.integers(4)
    if shape == 0:
        logits = np.round(logits)
    elif shape == 1:
        logits[:] = logits[0, 0]
    elif shape == 2:
        logits[:, rng.random(vocab) < 0.5] = -np.inf
    else:
        logits[:, rng.random(vocab) < 0.7] = logits.max()
    for row in range(rows):
        temperature = rng.choice([0, 1e-3, 0.6, 1, 40])
        arrays["sampler_params"][row] = (
            temperature,
            rng.choice([0, rng.choice(many)]),
            rng.choice([1, 0.95, 0.1]),
            rng.choice([0, 0.04]),
        )
        step = max(temperature, 0.01) * 0.004
        logits[row] = np.round(logits[row] / step) * step
    logits = logits.astype(np.float32)
    wanted, found = (as_decode_state({k: v.copy() for k, v in arrays.items()}) for _ in range(2))
    ReferenceOps().sample(logits, wanted)
    simulated = Simulated()
    for _ in range(2):
        found.token[:] = -7
        simulated.sample(logits, found)
        label = f"{shape} {vocab} {arrays['sampler_params']}"
        np.testing.assert_array_equal(found.token, wanted.token, label)
    sampled = arrays["sampler_params"][:, 0] != 0
    counts = found.bin_counts.reshape(-1)[: rows * BINS].reshape(rows, BINS).sum(axis=1)
    assert (counts[~sampled] == 0).all() and (counts[sampled] > 0).all(), (
        "greedy rows are not sorted"
    )


@pytest.mark.parametrize("name", [*CASES, "odd"])
def test_sampling_kernels_equal_the_reference(name: str, rng: np.random.Generator) -> None:
    needs.numba_simulator()
    run = subprocess.run(
        [sys.executable, "-m", "tests.nogpu.test_sample", str(rng.integers(1 << 32)), name],
        cwd=ROOT,
        env=os.environ | {"NUMBA_ENABLE_CUDASIM": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr


def test_compiled_sampling_kernels_match_their_contracts() -> None:
    needs.numba_simulator()
    kernels = (SLICE_MAX, LOGIT_HISTOGRAM, SAMPLE_TOKEN, ADVANCE_STEP)
    assert [kernel.contract.entry for kernel in kernels] == [
        "slice_max", "logit_histogram", "sample_token", "advance_step",
    ]  # fmt: skip
    assert [kernel.contract.block for kernel in kernels] == [
        256, 256, 512, 32,
    ]  # fmt: skip


if __name__ == "__main__":
    prepare_simulator()
    first, size = int(sys.argv[1]), CASES.get(sys.argv[2])
    if size is None:
        for offset in range(3):
            compare_odd(np.random.default_rng(first + offset))
        sys.exit()
    compare(sample, first, size)
    for offset in range(9):
        compare(advance_step, first + offset, size)
