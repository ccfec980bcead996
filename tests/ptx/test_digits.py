"""Kernels that store digits: the bits are those of the separate kernels, and of each row alone."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from osmium.kernels.ptx import kernel
from osmium.ops.gpu import GpuOps
from tests.ops.cases import new_rows
from tests.ptx.interpreter import InterpretedRuntime

Array = npt.NDArray[Any]
EPS = 1e-6
SHAPES = [(1, 128), (31, 640), (33, 2304), (65, 384), (2, 4224)]
"""Rows and width: a group, an odd number of them, and more than the 2,048 values of a turn."""


def values(rng: np.random.Generator, *shape: int) -> npt.NDArray[np.float32]:
    """Rows of different sizes, with a group of zeros and an outlier."""
    x = rng.standard_normal(shape, np.float32) * np.exp(rng.standard_normal((shape[0], 1)) * 3)
    x = x.astype(np.float32)
    x[-1, -128:] = 0
    x[0, 3] *= 100
    return x


def split(ops: GpuOps, name: str, source: Any, width: int) -> tuple[Array, Array]:
    """Digits and units of rows by the kernel `name`."""
    out = new_rows(ops, source.shape[0], width)
    kernel(name)(ops.stream, source.shape[0], out.digits, out.units, source, width)
    return read(ops, out)


def read(ops: GpuOps, rows: Any) -> tuple[Array, Array]:
    return np.array(ops.copy_d2h(rows.digits)), np.array(ops.copy_d2h(rows.units))


def equal(found: tuple[Array, ...], wanted: tuple[Array, ...]) -> bool:
    return all(a.tobytes() == b.tobytes() for a, b in zip(found, wanted, strict=True))


def gains(square_sums: npt.NDArray[np.float32], width: int) -> npt.NDArray[np.float32]:
    """1 / rms of each row, with the kernel's order of sums: threads, lanes, warps."""
    rows, count = square_sums.shape
    padded = np.zeros((rows, -(-count // 256), 256), np.float32)
    padded.reshape(rows, -1)[:, :count] = square_sums
    sums = np.zeros((rows, 256), np.float32)
    for turn in range(padded.shape[1]):
        sums += padded[:, turn]
    by_warp, lanes = sums.reshape(rows, 8, 32), np.arange(32)
    for step in (16, 8, 4, 2, 1):
        by_warp = by_warp + by_warp[..., lanes ^ step]
    warps = by_warp[..., 0]
    for _ in range(3):
        warps = warps[:, ::2] + warps[:, 1::2]
    mean = warps[:, 0] / np.float32(width) + np.float32(EPS)
    return np.asarray(np.float32(1) / np.sqrt(mean), np.float32)


@pytest.mark.parametrize(("rows", "width"), SHAPES)
@pytest.mark.parametrize("normed", [True, False])
def test_norms_store_the_halves_and_digits_of_separate_kernels(
    rng: np.random.Generator, rows: int, width: int, normed: bool
) -> None:
    ops = GpuOps(InterpretedRuntime(1))
    x, norm = ops.to_device(values(rng, rows, width)), ops.to_device(values(rng, 1, width)[0])
    eps = EPS if normed else None
    found, wanted = new_rows(ops, rows, width, eps), new_rows(ops, rows, width, eps)
    with ops.prefill():
        if normed:
            ops.rms_norm(found, x, norm)
        else:
            ops.copy(found.f32, x)
            ops.prepare_input(found)
    kernel("norm_split_hi_lo_f32")(
        ops.stream, rows, wanted.hi_lo, wanted.square_sums or 0, x, norm if normed else 0, width
    )
    assert ops.copy_d2h(found.hi_lo).tobytes() == ops.copy_d2h(wanted.hi_lo).tobytes()
    digits, units = split(ops, "split_digits_hi_lo_f32", found.hi_lo, width)
    if normed:
        sums = ops.copy_d2h(found.square_sums)
        assert sums.tobytes() == ops.copy_d2h(wanted.square_sums).tobytes()
        units *= gains(sums, width)[:, None]
    assert equal(read(ops, found), (digits, units))


@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_silu_and_mul_stores_the_digits_of_its_results(
    rng: np.random.Generator, rows: int, width: int
) -> None:
    ops = GpuOps(InterpretedRuntime(1))
    x = ops.to_device(values(rng, rows, 2 * width))
    out, found = ops.empty((rows, width), np.float32), new_rows(ops, rows, width)
    ops.silu_and_mul(out, x)
    kernel("silu_and_mul_digits_f32")(ops.stream, rows, found.digits, found.units, x, width)
    assert equal(read(ops, found), split(ops, "split_digits_f32", out, width))


@pytest.mark.parametrize(
    ("rows", "heads", "dim"),
    [(1, 4, 32), (31, 5, 128), (33, 3, 256), (65, 4, 96), (2, 34, 64), (3, 11, 384)],
)
def test_sigmoid_gate_stores_the_digits_of_its_results(
    rng: np.random.Generator, rows: int, heads: int, dim: int
) -> None:
    ops, width = GpuOps(InterpretedRuntime(1)), heads * dim
    qgkv = ops.to_device(values(rng, rows, 2 * (heads + 1) * dim))
    out = ops.to_device(values(rng, rows, width).reshape(rows, heads, dim))
    found = new_rows(ops, rows, width)
    kernel("sigmoid_gate_digits_f32")(
        ops.stream, rows, found.digits, found.units, out, qgkv, width, dim, qgkv.shape[1]
    )
    ops.sigmoid_gate(out, qgkv)
    wanted = split(ops, "split_digits_f32", out.reshape(rows, width), width)
    assert equal(read(ops, found), wanted)


@pytest.mark.parametrize(("rows", "heads"), [(1, 1), (31, 3), (33, 16), (65, 2), (2, 33)])
def test_gated_rms_norm_stores_the_digits_of_its_results(
    rng: np.random.Generator, rows: int, heads: int
) -> None:
    ops, width, column = GpuOps(InterpretedRuntime(1)), heads * 128, 36
    x = ops.to_device(values(rng, rows, width).reshape(rows, heads, 128))
    z, w = ops.to_device(values(rng, rows, column + width)), ops.to_device(values(rng, 1, 128)[0])
    out, found = ops.empty((rows, heads, 128), np.float32), new_rows(ops, rows, width)
    ops.gated_rms_norm(out, x, z, column, w, EPS)
    kernel("gated_rms_norm_digits_f32")(
        ops.stream, rows, found.digits, found.units, x, z, w, width, column + width, column, EPS
    )
    wanted = split(ops, "split_digits_f32", out.reshape(rows, width), width)
    assert equal(read(ops, found), wanted)


def test_a_nan_makes_the_unit_of_its_group_a_nan(rng: np.random.Generator) -> None:
    ops = GpuOps(InterpretedRuntime(1))
    x = rng.standard_normal((2, 384), np.float32)
    x[1, 200] = np.nan
    _, units = split(ops, "split_digits_f32", ops.to_device(x), 384)
    assert np.isnan(units).tolist() == [[False] * 3, [False, True, False]]
