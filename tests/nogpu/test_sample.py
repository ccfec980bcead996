"""Numba sampling kernels against ReferenceOps: the same tokens, steps and token ring.

Like in test_assign_slots.py, Numba's simulator runs the kernels in a separate process. `python -m
tests.nogpu.test_sample SEED ROWS VOCAB` compares random calls.
"""

import sys
import types
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from osmium.kernels.adjust_logits import ADJUST_LOGITS
from osmium.kernels.logit_histogram import LOGIT_HISTOGRAM, SLICE_MAX
from osmium.kernels.numba_kernels import cuda
from osmium.kernels.sample import ADVANCE_STEP, SAMPLE_TOKEN
from osmium.kernels.top_logprobs import TOP_LOGPROBS
from osmium.ops.controls import SamplingControls
from osmium.ops.reference import ReferenceOps
from tests import needs
from tests.nogpu.simulator import prepare_simulator, run_simulated
from tests.ops.cases import (
    TINY,
    Case,
    advance_step,
    allowed,
    as_decode_state,
    decode_arrays,
    sample,
    sample_controlled,
)
from tests.ops.cases import compare as distance

ROOT = Path(__file__).resolve().parents[2]

BINS, MAX_CANDIDATES, THREADS = 32, 16, 16

CASES = {"few": TINY, "more": replace(TINY, outputs=90)}

CONTROLLED = {
    "fewer tokens than slices": replace(TINY, outputs=3),
    "fewer tokens than alternatives": replace(TINY, outputs=18),
    "several words of a mask": replace(TINY, outputs=190),
}


class Simulated(ReferenceOps):
    """ReferenceOps with the kernels under test in the simulator."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels = simulated(
            "slice_max", "adjust_logits", "logit_histogram", "sample_token", "top_logprobs",
            "advance_step",
        )  # fmt: skip

    def sample(self, logits: Any, replies: Any) -> None:
        r, (rows, vocab) = replies, logits.shape
        slices = r.slice_max.shape[1]
        self.kernels["slice_max"][(slices, rows), THREADS](
            r.slice_max.reshape(-1), r.slice_argmax.reshape(-1), r.bin_counts.reshape(-1),
            r.bin_weights.reshape(-1), logits.reshape(-1), vocab, slices,
        )  # fmt: skip
        self.sample_slices(logits, r)

    def sample_slices(self, logits: Any, r: Any) -> None:
        """Sample once the largest logit of each slice is known."""
        (rows, vocab), slices = logits.shape, r.slice_max.shape[1]
        flat, slice_max, settings = (
            array.reshape(-1) for array in (logits, r.slice_max, r.sampler_params)
        )
        bins = [
            array.reshape(-1)
            for array in (r.bin_counts, r.bin_weights, r.slice_bin_ends, r.bin_order)
        ]
        self.kernels["logit_histogram"][(slices, rows), BINS // 2](
            r.token, *bins, flat, slice_max, r.slice_argmax.reshape(-1), settings, vocab, slices
        )
        self.kernels["sample_token"][rows, BINS](
            r.token, flat, slice_max, settings, r.uniforms.reshape(-1), r.decode_step, *bins, vocab,
            slices, r.ring_size,
        )  # fmt: skip

    def sample_controlled(self, logits: Any, step: Any, decode_state: Any, controls: Any) -> None:
        r, (rows, vocab) = decode_state, logits.shape
        c = replace(
            controls,
            **{f.name: getattr(controls, f.name).reshape(-1) for f in fields(SamplingControls)},
        )
        slices, words = r.slice_max.shape[1], controls.token_mask.shape[1]
        flat = logits.reshape(-1)
        self.kernels["adjust_logits"][(slices, rows), THREADS](
            c.adjusted, r.slice_max.reshape(-1), r.slice_argmax.reshape(-1),
            r.bin_counts.reshape(-1), r.bin_weights.reshape(-1), c.raw_max, c.raw_argmax,
            c.raw_sums, c.blocks_done, c.token_counts, flat, c.flags, c.penalties, c.logit_bias,
            c.token_mask, step.ids, step.positions, step.state_slots, vocab, slices, words,
        )  # fmt: skip
        self.sample_slices(controls.adjusted, r)
        self.kernels["top_logprobs"][(slices, rows), THREADS](
            c.logprobs, c.logprob_tokens, c.top_logits, c.top_tokens, c.blocks_done, r.token, flat,
            c.raw_max, c.raw_argmax, c.raw_sums, c.flags, step.state_slots, r.decode_step, vocab,
            slices, r.ring_size,
        )  # fmt: skip

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
            r.null_page,
        )


def atomic_add(array: Any, index: int, value: Any) -> None:
    """The kernels' atomic_add in the simulator."""
    cuda.atomic.add(array, index, value)


def fetch_add(array: Any, index: int, value: Any) -> Any:
    """Stands in for the kernels' fetch_add in the simulator."""
    return cuda.atomic.add(array, index, value)


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
    called = DEVICE_FUNCTIONS | {"atomic_add": atomic_add, "fetch_add": fetch_add}
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
    for name, kind in simulated_function[0].writes.items():
        found, wanted = (simulated_function[i].arrays[name] for i in (1, 0))
        assert distance(found, wanted, kind) <= allowed(kind), f"{name}: {found} is not {wanted}"


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


@pytest.mark.parametrize("name", [*CASES, *CONTROLLED, "odd"])
def test_sampling_kernels_equal_the_reference(name: str, rng: np.random.Generator) -> None:
    needs.numba_simulator()
    run = run_simulated("tests.nogpu.test_sample", str(rng.integers(1 << 32)), name)
    assert run.returncode == 0, run.stderr


def test_compiled_sampling_kernels_match_their_contracts() -> None:
    needs.numba_simulator()
    kernels = (
        SLICE_MAX, LOGIT_HISTOGRAM, SAMPLE_TOKEN, ADVANCE_STEP, ADJUST_LOGITS, TOP_LOGPROBS,
    )  # fmt: skip
    assert [kernel.contract.entry for kernel in kernels] == [
        "slice_max", "logit_histogram", "sample_token", "advance_step", "adjust_logits",
        "top_logprobs",
    ]  # fmt: skip
    assert [kernel.contract.block for kernel in kernels] == [
        256, 256, 512, 32, 256, 256,
    ]  # fmt: skip


if __name__ == "__main__":
    prepare_simulator()
    first, size = int(sys.argv[1]), CASES.get(sys.argv[2])
    if sys.argv[2] in CONTROLLED:
        for offset in range(2):
            compare(sample_controlled, first + offset, CONTROLLED[sys.argv[2]])
        sys.exit()
    if size is None:
        for offset in range(3):
            compare_odd(np.random.default_rng(first + offset))
        sys.exit()
    compare(sample, first, size)
    compare(sample_controlled, first, size)
    for offset in range(9):
        compare(advance_step, first + offset, size)
