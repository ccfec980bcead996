"""Penalties, bias, log-probabilities and masks of decode sessions against the host's sampler."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from osmium.engine.control_tables import MAX_SINGLE_WRITES, ControlTables
from osmium.engine.request import FinishReason, Request, SamplingParams
from osmium.engine.sampler import sample
from osmium.ops.controls import PROMPT_BIT
from osmium.ops.reference import ReferenceOps
from tests.engine.fakes import GREEDY, VOCAB, EngineHarness, Gate, Logits, Response, scrambled

Make = Callable[..., EngineHarness]


def likely(history: list[int]) -> Logits:
    """Pseudo-random logits, of which those of the first twelve ids are the largest."""
    logits = scrambled(history)
    logits[12:] -= 12
    return logits


PENALTIES = replace(
    GREEDY, max_tokens=12, repetition_penalty=1.3, presence_penalty=0.7, frequency_penalty=0.5
)

CONTROLS: dict[str, SamplingParams] = {
    "penalties": PENALTIES,
    "negative penalties": replace(
        GREEDY, repetition_penalty=0.5, presence_penalty=-1.5, frequency_penalty=-2, max_tokens=12
    ),
    "bias": replace(GREEDY, logit_bias={7: 4.5, 9: -100, 200: 5}, max_tokens=12),
    "log-probabilities": replace(GREEDY, logprobs=20),
    "all, sampled": replace(
        PENALTIES, temperature=0.9, top_k=30, top_p=0.9, seed=5, logit_bias={3: 6.0}, logprobs=3
    ),
}


class AllowedTokens:
    """A mask that allows some tokens after each number of tokens, and records its calls."""

    def __init__(self, *sets: set[int]) -> None:
        self.sets, self.tokens, self.fills = sets, list[int](), list[int]()

    def fill(self, words: npt.NDArray[np.int32]) -> None:
        self.fills.append(len(self.tokens))
        bits = np.zeros(32 * len(words), np.uint8)
        bits[list(self.sets[len(self.tokens) % len(self.sets)])] = 1
        words[:] = np.packbits(bits, bitorder="little").view(np.int32)

    def push(self, token: int) -> None:
        self.tokens.append(token)

    def completion(self) -> tuple[int, ...]:
        return ()


def host_response(
    prompt: list[int], params: SamplingParams, mask: AllowedTokens | None = None
) -> list[tuple[int, float | None, Any]]:
    """The response by the host's sampler alone."""
    request = Request(prompt, params, lambda event: None, None, params.seed or 0, token_mask=mask)
    found = []
    for _ in range(params.max_tokens or 0):
        found.append(sample(likely(request.tokens), request))
        request.tokens.append(found[-1][0])
        if mask is not None:
            mask.push(found[-1][0])
    return found


def check(response: Response, wanted: list[tuple[int, float | None, Any]]) -> None:
    assert response.wait().error is None
    assert response.ids == [token for token, _, _ in wanted]
    for token, (_, logprob, top) in zip(response.tokens, wanted, strict=True):
        assert token.logprob == (None if logprob is None else pytest.approx(logprob, abs=1e-5))
        assert [i for i, _ in token.top] == [i for i, _ in top]
        assert [p for _, p in token.top] == pytest.approx([p for _, p in top], abs=1e-5)


def submit_masked(
    harness: EngineHarness, prompt: list[int], mask: AllowedTokens, params: SamplingParams
) -> Response:
    response = Response()
    response.request = harness.engine.submit(prompt, params, response.on_event, token_mask=mask)
    return response


@pytest.fixture
def make(harness_of: Make) -> Make:
    """Engine harnesses of a model with the logits `likely`."""
    return lambda **options: harness_of(likely, **options)


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the arrays that were copied to the host."""
    shapes: list[tuple[int, ...]] = []
    copy_d2h = ReferenceOps.copy_d2h

    def recorded(self: ReferenceOps, source: Any) -> Any:
        shapes.append(source.shape)
        return copy_d2h(self, source)

    monkeypatch.setattr(ReferenceOps, "copy_d2h", recorded)
    return shapes


@pytest.mark.parametrize("name", CONTROLS)
def test_a_controlled_response_is_the_host_samplers(
    make: Make, rng: np.random.Generator, name: str
) -> None:
    harness = make()
    for length in (1, 2, 11):
        prompt = rng.integers(0, VOCAB, length).tolist()
        check(harness.submit(prompt, CONTROLS[name]), host_response(prompt, CONTROLS[name]))


def test_the_penalties_of_these_tests_change_responses() -> None:
    plain = [token for token, _, _ in host_response([1, 2], replace(GREEDY, max_tokens=12))]
    for name in ("penalties", "negative penalties", "bias"):
        assert [token for token, _, _ in host_response([1, 2], CONTROLS[name])] != plain


@pytest.mark.parametrize("name", CONTROLS)
def test_only_the_first_tokens_logits_are_copied_to_the_host(
    make: Make, copied: list[tuple[int, ...]], name: str
) -> None:
    harness = make()
    response = harness.submit([1, 2, 3], CONTROLS[name])
    response.wait()
    assert [shape for shape in copied if VOCAB in shape] == [(1, VOCAB)]


def test_requests_that_come_and_go_keep_their_own_counts_and_biases(
    make: Make, rng: np.random.Generator
) -> None:
    """Rows move and state slots are used again; a few requests have no controls."""
    harness = make(sequences=3)
    jobs = []
    for i in range(14):
        prompt = rng.integers(0, VOCAB, int(rng.integers(1, 20))).tolist()
        params = list(CONTROLS.values())[i % 5] if i % 4 else GREEDY
        params = replace(params, max_tokens=int(rng.integers(2, 25)))
        jobs.append((prompt, params, harness.submit(prompt, params)))
    for prompt, params, response in jobs:
        check(response, host_response(prompt, params))


def test_tables_are_written_once_while_other_requests_come_and_go(
    make: Make, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[tuple[int, ...]] = []
    copy_h2d = ReferenceOps.copy_h2d

    def recorded(self: ReferenceOps, out: Any, source: Any) -> None:
        if out.dtype in (np.uint32, np.float32) and out.shape[-1] in (1, VOCAB):
            written.append(out.shape)
        copy_h2d(self, out, source)

    monkeypatch.setattr(ReferenceOps, "copy_h2d", recorded)
    harness = make(sequences=2)
    params = replace(PENALTIES, max_tokens=50, logit_bias={3: 1.0})
    response = harness.submit([1, 2, 3], params)
    for i in range(6):
        harness.submit([i + 1], replace(GREEDY, max_tokens=5)).wait()
    check(response, host_response([1, 2, 3], params))
    assert written == [(1, VOCAB)] * 2, "counts and bias"


def test_a_preempted_request_keeps_its_counts(make: Make, rng: np.random.Generator) -> None:
    harness = make(pages=18, sequences=3)  # 72 tokens for three times 40
    prompts = [rng.integers(0, VOCAB, 8).tolist() for _ in range(3)]
    params = replace(PENALTIES, max_tokens=32, logit_bias={5: 3.0})
    responses = [harness.submit(prompt, params) for prompt in prompts]
    for prompt, response in zip(prompts, responses, strict=True):
        check(response, host_response(prompt, params))


@pytest.mark.parametrize("missing", [0, 1, MAX_SINGLE_WRITES, MAX_SINGLE_WRITES + 1])
def test_tables_count_the_tokens_that_the_device_has_not_counted(
    rng: np.random.Generator, missing: int
) -> None:
    """As after steps sampled on the host.  Few counts are written one by one."""
    ops, prompt = ReferenceOps(), rng.integers(0, 9, 6).tolist()
    tables = ControlTables(ops, 2, 3, VOCAB, 8)
    request, other = (
        Request(prompt, PENALTIES, lambda event: None, None, seed=0) for _ in range(2)
    )
    request.state_slot, other.state_slot = 2, 0
    request.num_computed_tokens = other.num_computed_tokens = 5
    tables.start([other, request])
    request.tokens += rng.integers(0, 9, missing).tolist()
    request.num_computed_tokens += missing
    written: list[int] = []
    copy_h2d = ops.copy_h2d
    ops.copy_h2d = lambda out, source: (written.append(out.size), copy_h2d(out, source))  # type: ignore
    tables.start([request])
    wanted = np.zeros(VOCAB, np.uint32)
    wanted[request.tokens[:5]] |= PROMPT_BIT
    if missing:
        wanted[request.tokens[5]] |= PROMPT_BIT
    np.add.at(wanted, request.tokens[6 : 5 + missing], 1)
    assert tables.controls.token_counts[2].tolist() == wanted.tolist()
    assert (VOCAB in written) == (missing > MAX_SINGLE_WRITES)
    assert written.count(1) == (len({*request.tokens[5 : 5 + missing]}) if missing <= 16 else 0)


def test_a_state_slot_gets_the_tables_of_its_new_request() -> None:
    tables = ControlTables(ReferenceOps(), 1, 1, VOCAB, 8)
    for token in (3, 4):
        params = replace(PENALTIES, logit_bias={token: 2.0})
        request = Request([token, token], params, lambda event: None, None, seed=0)
        request.state_slot, request.num_computed_tokens = 0, 1
        for _ in range(2):
            tables.start([request])
            assert np.flatnonzero(tables.controls.token_counts[0]).tolist() == [token]
            assert np.flatnonzero(tables.controls.logit_bias[0]).tolist() == [token]


def test_a_mask_restricts_every_token_and_is_filled_once_for_each(
    make: Make, rng: np.random.Generator
) -> None:
    sets = ({1, 2, 3}, {31, 32, 33}, {VOCAB - 1}, {0, 100, 250})
    for prompt in ([5], rng.integers(0, VOCAB, 13).tolist()):
        for params in (replace(GREEDY, max_tokens=10), CONTROLS["all, sampled"]):
            mask, host_mask = AllowedTokens(*sets), AllowedTokens(*sets)
            response = submit_masked(make(), prompt, mask, params)
            check(response, host_response(prompt, params, host_mask))
            assert all(token in sets[i % 4] for i, token in enumerate(response.ids))
            assert mask.tokens == response.ids
            assert mask.fills == list(range(len(response.ids)))


def test_masked_and_free_requests_run_together(make: Make, rng: np.random.Generator) -> None:
    harness = make(sequences=3)
    jobs: list[tuple[list[int], SamplingParams, AllowedTokens | None, Response]] = []
    for i in range(9):
        prompt = rng.integers(0, VOCAB, int(rng.integers(1, 9))).tolist()
        params = replace(list(CONTROLS.values())[i % 5], max_tokens=3 + 2 * i)
        sets = ({i, i + 50}, {7, 8, 9 + i})
        if i % 3 == 0:
            jobs.append((prompt, params, None, harness.submit(prompt, params)))
        else:
            response = submit_masked(harness, prompt, AllowedTokens(*sets), params)
            jobs.append((prompt, params, AllowedTokens(*sets), response))
    for prompt, params, mask, response in jobs:
        check(response, host_response(prompt, params, mask))


def test_the_next_steps_model_is_launched_before_a_masks_token_is_delivered() -> None:
    """The mask is made while the next step's model runs."""
    harness, order = EngineHarness(likely, lookahead=2), list[str]()
    try:
        mask = AllowedTokens(set(range(VOCAB)))
        harness.model.before = lambda step: order.append("model")
        fill, push = mask.fill, mask.push

        def filled(words: npt.NDArray[np.int32]) -> None:
            order.append("mask")
            fill(words)

        def pushed(token: int) -> None:
            order.append("token")
            push(token)

        mask.fill, mask.push = filled, pushed  # type: ignore[method-assign]
        submit_masked(harness, [1], mask, replace(GREEDY, max_tokens=4)).wait()
        assert order == [
            "model", "mask", "token",  # of the prefill
            "model", "mask", "model", "token", "mask", "model", "token", "mask", "token",
        ]  # fmt: skip
    finally:
        harness.close()


def test_a_mask_that_allows_no_token_ends_its_own_request_only(make: Make) -> None:
    harness = make()
    other = harness.submit([9], replace(GREEDY, max_tokens=20))
    for sets in ((set[int](),), ({5}, set[int]())):  # at the first token, and in a session
        finish = submit_masked(harness, [4], AllowedTokens(*sets), GREEDY).wait()
        assert finish.reason is FinishReason.ERROR
        assert "mask" in str(finish.error)
    assert other.wait().error is None
    assert other.ids == [
        token for token, _, _ in host_response([9], replace(GREEDY, max_tokens=20))
    ]


@pytest.mark.parametrize("failing", ["fill", "push"])
@pytest.mark.parametrize("calls", [1, 4])  # at the first token, and in a session
def test_an_error_of_a_mask_ends_its_own_request_only(make: Make, failing: str, calls: int) -> None:
    harness = make()
    other = harness.submit([9], replace(GREEDY, max_tokens=20))
    mask, left = AllowedTokens({1, 2, 3}), [calls]

    def fail(argument: Any) -> None:
        left[0] -= 1
        if not left[0]:
            raise ValueError("no such grammar")
        getattr(AllowedTokens, failing)(mask, argument)

    setattr(mask, failing, fail)
    response = submit_masked(harness, [4], mask, GREEDY)
    finish = response.wait()
    assert finish.reason is FinishReason.ERROR and "no such grammar" in str(finish.error)
    assert len(response.ids) == calls - 1
    check(other, host_response([9], replace(GREEDY, max_tokens=20)))


def test_one_of_many_host_sampled_requests_fails_alone(make: Make) -> None:
    """Beside more sequences than a decode session holds."""
    harness = make(sequences=18, chunk=32)
    params = replace(GREEDY, max_tokens=50)
    others = [harness.submit([i + 1], params) for i in range(17)]
    mask = AllowedTokens(*[{1}] * 3, set())
    finish = submit_masked(harness, [4], mask, params).wait()
    assert finish.reason is FinishReason.ERROR and finish.completion_tokens == 3
    for i, response in enumerate(others):
        check(response, host_response([i + 1], params))


def test_a_stop_text_ends_a_masked_request_beside_another(make: Make) -> None:
    harness = make(sequences=2)
    letters = [{byte} for byte in b"abcSTOP"]
    other_mask, wanted_mask = AllowedTokens({1, 2}, {3, 4}), AllowedTokens({1, 2}, {3, 4})
    params = replace(GREEDY, max_tokens=20)
    other = submit_masked(harness, [8], other_mask, params)
    stopped = submit_masked(harness, [9], AllowedTokens(*letters), replace(params, stop=("STOP",)))
    assert stopped.wait().reason is FinishReason.STOP
    assert stopped.text == "abc"
    check(other, host_response([8], params, wanted_mask))


def test_more_sequences_than_a_decode_session_holds_are_all_served(
    make: Make, rng: np.random.Generator
) -> None:
    gate = Gate()  # holds the first step until all requests wait
    harness = make(sequences=20, chunk=32, gate=gate)
    assert harness.engine.runner.max_decode_rows == 16
    jobs = []
    for i in range(20):
        prompt = rng.integers(0, VOCAB, 3).tolist()
        params = replace(PENALTIES if i % 2 else GREEDY, max_tokens=40 + i)
        jobs.append((prompt, params, harness.submit(prompt, params)))
    gate.open()
    for prompt, params, response in jobs:
        check(response, host_response(prompt, params))
    assert max(len(parts) for parts in harness.model.steps) == 20
    assert Counter(len(parts) for parts in harness.model.steps)[16] > 0


def test_a_vocabulary_smaller_than_the_alternatives_returns_all_of_it() -> None:
    tables = ControlTables(ReferenceOps(), 1, 1, 12, 8)
    request = Request([1], replace(GREEDY, logprobs=20), lambda event: None, None, seed=0)
    tables.start([request])
    assert tables.controls.flags[0].tolist() == [0, 1, 12]
    assert len(tables.logprobs(0, 0)[1]) == 12
