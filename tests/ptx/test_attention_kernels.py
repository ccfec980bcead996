"""Attention and delta net cases on the reference, against float64 formulas.

The interpreter compares kernels with the reference; these tests check the reference independently
on the same ragged cases.
"""

import numpy as np
import numpy.typing as npt
import pytest

from osmium.ops.reference import ReferenceOps
from osmium.quant import int4
from osmium.quant.floats import bf16_from_f32, f32_from_bf16
from tests.ops.cases import Arrays, Case, kept_rows, run
from tests.ptx.cases_attention import CASES
from tests.tolerance import TOLERANCE, close

F64 = npt.NDArray[np.float64]
PAGE = 4
"""Tokens per page in the rope cases."""


def of(*kinds: str) -> pytest.MarkDecorator:
    names = [name for name in CASES if any(kind in name for kind in kinds)]
    return pytest.mark.parametrize("name", names)


def case_and_outputs(name: str, rng: np.random.Generator) -> tuple[Case, Arrays]:
    case = CASES[name](rng)
    return case, run(case, ReferenceOps())


def rotated(x: F64, w: F64, position: int, frequencies: npt.NDArray[np.float32]) -> F64:
    """One head: normed, weighted, and its pairs rotated as complex numbers. Only the angle is
    f32."""
    x = x / np.sqrt((x * x).mean() + 1e-6) * (1 + w)
    half = len(frequencies)
    angle = (np.float32(position) * frequencies).astype(np.float64)
    pairs = (x[:half] + 1j * x[half : 2 * half]) * np.exp(1j * angle)
    return np.concatenate([pairs.real, pairs.imag, x[2 * half :]])


@of("rope_append")
def test_heads_are_rotated_and_written_to_their_page(name: str, rng: np.random.Generator) -> None:
    case, out = case_and_outputs(name, rng)
    a = case.arrays
    tokens, heads, dim = out["q"].shape
    kv = a["k_pages"].shape[2]
    norms = a["norms"].astype(np.float64)
    kept = "bf16" if a["k_pages"].dtype == np.uint16 else "e4m3 values"
    untouched = np.ones(a["k_pages"].shape[:2], bool)
    for t in range(tokens):
        rows = a["qgkv"][t].astype(np.float64).reshape(-1, dim)
        queries, keys, values = rows[: 2 * heads : 2], rows[2 * heads : -kv], rows[-kv:]
        position = int(a["positions"][t])
        for h in range(heads):
            want = rotated(queries[h], norms[0], position, a["frequencies"])
            assert close(out["q"][t, h], want, "f32")
        at = a["pages"][a["sequence"][t], position // PAGE], position % PAGE
        untouched[at] = False
        for g in range(kv):
            want = rotated(keys[g], norms[1], position, a["frequencies"])
            assert close(kept_rows(out, "k")[at][g], want, kept)
        if kept == "bf16":
            np.testing.assert_array_equal(
                out["v_pages"][at], bf16_from_f32(values.astype(np.float32))
            )
    for name in set(out) - {"q"}:
        np.testing.assert_array_equal(out[name][untouched], a[name][untouched])


@of("attention ")
def test_attention_is_a_softmax_weighted_mean(name: str, rng: np.random.Generator) -> None:
    case, out = case_and_outputs(name, rng)
    a = case.arrays
    page, kv = a["k_pages"].shape[1:3]
    tokens, heads, dim = out["out"].shape
    for t in range(tokens):
        seen = np.arange(a["positions"][t] + 1)
        where = a["pages"][a["sequence"][t], seen // page], seen % page
        for h in range(heads):
            k, v = (kept_rows(a, n)[where][:, h // (heads // kv)].astype(np.float64) for n in "kv")
            weights = np.exp(k @ a["q"][t, h].astype(np.float64) / np.sqrt(dim))
            assert close(out["out"][t, h], weights @ v / weights.sum(), "f32")


@of("delta_rule_recurrent", "delta_rule_chunk")
def test_the_delta_rule_replaces_the_value_of_a_key(name: str, rng: np.random.Generator) -> None:
    case, out = case_and_outputs(name, rng)
    a = case.arrays
    _, heads, dk, dv = a["state"].shape
    keys = (a["qkv"].shape[1] - heads * dv) // (2 * dk)
    for s, slot in enumerate(a["slots"]):
        rows = slice(a["starts"][s], a["starts"][s + 1])
        if slot < 0:
            assert not out["out"][rows].any()
            continue
        want = np.empty((rows.stop - rows.start, heads, dv))
        most = np.empty_like(want)  # the sum of absolute values
        for j in range(heads):
            shared = j // (heads // keys)
            state = np.zeros((dk, dv)) if a["past"][s] == 0 else a["state"][slot, j].astype(float)
            for t in range(rows.start, rows.stop):
                row = a["qkv"][t].astype(np.float64)
                q, k = row[: 2 * keys * dk].reshape(2, keys, dk)[:, shared]
                v = row[2 * keys * dk :].reshape(heads, dv)[j]
                q, k = (x / np.sqrt(x @ x + 1e-6) for x in (q, k))
                state = state * np.exp(float(a["decay"][t, j]))
                # towards v at k: beta of the difference to the state's value there
                state = state + np.outer(k, a["beta"][t, j] * (v - k @ state))
                want[t - rows.start, j] = q @ state / np.sqrt(dk)
                most[t - rows.start, j] = np.abs(q) @ np.abs(state) / np.sqrt(dk)
            assert close(out["state"][slot, j], state, "f32")
        # not of `want`: where q and k are almost orthogonal, the sum is mostly rounding
        off = np.linalg.norm(out["out"][rows] - want)
        assert off <= TOLERANCE["f32"] * np.linalg.norm(most)


@of("delta_net")
def test_a_delta_net_step_convolves_the_inputs_of_its_rule(
    name: str, rng: np.random.Generator
) -> None:
    case, out = case_and_outputs(name, rng)
    a = {key: array.astype(float) for key, array in case.arrays.items() if array.dtype == "f4"}
    slots, past = case.arrays["slots"], case.arrays["past"]
    _, heads, dk, dv = a["state"].shape
    channels = a["conv"].shape[0]
    keys = (channels - heads * dv) // (2 * dk)
    ab = f32_from_bf16(case.arrays["ab_matrix"]).astype(float)
    for s, (slot, p) in enumerate(zip(slots, past, strict=True)):
        if slot < 0:
            np.testing.assert_array_equal(out["x"][s], case.arrays["x"][s])
            continue
        before = [a["inputs"][slot][:, (p - i) % 4] if p else np.zeros(channels) for i in (3, 2, 1)]
        row = silu(sum(a["conv"].T * np.array([*before, a["u"][s, :channels]])))
        np.testing.assert_array_equal(out["inputs"][slot][:, p % 4], case.arrays["u"][s, :channels])
        x, made = a["x"][s], []
        gate = ab @ (x / np.sqrt(np.mean(x * x) + 1e-6) * (1 + a["scale"]))
        decay = np.exp(-np.exp(a["a_log"]) * np.log1p(np.exp(gate[:heads] + a["dt_bias"])))
        beta = 1 / (1 + np.exp(-gate[heads:]))
        for j in range(heads):
            q, k = row[: 2 * keys * dk].reshape(2, keys, dk)[:, j // (heads // keys)]
            q, k = (x / np.sqrt(x @ x + 1e-6) for x in (q, k))
            v = row[2 * keys * dk :].reshape(heads, dv)[j]
            state = (a["state"][slot, j] if p else np.zeros((dk, dv))) * decay[j]
            state = state + np.outer(k, beta[j] * (v - k @ state))
            o = q @ state / np.sqrt(dk)
            o = o / np.sqrt(np.mean(o * o) + 1e-6) * a["norm"]
            z = a["u"][s, channels:].reshape(heads, dv)[j]
            assert close(out["state"][slot, j], state, "rows")
            made.append(o * silu(z))
        matrix = int4.dequantize(case.arrays["out"], case.arrays["out_scale"]).astype(float)
        assert close(out["x"][s], x + matrix @ np.concatenate(made), "rows")


def silu(x: F64) -> F64:
    return np.asarray(x / (1 + np.exp(-x)))
