"""Properties of whole models that need no other reference."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from osmium.errors import CheckpointError
from osmium.models import model_class
from osmium.models.state import make_state, state_bytes
from osmium.models.weights import upload
from osmium.models.workspace import make_workspace, workspace_bytes
from osmium.ops import Array, Fill, LinearWeight, MatmulInput, Ops, StepInputs
from osmium.ops.gpu import GpuOps
from osmium.ops.reference import ReferenceOps
from tests.models.build import CASES, Case, prompt
from tests.models.run import Logits, SequenceDriver, make_driver
from tests.ptx.interpreter import InterpretedRuntime
from tests.tolerance import close, distance

each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
MIXED = CASES[0]
"""Three delta nets, one attention layer, eight experts."""


@each_case
def test_prefill_equals_repeated_decode(case: Case) -> None:
    ids = prompt(case)
    at_once = make_driver(case).logits(ids, len(ids))
    steps = make_driver(case).logits(ids, 1)
    assert close(steps, at_once, "logits"), distance(steps, at_once)


@each_case
def test_prefill_with_e4m3_kv_is_close_to_repeated_decode(case: Case) -> None:
    """A key that differs in its last bits may round to another e4m3, so later tokens differ a
    little.

    That is far below e4m3's own error, .3 to 3 % of f32's logits; few tokens route to another
    expert.
    """
    ids = prompt(case)
    at_once, steps = (make_driver(case, kv_dtype="fp8_e4m3").logits(ids, n) for n in (len(ids), 1))
    errors = np.linalg.norm(steps - at_once, axis=1) / np.linalg.norm(at_once, axis=1)
    assert np.median(errors) < 1e-3
    assert np.quantile(errors, 0.9) < 1e-2


@each_case
def test_prefill_in_chunks_equals_prefill_at_once(case: Case) -> None:
    ids = prompt(case)
    at_once = make_driver(case).logits(ids, len(ids))
    for chunk in (2, 3, 4, 33):  # around the row count from which the delta rule runs in chunks
        parts = make_driver(case).logits(ids, chunk)
        assert close(parts, at_once, "logits"), (chunk, distance(parts, at_once))


@pytest.mark.parametrize("page", [1, 3, 64])
def test_any_page_size_gives_the_same_logits(page: int) -> None:
    ids = prompt(MIXED)
    one = make_driver(MIXED, page=256).logits(ids, 40)
    assert np.array_equal(make_driver(MIXED, page=page).logits(ids, 40), one)


@pytest.mark.parametrize(("kind", "max_distance"), [("bf16", 2e-2), ("fp8_e4m3", 5e-2)])
def test_narrow_kv_is_close_to_f32_kv(kind: str, max_distance: float) -> None:
    ids = prompt(MIXED)
    wide, narrow = (make_driver(MIXED, kv_dtype=one).logits(ids, 40) for one in ("f32", kind))
    errors = np.linalg.norm(narrow - wide, axis=1) / np.linalg.norm(wide, axis=1)
    # median over tokens: another routed expert changes a few of them a lot
    assert 0 < np.median(errors) < max_distance


def test_e4m3_pages_of_any_size_and_in_a_batch_give_the_same_logits() -> None:
    first = prompt(MIXED)[:60]
    second = first[::-1][:31].copy()
    alone = [make_driver(MIXED, kv_dtype="fp8_e4m3").logits(ids, 40)[-1] for ids in (first, second)]
    batched = make_driver(MIXED, kv_dtype="fp8_e4m3", page=3)
    batched.step({0: first[:40], 1: second[:20]})
    for ids, s in ((first[40:59], 0), (second[20:30], 1)):
        batched.step({s: ids})
    out = batched.step({0: first[59:], 1: second[30:]})
    for s in range(2):
        assert close(out[s][-1], alone[s], "logits"), distance(out[s][-1], alone[s])


@each_case
def test_a_batch_equals_its_sequences_alone(case: Case) -> None:
    first = prompt(case)
    second = first[::-1][: len(first) // 2].copy()
    alone = [make_driver(case).logits(ids, len(ids)) for ids in (first, second)]
    batched = make_driver(case)
    split = len(second) - 9
    a = batched.step({0: first[:split]})[0]
    # prefill and decode in one batch
    b = batched.step({2: second[:split], 0: first[split : split + 1]})
    parts = [[a, b[0]], [b[2]]]
    for t in range(9):  # decode in one batch
        at = split + 1 + t
        out = batched.step({0: first[at : at + 1], 2: second[split + t : split + t + 1]})
        parts[0].append(out[0])
        parts[1].append(out[2])
    for got, want in zip((np.concatenate(p) for p in parts), alone, strict=True):
        assert close(got, want[: len(got)], "logits"), distance(got, want[: len(got)])


@each_case
def test_a_new_sequence_does_not_depend_on_the_last_one(case: Case) -> None:
    ids = prompt(case)
    driver = make_driver(case)
    driver.logits(ids[::-1], 50)
    assert np.array_equal(driver.logits(ids, 50), make_driver(case).logits(ids, 50))


@pytest.mark.parametrize(
    ("case", "bits"),
    [
        (case, bits)
        for case in CASES
        for bits in (16, 8, 4)
        if bits != 4 or case.experts[2] % 32 == 0
    ],
    ids=lambda value: value.name if isinstance(value, Case) else str(value),
)
def test_a_fetched_expert_equals_a_resident_one(case: Case, bits: int) -> None:
    ids = prompt(case)
    resident = make_driver(case, bits)
    streamed = make_driver(case, bits, capacity=case.experts[1])
    # One row at a time, so that both sides compute its experts by the same calls.
    assert np.array_equal(streamed.logits(ids, 1), resident.logits(ids, 1))
    routed = len(ids) * case.experts[1] * len(case.kinds)
    assert resident.expert_runner.counters().hit == routed
    counted = streamed.expert_runner.counters()
    assert counted.routed == routed == counted.hit + counted.missed
    if case.experts[0] > case.experts[1]:
        assert counted.experts_copied > case.experts[1] * len(case.kinds)


def test_the_head_computes_only_the_given_rows() -> None:
    ids = prompt(MIXED)
    model = make_driver(MIXED)
    every = model.logits(ids, len(ids))
    rows = [149, 0, 77]
    assert close(model.head(rows), every[rows], "f32")


def test_a_forward_pass_allocates_no_device_memory() -> None:
    class Counting(ReferenceOps):
        num_allocations = 0

        def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
            self.num_allocations += 1
            return super().empty(shape, dtype)

        def to_device(self, array: npt.NDArray[Any]) -> Array:
            self.num_allocations += 1
            return super().to_device(array)

        def empty_mapped(
            self, shape: tuple[int, ...], dtype: npt.DTypeLike, fill: Fill | None = None
        ) -> Array:
            self.num_allocations += 1
            return super().empty_mapped(shape, dtype, fill)

    ops = Counting()
    driver = make_driver(MIXED, ops=ops, capacity=4)
    step, logits = one_sequence(driver.page), np.empty((1, MIXED.vocab), np.float32)
    before, read = ops.num_allocations, ops.d2h_bytes
    driver.model.forward(step, driver.state)
    driver.model.head(logits, step.query_start_loc[:1])
    assert before > 0
    assert (ops.num_allocations, ops.d2h_bytes) == (before, read)


def test_decode_uses_the_recurrent_rule_and_prefill_the_chunked_one() -> None:
    class Watching(ReferenceOps):
        def __init__(self) -> None:
            super().__init__()
            self.rules: set[str] = set()

        def delta_rule_recurrent(self, *arguments: Any) -> None:
            self.rules.add("step")
            super().delta_rule_recurrent(*arguments)

        def delta_rule_chunk(self, *arguments: Any) -> None:
            self.rules.add("chunk")
            super().delta_rule_chunk(*arguments)

    for parts, rule in (
        ({0: [1]}, "step"),
        ({0: [1], 1: [2], 2: [3]}, "step"),
        ({0: [1] * 37}, "chunk"),
        ({0: [1] * 37, 2: [3]}, "chunk"),
    ):
        ops = Watching()
        make_driver(MIXED, ops=ops).step(parts)
        assert ops.rules == {rule}, parts


@pytest.mark.parametrize("gpu", [True, False])
def test_planned_bytes_equal_allocated_bytes(gpu: bool) -> None:
    config = make_driver(MIXED).config
    ops: Ops = GpuOps(InterpretedRuntime()) if gpu else ReferenceOps()
    work = make_workspace(ops, config, 17, 40)
    made = [
        vars(value).values() if isinstance(value, MatmulInput) else [value]
        for value in vars(work).values()
    ]
    arrays = [array for some in made for array in some if hasattr(array, "nbytes")]
    planned = sum(-(-array.nbytes // 256) * 256 for array in arrays)
    assert workspace_bytes(config, 17, gpu, 40) == planned
    for kind in ("f32", "bf16", "fp8_e4m3"):
        state = make_state(ops, config, 5, 16, 3, kind)
        made = sum(
            array.nbytes
            for layer in state.layers
            for array in vars(layer).values()
            if array is not None
        )
        assert state_bytes(config, 5, 16, 3, kind) == made


@pytest.mark.parametrize("name", ["llama", "attention", "../cuda", "osmium.errors", ""])
def test_an_unknown_model_type_is_refused_by_name(name: str) -> None:
    with pytest.raises(CheckpointError, match=repr(name).replace(".", r"\.")):
        model_class(name)


@pytest.mark.parametrize("name", ["embed", "norm", "layers.0.router", "layers.3.qgkv",
                                  "layers.1.conv", "layers.2.shared_down"])  # fmt: skip
def test_a_missing_or_misshapen_weight_is_named(name: str) -> None:
    good = make_driver(MIXED)
    build = model_class(good.config.model_type)
    weights = dict(good.weights)
    taken = weights.pop(name)
    with pytest.raises(CheckpointError, match=name):
        build(good.ops, good.config, weights, good.expert_runner, 8)
    if isinstance(taken, LinearWeight):
        weights[name] = LinearWeight("bf16", taken.out_features + 1, taken.in_features, taken.data)
    else:
        weights[name] = taken[:-1]
    with pytest.raises(CheckpointError, match=name):
        build(good.ops, good.config, weights, good.expert_runner, 8)


def test_512_delta_net_steps_are_close_to_float64(rng: np.random.Generator) -> None:
    tokens, keys, values, dk, dv = 512, 2, 4, 32, 64
    qkv = rng.standard_normal((tokens, 2 * keys * dk + values * dv)).astype(np.float32)
    # From heads that decay within one token to heads that keep hundreds.
    spread = np.linspace(-7, 1, values) + rng.uniform(-1, 1, (tokens, values))
    decay = -np.exp(spread).astype(np.float32)
    beta = rng.uniform(0, 1, (tokens, values)).astype(np.float32)
    want, last = delta_rule(qkv, decay, beta, keys, dk, dv)
    ops, step = ReferenceOps(), one_sequence(tokens)
    for rule in (ops.delta_rule_recurrent, ops.delta_rule_chunk):
        out = np.full((tokens, values, dv), np.nan, np.float32)
        state = np.full((1, values, dk, dv), np.nan, np.float32)
        rule(out, qkv, decay, beta, state, step)
        assert close(out, want, "f32"), (rule.__name__, distance(out, want))
        assert close(state[0], last, "f32"), (rule.__name__, distance(state[0], last))


def delta_rule(
    qkv: Logits, decay: Logits, beta: Logits, keys: int, dk: int, dv: int
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """The gated delta rule in float64, head by head: out [T, V, dv] and the final state."""
    tokens, values = decay.shape
    wide = qkv.astype(np.float64)
    state = np.zeros((values, dk, dv))
    out = np.empty((tokens, values, dv))
    for t in range(tokens):
        for j in range(values):
            u = j // (values // keys)
            q, k = (wide[t, at + u * dk : at + (u + 1) * dk] for at in (0, keys * dk))
            v = wide[t, 2 * keys * dk + j * dv :][:dv]
            q = q / np.sqrt((q * q).sum() + 1e-6) / np.sqrt(dk)
            k = k / np.sqrt((k * k).sum() + 1e-6)
            state[j] *= np.exp(np.float64(decay[t, j]))
            state[j] += np.outer(k, np.float64(beta[t, j]) * (v - state[j].T @ k))
            out[t, j] = state[j].T @ q
    return out, state


def one_sequence(tokens: int) -> StepInputs:
    """Inputs of a new sequence in slot 0 and page 0."""
    every, zero = np.arange(tokens, dtype=np.int32), np.zeros(1, np.int32)
    starts = np.array([0, tokens], np.int32)
    return StepInputs(
        tokens, 1, tokens, every % 32, every, 0 * every, starts, zero, zero, zero[None]
    )


@each_case
@pytest.mark.parametrize("embed_on_host", [True, False])
def test_uploaded_weights_give_the_same_logits(case: Case, embed_on_host: bool) -> None:
    driver = make_driver(case)
    ids = prompt(case)
    want = driver.logits(ids, 40)
    placed = upload(driver.ops, driver.weights, embed_on_host=embed_on_host)
    if embed_on_host:
        assert not np.shares_memory(placed["embed"], driver.weights["embed"])
        assert "head" in placed  # a tied head is read completely, so it is not in host memory
    again = SequenceDriver(driver.config, placed, driver.layout, driver.experts)
    assert np.array_equal(again.logits(ids, 40), want)
