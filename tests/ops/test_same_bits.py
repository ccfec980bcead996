"""A row's bits depend neither on the cache, nor on other rows, nor on the size of the GPU.

Steps of few rows: hits and fetched experts, decode attention and matrices.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest

from osmium.ops import LinearWeight, Ops, SlotAssignment
from osmium.ops.gpu import GpuOps
from osmium.ops.types import AttentionWeights, AttentionWorkspace
from osmium.quant.expert_layout import ExpertLayout
from tests.ops import cases
from tests.ops.cases import LAB, Size, experts_call, new_rows, read_rows
from tests.ptx import cases_linear
from tests.ptx.cases_linear import cache_of
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


def expert_arrays(rng: np.random.Generator, shared: int) -> Arrays:
    """Arrays of ROWS tokens in INT4 experts, with the slot of each pair in `slots_of`."""
    make = cases_linear.experts(4, ROWS, TOP_K, HIDDEN, INNER, shared=shared)
    arrays: Arrays = dict(make(rng).arrays)
    placed = arrays["pair_slots"]
    return arrays | {"slots_of": np.where(placed < 0, ~placed, placed)}


def computed_experts(ops: Ops, arrays: Arrays, fetched: Any) -> tuple[bytes, bytes]:
    """Output and the next matrix's input; `fetched` None: all experts are resident."""
    a = arrays | {"partial_out": np.full(arrays["x"].shape, -7, np.int64)}
    if fetched is None:
        a["routed_ids"] = a["slots_of"].astype(np.uint16)
    else:
        a["pair_slots"] = np.where(fetched, ~a["slots_of"], a["slots_of"])
    on_device = {name: ops.to_device(np.array(value)) for name, value in a.items()}
    layout = ExpertLayout(4, HIDDEN, INNER)
    cache = cache_of(layout, on_device["slots"], on_device["expert_to_slot"])
    plan, unused = None, cast(Any, None)
    if fetched is not None:
        plan = SlotAssignment(
            unused, unused, unused, unused, unused, on_device["pair_slots"],
            on_device["fetch_progress"], on_device["partial_out"],
        )  # fmt: skip
    parts = ("all",) if fetched is None else ("hits", "rest")
    experts_call(ops, on_device, "int8", plan, cache, parts, 3, norm=True)
    ops.synchronize()
    return ops.copy_d2h(on_device["out"]).tobytes(), ops.copy_d2h(on_device["next"]).tobytes()


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
    make = cases.shared_context
    arrays = dict(make(rng, size, SPLITS * ROWS, kv_format).arrays)

    def attended(ops: Ops, a: Arrays, one: Size) -> tuple[bytes, bytes]:
        rows = len(one.past)
        a = {name: ops.to_device(np.array(value)) for name, value in a.items()}
        width = one.heads * one.head_dim
        matrix = LinearWeight("int4", one.hidden, width, a["out"], a["out_scale"], 128)
        weights = AttentionWeights(a["norms"], a["frequencies"], matrix, 1e-6, one.head_dim**-0.5)
        h = new_rows(ops, rows, one.hidden, 1e-6)
        workspace = AttentionWorkspace(
            a["q"], new_rows(ops, rows, width), a["partial"], a["turns"], a["sums"], a["parts"]
        )
        ops.gated_attention(
            a["x"], h, a["scale"], a["qgkv"], weights, cases._kv(a), workspace, cases._step(one, a)
        )
        read_rows(ops, a["h"], h)
        ops.synchronize()
        return ops.copy_d2h(a["x"]).tobytes(), ops.copy_d2h(a["h"]).tobytes()

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
            found = cases.run(cases.Case(arrays, case.call, case.writes), ops)["out"]
            np.testing.assert_array_equal(found.view(np.int32), wanted[part].view(np.int32))
