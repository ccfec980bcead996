"""How blocks are shared out over GPUs of different sizes."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from osmium.ops.gpu import GQA_DECODE_SPLIT_KV, GpuOps
from osmium.ops.reference import ReferenceOps
from osmium.ops.tiling import MIN_KV_SPLITS, num_kv_splits
from osmium.ops.types import FETCH_BLOCKS
from tests.ops.cases import allowed, compare, run
from tests.ptx.cases_attention import shared
from tests.ptx.interpreter import InterpretedRuntime


@dataclass
class Size:
    """Of a machine, all that sharing asks for."""

    sm_count: int
    max_shared_per_block: int
    """Bytes that a block may ask for."""


@pytest.mark.parametrize("beside", [0, FETCH_BLOCKS])
@pytest.mark.parametrize("groups", [1, 2, 3])
def test_contexts_fill_a_gpu_once_beside_what_copies(groups: int, beside: int) -> None:
    """One of these blocks a multiprocessor, or two and room for what copies."""
    for multiprocessors, most, room in ((170, 99 << 10, 170 - beside), (132, 227 << 10, 264)):
        machine: Any = Size(multiprocessors, most)
        blocks = groups * num_kv_splits(machine, 1000, groups, beside)
        assert room - groups < blocks <= room
    small: Any = Size(10, 99 << 10)
    assert num_kv_splits(small, 1000, groups, beside) >= MIN_KV_SPLITS
    assert num_kv_splits(small, 3, groups, beside) == 3


@pytest.mark.parametrize("beside", [0, FETCH_BLOCKS])
def test_blocks_that_wait_for_each_other_all_find_room(beside: int) -> None:
    """A context's, which add each other's sums up, on every GPU; and all contexts', on most."""
    for multiprocessors, most in ((20, 99), (24, 99), (46, 99), (82, 99), (108, 163), (132, 227)):
        machine: Any = Size(multiprocessors, most << 10)
        room = 2 * multiprocessors if most == 227 else multiprocessors - beside
        for blocks in range(1, 33):
            splits = num_kv_splits(machine, 160, blocks, beside)
            assert MIN_KV_SPLITS <= splits <= room
            assert blocks * splits <= room or blocks * MIN_KV_SPLITS > room


def test_attention_leaves_room_until_what_is_launched_early_is_joined() -> None:
    make = shared(256, 16, 2, 7, 24, (100, 40), "fp8")
    machine = InterpretedRuntime()
    machine.sm_count = 36
    ops = GpuOps(machine)
    splits: list[int] = []
    launch = machine.stream.launch

    def launched(kernel: Any, grid: tuple[int, ...], values: tuple[Any, ...]) -> None:
        if kernel is GQA_DECODE_SPLIT_KV["fp8"]:
            splits.append(grid[0])
        launch(kernel, grid, values)

    machine.stream.launch = launched  # type: ignore[method-assign]

    def right() -> bool:
        wanted = run(make(np.random.default_rng(0)), ReferenceOps())
        case = make(np.random.default_rng(0))
        found = run(case, ops)
        return all(compare(found[k], wanted[k], kind) <= allowed(kind)
                   for k, kind in case.writes.items())  # fmt: skip

    assert right()
    with ops.on_side_stream(prefetch=True):
        pass
    assert right()
    with ops.on_side_stream():
        pass
    ops.join_side_stream()
    assert right()
    ops.join_side_stream(prefetch=True)
    assert right()
    assert splits == [9, 5, 5, 9]
