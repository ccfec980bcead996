"""Numba kernel count_uses against the reference, in Numba's simulator.

Like in test_assign_slots.py, the simulator runs in a separate process.
`python -m tests.nogpu.test_count_uses SEED CASE` compares one random case.
"""

import sys
import threading
import types
from typing import Any

import numpy as np
import pytest

from osmium.kernels.count_uses import COUNT_STEP, COUNT_USES, EXPERTS_PER_BLOCK
from osmium.kernels.numba_kernels import KERNELS
from osmium.ops.reference import ReferenceOps
from tests import needs
from tests.nogpu.simulator import prepare_simulator, run_simulated
from tests.ops.cases import allowed, compare, run
from tests.ptx.cases_grouped import CASES, uses

THREADS = 32

SIMULATED = {
    **{name: make for name, make in CASES.items() if name.startswith("count_uses")},
    "more experts than threads": uses(40, 3, 77),
    "several threads per expert": uses(90, 2, 9, "some"),
}


LOCK = threading.Lock()
"""The simulator runs each CUDA thread as a Python thread."""


def atomic_add(array: Any, index: int, value: int) -> None:
    """The kernel's atomic_add in the simulator."""
    with LOCK:
        array[index] += value


class Simulated(ReferenceOps):
    """ReferenceOps with the kernel under test in the simulator."""

    def count_uses(self, groups: Any, cache: Any, layer: int, ids: Any) -> None:
        from numba import cuda, float32, int32, int64, uint32

        known = {"cuda": cuda, "int32": int32, "uint32": uint32, "float32": float32}
        known |= {"exp2": np.exp2, "int64": int64, "atomic_add": atomic_add}
        count_uses, count_step = (
            types.FunctionType(function.__code__, {**function.__globals__, **known})
            for function in (KERNELS[name].function for name in ("count_uses", "count_step"))
        )
        (tokens, top_k), decay = ids.shape, cache.decay
        cuda.jit(count_uses)[-(-cache.num_experts // EXPERTS_PER_BLOCK), THREADS](
            cache.short_count[layer], cache.long_count[layer], cache.last_used[layer], cache.step,
            cache.counters, groups.tiles.reshape(-1), groups.num_tiles, groups.order, tokens, top_k,
            cache.num_experts, 1 / decay.half_life, 1 / decay.long_half_life,
        )  # fmt: skip
        if layer + 1 == len(cache.expert_to_slot):
            cuda.jit(count_step)[1, 32](cache.step)


@pytest.mark.parametrize("name", SIMULATED)
def test_the_kernel_counts_like_the_reference(name: str, rng: np.random.Generator) -> None:
    needs.numba_simulator()
    done = run_simulated("tests.nogpu.test_count_uses", str(rng.integers(1 << 32)), name)
    assert done.returncode == 0, done.stderr


def test_the_compiled_kernel_matches_its_contract() -> None:
    contract = COUNT_USES.contract
    assert contract.entry == COUNT_USES.name == "count_uses" and contract.block == 256
    assert COUNT_STEP.contract.entry == COUNT_STEP.name == "count_step"
    assert [p.name for p in contract.params if not p.is_array] == [
        "num_tokens", "top_k", "num_experts", "rate", "long_rate",
    ]  # fmt: skip


if __name__ == "__main__":
    prepare_simulator()
    case = SIMULATED[sys.argv[2]](np.random.default_rng(int(sys.argv[1])))
    wanted, found = run(case, ReferenceOps()), run(case, Simulated())
    for output, kind in case.writes.items():
        assert compare(found[output], wanted[output], kind) <= allowed(kind), output
