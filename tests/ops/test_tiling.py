"""Distribution of blocks over GPUs of different sizes."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from osmium.ops import PagedKV, StepInputs
from osmium.ops.gpu import GQA_DECODE_SPLIT_KV, GpuOps
from osmium.ops.gpu_experts import MOE_DOWN_FUSED
from osmium.ops.reference import ReferenceOps
from osmium.ops.tiling import max_kv_pollers, prefill_attention_tokens, tile_expert_down
from osmium.ops.types import FETCH_BLOCKS
from osmium.quant.expert_layout import ExpertLayout
from tests.ops.cases import allowed, compare, run
from tests.ptx.cases_attention import split_kv
from tests.ptx.interpreter import InterpretedRuntime


@dataclass
class GpuSize:
    """The device properties that tiling reads."""

    sm_count: int
    max_shared_per_block: int
    """Largest dynamic shared memory of a block, bytes."""


@pytest.mark.parametrize("prefetch_blocks", [0, FETCH_BLOCKS])
def test_blocks_that_wait_for_others_leave_room_for_them(prefetch_blocks: int) -> None:
    for multiprocessors, max_shared in (
        (20, 99),
        (24, 99),
        (46, 99),
        (82, 99),
        (108, 163),
        (132, 227),
    ):
        device: Any = GpuSize(multiprocessors, max_shared << 10)
        resident = 2 * multiprocessors if max_shared == 227 else multiprocessors - prefetch_blocks
        assert 1 <= max_kv_pollers(device, prefetch_blocks) < resident
    small: Any = GpuSize(10, 99 << 10)
    assert max_kv_pollers(small, prefetch_blocks) >= 1


@pytest.mark.parametrize("multiprocessors", [20, 24, 28, 36, 46, 60, 82, 84, 108, 128, 132, 170])
@pytest.mark.parametrize("max_shared", [99, 163, 227])
@pytest.mark.parametrize(
    ("hidden", "inner", "top_k"), [(2048, 512, 8), (3072, 1024, 8), (4096, 1024, 10)]
)
def test_a_block_of_expert_down_fits_shared_memory(
    hidden: int, inner: int, top_k: int, max_shared: int, multiprocessors: int
) -> None:
    """In the published shapes, with a shared expert of the routed ones' size."""
    device: Any = GpuSize(multiprocessors, max_shared << 10)
    layout, contract = ExpertLayout(4, hidden, inner), MOE_DOWN_FUSED.contract
    for tokens in (1, 8):
        tiling, ring_bytes = tile_expert_down(device, layout, tokens, top_k, inner)
        sizes = {
            "ring_bytes": ring_bytes, "top_k": top_k, "inner_size": inner, "shared_size": inner,
            "tiles": tiling.tiles,
        }  # fmt: skip
        assert contract.dynamic is not None
        dynamic = contract.dynamic(sizes)
        assert contract.shared + dynamic <= device.max_shared_per_block
        assert tiling.blocks * tiling.tiles >= hidden // 8
        assert (tiling.blocks - 1) * tiling.tiles < hidden // 8 <= tiling.blocks * tiling.tiles
        assert tiling.blocks >= min(multiprocessors, hidden // 8) // 2


def test_fewer_attention_blocks_wait_until_the_prefetch_stream_is_joined() -> None:
    make = split_kv(256, 16, 2, 7, 24, (100, 40), "fp8")
    device = InterpretedRuntime()
    device.sm_count = 36
    ops = GpuOps(device)
    pollers: list[int] = []
    launch = device.stream.launch

    def recording_launch(kernel: Any, grid: tuple[int, ...], values: tuple[Any, ...]) -> None:
        if kernel is GQA_DECODE_SPLIT_KV["fp8"]:
            assert grid[0] == 12  # two rows share 24 partial results
            pollers.append(values[-4])
        launch(kernel, grid, values)

    device.stream.launch = recording_launch  # type: ignore[method-assign]

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
    assert pollers == [18, 10, 10, 18]


@pytest.mark.parametrize(
    ("kept", "heads", "groups", "dim", "lengths", "expected"),
    [
        ("fp8", 32, 2, 256, (512,), 4),
        ("fp8", 16, 2, 256, (512,), 8),
        ("bf16", 32, 2, 256, (512,), 2),
        ("fp8", 32, 4, 128, (9,), 8),
        ("fp8", 32, 2, 256, (8,), 0),
        ("fp8", 32, 2, 256, (1,) * 16, 0),
        ("fp8", 32, 2, 64, (512,), 0),
        ("bf16", 66, 2, 128, (512,), 0),
    ],
)
def test_prefill_attention_takes_steps_of_many_tokens_and_whole_groups_of_heads(
    kept: str, heads: int, groups: int, dim: int, lengths: tuple[int, ...], expected: int
) -> None:
    unused: Any = None
    q = np.empty((sum(lengths), heads, dim), np.float32)
    pages = np.empty((1, 1, groups, dim), np.uint8 if kept == "fp8" else np.uint16)
    step = StepInputs(sum(lengths), len(lengths), 64, *[unused] * 7)
    assert prefill_attention_tokens(q, PagedKV(pages, pages), step) == expected
