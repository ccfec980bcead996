"""Prefill attention: a token's bits depend on its query and its context alone.

Here contexts are divided into parts of 64 and 128 positions: one, two or four tiles.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from osmium.kernels.ptx import Kernel
from osmium.ops import PagedKV, StepInputs
from osmium.ops.gpu import GQA_PREFILL, GpuOps
from osmium.ops.reference import ReferenceOps
from osmium.ops.tiling import PREFILL_AHEAD_SHARED_BYTES, copies_kv_ahead
from osmium.quant.floats import bf16_from_f32, f32_from_bf16
from tests.ops.cases import allowed, compare, run
from tests.ptx.cases_attention import CASES
from tests.ptx.interpreter import InterpretedRuntime
from tests.ptx.prefill_parts import use_parts
from tests.tolerance import distance

Array = npt.NDArray[Any]
HEADS, KV_HEADS, PAGE = 3, 1, 16


@pytest.fixture(autouse=True)
def part(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Positions of a part: 128 where copies are ahead, else 64."""
    spec = getattr(request.node, "callspec", None)
    copies_ahead = spec is not None and spec.params.get("max_shared") == 227
    positions = 128 if copies_ahead else 64
    use_parts(monkeypatch, positions)
    return positions


def machine(seed: int, max_shared: int) -> InterpretedRuntime:
    """A device with this many KiB of shared memory per block."""
    runtime = InterpretedRuntime(seed)
    runtime.max_shared_per_block = max_shared << 10
    return runtime


def gpu(seed: int, max_shared: int) -> GpuOps:
    return GpuOps(machine(seed, max_shared))


class Context:
    """Keys and values of two sequences of 88 positions, and queries of each position."""

    def __init__(self, rng: np.random.Generator, kept: str, dim: int) -> None:
        self.dim = dim
        self.q = rng.standard_normal((2, 88, HEADS, dim), np.float32)
        self.table = rng.permutation(12).astype(np.int32).reshape(2, 6)
        shape = (12, PAGE, KV_HEADS, dim)
        scales: list[Array | None] = [None, None]
        if kept == "fp8":
            codes = np.array([code for code in range(256) if code & 0x7F != 0x7F], np.uint8)
            pages = [rng.choice(codes, shape) for _ in "kv"]  # every e4m3 but NaN
            scales = [rng.uniform(1e-3, 1e-2, shape[:3]).astype(np.float16) for _ in "kv"]
        else:
            pages = [bf16_from_f32(rng.standard_normal(shape, np.float32)) for _ in "kv"]
        self.kv = [*pages, *scales]

    def attend(self, ops: Any, *parts: tuple[int, int, int]) -> list[Array]:
        """The output of positions `first` to `end` of sequence `s`, for each (s, first, end)."""
        kv = PagedKV(*(None if array is None else ops.to_device(array) for array in self.kv))
        positions = np.concatenate([np.arange(first, end) for _, first, end in parts])
        q = np.concatenate([self.q[s, first:end] for s, first, end in parts])
        lengths = [end - first for _, first, end in parts]
        unused: Any = None
        step = StepInputs(
            len(q), len(parts), PAGE, unused, ops.to_device(positions.astype(np.int32)),
            ops.to_device(np.repeat(np.arange(len(parts)), lengths).astype(np.int32)),
            ops.to_device(np.cumsum([0, *lengths]).astype(np.int32)), unused, unused,
            ops.to_device(self.table[[s for s, _, _ in parts]]), max(end for _, _, end in parts),
        )  # fmt: skip
        turns = ops.to_device(np.zeros((len(q), KV_HEADS), np.int32))
        sums = ops.empty((len(q), 2, HEADS, 2), np.float32)
        out = ops.empty(q.shape, np.float32)
        ops.attention(out, ops.to_device(q), kv, step, self.dim**-0.5, turns, sums)
        assert not ops.copy_d2h(turns).any()
        return np.split(ops.copy_d2h(out), np.cumsum(lengths)[:-1])


@pytest.mark.parametrize("max_shared", [99, 227])
@pytest.mark.parametrize("dim", [128, 256])
@pytest.mark.parametrize("kept", ["bf16", "fp8"])
def test_neither_cuts_nor_other_sequences_change_a_bit(
    rng: np.random.Generator, kept: str, dim: int, max_shared: int
) -> None:
    context = Context(rng, kept, dim)
    (whole,) = context.attend(gpu(1, max_shared), (0, 0, 88))
    assert np.isfinite(whole).all()
    for cut in (9, 64, 70):
        before, _ = context.attend(gpu(2, max_shared), (0, 0, cut), (1, 3, 20))
        _, after = context.attend(gpu(3, max_shared), (1, 60, 75), (0, cut, 88))
        assert np.concatenate([before, after]).tobytes() == whole.tobytes(), f"cut at {cut}"


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("prefill attention")])
def test_attention_that_copies_ahead_equals_its_reference(name: str) -> None:
    wanted = run(CASES[name](np.random.default_rng(5)), ReferenceOps(cache_bytes=0))
    case, runtime, launched = CASES[name](np.random.default_rng(5)), machine(5, 227), set[str]()
    launch = runtime.stream.launch

    def recording_launch(kernel: Kernel, grid: tuple[int, ...], values: tuple[Any, ...]) -> None:
        launched.add(kernel.name)
        launch(kernel, grid, values)

    runtime.stream.launch = recording_launch  # type: ignore[method-assign]
    found = run(case, GpuOps(runtime))
    assert compare(found["out"], wanted["out"], case.writes["out"]) <= allowed(case.writes["out"])
    assert launched == {f"gqa_prefill_{'_'.join(name.split(',')[0].split()[2:])}_ahead"}


def test_attention_copies_ahead_where_two_blocks_fit() -> None:
    """Such devices are of sm_90 and sm_100; the others have 99 or 163 KiB per block."""
    assert [copies_kv_ahead(machine(0, size)) for size in (99, 163, 227)] == [False, False, True]
    contracts = [kernel.contract for key, kernel in GQA_PREFILL.items() if key.endswith("_ahead")]
    sizes = [contract.dynamic({}) for contract in contracts if contract.dynamic is not None]
    assert max(sizes) == PREFILL_AHEAD_SHARED_BYTES
    assert all({"sm_90", "sm_100"} <= {*contract.targets} for contract in contracts)


@pytest.mark.parametrize("max_shared", [99, 227])
@pytest.mark.parametrize("kept", ["bf16", "fp8"])
def test_sums_are_rescaled_where_scores_grow(
    rng: np.random.Generator, kept: str, max_shared: int
) -> None:
    """Keys grow from position 32 and from 64 on, so some rows' largest scores grow by more than
    2^6, and some do not."""
    context = Context(rng, kept, 128)
    positions = np.arange(96)
    growth = np.array([1, 4, 16], np.float32)[positions // 32].reshape(-1, PAGE, 1)
    pages, values = context.table[0], context.kv[2 if kept == "fp8" else 0]
    assert values is not None
    if kept == "fp8":
        values[pages] = (values[pages] * growth).astype(np.float16)
    else:
        values[pages] = bf16_from_f32(f32_from_bf16(values[pages]) * growth[..., None])
    (wanted,) = context.attend(ReferenceOps(cache_bytes=0), (0, 0, 88))
    (found,) = context.attend(gpu(1, max_shared), (0, 0, 88))
    assert distance(found, wanted) < (5e-3 if kept == "fp8" else 1e-4)
