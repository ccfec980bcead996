"""Operations on experts of many tokens: the reference against independent formulas, and equal bits.

The interpreter compares gather_add's kernel with the reference; tests/nogpu/test_group_by_expert.py
does so for the kernels of group_by_expert.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from osmium.ops import Ops
from osmium.ops.gpu import GpuOps
from osmium.ops.grouped import TILE_ROWS, ExpertGroups
from osmium.ops.reference import ReferenceOps
from tests.ops.cases import Arrays, run
from tests.ptx.cases_grouped import CASES, gather
from tests.ptx.interpreter import InterpretedRuntime
from tests.tolerance import close


def of(name: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("name", [case for case in CASES if case.startswith(name)])


@of("group_by_expert")
def test_pairs_are_sorted_by_expert_and_cut_into_tiles(name: str, rng: np.random.Generator) -> None:
    case = CASES[name](rng)
    out, ids = run(case, ReferenceOps()), case.arrays["ids"].reshape(-1)
    pairs = sorted(range(ids.size), key=lambda p: (ids[p], p))
    assert out["order"][: ids.size].tolist() == pairs
    assert out["position"][pairs].tolist() == list(range(ids.size))
    next_start, last_expert = 0, -1
    for slot, start, rows, expert in out["tiles"][: out["num_tiles"][0]].tolist():
        assert start == next_start and 1 <= rows <= TILE_ROWS and expert >= last_expert
        assert (ids[pairs[start : start + rows]] == expert).all()
        has_more = start + rows < ids.size and ids[pairs[start + rows]] == expert
        assert rows == TILE_ROWS or not has_more, "only an expert's last tile is partial"
        assert slot in (expert, case.arrays["slots"][expert])
        next_start, last_expert = start + rows, expert
    assert next_start == ids.size, "tiles cover all pairs"
    for array in (out["order"], out["position"]):
        assert (array[ids.size :] == 77).all(), "entries of other tokens stay as they are"
    assert (out["tiles"][out["num_tiles"][0] :] == 77).all()


def test_there_is_room_for_the_most_tiles() -> None:
    """Each expert has one pair more than whole tiles."""
    experts, tiles_each = 5, 3
    ids = np.repeat(np.arange(experts), tiles_each * TILE_ROWS - TILE_ROWS + 1).astype(np.uint16)
    shapes = ExpertGroups.shapes(ids.size, 1, experts)
    groups = ExpertGroups(*(np.zeros(shape, dtype) for shape, dtype in shapes.values()))
    ReferenceOps().group_by_expert(groups, ids[:, None], experts)
    assert groups.num_tiles[0] == experts * tiles_each <= len(groups.tiles)
    nbytes = sum(getattr(groups, name).nbytes for name in shapes)
    assert ExpertGroups.nbytes(ids.size, 1, experts) == nbytes


@of("gather_add")
def test_gather_add_is_a_weighted_sum_and_the_gated_shared_expert(
    name: str, rng: np.random.Generator
) -> None:
    case = CASES[name](rng)
    a = case.arrays
    y = np.concatenate([a[key] for key in a if key[0] == "y"]).astype(np.float64)
    wanted = a["out"].astype(np.float64)
    tokens, top_k = a["weights"].shape
    for t in range(tokens):
        for k in range(top_k):
            wanted[t] += a["weights"][t, k] * y[a["position"][t * top_k + k]]
        if "one each" not in name:
            wanted[t] += a["shared_out"][t] / (1 + np.exp(-a["router_logits"][t, -1]))
    assert close(run(case, ReferenceOps())["out"], wanted, "f32")


def interpreted(arrays: Arrays, parts: list[npt.NDArray[Any]]) -> bytes:
    """The bits of gather_add for consecutive parts of y, by the kernel."""
    ops: Ops = GpuOps(InterpretedRuntime())
    a = {name: ops.to_device(np.array(array)) for name, array in arrays.items()}
    start = 0
    for part in parts:
        y = ops.to_device(np.array(part))
        ops.gather_add(a["out"], y, a["weights"], a["position"], start)
        start += len(part)
    return ops.copy_d2h(a["out"]).tobytes()


def test_the_cuts_of_y_do_not_change_a_bit(rng: np.random.Generator) -> None:
    a = gather(33, 8, 132)(rng).arrays
    whole = interpreted(a, [a["y0"]])
    for cuts in ([1], [130], [64, 128, 192], [200, 263]):
        assert interpreted(a, np.split(a["y0"], cuts)) == whole, cuts


def test_the_order_of_a_tokens_pairs_does_not_change_a_bit(rng: np.random.Generator) -> None:
    a = gather(9, 8, 32)(rng).arrays
    shuffled = np.argsort(rng.random((9, 8)), axis=1)
    position = np.take_along_axis(a["position"][:72].reshape(9, 8), shuffled, axis=1)
    weights = np.take_along_axis(a["weights"], shuffled, axis=1)
    other = a | {"position": position.reshape(-1), "weights": weights}
    assert interpreted(other, [a["y0"]]) == interpreted(a, [a["y0"]])


def test_a_tokens_bits_do_not_depend_on_other_tokens(rng: np.random.Generator) -> None:
    a = gather(9, 8, 32)(rng).arrays
    whole = np.frombuffer(interpreted(a, [a["y0"]]), np.float32).reshape(9, 32)
    rows = np.sort(a["position"][24:32])
    alone = {
        "out": a["out"][3:4],
        "weights": a["weights"][3:4],
        "position": np.searchsorted(rows, a["position"][24:32]).astype(np.int32),
    }
    assert interpreted(alone, [a["y0"][rows]]) == whole[3].tobytes()
