"""sample and advance, the Numba kernels, against ReferenceOps: the same tokens, steps and mail.

As in test_assign_slots.py the kernels run in Numba's simulator, in a process of their own:
`python -m tests.nogpu.test_sample SEED ROWS VOCAB` compares random calls.
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
from tests.ops.cases import TINY, Case, advance, as_replies, replies, sample

ROOT = Path(__file__).resolve().parents[2]

BINS, MAX_CANDIDATES = 32, 16

CASES = {"few": TINY, "more": replace(TINY, outputs=90)}


class Simulated(ReferenceOps):
    """The reference, but for the kernels under test."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels = simulated("slice_max", "logit_histogram", "sample_token", "advance_step")

    def sample(self, logits: Any, replies: Any) -> None:
        r, (rows, vocab) = replies, logits.shape
        slices = r.slice_max.shape[1]
        flat = logits.reshape(-1)
        best, where = r.slice_max.reshape(-1), r.slice_argmax.reshape(-1)
        settings, chance = r.sampler_params.reshape(-1), r.uniforms.reshape(-1)
        counts, masses = r.bin_counts.reshape(-1), r.bin_weights.reshape(-1)
        ends, order = r.slice_bin_ends.reshape(-1), r.bin_order.reshape(-1)
        self.kernels["slice_max"][(slices, rows), 16](
            best, where, counts, masses, flat, vocab, slices
        )  # fmt: skip
        self.kernels["logit_histogram"][(slices, rows), BINS // 2](
            r.token, counts, masses, ends, order, flat, best, where, settings, vocab, slices
        )  # fmt: skip
        self.kernels["sample_token"][rows, BINS](
            r.token, flat, best, settings, chance, r.decode_step, counts, masses, ends, order,
            vocab,
            slices, r.ring_size,
        )  # fmt: skip

    def advance(self, step: Any, replies: Any) -> None:
        r = replies
        self.kernels["advance_step"][1, 32](
            step.ids, step.positions, step.context_lens, step.state_slots,
            step.page_table.reshape(-1), r.token,
            r.tokens_left, r.stop_on_eos, r.eos, r.decode_step, r.token_ring, step.tokens,
            step.page_table.shape[1], len(r.eos),
            r.ring_size, r.null_slot, r.null_page,
        )  # fmt: skip


def atomic_add(array: Any, index: int, value: Any) -> None:
    """The kernels' own name for it, in the simulator."""
    cuda.atomic.add(array, index, value)


def simulated(*chosen: str) -> dict[str, Any]:
    """Kernels for Numba's simulator, launched as kernel[blocks, threads](...); bins and list are
    few and short, so that a handful of tokens overflows them."""
    import numba
    from numba import cuda

    from osmium.kernels.numba_kernels import DEVICE_FUNCTIONS, KERNELS

    kinds = ("int32", "int64", "uint16", "uint32", "uint64", "float32", "float64")
    known = {kind: getattr(numba, kind) for kind in kinds}
    known |= {"cuda": cuda, "exp2": np.exp2}
    called = DEVICE_FUNCTIONS | {"atomic_add": atomic_add}
    functions = {name: KERNELS[name].function for name in chosen} | called
    every: dict[str, Any] = {}
    for function in functions.values():
        every |= function.__globals__
    every |= known | {"BINS": BINS, "MAX_CANDIDATES": MAX_CANDIDATES}
    for name, function in functions.items():
        made = types.FunctionType(function.__code__, every, name)
        every[name] = cuda.jit(made, device=name in called)
    return {name: every[name] for name in chosen}


def compare(case: Any, seed: int, size: Any) -> None:
    made: list[Case] = [case(np.random.default_rng(seed), size) for _ in range(2)]
    made[0].call(ReferenceOps(), made[0].arrays)
    made[1].call(Simulated(), made[1].arrays)
    for name in made[0].writes:
        np.testing.assert_array_equal(made[1].arrays[name], made[0].arrays[name], name)


def compare_odd(rng: np.random.Generator) -> None:
    """Ties, few distinct logits, all equal, some minus infinity; top-k at borders; temperatures
    that are tiny or huge, and rows at 0 beside others.  Drawn twice, from whatever is left in
    scratch.  Logits are far enough apart, or equal, for the few bins to tell."""
    rows, vocab = 3, int(rng.integers(40, 130))
    arrays = replies(rng, rows, vocab)
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
        arrays["settings"][row] = (
            temperature, rng.choice([0, rng.choice(many)]), rng.choice([1, 0.95, 0.1]),
            rng.choice([0, 0.04]),
        )  # fmt: skip
        step = max(temperature, 0.01) * 0.004
        logits[row] = np.round(logits[row] / step) * step
    logits = logits.astype(np.float32)
    wanted, found = (as_replies({k: v.copy() for k, v in arrays.items()}) for _ in range(2))
    ReferenceOps().sample(logits, wanted)
    simulated = Simulated()
    for _ in range(2):
        found.token[:] = -7
        simulated.sample(logits, found)
        said = f"{shape} {vocab} {arrays['settings']}"
        np.testing.assert_array_equal(found.token, wanted.token, said)
    drawn = arrays["settings"][:, 0] != 0
    counts = found.bin_counts.reshape(-1)[: rows * BINS].reshape(rows, BINS).sum(axis=1)
    assert (counts[~drawn] == 0).all() and (counts[drawn] > 0).all(), "greedy rows are not sorted"


@pytest.mark.parametrize("name", [*CASES, "odd"])
def test_the_kernels_draw_and_advance_as_the_reference_does(
    name: str, rng: np.random.Generator
) -> None:
    needs.numba_simulator()
    run = subprocess.run(
        [sys.executable, "-m", "tests.nogpu.test_sample", str(rng.integers(1 << 32)), name],
        cwd=ROOT,
        env=os.environ | {"NUMBA_ENABLE_CUDASIM": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr


def test_the_compiled_kernels_keep_to_their_contracts() -> None:
    needs.numba_simulator()
    kernels = (SLICE_MAX, LOGIT_HISTOGRAM, SAMPLE_TOKEN, ADVANCE_STEP)
    assert [kernel.contract.entry for kernel in kernels] == [
        "slice_max", "logit_histogram", "sample_token", "advance_step",
    ]  # fmt: skip
    assert [kernel.contract.block for kernel in kernels] == [
        256, 256, 512, 32,
    ]  # fmt: skip


if __name__ == "__main__":
    # The simulator polls its threads: by the default of 5 ms a barrier waits for as long each time.
    sys.setswitchinterval(5e-5)
    first, size = int(sys.argv[1]), CASES.get(sys.argv[2])
    if size is None:
        for turn in range(3):
            compare_odd(np.random.default_rng(first + turn))
        sys.exit()
    compare(sample, first, size)
    for turn in range(9):
        compare(advance, first + turn, size)
