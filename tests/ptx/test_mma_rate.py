"""The probe of matrix instructions computes what its header says: no mma is left out."""

import numpy as np
import numpy.typing as npt
import pytest

from osmium.ops.gpu import GpuOps
from osmium.ops.mma_rate import MMA_RATE, ROUND_OPERATIONS, ROUND_THREADS, multiply_registers
from tests.ptx.interpreter import InterpretedRuntime

LANES = np.arange(32)
G, Q = LANES // 4, LANES % 4


def registers(thread: npt.NDArray[np.int64], factors: list[int]) -> npt.NDArray[np.uint32]:
    """u32 [registers, lanes]: (t + 1) * factor."""
    words: npt.NDArray[np.uint32] = ((thread + 1) * np.array(factors)[:, None]).astype(np.uint32)
    return words


def as_bf16(words: npt.NDArray[np.uint32]) -> npt.NDArray[np.float64]:
    """f64 [registers, lanes, 2], 1 or 2 by bits 7 and 23 of 0x10001 times each word."""
    words = words * np.uint32(0x10001)
    return 1.0 + np.stack([words >> 7 & 1, words >> 23 & 1], -1)


def as_s8(words: npt.NDArray[np.uint32]) -> npt.NDArray[np.float64]:
    """f64 [registers, lanes, 4], the bytes of each word."""
    return np.ascontiguousarray(words)[..., None].view(np.int8).astype(np.float64)


def expected(rounds: int, operands: str) -> npt.NDArray[np.float64]:
    """The 256 sums of a block, from whole matrices A [16, K] and B [K, 8]."""
    each, read = (4, as_s8) if operands == "s8" else (2, as_bf16)
    sums = np.zeros(ROUND_THREADS)
    for warp in range(ROUND_THREADS // 32):
        thread = LANES + 32 * warp
        for i in range(4):
            values = read(registers(thread, [8 * i + 2 * r + 1 for r in range(4)]))
            a = np.zeros((16, 8 * each))
            for r in range(4):
                for e in range(each):
                    a[G + 8 * (r % 2), each * (Q + 4 * (r // 2)) + e] = values[r, :, e]
            for j in range(4):
                values_b = read(registers(thread, [4 * j + 2 * r + 33 for r in range(2)]))
                b = np.zeros((8 * each, 8))
                for r in range(2):
                    for e in range(each):
                        b[each * (Q + 4 * r) + e, G] = values_b[r, :, e]
                c = rounds * (a @ b)
                for row in (G, G + 8):
                    sums[thread] += c[row, 2 * Q] + c[row, 2 * Q + 1]
    return sums


@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize("operands", ["s8", "bf16"])
def test_each_thread_stores_the_sum_of_its_results(operands: str, rounds: int) -> None:
    ops = GpuOps(InterpretedRuntime())
    out = ops.empty((2, ROUND_THREADS), np.int32 if operands == "s8" else np.float32)
    multiply_registers(ops.stream, out, rounds, operands)
    found = ops.copy_d2h(out)
    for block in found:
        assert (block == expected(rounds, operands)).all()
    assert len(np.unique(found)) > 100, "operands differ between threads"


@pytest.mark.parametrize(("operands", "depth"), [("s8", 32), ("bf16", 16)])
def test_the_operations_of_a_round_are_those_of_its_instructions(operands: str, depth: int) -> None:
    text = MMA_RATE[operands].contract.text
    count = sum(line.strip().startswith("mma.sync") for line in text.splitlines())
    assert ROUND_OPERATIONS[operands] == count * 16 * 8 * depth * 2


@pytest.mark.gpu
@pytest.mark.parametrize("operands", ["s8", "bf16"])
def test_the_sums_are_equal_on_a_gpu(gpu: GpuOps, operands: str) -> None:
    out = gpu.empty((3, ROUND_THREADS), np.int32 if operands == "s8" else np.float32)
    multiply_registers(gpu.stream, out, 5, operands)
    assert (gpu.copy_d2h(out) == expected(5, operands)).all()
