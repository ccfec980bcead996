"""Linear, expert, top-k and fetch cases on the reference, against float64 formulas.

The interpreter compares kernels with the reference; these tests check the reference independently
on the same ragged cases.
"""

import re
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from osmium.ops import ExpertCache
from osmium.ops.reference import ReferenceOps
from osmium.ops.types import PREFETCH_STOP
from osmium.quant.expert_layout import ExpertLayout
from osmium.quant.floats import f32_from_bf16
from tests.ops.cases import Arrays, Case, run
from tests.ptx.cases_linear import CASES
from tests.tolerance import close

F64 = npt.NDArray[np.float64]


def of(pattern: str) -> pytest.MarkDecorator:
    names = [name for name in CASES if re.search(pattern, name)]
    return pytest.mark.parametrize("name", names)


def matrix(form: str, data: npt.NDArray[Any], scale: npt.NDArray[Any] | None) -> F64:
    """A stored matrix [N, K], nibble by nibble (the bit table of quant/int4.py)."""
    if form == "bf16":
        return f32_from_bf16(data).astype(np.float64)
    assert scale is not None
    wide = scale.astype(np.float64)
    if form == "int8":
        return data * wide[:, None]
    words = np.ascontiguousarray(data).view(np.uint32)
    q = np.stack([words >> (4 * (i // 2) + 16 * (i % 2)) & 15 for i in range(8)], axis=-1)
    q = q.reshape(len(data), -1).astype(np.float64) - 8
    return q * np.repeat(wide, q.shape[1] // wide.shape[1], axis=1)


def matrices_of(layout: ExpertLayout, raw: npt.NDArray[np.uint8]) -> tuple[F64, F64]:
    """Gate and up [2I, D], and down [D, I], of one packed expert."""
    form = {16: "bf16", 8: "int8", 4: "int4"}[layout.bits]
    kind = {16: np.uint16, 8: np.int8, 4: np.uint8}[layout.bits]
    made = []
    for rows, columns, start, scales, group in (
        (2 * layout.inner, layout.hidden, 0, layout.up_scale, layout.up_group),
        (layout.hidden, layout.inner, layout.down, layout.down_scale, layout.down_group),
    ):
        nbytes = rows * columns * layout.bits // 8
        data = raw[start : start + nbytes].view(kind).reshape(rows, -1)
        scale: npt.NDArray[Any] | None = None
        if layout.bits == 8:
            scale = raw[scales : scales + 4 * rows].view(np.float32)
        elif layout.bits == 4:
            n = rows * (columns // group)
            scale = raw[scales : scales + 2 * n].view(np.float16).reshape(rows, -1)
        made.append(matrix(form, data, scale))
    return made[0], made[1]


def case_and_outputs(name: str, rng: np.random.Generator) -> tuple[Case, Arrays]:
    case = CASES[name](rng)
    return case, run(case, ReferenceOps())


@of("_linear")
def test_linear_is_a_sum_of_products(name: str, rng: np.random.Generator) -> None:
    case, out = case_and_outputs(name, rng)
    a = case.arrays
    w = matrix(name.split("_")[0], a["w"], a.get("scale"))
    assert close(out["out"], a["x"].astype(np.float64) @ w.T, "f32")


class RecordingOps(ReferenceOps):
    """Records the expert layout of expert_up."""

    asked: ExpertLayout

    def expert_up(self, *arguments: Any) -> None:
        (cache,) = (one for one in arguments if isinstance(one, ExpertCache))
        self.layout = cache.layout
        super().expert_up(*arguments)


def norm(x: F64, w: F64) -> F64:
    made: F64 = x / np.sqrt((x * x).mean(axis=1, keepdims=True) + 1e-6) * (1 + w)
    return made


def gated(x: F64, up: F64, down: F64) -> F64:
    g, u = np.split(x @ up.T, 2, axis=-1)
    made: F64 = (g / (1 + np.exp(-g)) * u) @ down.T
    return made


@of("_expert")
def test_experts_are_summed_by_weight(name: str, rng: np.random.Generator) -> None:
    case, ops = CASES[name](rng), RecordingOps()
    out, a = run(case, ops), case.arrays
    h = norm(a["x"].astype(np.float64), a["norm"])
    form = "bf16" if a["shared_up"].dtype == np.uint16 else "int8"
    own_slot = [matrix(form, a[key], a.get(f"{key}_scale")) for key in ("shared_up", "shared_down")]
    gate = 1 / (1 + np.exp(-a["scores"][:, 3:4].astype(np.float64)))
    want = a["out"] + gate * gated(h, *own_slot)
    for t, chosen in enumerate(a["routed_ids"]):
        for expert, weight in zip(chosen, a["weights"][t], strict=True):
            layout = matrices_of(ops.layout, a["slots"][0, a["expert_to_slot"][0, expert]])
            want[t] += weight * gated(h[t], *layout)
    assert close(out["out"], want, "f32")
    assert close(out["next"], norm(want, a["norm"]), "f32")


@of("^topk_softmax ")
def test_topk_softmax_takes_the_largest_probabilities(name: str, rng: np.random.Generator) -> None:
    case, out = case_and_outputs(name, rng)
    logits = case.arrays["logits"]
    spare = int((logits[0] == 99).sum())
    top_k = out["ids"].shape[1]
    for t, row in enumerate(logits[:, : logits.shape[1] - spare].astype(np.float64)):
        p = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
        ids = sorted(range(len(p)), key=lambda e: (-p[e], e))[:top_k]
        assert out["ids"][t].tolist() == ids
        assert close(out["weights"][t], p[ids] / p[ids].sum(), "f32")
    added = out["counters"] - case.arrays["counters"]
    assert added.tolist() == [out["ids"].size, 0, 0, 0]


@of("^fetch")
def test_fetch_copies_the_assigned_experts_and_nothing_else(
    name: str, rng: np.random.Generator
) -> None:
    case, out = case_and_outputs(name, rng)
    a = case.arrays
    want = a["slots"].copy()
    copied = [u for u in range(a["count"][0]) if a["fetch"][u]]
    for u in copied:
        want[0, a["slot"][u]] = a["host_experts"][0, a["expert"][u]]
    np.testing.assert_array_equal(out["slots"], want)
    uses = sum(int(a["uses"][u]) for u in copied)
    prefetch = int(a["segments_done"].sum()) if a["fetch"][0] == 2 else 0
    added = (out["counters"] - a["counters"]).tolist()
    assert added == [0, 0, uses, len(copied), 0, 0, prefetch]


@of("^prefetch")
def test_prefetch_copies_the_predicted_experts_and_nothing_else(
    name: str, rng: np.random.Generator
) -> None:
    """Of each layer after the first that may start, unless its slots are already assigned."""
    case, out = case_and_outputs(name, rng)
    a = case.arrays
    want, signals = a["slots"].copy(), a["start_signal"][:, 0] - 48
    for layer, expert in enumerate(a["expert"].tolist()):
        may_start = layer > 0 and signals[layer] == 8 and np.isin(signals[1:layer], (8, 15)).all()
        copies = may_start and expert >= 0 and not a["state"][layer, 0] & PREFETCH_STOP
        if copies:
            want[layer, a["slot"][layer] - 3 * layer] = a["host_experts"][layer, expert]
        assert (out["segments_done"][layer].max() > 0) == copies
        assert (out["state"][layer] - a["state"][layer] == may_start * (1 + (1 << 15))).all()
    np.testing.assert_array_equal(out["slots"], want)
