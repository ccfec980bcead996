"""Prefill attention: a token's bits depend on its query and its context alone."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from osmium.ops import PagedKV, StepInputs
from osmium.ops.gpu import GpuOps
from osmium.quant.floats import bf16_from_f32
from tests.ptx.interpreter import InterpretedRuntime

Array = npt.NDArray[Any]
HEADS, KV_HEADS, PAGE = 3, 1, 16


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

    def attend(self, seed: int, *parts: tuple[int, int, int]) -> list[Array]:
        """The output of positions `first` to `end` of sequence `s`, for each (s, first, end)."""
        ops = GpuOps(InterpretedRuntime(seed))
        kv = PagedKV(*(None if array is None else ops.to_device(array) for array in self.kv))
        positions = np.concatenate([np.arange(first, end) for _, first, end in parts])
        q = np.concatenate([self.q[s, first:end] for s, first, end in parts])
        lengths = [end - first for _, first, end in parts]
        unused: Any = None
        step = StepInputs(
            len(q), len(parts), PAGE, unused, ops.to_device(positions.astype(np.int32)),
            ops.to_device(np.repeat(np.arange(len(parts)), lengths).astype(np.int32)),
            ops.to_device(np.cumsum([0, *lengths]).astype(np.int32)), unused, unused,
            ops.to_device(self.table[[s for s, _, _ in parts]]),
        )  # fmt: skip
        out = ops.empty(q.shape, np.float32)
        ops.attention(out, ops.to_device(q), kv, step, self.dim**-0.5)
        return np.split(ops.copy_d2h(out), np.cumsum(lengths)[:-1])


@pytest.mark.parametrize("dim", [128, 256])
@pytest.mark.parametrize("kept", ["bf16", "fp8"])
def test_neither_cuts_nor_other_sequences_change_a_bit(
    rng: np.random.Generator, kept: str, dim: int
) -> None:
    context = Context(rng, kept, dim)
    (whole,) = context.attend(1, (0, 0, 88))
    assert np.isfinite(whole).all()
    for cut in (9, 64, 70):
        before, _ = context.attend(2, (0, 0, cut), (1, 3, 20))
        _, after = context.attend(3, (1, 60, 75), (0, cut, 88))
        assert np.concatenate([before, after]).tobytes() == whole.tobytes(), f"cut at {cut}"
