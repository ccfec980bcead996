"""BF16 matrices of many rows: a row's bits depend on its inputs and the weights alone."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from osmium.ops import ExpertGroups, GroupedExperts, LinearWeight
from osmium.ops.gpu import GpuOps
from osmium.quant.expert_layout import ExpertLayout
from osmium.quant.floats import bf16_from_f32
from tests.ops.cases import new_rows, normed_rows, packed_experts, rows_of
from tests.ptx.interpreter import InterpretedRuntime

Array = npt.NDArray[Any]
ROWS = 65

GPUS: dict[tuple[int, int], tuple[str, int]] = {
    (3, 99): ("bf16_gemm_f32", 3),
    (3, 227): ("bf16_gemm_f32", 5),
    (132, 227): ("bf16_gemm_small_f32", 5),
}
"""Kernel and stages of 65 rows, by multiprocessors and KiB of shared memory per block."""

NARROW_GPUS: dict[tuple[int, int], tuple[str, int]] = {
    (3, 99): ("bf16_gemm_narrow_f32", 3),
    (132, 227): ("bf16_gemm_narrow_f32", 5),
    (108, 163): ("bf16_gemm_narrow_f32", 5),
}
"""The same for a matrix of few rows."""


def gpu(seed: int, sm_count: int = 3, max_shared: int = 99) -> tuple[GpuOps, set[tuple[str, int]]]:
    """Operations, and the BF16 matrix kernels that they have launched, with their stages."""
    runtime, launched = InterpretedRuntime(seed), set[tuple[str, int]]()
    runtime.sm_count, runtime.max_shared_per_block = sm_count, max_shared << 10
    launch = runtime.stream.launch

    def recording_launch(kernel: Any, grid: tuple[int, ...], values: tuple[Any, ...]) -> None:
        if "gemm" in kernel.name:
            names = [parameter.name for parameter in kernel.contract.params]
            launched.add((kernel.name, values[names.index("stages")]))
        launch(kernel, grid, values)

    runtime.stream.launch = recording_launch  # type: ignore[method-assign]
    return GpuOps(runtime), launched


class Matrix:
    """A matrix [n, k], its inputs and a residual."""

    def __init__(self, rng: np.random.Generator, n: int, k: int) -> None:
        self.w = bf16_from_f32(rng.standard_normal((n, k), np.float32))
        self.x = rng.standard_normal((ROWS, k), np.float32)
        self.norm = rng.standard_normal(k, np.float32)
        self.residual = rng.standard_normal((ROWS, n), np.float32)

    def multiply(self, ops: GpuOps, rows: Array, columns: slice = slice(None)) -> tuple[Array, ...]:
        """linear of normed rows, and the residual plus linear of the rows."""
        part = np.ascontiguousarray(self.w[columns])
        w = LinearWeight("bf16", part.shape[0], part.shape[1], ops.to_device(part))
        x = ops.to_device(self.x[rows])
        out = ops.empty((len(rows), len(part)), np.float32)
        more = ops.to_device(self.residual[rows, columns])
        ops.linear(out, normed_rows(ops, x, ops.to_device(self.norm)), w)
        ops.gemm(more, rows_of(ops, x), w, 1)
        return np.array(ops.copy_d2h(out)), np.array(ops.copy_d2h(more))


@pytest.mark.parametrize(
    ("gpus", "n", "k", "columns"),
    [(GPUS, 385, 160, slice(63, 384)), (NARROW_GPUS, 131, 672, slice(63, 130))],
)
def test_a_rows_bits_depend_on_no_other_row_or_column_nor_on_blocks(
    rng: np.random.Generator,
    gpus: dict[tuple[int, int], tuple[str, int]],
    n: int,
    k: int,
    columns: slice,
) -> None:
    matrix, rows = Matrix(rng, n, k), np.arange(ROWS)
    whole = None
    for seed, (size, wanted) in enumerate(gpus.items()):
        ops, launched = gpu(seed, *size)
        found = matrix.multiply(ops, rows)
        assert launched == {wanted}
        whole = whole or found
        assert all(a.tobytes() == b.tobytes() for a, b in zip(found, whole, strict=True)), wanted
    assert whole is not None and np.isfinite(whole).all()
    parts = (rng.permutation(ROWS)[:9], slice(0, n)), (np.arange(32, 65), columns)
    for some, chosen in parts:
        found = matrix.multiply(gpu(1)[0], some, chosen)
        for part, all_rows in zip(found, whole, strict=True):
            assert part.tobytes() == all_rows[some, chosen].tobytes()


class Experts:
    """Three experts, two of them with many rows, and tokens with two experts each."""

    layout = ExpertLayout(16, 96, 160)

    def __init__(self, rng: np.random.Generator) -> None:
        self.packed = packed_experts(rng, self.layout, 3)
        self.x = rng.standard_normal((ROWS + 5, self.layout.hidden), np.float32)
        self.norm = rng.standard_normal(self.layout.hidden, np.float32)
        self.ids = np.array([[0, 2]] * ROWS + [[1, 2]] * 5, np.uint16)

    def compute(self, ops: GpuOps, tokens: Array, slots: Array) -> Array:
        """pair_out [tokens, 2, D]; `slots` are the places of the experts in VRAM."""
        ids, shape = self.ids[tokens], (len(tokens), 2, self.layout.hidden)
        shapes = ExpertGroups.shapes(len(tokens), 2, 3)
        groups = ExpertGroups(*(ops.empty(s, dtype) for s, dtype in shapes.values()))
        pair_out = ops.empty((ids.size, self.layout.hidden), np.float32)
        grouped = GroupedExperts(groups, pair_out)
        h = normed_rows(ops, ops.to_device(self.x[tokens]), ops.to_device(self.norm))
        device_ids = ops.to_device(ids)
        ops.group_by_expert(groups, device_ids, 3)
        held = np.empty_like(self.packed)
        held[slots] = self.packed
        ops.expert_part(
            grouped, new_rows(ops, ids.size, self.layout.inner), h, device_ids, self.layout,
            ops.to_device(held), ops.to_device(slots.astype(np.int32)),
        )  # fmt: skip
        found: Array = np.array(ops.copy_d2h(pair_out))[ops.copy_d2h(groups.position)]
        return found.reshape(shape)


def test_a_pairs_bits_depend_on_no_other_pair_nor_on_slots(rng: np.random.Generator) -> None:
    experts = Experts(rng)
    ops, launched = gpu(1)
    whole = experts.compute(ops, np.arange(ROWS + 5), np.arange(3))
    assert launched == {("bf16_moe_gemm_up_f32", 3), ("bf16_moe_gemm_down_f32", 3)}
    assert np.isfinite(whole).all()
    for tokens in (rng.permutation(ROWS + 5)[:9], np.arange(3, ROWS + 2)):
        ops, launched = gpu(2, 132, 227)
        found = experts.compute(ops, tokens, rng.permutation(3))
        assert found.tobytes() == whole[tokens].tobytes()
        assert launched == {("bf16_moe_gemm_up_f32", 5), ("bf16_moe_gemm_down_f32", 5)}
