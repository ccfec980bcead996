"""Reference operations against independent float64 formulas."""

import numpy as np
import pytest

from osmium.ops.reference import ReferenceOps
from tests.ops.cases import CASES, LAB, TINY, Size, run
from tests.tolerance import close


@pytest.mark.parametrize("size", [TINY, LAB], ids=lambda s: s.name)
def test_delta_chunk_equals_delta_step(rng: np.random.Generator, size: Size) -> None:
    seed = int(rng.integers(1 << 32))
    step, chunk = (
        run(CASES[name](np.random.default_rng(seed), size), ReferenceOps())
        for name in ("delta_rule_recurrent", "delta_rule_chunk")
    )
    for name in ("out", "state"):
        assert close(chunk[name], step[name], "f32")


def test_delta_step_equals_the_rule_in_float64(rng: np.random.Generator) -> None:
    case = CASES["delta_rule_recurrent"](rng, TINY)
    a = {name: np.array(array) for name, array in case.arrays.items()}
    out = run(case, ReferenceOps())["out"]
    dk, dv, key_heads, heads = TINY.key_dim, TINY.value_dim, TINY.key_heads, TINY.value_heads
    width = key_heads * dk
    wanted = np.zeros(out.shape)
    for s in range(len(TINY.lengths)):
        for j in range(heads):
            state = a["state"][a["slots"][s], j].astype(np.float64)
            if a["past"][s] == 0:
                state = np.zeros_like(state)
            at = (j // (heads // key_heads)) * dk
            for t in range(a["starts"][s], a["starts"][s + 1]):
                row = a["qkv"][t].astype(np.float64)
                q, k = row[at : at + dk], row[width + at : width + at + dk]
                v = row[2 * width + j * dv : 2 * width + (j + 1) * dv]
                q = q / np.sqrt(q @ q + 1e-6) / np.sqrt(dk)
                k = k / np.sqrt(k @ k + 1e-6)
                state = np.exp(np.float64(a["decay"][t, j])) * state
                state += np.outer(k, a["beta"][t, j] * (v - k @ state))
                wanted[t, j] = q @ state
    # In the norm: where a decay is near total, single values are only cancellation error.
    assert close(out, wanted, "f32")


def test_attention_equals_softmax_over_the_whole_context(rng: np.random.Generator) -> None:
    from osmium.quant.floats import f32_from_bf16

    case = CASES["attention"](rng, TINY)
    a, out = case.arrays, run(case, ReferenceOps())["out"]
    k, v = (f32_from_bf16(a[name]).astype(np.float64) for name in ("k_pages", "v_pages"))
    for t, position in enumerate(a["positions"]):
        table = a["pages"][a["sequence"][t]]
        where = [(table[p // TINY.page], p % TINY.page) for p in range(position + 1)]
        for h in range(TINY.heads):
            g = h // (TINY.heads // TINY.kv_heads)
            keys = np.array([k[page, row, g] for page, row in where])
            values = np.array([v[page, row, g] for page, row in where])
            scores = keys @ a["q"][t, h] / np.sqrt(TINY.head_dim)
            p = np.exp(scores - scores.max())
            assert close(out[t, h], (p / p.sum()) @ values, "f32")


def test_a_small_cache_of_converted_matrices_changes_nothing(rng: np.random.Generator) -> None:
    seed = int(rng.integers(1 << 32))
    for name in ("linear int4", "experts int8"):
        kept, anew = (
            run(CASES[name](np.random.default_rng(seed), TINY), ReferenceOps(cache_bytes=keep))
            for keep in (1 << 30, 0)
        )
        assert np.array_equal(kept["out"], anew["out"])
