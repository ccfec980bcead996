"""The linear, expert, route and fetch cases on the reference, against formulas in float64.

What the interpreter compares kernels with is held here to a second way of saying it, on the very
same ragged cases.
"""

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


def of(kind: str, but: str | None = None) -> pytest.MarkDecorator:
    names = [name for name in CASES if kind in name and (but is None or but not in name)]
    return pytest.mark.parametrize("name", names)


def matrix(form: str, data: npt.NDArray[Any], scale: npt.NDArray[Any] | None) -> F64:
    """A stored matrix [N, K], nibble by nibble (quant/int4.py's table of bits, read aloud)."""
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


def halves(record: ExpertLayout, raw: npt.NDArray[np.uint8]) -> tuple[F64, F64]:
    """Gate and up [2I, D], and down [D, I], of one record."""
    form = {16: "bf16", 8: "int8", 4: "int4"}[record.bits]
    kind = {16: np.uint16, 8: np.int8, 4: np.uint8}[record.bits]
    made = []
    for rows, columns, start, scales, group in (
        (2 * record.inner, record.hidden, 0, record.up_scale, record.up_group),
        (record.hidden, record.inner, record.down, record.down_scale, record.down_group),
    ):
        nbytes = rows * columns * record.bits // 8
        data = raw[start : start + nbytes].view(kind).reshape(rows, -1)
        scale: npt.NDArray[Any] | None = None
        if record.bits == 8:
            scale = raw[scales : scales + 4 * rows].view(np.float32)
        elif record.bits == 4:
            n = rows * (columns // group)
            scale = raw[scales : scales + 2 * n].view(np.float16).reshape(rows, -1)
        made.append(matrix(form, data, scale))
    return made[0], made[1]


def case_and_outputs(name: str, rng: np.random.Generator) -> tuple[Case, Arrays]:
    case = CASES[name](rng)
    return case, run(case, ReferenceOps())


@of("_linear")
def test_linear_is_the_sum_of_products(name: str, rng: np.random.Generator) -> None:
    case, out = case_and_outputs(name, rng)
    a = case.arrays
    w = matrix(name.split("_")[0], a["w"], a.get("scale"))
    assert close(out["out"], a["x"].astype(np.float64) @ w.T, "f32")


class Keeping(ReferenceOps):
    """Keeps the record of the experts that it is asked for."""

    asked: ExpertLayout

    def expert_up(self, *arguments: Any) -> None:
        (cache,) = (one for one in arguments if isinstance(one, ExpertCache))
        self.asked = cache.layout
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
    case, ops = CASES[name](rng), Keeping()
    out, a = run(case, ops), case.arrays
    h = norm(a["x"].astype(np.float64), a["norm"])
    form = "bf16" if a["shared_up"].dtype == np.uint16 else "int8"
    own = [matrix(form, a[key], a.get(f"{key}_scale")) for key in ("shared_up", "shared_down")]
    gate = 1 / (1 + np.exp(-a["scores"][:, 3:4].astype(np.float64)))
    want = a["out"] + gate * gated(h, *own)
    for t, chosen in enumerate(a["chosen"]):
        for expert, weight in zip(chosen, a["weights"][t], strict=True):
            record = halves(ops.asked, a["slots"][0, a["slot_of"][0, expert]])
            want[t] += weight * gated(h[t], *record)
    assert close(out["out"], want, "f32")
    assert close(out["next"], norm(want, a["norm"]), "f32")


@of("route ")
def test_route_takes_the_largest_probabilities(name: str, rng: np.random.Generator) -> None:
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


@of("fetch", but="early")
def test_fetch_copies_what_the_plan_says_and_nothing_else(
    name: str, rng: np.random.Generator
) -> None:
    case, out = case_and_outputs(name, rng)
    a = case.arrays
    want = a["slots"].copy()
    copied = [u for u in range(a["count"][0]) if a["fetch"][u]]
    for u in copied:
        want[0, a["slot"][u]] = a["arena"][0, a["expert"][u]]
    np.testing.assert_array_equal(out["slots"], want)
    uses = sum(int(a["uses"][u]) for u in copied)
    early = int(a["done"].sum()) if a["fetch"][0] == 2 else 0
    added = (out["counters"] - a["counters"]).tolist()
    assert added == [0, 0, uses, len(copied), 0, 0, early]


@of("fetch early")
def test_an_early_fetch_copies_the_guess_and_nothing_else(
    name: str, rng: np.random.Generator
) -> None:
    """Of each layer behind the first that has its turn, unless it is placed already."""
    case, out = case_and_outputs(name, rng)
    a = case.arrays
    want, said = a["slots"].copy(), a["go"][:, 0] - 48
    for layer, expert in enumerate(a["expert"].tolist()):
        comes = layer > 0 and said[layer] == 8 and np.isin(said[1:layer], (8, 15)).all()
        copies = comes and expert >= 0 and not a["state"][layer, 0] & PREFETCH_STOP
        if copies:
            want[layer, a["slot"][layer] - 3 * layer] = a["arena"][layer, expert]
        assert (out["done"][layer].max() > 0) == copies
        assert (out["state"][layer] - a["state"][layer] == comes * (1 + (1 << 15))).all()
    np.testing.assert_array_equal(out["slots"], want)
