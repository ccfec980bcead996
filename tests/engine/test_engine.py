"""The engine thread: responses, cancellation, refusals and errors with any number of clients."""

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from osmium.engine.request import Event, Finish, FinishReason, SamplingParams, Token
from osmium.errors import CudaError, EngineStopped, OsmiumError, RequestError
from osmium.ops import StepInputs
from tests.engine.fakes import (
    EOS,
    GREEDY,
    OTHER_EOS,
    PATIENCE_S,
    SPECIAL,
    VOCAB,
    EngineHarness,
    Gate,
    Logits,
    always,
    follow,
    scrambled,
    uniform,
)

Make = Callable[..., EngineHarness]

LONG = replace(GREEDY, max_tokens=None)
BUSY = CudaError("busy", call="c", name="N", code=1, context_lost=False)


def prompts(rng: np.random.Generator, count: int, max_tokens: int = 30) -> list[list[int]]:
    return [
        rng.integers(0, VOCAB, int(rng.integers(1, max_tokens + 1))).tolist() for _ in range(count)
    ]


# -- replies ---------------------------------------------------------------------------------------


def test_a_greedy_response_is_the_models_most_likely_tokens(
    harness_of: Make, rng: np.random.Generator
) -> None:
    harness = harness_of()
    for prompt in prompts(rng, 6):
        response = harness.submit(prompt)
        end = response.wait()
        assert response.ids == follow(scrambled, prompt, 8)
        assert (end.reason, end.error) == (FinishReason.LENGTH, None)
        assert (end.prompt_tokens, end.completion_tokens) == (len(prompt), 8)


@pytest.mark.parametrize("chunk", [3, 7, 64])
@pytest.mark.parametrize("page", [1, 5, 64])
def test_neither_chunk_size_nor_page_size_changes_a_response(
    harness_of: Make, rng: np.random.Generator, chunk: int, page: int
) -> None:
    prompt = rng.integers(0, VOCAB, 29).tolist()
    response = harness_of(chunk=chunk, page=page).submit(prompt)
    response.wait()
    assert response.ids == follow(scrambled, prompt, 8)


def test_an_end_token_of_either_config_ends_a_response_and_is_not_in_its_text(
    harness_of: Make,
) -> None:
    for end in (EOS, OTHER_EOS):
        response = harness_of(always(104, 105, end)).submit([1], replace(LONG, ignore_eos=False))
        finish = response.wait()
        assert (response.text, response.ids) == ("hi", [104, 105])
        assert (finish.reason, finish.completion_tokens) == (FinishReason.STOP, 3)


def test_end_tokens_may_be_ignored(harness_of: Make) -> None:
    response = harness_of(always(104, EOS, 105)).submit([1], replace(GREEDY, max_tokens=6))
    assert response.wait().reason is FinishReason.LENGTH
    assert response.ids == [104, EOS, 105, 104, EOS, 105]
    assert response.text == "hihi"


@pytest.mark.parametrize("count", [1, 2, 9])
def test_max_tokens_is_exact(harness_of: Make, count: int) -> None:
    response = harness_of().submit([1, 2, 3], replace(GREEDY, max_tokens=count))
    finish = response.wait()
    assert len(response.ids) == finish.completion_tokens == count
    assert finish.reason is FinishReason.LENGTH


@pytest.mark.parametrize("prompt", [1, 40, 63])
def test_a_full_context_ends_a_response(harness_of: Make, prompt: int) -> None:
    response = harness_of(context=64).submit([7] * prompt, LONG)
    finish = response.wait()
    assert (finish.reason, finish.stop) == (FinishReason.LENGTH, None)
    assert len(response.ids) == 64 - prompt


def test_a_stop_string_across_tokens_ends_a_response_before_it(harness_of: Make) -> None:
    generated = "count 1 2 3 END more"
    response = harness_of(always(*generated.encode())).submit(
        [1], replace(LONG, stop=("never", "3 END"))
    )
    finish = response.wait()
    assert (response.text, finish.reason) == ("count 1 2 ", FinishReason.STOP)
    assert finish.stop == "3 END"
    assert finish.completion_tokens == generated.index(" more")


@pytest.mark.parametrize("lookahead", [0, 2])
@pytest.mark.parametrize(
    ("fields", "end", "count"),
    [
        ({}, EOS, 8),
        ({"stop_token_ids": (SPECIAL, 5)}, SPECIAL, 8),
        ({"stop": ("<special>",)}, SPECIAL, 8),
        ({"stop": ("b",)}, EOS, 7),
        ({"ignore_eos": True, "stop_token_ids": (EOS,)}, EOS, 8),
    ],
)
def test_nothing_but_max_tokens_ends_a_response_before_min_tokens(
    harness_of: Make, fields: dict[str, Any], end: int, count: int, lookahead: int
) -> None:
    """Tokens 2, 4, ... would be `end`, and the others "b"."""
    harness = harness_of(always(98, end), lookahead=lookahead)
    params = replace(LONG, **{"ignore_eos": False, **fields}, min_tokens=6)
    response, beside = harness.submit([1], params), harness.submit([1], GREEDY)
    finish = response.wait()
    assert (finish.reason, finish.completion_tokens) == (FinishReason.STOP, count)
    assert end not in response.ids
    assert beside.wait().completion_tokens == GREEDY.max_tokens
    short = harness.submit([1], replace(params, min_tokens=3, max_tokens=3))
    assert short.wait().completion_tokens == 3


def test_min_tokens_needs_a_token_that_does_not_end_the_response(harness_of: Make) -> None:
    harness = harness_of()
    ends = tuple(range(VOCAB))
    with pytest.raises(RequestError) as caught:
        harness.submit([1], replace(LONG, stop_token_ids=ends, min_tokens=1))
    assert caught.value.param == "min_tokens"
    assert harness.submit([1], replace(LONG, stop_token_ids=ends)).wait().completion_tokens == 1


@pytest.mark.parametrize("lookahead", [0, 2])
@pytest.mark.parametrize(
    "fields",
    [{"stop_token_ids": (SPECIAL, 5)}, {"stop": ("<special>",)}, {"stop_token_ids": [100]}],
)
def test_a_stop_token_ends_a_response_and_is_not_part_of_it(
    harness_of: Make, fields: dict[str, Any], lookahead: int
) -> None:
    ends = 100 if "stop_token_ids" in fields and 100 in fields["stop_token_ids"] else SPECIAL
    rule = always(*b"abc", ends, *b"defg")
    params = replace(LONG, **fields)
    response = harness_of(rule, lookahead=lookahead).submit([1], params)
    finish = response.wait()
    assert (response.text, finish.reason) == ("abc", FinishReason.STOP)
    assert response.ids == [*b"abc"]
    assert finish.completion_tokens == 4


def test_text_held_back_before_a_stop_token_is_part_of_the_response(harness_of: Make) -> None:
    params = replace(LONG, stop=("bcx", "<special>"))
    response = harness_of(always(*b"abc", SPECIAL)).submit([1], params)
    finish = response.wait()
    assert (response.text, finish.reason) == ("abc", FinishReason.STOP)
    assert finish.stop == "<special>"


def test_a_stop_string_in_the_reasoning_does_not_count(harness_of: Make) -> None:
    rule = always(*b"END<special>", SPECIAL, *b"|aEND")
    params = replace(LONG, stop=("END", "<special>"), stop_after="|")
    response = harness_of(rule).submit([1], params)
    finish = response.wait()
    assert (response.text, finish.reason) == ("END<special>|a", FinishReason.STOP)


def test_tokens_know_where_their_text_is_before_stop_strings(harness_of: Make) -> None:
    text = "aé END"
    response = harness_of(always(*text.encode())).submit([1], replace(LONG, stop=("END",)))
    response.wait()
    assert response.text == "aé "
    wanted = [(0, 1), (1, 1), (1, 2), (2, 3), (3, 4), (4, 5), (5, 6)]
    assert [(one.start, one.end) for one in response.tokens] == wanted


def test_text_held_back_for_a_stop_string_comes_with_the_finish(harness_of: Make) -> None:
    response = harness_of(always(*b"abcd")).submit(
        [1], replace(GREEDY, max_tokens=3, stop=("bcx",))
    )
    finish = response.wait()
    assert (response.text, finish.text, finish.reason) == ("abc", "bc", FinishReason.LENGTH)


def test_an_incomplete_character_at_the_end_becomes_a_replacement_character(
    harness_of: Make,
) -> None:
    response = harness_of(always(*"é".encode())).submit([1], replace(GREEDY, max_tokens=1))
    assert response.wait().text == "\ufffd"


def test_log_probabilities_come_with_each_token(harness_of: Make) -> None:
    response = harness_of(uniform).submit([1], replace(GREEDY, logprobs=2))
    response.wait()
    for token in response.tokens:
        assert token.logprob == pytest.approx(-np.log(VOCAB))
        assert [alternative for alternative, _ in token.top] == [0, 1]


def test_a_repetition_penalty_covers_prompt_and_response(harness_of: Make) -> None:
    def rule(history: list[int]) -> Logits:
        return np.linspace(2, 1.9, VOCAB, dtype=np.float32)

    response = harness_of(rule).submit(
        [0, 2], replace(GREEDY, max_tokens=4, repetition_penalty=2.0)
    )
    response.wait()
    assert response.ids == [1, 3, 4, 5]


# -- seeds -----------------------------------------------------------------------------------------

RANDOM = SamplingParams(temperature=1.5, ignore_eos=True, max_tokens=20)


def test_a_seed_gives_the_same_response_alone_and_in_a_batch(
    harness_of: Make, rng: np.random.Generator
) -> None:
    prompt = rng.integers(0, VOCAB, 11).tolist()
    alone = harness_of().submit(prompt, replace(RANDOM, seed=41))
    alone.wait()
    batched = harness_of(sequences=4, pages=20)
    others = [
        batched.submit(other, replace(RANDOM, seed=i)) for i, other in enumerate(prompts(rng, 5))
    ]
    among = batched.submit(prompt, replace(RANDOM, seed=41))
    others += [batched.submit(other) for other in prompts(rng, 5)]
    for response in (among, *others):
        response.wait()
    assert among.ids == alone.ids


def test_another_seed_or_none_gives_another_response(harness_of: Make) -> None:
    harness = harness_of(uniform)
    responses = [harness.submit([1], replace(RANDOM, seed=seed)) for seed in (1, 2, None, None)]
    for response in responses:
        response.wait()
    assert len({tuple(response.ids) for response in responses}) == 4


# -- batches ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("pages", [None, 16, 23])
def test_more_requests_than_slots_get_the_same_responses_as_alone(
    harness_of: Make, rng: np.random.Generator, pages: int | None
) -> None:
    """Sixteen pages hold one context, so requests are preempted and their prompts computed
    again."""
    harness = harness_of(pages=pages)
    all_prompts = prompts(rng, 20, max_tokens=50)
    responses = [harness.submit(prompt) for prompt in all_prompts]
    for prompt, response in zip(all_prompts, responses, strict=True):
        response.wait()
        assert response.ids == follow(scrambled, prompt, 8)
    longest = max(len(parts) for parts in harness.model.steps)
    assert longest > 1, "no step had two sequences"
    assert longest <= 3


def test_a_long_prompt_does_not_stop_decoding_of_other_requests(harness_of: Make) -> None:
    gate = Gate()
    harness = harness_of(gate=gate, decode_gap_s=1e-6)
    decoding = harness.submit([1], LONG)
    gate.pass_steps()
    prefilling = harness.submit([2] * 40)
    step_tokens = []
    for _ in range(8):
        step_tokens.append([count for _, count in gate.arrival()])
        gate.release()
    gate.open()
    assert [8] in step_tokens and [1] in step_tokens
    assert all([8] != b for a, b in pairwise(step_tokens[1:]) if a == [8]), step_tokens
    prefilling.wait()
    decoding.wait()


def test_requests_from_many_threads_are_all_answered(
    harness_of: Make, rng: np.random.Generator
) -> None:
    harness = harness_of()
    all_prompts = prompts(rng, 24)
    result: dict[int, list[int]] = {}

    def client(i: int) -> None:
        result[i] = [token.id for token in harness.engine.generate(all_prompts[i], GREEDY)]

    threads = [threading.Thread(target=client, args=(i,)) for i in range(len(all_prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert result == {i: follow(scrambled, prompt, 8) for i, prompt in enumerate(all_prompts)}


# -- cancelling ------------------------------------------------------------------------------------


def test_a_prompt_stays_computed_after_the_first_token(harness_of: Make) -> None:
    response = harness_of().submit([1] * 20)
    response.wait()
    assert response.request.prompt_progress == (20, 20), "its pages are free by now"


def test_a_request_cancelled_in_prefill_computes_no_further_chunk(
    harness_of: Make,
) -> None:
    gate = Gate()
    harness = harness_of(gate=gate)
    response = harness.submit([5] * 40)
    gate.pass_steps()
    gate.arrival()  # the second chunk
    harness.engine.cancel(response.request)
    gate.open()
    finish = response.wait()
    assert (finish.reason, response.ids) == (FinishReason.CANCELLED, [])
    assert len(harness.model.steps) == 2


def test_a_request_cancelled_in_decode_reports_its_generated_tokens(harness_of: Make) -> None:
    harness = harness_of(context=4096, pages=4096)
    response = harness.submit([5], LONG)
    response.wait_for_tokens(5)
    harness.engine.cancel(response.request)
    finish = response.wait()
    assert finish.reason is FinishReason.CANCELLED
    assert finish.completion_tokens == len(response.ids) >= 5
    assert response.ids == follow(scrambled, [5], len(response.ids))


def test_a_request_cancelled_in_the_queue_never_runs(harness_of: Make) -> None:
    gate = Gate()
    harness = harness_of(gate=gate, sequences=1)
    first = harness.submit([1], replace(GREEDY, max_tokens=3))
    gate.pass_steps()
    second, third = harness.submit([2, 2]), harness.submit([3])
    harness.engine.cancel(second.request)
    gate.open()
    assert second.wait().reason is FinishReason.CANCELLED
    assert first.wait().reason is third.wait().reason is FinishReason.LENGTH
    assert [0, 2] not in [
        [past, count] for parts in harness.model.steps for _, past, count in parts
    ]


def test_cancelling_twice_or_after_the_end_has_no_effect(harness_of: Make) -> None:
    harness = harness_of()
    response = harness.submit([1])
    finish = response.wait()
    harness.engine.cancel(response.request)
    harness.engine.cancel(response.request)
    assert harness.submit([2]).wait().reason is FinishReason.LENGTH
    assert response.wait() is finish


def test_closing_the_iterator_of_generate_cancels_the_request(harness_of: Make) -> None:
    harness = harness_of(context=4096, pages=4096)
    tokens = harness.engine.generate([5], LONG)
    generated = [next(tokens).id for _ in range(3)]
    tokens.close()
    assert generated == follow(scrambled, [5], 3)
    until(lambda: harness.engine.status()["running"] == 0)
    assert harness.engine.status()["tokens"]["completion"] < 4000


def test_an_unused_iterator_cancels_its_request_when_deleted(harness_of: Make) -> None:
    harness = harness_of(context=4096, pages=4096)
    tokens = harness.engine.generate([5], LONG)
    until(lambda: harness.engine.status()["running"] == 1)
    del tokens
    until(lambda: harness.engine.status()["running"] == 0)
    assert harness.engine.status()["tokens"]["completion"] < 4000


def until(holds: Callable[[], bool]) -> None:
    """Wait until `holds()` is true."""
    end = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < end, "the condition never became true"
        time.sleep(0.001)


def test_generate_yields_all_text(harness_of: Make) -> None:
    harness = harness_of(always(*b"abc", EOS))
    params = SamplingParams(temperature=0, stop=("cd",))
    tokens = list(harness.engine.generate([1], params))
    assert [token.text for token in tokens] == ["a", "b", "c"]
    assert [token.id for token in tokens] == [97, 98, 99]


def test_many_random_requests_and_cancels_free_every_page_and_slot(
    harness_of: Make, rng: np.random.Generator
) -> None:
    harness = harness_of(pages=20)
    responses = []
    for prompt in prompts(rng, 150, max_tokens=60):
        params = replace(GREEDY, max_tokens=int(rng.integers(1, 30)))
        responses.append((prompt, harness.submit(prompt, params)))
        if rng.integers(0, 2):
            _, victim = responses[int(rng.integers(0, len(responses)))]
            harness.engine.cancel(victim.request)
        if rng.integers(0, 4) == 0:
            time.sleep(float(rng.uniform(0, 0.003)))
    for prompt, response in responses:
        assert response.wait().error is None
        assert response.ids == follow(scrambled, prompt, len(response.ids))
    status = harness.engine.status()
    assert (status["running"], status["waiting"]) == (0, 0)
    assert status["free_pages"] == status["pages"] == 20
    assert harness.kv_cache.free_slots == harness.kv_cache.num_slots


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [64, 65, 1000])
def test_a_prompt_over_the_context_is_refused_with_openais_error_code(
    harness_of: Make, length: int
) -> None:
    with pytest.raises(RequestError, match=rf"(?s)\b64 tokens.*\b{length} tokens") as caught:
        harness_of(context=64).submit([1] * length)
    error = caught.value
    assert (error.code, error.param, error.status) == ("context_length_exceeded", "messages", 400)


def test_a_prompt_without_tokens_is_refused(harness_of: Make) -> None:
    with pytest.raises(RequestError):
        harness_of().submit([])


@pytest.mark.parametrize("token", [-1, VOCAB, 2**40])
def test_a_token_id_outside_the_vocabulary_is_refused(harness_of: Make, token: int) -> None:
    harness = harness_of()
    with pytest.raises(RequestError, match=str(token)):
        harness.submit([1, token])
    with pytest.raises(RequestError, match=str(token)):
        harness.engine.logits([1, token])


def test_a_bias_outside_the_vocabulary_is_refused(harness_of: Make) -> None:
    with pytest.raises(RequestError, match=str(VOCAB)) as caught:
        harness_of().submit([1], replace(GREEDY, logit_bias={VOCAB: 1.0}))
    assert caught.value.param == "logit_bias"
    with pytest.raises(RequestError) as caught:
        harness_of().submit([1], replace(GREEDY, stop_token_ids=(1, VOCAB)))
    assert caught.value.param == "stop_token_ids"


# -- logits and jobs -------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 7, 8, 9, 16, 17, 40, 64])
def test_prompt_logits_cover_every_position(harness_of: Make, length: int) -> None:
    ids = np.random.default_rng(length).integers(0, VOCAB, length).tolist()
    result = harness_of().engine.logits(ids)
    assert result.dtype == np.float32
    assert np.array_equal(result, [scrambled(ids[: t + 1]) for t in range(length)])


def test_wide_chunks_yield_logits_in_several_pieces(harness_of: Make) -> None:
    ids = np.random.default_rng(1).integers(0, VOCAB, 60).tolist()
    result = harness_of(chunk=64).engine.logits(ids)
    assert np.array_equal(result, [scrambled(ids[: t + 1]) for t in range(60)])


def test_prompt_logits_of_several_sequences_are_separate(harness_of: Make) -> None:
    sequences = [[1, 2, 3, 4], [9], [7, 7, 7, 7, 7, 7, 7], [5, 6], [3]]
    result: dict[tuple[int, int], Logits] = {}
    harness = harness_of()
    for (position, sequence), piece in harness.engine.prompt_logits(sequences, 2):
        for i, row in enumerate(piece):
            result[sequence, position + i] = row
    wanted = {
        (s, t): scrambled(ids[: t + 1]) for s, ids in enumerate(sequences) for t in range(len(ids))
    }
    assert result.keys() == wanted.keys()
    assert all(np.array_equal(result[key], wanted[key]) for key in wanted)


def test_prompt_logits_during_a_response_do_not_change_it(harness_of: Make) -> None:
    harness = harness_of(context=512, pages=128)
    response = harness.submit([1, 2, 3], replace(GREEDY, max_tokens=200))
    for count in (5, 50, 100):
        response.wait_for_tokens(count)
        assert np.array_equal(harness.engine.logits([4, 5])[1], scrambled([4, 5]))
    assert response.wait().reason is FinishReason.LENGTH
    assert response.ids == follow(scrambled, [1, 2, 3], 200)


def test_logits_over_the_context_are_refused(harness_of: Make) -> None:
    harness = harness_of(context=64)
    with pytest.raises(RequestError, match="65"):
        harness.engine.logits([1] * 65)
    with pytest.raises(RequestError, match="65"):
        harness.engine.prompt_logits([[1], [1] * 65], 8)
    with pytest.raises(RequestError):
        harness.engine.stream_prompt_logits([[]], 8, lambda position, sequence, rows: None)


def test_a_failing_job_leaves_the_engine_running(harness_of: Make) -> None:
    harness = harness_of()

    def job() -> None:
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        harness.engine.run_on_engine_thread(job)
    assert harness.submit([1]).wait().error is None


def test_status_counts_requests_and_tokens(harness_of: Make) -> None:
    gate = Gate()
    harness = harness_of(gate=gate, sequences=1)
    first = harness.submit([1] * 5, replace(GREEDY, max_tokens=4))
    gate.arrival()
    second = harness.submit([2] * 3, replace(GREEDY, max_tokens=2))
    status: dict[str, Any] = {}
    status_thread = threading.Thread(target=lambda: status.update(harness.engine.status()))
    status_thread.start()
    time.sleep(0.05)
    gate.open()
    status_thread.join(PATIENCE_S)
    assert (status["running"], status["waiting"]) == (1, 1)
    first.wait()
    second.wait()
    after = harness.engine.status()
    assert (after["running"], after["waiting"]) == (0, 0)
    assert after["tokens"] == {"prompt": 8, "completion": 6}


# -- errors ----------------------------------------------------------------------------------------


class Failing:
    """A model whose step number `at` raises."""

    def __init__(self, at: int, error: Exception) -> None:
        self.at, self.error, self.count = at, error, 0

    def __call__(self, step: StepInputs) -> None:
        self.count += 1
        if self.count == self.at:
            raise self.error


@pytest.mark.parametrize("error", [ValueError("a bug"), OsmiumError("a bug"), MemoryError("a bug")])
@pytest.mark.parametrize("at", [1, 2, 5])
def test_a_failing_step_ends_its_requests_and_the_engine_continues(
    harness_of: Make, error: Exception, at: int
) -> None:
    harness = harness_of()
    harness.model.before = Failing(at, error)
    broken = harness.submit([1] * 12)
    finish = broken.wait()
    assert finish.reason is FinishReason.ERROR
    assert isinstance(finish.error, OsmiumError)
    assert not isinstance(finish.error, EngineStopped)
    assert "a bug" in str(finish.error)
    again = harness.submit([1] * 12)
    assert again.wait().error is None
    assert again.ids == follow(scrambled, [1] * 12, 8)
    assert harness.kv_cache.free_pages == harness.kv_cache.num_pages


def test_a_cuda_error_that_keeps_the_context_ends_only_one_step(harness_of: Make) -> None:
    harness = harness_of()
    harness.model.before = Failing(1, BUSY)
    assert isinstance(harness.submit([1]).wait().error, CudaError)
    assert harness.submit([1]).wait().error is None


def lost() -> CudaError:
    return CudaError("gone", call="cuCtxSynchronize", name="N", code=700, context_lost=True)


def test_a_lost_context_ends_every_request_and_the_engine(harness_of: Make) -> None:
    gate = Gate()
    harness = harness_of(gate=gate, sequences=1)
    running = harness.submit([1])
    gate.arrival()
    waiting = harness.submit([2])
    harness.model.before = Failing(2, lost())
    gate.open()
    for response in (running, waiting):
        finish = response.wait()
        assert finish.reason is FinishReason.ERROR
        assert isinstance(finish.error, EngineStopped)
    assert len(running.ids) in (1, 2)  # the next step may be launched before the last one is read
    with pytest.raises(EngineStopped, match="gone"):
        harness.submit([1])
    with pytest.raises(EngineStopped):
        harness.engine.status()


def test_jobs_queued_when_the_context_is_lost_raise_its_error(harness_of: Make) -> None:
    gate = Gate()
    harness = harness_of(gate=gate)
    running = harness.submit([1])
    gate.arrival()
    errors: list[OsmiumError] = []

    def client() -> None:
        try:
            harness.engine.logits([3])
        except OsmiumError as error:
            errors.append(error)

    threads = [threading.Thread(target=client) for _ in range(3)]
    for thread in threads:
        thread.start()
    time.sleep(0.05)
    harness.model.before = Failing(1, lost())
    gate.open()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert sorted(type(error).__name__ for error in errors) == [
        "CudaError", "EngineStopped", "EngineStopped",
    ]  # fmt: skip
    assert isinstance(running.wait().error, EngineStopped)


def test_a_context_lost_in_a_job_raises_and_stops_the_engine(harness_of: Make) -> None:
    harness = harness_of()
    harness.model.before = Failing(1, lost())
    with pytest.raises(CudaError):
        harness.engine.logits([3])
    until(lambda: harness.engine.stopped is not None)
    with pytest.raises(EngineStopped):
        harness.engine.logits([3])


def test_non_finite_logits_fail_the_request(harness_of: Make) -> None:
    def rule(history: list[int]) -> Logits:
        return np.full(VOCAB, np.nan, np.float32)

    finish = harness_of(rule).submit([1]).wait()
    assert isinstance(finish.error, OsmiumError)
    assert "not finite" in str(finish.error)


def test_a_callback_that_raises_ends_only_its_own_request(harness_of: Make) -> None:
    harness = harness_of()
    calls = []

    def broken(event: Event) -> None:
        calls.append(event)
        raise RuntimeError("the client's loop is closed")

    other = harness.submit([2], replace(GREEDY, max_tokens=20))
    harness.engine.submit([1], LONG, broken)
    assert other.wait().error is None
    assert other.ids == follow(scrambled, [2], 20)
    until(lambda: len(calls) == 2)
    assert [type(event) for event in calls] == [Token, Finish]
    assert harness.engine.status()["running"] == 0


@pytest.mark.parametrize("method", ["push", "flush"])
def test_a_detokenizer_that_fails_ends_its_own_request_with_an_error(
    harness_of: Make, method: str
) -> None:
    class Broken:
        def push(self, token: int) -> str:
            return self.fail("push")

        def flush(self) -> str:
            return self.fail("flush")

        def fail(self, called: str) -> str:
            if called == method:
                raise ValueError("no such id")
            return ""

        def decoder(self) -> "Broken":
            return self

    harness = harness_of(tokenizer=Broken())
    for _ in range(2):  # the engine continues
        finish = harness.submit([1]).wait()
        assert finish.reason is FinishReason.ERROR
        assert "no such id" in str(finish.error)


# -- closing ---------------------------------------------------------------------------------------


def test_closing_ends_running_and_waiting_requests_and_refuses_new_ones(harness_of: Make) -> None:
    harness = harness_of(context=4096, pages=3072, sequences=1)
    responses = [harness.submit([i], LONG) for i in range(1, 4)]
    responses[0].wait_for_tokens(2)
    harness.engine.close()
    for response in responses:
        assert response.is_done
        finish = response.wait()
        assert (finish.reason, type(finish.error)) == (FinishReason.ERROR, EngineStopped)
    for call in (
        lambda: harness.submit([1]),
        lambda: harness.engine.logits([1]),
        harness.engine.status,
    ):
        with pytest.raises(EngineStopped):
            call()
    harness.engine.close()


def test_generate_yields_the_earlier_tokens_and_raises_when_the_engine_closes(
    harness_of: Make,
) -> None:
    harness = harness_of(context=4096, pages=3072)
    generated = []
    with pytest.raises(EngineStopped):
        for token in harness.engine.generate([5], LONG):
            generated.append(token.id)
            if len(generated) == 4:
                threading.Thread(target=harness.engine.close).start()
    assert generated == follow(scrambled, [5], len(generated))
    assert len(generated) >= 4


def test_closing_from_a_callback_does_not_deadlock(harness_of: Make) -> None:
    harness = harness_of()
    done = threading.Event()

    def close(event: Event) -> None:
        harness.engine.close()
        done.set()

    harness.engine.submit([1], LONG, close)
    assert done.wait(PATIENCE_S)
    harness.engine.close()
    assert harness.engine.stopped is not None


def test_on_thread_and_on_close_run_on_the_engine_thread(harness_of: Make) -> None:
    calls: list[tuple[str, str]] = []

    def note(what: str) -> Callable[[], None]:
        return lambda: calls.append((what, threading.current_thread().name))

    harness = harness_of(on_thread=note("first"), on_close=note("last"))
    harness.submit([1]).wait()
    harness.engine.close()
    assert [what for what, _ in calls] == ["first", "last"]
    assert {name for _, name in calls} == {"osmium-engine"}


def test_a_thread_that_fails_to_start_stops_the_engine_with_its_error(harness_of: Make) -> None:
    def fail() -> None:
        raise OsmiumError("the device is gone")

    harness = harness_of(on_thread=fail)
    until(lambda: harness.engine.stopped is not None)
    with pytest.raises(EngineStopped, match="the device is gone"):
        harness.submit([1])
