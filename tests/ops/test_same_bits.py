"""A row's bits depend neither on the cache, nor on other rows, nor on the size of the GPU.

Steps of few rows: hits and fetched experts, decode attention and matrices.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from osmium.ops import Ops
from osmium.ops.gpu import GpuOps
from tests.ops import cases
from tests.ops.cases import LAB, Case, Size
from tests.ptx import cases_linear
from tests.ptx.interpreter import InterpretedRuntime

Arrays = dict[str, npt.NDArray[Any]]
ROWS = 4
SPLITS = 12


def machines() -> Iterator[Any]:
    yield pytest.param(None, id="interpreter")
    yield pytest.param("gpu", id="gpu", marks=pytest.mark.gpu)


@pytest.fixture(params=machines())
def backends(request: pytest.FixtureRequest) -> list[Ops]:
    """GPUs of two sizes, interpreted, or this machine's one."""
    if request.param == "gpu":
        return [request.getfixturevalue("gpu")]
    found: list[Ops] = []
    for multiprocessors in (3, 40):
        runtime = InterpretedRuntime()
        runtime.sm_count = multiprocessors
        found.append(GpuOps(runtime))
    return found


def rows_alone(arrays: Arrays, names: tuple[str, ...], rows: int) -> Iterator[Arrays]:
    """The arrays of each row, where `names` have a row per token."""
    for row in range(rows):
        yield arrays | {name: arrays[name][row : row + 1].copy() for name in names}


TOP_K, HIDDEN, INNER = 3, 128, 128


def expert_case(rng: np.random.Generator, shared: int, *parts: str) -> Case:
    return cases_linear.experts(4, ROWS, TOP_K, HIDDEN, INNER, *parts, shared=shared)(rng)


def expert_arrays(rng: np.random.Generator, shared: int) -> Arrays:
    """Arrays of ROWS tokens in INT4 experts, with the slot of each pair in `slots_of`."""
    arrays: Arrays = dict(expert_case(rng, shared).arrays)
    placed = arrays["pair_slots"]
    return arrays | {"slots_of": np.where(placed < 0, ~placed, placed)}


def computed_experts(ops: Ops, arrays: Arrays, fetched: Any) -> tuple[bytes, bytes]:
    """Output and the next matrix's input; `fetched` None: all experts are resident."""
    slots, shared = arrays["slots_of"], arrays["both"].shape[1] // 2
    if fetched is None:
        a = {name: array for name, array in arrays.items() if name != "pair_slots"}
        a["routed_ids"] = slots.astype(np.uint16)
    else:
        a = arrays | {"pair_slots": np.where(fetched, ~slots, slots)}
    parts = ("all",) if fetched is None else ("hits", "rest")
    made = expert_case(np.random.default_rng(0), shared, *parts)
    found = cases.run(replace(made, arrays=a), ops)
    return found["out"].tobytes(), found["next"].tobytes()


@pytest.mark.parametrize("shared", [64, 72])
def test_experts_have_the_same_bits_whichever_are_hits(
    rng: np.random.Generator, backends: list[Ops], shared: int
) -> None:
    """A shared expert of 64 values is computed beside the routed ones, one of 72 by others."""
    arrays = expert_arrays(rng, shared)
    pairs = arrays["slots_of"].shape
    wanted = computed_experts(backends[0], arrays, None)
    many = len(backends) == 1
    for ops in backends:
        masks = [rng.random(pairs) < part for part in (0.5, *([0.2, 0.8] * many))]
        for fetched in [*masks, *([np.ones(pairs, bool), None] if many else [])]:
            assert computed_experts(ops, arrays, fetched) == wanted
    names = ("out", "next", "x", "pair_slots", "slots_of", "routed_ids", "weights", "scores",
             "shared_out", "y", "both")  # fmt: skip
    size = 4 * HIDDEN
    for row, alone in enumerate(rows_alone(arrays, names, ROWS)):
        if many or row == ROWS - 1:
            out, after = computed_experts(ops, alone, rng.random((1, TOP_K)) < 0.5)
            assert out == wanted[0][row * size : (row + 1) * size]
            assert after == wanted[1][row * size : (row + 1) * size]


@pytest.mark.parametrize(("bad", "expert"), [(np.nan, 1), (np.inf, 0), (3e17, 1)])
def test_a_sum_of_experts_that_does_not_fit_is_not_a_number(
    rng: np.random.Generator, backends: list[Ops], bad: float, expert: int
) -> None:
    """Of a row whose products are too large or not finite, those of a fetched expert or of a hit.

    Other rows are as before.
    """
    arrays, ops = expert_arrays(rng, 64), backends[0]
    fetched = np.zeros(arrays["slots_of"].shape, bool)
    fetched[:, 0] = True
    wanted = np.frombuffer(computed_experts(ops, arrays, fetched)[0], np.float32)
    wanted = wanted.reshape(ROWS, HIDDEN)
    arrays["weights"][1, expert] = bad
    for mask in (fetched, None):
        out = np.frombuffer(computed_experts(ops, arrays, mask)[0], np.float32)
        out = out.reshape(ROWS, HIDDEN)
        assert np.isnan(out[1]).all()
        np.testing.assert_array_equal(np.delete(out, 1, 0), np.delete(wanted, 1, 0))


@pytest.mark.parametrize("kv_format", ["bf16", "fp8"])
def test_decode_attention_has_the_same_bits_for_any_rows_and_gpu(
    rng: np.random.Generator, backends: list[Ops], kv_format: str
) -> None:
    past = (0, 33, 150, 260)
    size = replace(
        LAB, hidden=64, heads=4, kv_heads=2, head_dim=64, rotary=16, page=16, past=past,
        lengths=(1,) * ROWS,
    )  # fmt: skip
    arrays: Arrays = dict(cases.shared_context(rng, size, SPLITS * ROWS, kv_format).arrays)

    def attended(ops: Ops, a: Arrays, one: Size) -> tuple[bytes, bytes]:
        made = cases.shared_context(np.random.default_rng(0), one, SPLITS, kv_format)
        found = cases.run(replace(made, arrays=a), ops)
        return found["x"].tobytes(), found["h"].tobytes()

    wanted = attended(backends[0], arrays, size)
    names = ("x", "h", "q", "qgkv", "turns", "sums", "positions", "past", "slots", "pages")
    for ops in backends:
        assert attended(ops, arrays, size) == wanted
        with ops.on_side_stream(prefetch=True):
            pass  # fewer blocks wait for others beside a prefetch
        assert attended(ops, arrays, size) == wanted
        ops.join_side_stream(prefetch=True)
        for row, alone in enumerate(rows_alone(arrays, names, ROWS)):
            alone |= {
                "sequence": np.zeros(1, np.int32),
                "starts": np.array([0, 1], np.int32),
                "partial": arrays["partial"][:SPLITS],
            }
            one = replace(size, past=past[row : row + 1], lengths=(1,))
            x, h = attended(ops, alone, one)
            bytes_of_row = 4 * size.hidden
            assert x == wanted[0][row * bytes_of_row : (row + 1) * bytes_of_row]
            assert h == wanted[1][row * bytes_of_row : (row + 1) * bytes_of_row]


@pytest.mark.parametrize("form", ["int4", "int8", "bf16"])
def test_matrices_have_the_same_bits_for_any_rows_and_gpu(
    rng: np.random.Generator, backends: list[Ops], form: str
) -> None:
    rows, outputs, inputs = 8, 136, 512
    case = cases_linear.linear(form, rows, outputs, inputs, 128 if form == "int4" else 0)(rng)
    wanted = cases.run(case, backends[0])["out"]
    for ops in backends:
        np.testing.assert_array_equal(
            cases.run(case, ops)["out"].view(np.int32), wanted.view(np.int32)
        )
        for first, count in ((0, 1), (7, 1), (2, 2), (1, 5), (0, 6), (4, 4)):
            part = slice(first, first + count)
            arrays = {n: v[part] if len(v) == rows else v for n, v in case.arrays.items()}
            found = cases.run(replace(case, arrays=arrays), ops)["out"]
            np.testing.assert_array_equal(found.view(np.int32), wanted[part].view(np.int32))
