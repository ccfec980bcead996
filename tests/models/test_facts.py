"""Facts about whole models that need no reference but the model itself."""

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
from tests.models.run import Logits, Runner, runner
from tests.ptx.interpreter import InterpretedMachine
from tests.tolerance import close, distance

each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
MIXED = CASES[0]
"""Three delta nets, one attention layer, eight experts."""


@each_case
def test_prefill_equals_repeated_decode(case: Case) -> None:
    ids = prompt(case)
    whole = runner(case).logits(ids, len(ids))
    steps = runner(case).logits(ids, 1)
    assert close(steps, whole, "logits"), distance(steps, whole)


@each_case
def test_prefill_into_e4m3_pages_is_near_repeated_decode(case: Case) -> None:
    """Where the last bits of a key differ it may round to another e4m3: those that read it feel it,
    far less than they feel e4m3 (.3 to 3 % of f32's logits), and a flipped expert moves few."""
    ids = prompt(case)
    whole, steps = (runner(case, kv_dtype="fp8_e4m3").logits(ids, n) for n in (len(ids), 1))
    off = np.linalg.norm(steps - whole, axis=1) / np.linalg.norm(whole, axis=1)
    assert np.median(off) < 1e-3
    assert np.quantile(off, 0.9) < 1e-2


@each_case
def test_prefill_in_chunks_equals_prefill_at_once(case: Case) -> None:
    ids = prompt(case)
    whole = runner(case).logits(ids, len(ids))
    for chunk in (2, 3, 4, 33):  # around the row count where the delta rule goes by chunks
        parts = runner(case).logits(ids, chunk)
        assert close(parts, whole, "logits"), (chunk, distance(parts, whole))


@pytest.mark.parametrize("page", [1, 3, 64])
def test_any_page_size_gives_the_same_logits(page: int) -> None:
    ids = prompt(MIXED)
    one = runner(MIXED, page=256).logits(ids, 40)
    assert np.array_equal(runner(MIXED, page=page).logits(ids, 40), one)


@pytest.mark.parametrize(("kind", "most"), [("bf16", 2e-2), ("fp8_e4m3", 5e-2)])
def test_narrow_pages_stay_near_f32_pages(kind: str, most: float) -> None:
    ids = prompt(MIXED)
    wide, narrow = (runner(MIXED, kv_dtype=one).logits(ids, 40) for one in ("f32", kind))
    off = np.linalg.norm(narrow - wide, axis=1) / np.linalg.norm(wide, axis=1)
    assert 0 < np.median(off) < most  # over tokens: a flipped expert moves a few of them far


def test_e4m3_pages_of_any_size_and_in_a_batch_give_the_same_logits() -> None:
    first = prompt(MIXED)[:60]
    second = first[::-1][:31].copy()
    alone = [runner(MIXED, kv_dtype="fp8_e4m3").logits(ids, 40)[-1] for ids in (first, second)]
    together = runner(MIXED, kv_dtype="fp8_e4m3", page=3)
    together.step({0: first[:40], 1: second[:20]})
    for ids, s in ((first[40:59], 0), (second[20:30], 1)):
        together.step({s: ids})
    out = together.step({0: first[59:], 1: second[30:]})
    for s in range(2):
        assert close(out[s][-1], alone[s], "logits"), distance(out[s][-1], alone[s])


@each_case
def test_a_batch_equals_its_sequences_alone(case: Case) -> None:
    first = prompt(case)
    second = first[::-1][: len(first) // 2].copy()
    alone = [runner(case).logits(ids, len(ids)) for ids in (first, second)]
    together = runner(case)
    split = len(second) - 9
    a = together.step({0: first[:split]})[0]
    b = together.step({2: second[:split], 0: first[split : split + 1]})  # prefill beside decode
    parts = [[a, b[0]], [b[2]]]
    for t in range(9):  # decode together
        at = split + 1 + t
        out = together.step({0: first[at : at + 1], 2: second[split + t : split + t + 1]})
        parts[0].append(out[0])
        parts[1].append(out[2])
    for got, want in zip((np.concatenate(p) for p in parts), alone, strict=True):
        assert close(got, want[: len(got)], "logits"), distance(got, want[: len(got)])


@each_case
def test_a_new_sequence_finds_nothing_of_the_last_one(case: Case) -> None:
    ids = prompt(case)
    used = runner(case)
    used.logits(ids[::-1], 50)
    assert np.array_equal(used.logits(ids, 50), runner(case).logits(ids, 50))


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
def test_a_cold_expert_equals_a_hot_one(case: Case, bits: int) -> None:
    ids = prompt(case)
    hot = runner(case, bits)
    cold = runner(case, bits, capacity=case.experts[1])
    # One row at a time: a row's experts are then computed by the same calls on both sides.
    assert np.array_equal(cold.logits(ids, 1), hot.logits(ids, 1))
    routed = len(ids) * case.experts[1] * len(case.kinds)
    assert hot.expert_runner.counters().hit == routed
    counted = cold.expert_runner.counters()
    assert counted.routed == routed == counted.hit + counted.missed
    if case.experts[0] > case.experts[1]:
        assert counted.experts_copied > case.experts[1] * len(case.kinds)


def test_the_head_computes_only_the_rows_asked_for() -> None:
    ids = prompt(MIXED)
    model = runner(MIXED)
    every = model.logits(ids, len(ids))
    rows = [149, 0, 77]
    assert close(model.head(rows), every[rows], "f32")


def test_a_forward_pass_allocates_nothing_through_its_operations() -> None:
    class Counting(ReferenceOps):
        made = 0

        def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
            self.made += 1
            return super().empty(shape, dtype)

        def to_device(self, array: npt.NDArray[Any]) -> Array:
            self.made += 1
            return super().to_device(array)

        def empty_mapped(
            self, shape: tuple[int, ...], dtype: npt.DTypeLike, fill: Fill | None = None
        ) -> Array:
            self.made += 1
            return super().empty_mapped(shape, dtype, fill)

    ops = Counting()
    given = runner(MIXED, ops=ops, capacity=4)
    step, logits = one_sequence(given.page), np.empty((1, MIXED.vocab), np.float32)
    before, read = ops.made, ops.bytes_to_host
    given.model.forward(step, given.state)
    given.model.head(logits, step.query_start_loc[:1])
    assert before > 0
    assert (ops.made, ops.bytes_to_host) == (before, read)


def test_decode_goes_by_steps_and_prefill_by_chunks() -> None:
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
        runner(MIXED, ops=ops).step(parts)
        assert ops.rules == {rule}, parts


@pytest.mark.parametrize("gpu", [True, False])
def test_the_bytes_planned_are_the_bytes_allocated(gpu: bool) -> None:
    config = runner(MIXED).config
    ops: Ops = GpuOps(InterpretedMachine()) if gpu else ReferenceOps()
    work = make_workspace(ops, config, 17)
    made = [
        vars(value).values() if isinstance(value, MatmulInput) else [value]
        for value in vars(work).values()
    ]
    arrays = [array for some in made for array in some if hasattr(array, "nbytes")]
    assert workspace_bytes(config, 17, gpu) == sum(array.nbytes for array in arrays)
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
def test_a_weight_that_is_missing_or_misshapen_is_named(name: str) -> None:
    good = runner(MIXED)
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


def test_512_delta_net_steps_stay_near_float64(rng: np.random.Generator) -> None:
    tokens, keys, values, dk, dv = 512, 2, 4, 32, 64
    qkv = rng.standard_normal((tokens, 2 * keys * dk + values * dv)).astype(np.float32)
    # From heads that forget within a token to heads that keep hundreds.
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
    """The gated delta rule in float64, head by head: out [T, V, dv], the state after it."""
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
    """A new sequence in slot 0 and page 0."""
    every, zero = np.arange(tokens, dtype=np.int32), np.zeros(1, np.int32)
    starts = np.array([0, tokens], np.int32)
    return StepInputs(
        tokens, 1, tokens, every % 32, every, 0 * every, starts, zero, zero, zero[None]
    )


@each_case
@pytest.mark.parametrize("embed_on_host", [True, False])
def test_uploaded_weights_give_the_same_logits(case: Case, embed_on_host: bool) -> None:
    given = runner(case)
    ids = prompt(case)
    want = given.logits(ids, 40)
    placed = upload(given.ops, given.weights, embed_on_host=embed_on_host)
    if embed_on_host:
        assert not np.shares_memory(placed["embed"], given.weights["embed"])
        assert "head" in placed  # a tied head is read whole: not from host memory
    again = Runner(given.config, placed, given.record, given.records)
    assert np.array_equal(again.logits(ids, 40), want)
