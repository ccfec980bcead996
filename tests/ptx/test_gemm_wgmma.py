"""gemm_wgmma.ptx against gemm_digits.ptx, whose bits it must have, and its waits and fences."""

import re
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from osmium.kernels import ptx
from osmium.ops import GroupedExperts, TileRange
from osmium.ops.gpu import GpuOps
from osmium.ops.grouped import ExpertGroups
from osmium.ops.reference import ReferenceOps
from osmium.ops.tiling import MAX_GRID_ROWS, wgmma_stages
from osmium.quant.expert_layout import ExpertLayout
from tests.ops.cases import allowed, compare, new_rows, packed_experts, rows_of, run
from tests.ptx.cases_grouped import Make, parts
from tests.ptx.cases_linear import fused, linear
from tests.ptx.interpreter import InterpretedRuntime, PtxFault, parse_program
from tests.ptx.kernels import NAMES, kernel_text

KERNELS = [name for name in NAMES if "_wgmma_" in name]

CASES: dict[str, Make] = {
    f"int{bits} {name}": make
    for bits in (4, 8)
    for name, make in {
        "1 row, 66 columns": linear(f"int{bits}", 1, 66, 128, 128),
        "31 rows, 2 columns": linear(f"int{bits}", 31, 2, 512, 128),
        "33 rows, 130 columns": linear(f"int{bits}", 33, 130, 384, 128),
        "65 rows, 70 columns": linear(f"int{bits}", 65, 70, 128, 128),
        "130 rows in three tiles": linear(f"int{bits}", 130, 6, 256, 128),
        "9 rows, accumulated": fused(f"int{bits}", 9, 136, 128),
        "33 tokens, absent experts": parts(bits, 33, 1, 7, 256, 128, 2, "some"),
        "65 tokens of one expert": parts(bits, 65, 1, 2, 256, 128, 1, "one"),
        "1 token, 3 experts": parts(bits, 1, 3, 4, 256, 128, 2),
    }.items()
}
"""Ragged shapes; `parts` also has resident and staged experts."""


@pytest.fixture(autouse=True)
def checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check shapes, dtypes, alignment and rules of every launch against the kernel's contract."""
    monkeypatch.setattr(ptx, "CHECK", True)


def gpu(seed: int, has_wgmma: bool, max_shared: int = 99) -> tuple[GpuOps, set[str]]:
    """Operations, and the matrix kernels that they have launched."""
    runtime, launched = InterpretedRuntime(seed, has_wgmma=has_wgmma), set[str]()
    runtime.max_shared_per_block = max_shared << 10
    launch = runtime.stream.launch

    def recording_launch(kernel: Any, grid: tuple[int, ...], values: tuple[Any, ...]) -> None:
        if "gemm" in kernel.name:
            launched.add(kernel.name)
        launch(kernel, grid, values)

    runtime.stream.launch = recording_launch  # type: ignore[method-assign]
    return GpuOps(runtime), launched


@pytest.mark.parametrize("max_shared", [99, 227])
@pytest.mark.parametrize("name", CASES)
def test_both_files_have_equal_bits(rng: np.random.Generator, name: str, max_shared: int) -> None:
    """Two stages with 99 KiB of shared memory, three with 227."""
    seed = int(rng.integers(1 << 32))
    found = []
    for has_wgmma in (True, False):
        case = CASES[name](np.random.default_rng(seed))
        ops, launched = gpu(seed, has_wgmma, max_shared)
        with ops.prefill():
            found.append(run(case, ops))
        assert launched and all(("_wgmma_" in kernel) == has_wgmma for kernel in launched)
    wanted = run(CASES[name](np.random.default_rng(seed)), ReferenceOps(cache_bytes=0))
    for output, kind in case.writes.items():
        assert found[0][output].tobytes() == found[1][output].tobytes(), output
        error = compare(found[0][output], wanted[output], kind)
        assert error <= max(allowed(kind), allowed("digits")), output


@pytest.mark.parametrize("bits", [4, 8])
def test_some_tiles_have_the_bits_of_all(rng: np.random.Generator, bits: int) -> None:
    """A launch of one tile stores its rows from row 0 on."""
    layout, experts, tokens, top_k = ExpertLayout(bits, 128, 128), 3, 70, 2
    ids = np.argsort(rng.random((tokens, experts)), axis=1)[:, :top_k].astype(np.uint16)
    packed = packed_experts(rng, layout, experts)
    ops, launched = gpu(1, True)
    shapes = ExpertGroups.shapes(tokens, top_k, experts)
    groups = ExpertGroups(*(ops.empty(shape, dtype) for shape, dtype in shapes.values()))
    h = rows_of(ops, ops.to_device(rng.standard_normal((tokens, 128), np.float32)))
    device_ids, slots = ops.to_device(ids), ops.to_device(np.arange(experts, dtype=np.int32))
    held = ops.to_device(packed)
    ops.group_by_expert(groups, device_ids, experts)

    def compute(rows: int, tiles: TileRange | None) -> npt.NDArray[np.float32]:
        pair_out = ops.empty((rows, 128), np.float32)
        grouped, inner = GroupedExperts(groups, pair_out), new_rows(ops, rows, 128)
        ops.expert_part(grouped, inner, h, device_ids, layout, held, slots, tiles)
        return np.array(ops.copy_d2h(pair_out))

    whole = compute(ids.size, None)
    tiles = ops.copy_d2h(groups.tiles)[: int(ops.copy_d2h(groups.num_tiles)[0])]
    assert len(tiles) >= experts
    for number, (_, start, rows, _) in enumerate(tiles.tolist()):
        part = compute(rows, TileRange(number, 1, start, rows))
        assert part.tobytes() == whole[start : start + rows].tobytes(), number
    names = {f"int{bits}_moe_gemm_up_wgmma_f32", f"int{bits}_moe_gemm_down_wgmma_f32"}
    assert launched == names


WAITS = {
    "fence.proxy.async.shared::cta;": "no fence.proxy.async since its matrix was stored",
    "wgmma.fence.sync.aligned;": "no wgmma.fence since",
    "wgmma.wait_group.sync.aligned 0;": "wgmma in flight",
    "wgmma.commit_group.sync.aligned;": "wgmma in flight",
}
"""Instructions, and the fault without all of them."""


@pytest.mark.parametrize("line", WAITS)
@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_without_a_wait_or_fence_fails(
    rng: np.random.Generator, name: str, line: str
) -> None:
    text = kernel_text(name).replace(line, "")
    assert text != kernel_text(name)
    bits = int(name[3])
    make = (
        parts(bits, 3, 2, 2, 128, 128, 1)
        if "moe" in name
        else CASES[f"int{bits} 1 row, 66 columns"]
    )
    ops, launched = gpu(1, True)
    ops.runtime.stream.programs[name] = parse_program(text)
    with pytest.raises(PtxFault, match=re.escape(WAITS[line])), ops.prefill():
        run(make(rng), ops)
    assert name in launched


@pytest.mark.parametrize("name", KERNELS)
def test_a_copy_into_the_stage_that_is_read_fails(rng: np.random.Generator, name: str) -> None:
    """The next group must go to the stage of the group before."""
    text, count = re.subn(r"(add\.u32 +%dst, %)load_(stage, %x_dst;)", r"\1\2", kernel_text(name))
    assert count == 8, "4 copies before the loop and 4 in it"
    bits = int(name[3])
    make = (
        parts(bits, 3, 2, 2, 384, 384, 1) if "moe" in name else linear(f"int{bits}", 9, 6, 384, 128)
    )
    ops, _ = gpu(1, True)
    ops.runtime.stream.programs[name] = parse_program(text)
    with pytest.raises(PtxFault, match="wgmma in flight read it"):
        run(make(rng), ops)


def test_wgmma_is_selected_by_the_device_and_the_shape() -> None:
    runtime = InterpretedRuntime(has_wgmma=True)
    runtime.max_shared_per_block = 227 << 10
    assert wgmma_stages(runtime, 4, 3072, 10) == wgmma_stages(runtime, 8, 3072, 10) == 3
    assert wgmma_stages(runtime, 4, 32768, 10) == 2, "scales leave no room for two blocks of three"
    assert wgmma_stages(runtime, 4, 128 * 800, 10) == 0, "scales leave no room for two stages"
    assert wgmma_stages(runtime, 8, 3072, MAX_GRID_ROWS) == 3
    assert wgmma_stages(runtime, 8, 3072, MAX_GRID_ROWS + 1) == 0, "its grid has rows on axis y"
    runtime.has_wgmma = False
    assert wgmma_stages(runtime, 8, 3072, 10) == 0
