"""Numba kernels of group_by_expert against the reference, in Numba's simulator.

Like in test_assign_slots.py, the simulator runs in a separate process.
`python -m tests.nogpu.test_group_by_expert SEED CASE` compares one random case.
"""

import sys
import types
from functools import partial
from typing import Any

import numpy as np
import pytest

from osmium.kernels.group_by_expert import EXPERT_HISTOGRAM, GROUP_BY_EXPERT, MAX_BLOCKS
from osmium.kernels.numba_kernels import KERNELS
from osmium.ops.gpu_grouped import pairs_per_block
from osmium.ops.reference import ReferenceOps
from tests import needs
from tests.nogpu.simulator import prepare_simulator, run_simulated
from tests.ops.cases import run
from tests.ptx.cases_grouped import CASES, all_resident, group

THREADS, BLOCK_PAIRS, WORDS = 64, 96, 300
"""Small, so that few pairs are several rounds of several blocks; 64 threads are two words."""

SIMULATED = {
    **{name: make for name, make in CASES.items() if name.startswith("group_by_expert")},
    "more experts than threads": group(40, 3, 130),
    "a word of bitmaps per expert": all_resident(50, 4, 290, "some"),
    "more blocks than loads in flight": group(420, 4, 61),
}


class Simulated(ReferenceOps):
    """ReferenceOps with the kernels under test in the simulator."""

    def group_by_expert(
        self, groups: Any, ids: Any, num_experts: int, expert_to_slot: Any = None
    ) -> None:
        blocks, flat = -(-ids.size // BLOCK_PAIRS), ids.reshape(-1)
        sizes, counts = (ids.size, num_experts, BLOCK_PAIRS), groups.block_counts.reshape(-1)
        unused = np.full(1, -9, np.int32)
        simulated("expert_histogram")[blocks, THREADS](counts, flat, *sizes)
        simulated("group_by_expert")[blocks, THREADS](
            groups.order, groups.position, groups.tiles.reshape(-1), groups.num_tiles, counts, flat,
            unused if expert_to_slot is None else expert_to_slot, *sizes,
            int(expert_to_slot is not None),
        )  # fmt: skip


def simulated(name: str) -> Any:
    """A kernel for Numba's simulator, launched as kernel[blocks, threads](...)."""
    from numba import cuda, int32, uint16, uint32

    known = {"cuda": cuda, "int32": int32, "uint16": uint16, "uint32": uint32}
    function = KERNELS[name].function
    known = {**function.__globals__, **known, "BITMAP_WORDS": WORDS}
    return cuda.jit(types.FunctionType(function.__code__, known, name))


@pytest.mark.parametrize("name", SIMULATED)
def test_the_kernels_group_pairs_like_the_reference(name: str, rng: np.random.Generator) -> None:
    needs.numba_simulator()
    done = run_simulated("tests.nogpu.test_group_by_expert", str(rng.integers(1 << 32)), name)
    assert done.returncode == 0, done.stderr


def test_the_compiled_kernels_match_their_contracts() -> None:
    needs.numba_simulator()
    sizes = ["num_pairs", "num_experts", "block_pairs"]
    for made, scalars in ((EXPERT_HISTOGRAM, sizes), (GROUP_BY_EXPERT, [*sizes, "has_slots"])):
        assert made.contract.entry == made.name and made.contract.block == 512
        assert [p.name for p in made.contract.params if not p.is_array] == scalars


@pytest.mark.parametrize("pairs", [1, 512, 513, 65_536, 65_537, 163_840, 524_288])
def test_few_blocks_sort_all_pairs(pairs: int) -> None:
    block_pairs = pairs_per_block(pairs)
    assert block_pairs % 512 == 0 and block_pairs < 65_536, "a count has 16 bits"
    assert -(-pairs // block_pairs) <= MAX_BLOCKS
    assert block_pairs == 512 or -(-pairs // (block_pairs - 512)) > MAX_BLOCKS, "no smaller ones"


if __name__ == "__main__":
    prepare_simulator()
    make = partial(SIMULATED[sys.argv[2]], np.random.default_rng(int(sys.argv[1])))
    case = make()
    wanted, found = run(case, ReferenceOps()), run(case, Simulated())
    for output in case.writes:
        np.testing.assert_array_equal(found[output], wanted[output], output)
