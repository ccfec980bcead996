"""The crank: what every caller may rely on, whoever else is calling."""

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
    VOCAB,
    Bench,
    Gate,
    Logits,
    always,
    follow,
    scrambled,
    uniform,
)

Make = Callable[..., Bench]

LONG = replace(GREEDY, max_tokens=None)


def prompts(rng: np.random.Generator, count: int, most: int = 30) -> list[list[int]]:
    return [rng.integers(0, VOCAB, int(rng.integers(1, most + 1))).tolist() for _ in range(count)]


# -- replies ---------------------------------------------------------------------------------------


def test_a_greedy_reply_is_what_the_model_says(bench: Make, rng: np.random.Generator) -> None:
    one = bench()
    for prompt in prompts(rng, 6):
        reply = one.ask(prompt)
        end = reply.wait()
        assert reply.ids == follow(scrambled, prompt, 8)
        assert (end.reason, end.error) == (FinishReason.LENGTH, None)
        assert (end.prompt_tokens, end.completion_tokens) == (len(prompt), 8)


@pytest.mark.parametrize("chunk", [3, 7, 64])
@pytest.mark.parametrize("page", [1, 5, 64])
def test_neither_chunk_nor_page_size_changes_a_reply(
    bench: Make, rng: np.random.Generator, chunk: int, page: int
) -> None:
    prompt = rng.integers(0, VOCAB, 29).tolist()
    reply = bench(chunk=chunk, page=page).ask(prompt)
    reply.wait()
    assert reply.ids == follow(scrambled, prompt, 8)


def test_an_end_token_of_either_config_ends_a_reply_and_is_no_text(bench: Make) -> None:
    for end in (EOS, OTHER_EOS):
        reply = bench(always(104, 105, end)).ask([1], replace(LONG, ignore_eos=False))
        finish = reply.wait()
        assert (reply.text, reply.ids) == ("hi", [104, 105])
        assert (finish.reason, finish.completion_tokens) == (FinishReason.STOP, 3)


def test_end_tokens_may_be_ignored(bench: Make) -> None:
    reply = bench(always(104, EOS, 105)).ask([1], replace(GREEDY, max_tokens=6))
    assert reply.wait().reason is FinishReason.LENGTH
    assert reply.ids == [104, EOS, 105, 104, EOS, 105]
    assert reply.text == "hihi"


@pytest.mark.parametrize("count", [1, 2, 9])
def test_max_tokens_is_exact(bench: Make, count: int) -> None:
    reply = bench().ask([1, 2, 3], replace(GREEDY, max_tokens=count))
    finish = reply.wait()
    assert len(reply.ids) == finish.completion_tokens == count
    assert finish.reason is FinishReason.LENGTH


@pytest.mark.parametrize("prompt", [1, 40, 63])
def test_a_full_context_ends_a_reply(bench: Make, prompt: int) -> None:
    reply = bench(context=64).ask([7] * prompt, LONG)
    finish = reply.wait()
    assert finish.reason is FinishReason.LENGTH
    assert len(reply.ids) == 64 - prompt


def test_a_stop_text_across_tokens_ends_a_reply_before_it(bench: Make) -> None:
    said = "count 1 2 3 END more"
    reply = bench(always(*said.encode())).ask([1], replace(LONG, stop=("never", "3 END")))
    finish = reply.wait()
    assert (reply.text, finish.reason) == ("count 1 2 ", FinishReason.STOP)
    assert finish.completion_tokens == said.index(" more")


def test_text_held_back_for_a_stop_comes_with_the_end(bench: Make) -> None:
    reply = bench(always(*b"abcd")).ask([1], replace(GREEDY, max_tokens=3, stop=("bcx",)))
    finish = reply.wait()
    assert (reply.text, finish.text, finish.reason) == ("abc", "bc", FinishReason.LENGTH)


def test_half_a_character_at_the_end_is_given_out_as_such(bench: Make) -> None:
    reply = bench(always(*"é".encode())).ask([1], replace(GREEDY, max_tokens=1))
    assert reply.wait().text == "\ufffd"


def test_log_probabilities_come_with_each_token(bench: Make) -> None:
    reply = bench(uniform).ask([1], replace(GREEDY, logprobs=2))
    reply.wait()
    for token in reply.tokens:
        assert token.logprob == pytest.approx(-np.log(VOCAB))
        assert [alternative for alternative, _ in token.top] == [0, 1]


def test_a_repetition_penalty_sees_prompt_and_reply(bench: Make) -> None:
    def rule(history: list[int]) -> Logits:
        return np.linspace(2, 1.9, VOCAB, dtype=np.float32)

    reply = bench(rule).ask([0, 2], replace(GREEDY, max_tokens=4, repetition_penalty=2.0))
    reply.wait()
    assert reply.ids == [1, 3, 4, 5]


# -- seeds -----------------------------------------------------------------------------------------

RANDOM = SamplingParams(temperature=1.5, ignore_eos=True, max_tokens=20)


def test_a_seed_gives_the_same_reply_alone_and_among_others(
    bench: Make, rng: np.random.Generator
) -> None:
    prompt = rng.integers(0, VOCAB, 11).tolist()
    alone = bench().ask(prompt, replace(RANDOM, seed=41))
    alone.wait()
    crowd = bench(sequences=4, pages=20)
    others = [crowd.ask(other, replace(RANDOM, seed=i)) for i, other in enumerate(prompts(rng, 5))]
    among = crowd.ask(prompt, replace(RANDOM, seed=41))
    others += [crowd.ask(other) for other in prompts(rng, 5)]
    for reply in (among, *others):
        reply.wait()
    assert among.ids == alone.ids


def test_another_seed_or_none_gives_another_reply(bench: Make) -> None:
    one = bench(uniform)
    replies = [one.ask([1], replace(RANDOM, seed=seed)) for seed in (1, 2, None, None)]
    for reply in replies:
        reply.wait()
    assert len({tuple(reply.ids) for reply in replies}) == 4


# -- many at once ----------------------------------------------------------------------------------


@pytest.mark.parametrize("pages", [None, 16, 23])
def test_more_requests_than_seats_all_get_the_reply_they_would_get_alone(
    bench: Make, rng: np.random.Generator, pages: int | None
) -> None:
    """Sixteen pages are one context: requests make room for each other and are read again."""
    one = bench(pages=pages)
    asked = prompts(rng, 20, most=50)
    replies = [one.ask(prompt) for prompt in asked]
    for prompt, reply in zip(asked, replies, strict=True):
        reply.wait()
        assert reply.ids == follow(scrambled, prompt, 8)
    longest = max(len(parts) for parts in one.model.steps)
    assert longest > 1, "nobody shared a step"
    assert longest <= 3


def test_a_long_prompt_does_not_silence_who_is_speaking(bench: Make) -> None:
    gate = Gate()
    one = bench(gate=gate)
    speaker = one.ask([1], LONG)
    gate.let()
    reader = one.ask([2] * 40)
    seen = []
    for _ in range(8):
        seen.append([count for _, count in gate.arrival()])
        gate.release()
    gate.open()
    assert [8] in seen and [1] in seen
    assert all(a != b for a, b in pairwise(seen[1:])), seen
    reader.wait()
    speaker.wait()


def test_requests_from_many_threads_are_all_answered(bench: Make, rng: np.random.Generator) -> None:
    one = bench()
    asked = prompts(rng, 24)
    got: dict[int, list[int]] = {}

    def client(i: int) -> None:
        got[i] = [token.id for token in one.engine.generate(asked[i], GREEDY)]

    threads = [threading.Thread(target=client, args=(i,)) for i in range(len(asked))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert got == {i: follow(scrambled, prompt, 8) for i, prompt in enumerate(asked)}


# -- cancelling ------------------------------------------------------------------------------------


def test_a_request_cancelled_while_its_prompt_is_read_computes_no_further_chunk(
    bench: Make,
) -> None:
    gate = Gate()
    one = bench(gate=gate)
    reply = one.ask([5] * 40)
    gate.let()
    gate.arrival()  # the second chunk
    one.engine.cancel(reply.request)
    gate.open()
    finish = reply.wait()
    assert (finish.reason, reply.ids) == (FinishReason.CANCELLED, [])
    assert len(one.model.steps) == 2


def test_a_request_cancelled_while_it_speaks_says_what_it_said(bench: Make) -> None:
    one = bench(context=4096, pages=4096)
    reply = one.ask([5], LONG)
    reply.wait_for_tokens(5)
    one.engine.cancel(reply.request)
    finish = reply.wait()
    assert finish.reason is FinishReason.CANCELLED
    assert finish.completion_tokens == len(reply.ids) >= 5
    assert reply.ids == follow(scrambled, [5], len(reply.ids))


def test_a_request_cancelled_while_it_waits_never_runs(bench: Make) -> None:
    gate = Gate()
    one = bench(gate=gate, sequences=1)
    first = one.ask([1], replace(GREEDY, max_tokens=3))
    gate.let()
    second, third = one.ask([2, 2]), one.ask([3])
    one.engine.cancel(second.request)
    gate.open()
    assert second.wait().reason is FinishReason.CANCELLED
    assert first.wait().reason is third.wait().reason is FinishReason.LENGTH
    assert [0, 2] not in [[past, count] for parts in one.model.steps for _, past, count in parts]


def test_cancelling_twice_or_after_the_end_is_harmless(bench: Make) -> None:
    one = bench()
    reply = one.ask([1])
    finish = reply.wait()
    one.engine.cancel(reply.request)
    one.engine.cancel(reply.request)
    assert one.ask([2]).wait().reason is FinishReason.LENGTH
    assert reply.wait() is finish


def test_leaving_the_loop_of_generate_cancels_the_rest(bench: Make) -> None:
    one = bench(context=4096, pages=4096)
    tokens = one.engine.generate([5], LONG)
    said = [next(tokens).id for _ in range(3)]
    tokens.close()
    assert said == follow(scrambled, [5], 3)
    until(lambda: one.engine.status()["running"] == 0)
    assert one.engine.status()["tokens"]["completion"] < 4000


def test_an_iterator_that_is_never_looped_over_cancels_its_request(bench: Make) -> None:
    one = bench(context=4096, pages=4096)
    tokens = one.engine.generate([5], LONG)
    until(lambda: one.engine.status()["running"] == 1)
    del tokens
    until(lambda: one.engine.status()["running"] == 0)
    assert one.engine.status()["tokens"]["completion"] < 4000


def until(holds: Callable[[], bool]) -> None:
    """Wait for it, for a while."""
    end = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.001)


def test_generate_gives_all_the_text(bench: Make) -> None:
    one = bench(always(*b"abc", EOS))
    params = SamplingParams(temperature=0, stop=("cd",))
    tokens = list(one.engine.generate([1], params))
    assert [token.text for token in tokens] == ["a", "b", "c"]
    assert [token.id for token in tokens] == [97, 98, 99]


def test_many_random_requests_and_cancels_leave_every_seat_free(
    bench: Make, rng: np.random.Generator
) -> None:
    one = bench(pages=20)
    replies = []
    for prompt in prompts(rng, 150, most=60):
        params = replace(GREEDY, max_tokens=int(rng.integers(1, 30)))
        replies.append((prompt, one.ask(prompt, params)))
        if rng.integers(0, 2):
            _, victim = replies[int(rng.integers(0, len(replies)))]
            one.engine.cancel(victim.request)
        if rng.integers(0, 4) == 0:
            time.sleep(float(rng.uniform(0, 0.003)))
    for prompt, reply in replies:
        assert reply.wait().error is None
        assert reply.ids == follow(scrambled, prompt, len(reply.ids))
    status = one.engine.status()
    assert (status["running"], status["waiting"]) == (0, 0)
    assert status["free_pages"] == status["pages"] == 20
    assert one.kv_cache.free_slots == one.kv_cache.num_slots


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [64, 65, 1000])
def test_a_prompt_over_the_context_is_refused_in_openais_words(bench: Make, length: int) -> None:
    with pytest.raises(RequestError, match=rf"(?s)\b64 tokens.*\b{length} tokens") as caught:
        bench(context=64).ask([1] * length)
    error = caught.value
    assert (error.code, error.param, error.status) == ("context_length_exceeded", "messages", 400)


def test_a_prompt_without_tokens_is_refused(bench: Make) -> None:
    with pytest.raises(RequestError):
        bench().ask([])


@pytest.mark.parametrize("token", [-1, VOCAB, 2**40])
def test_a_token_id_outside_the_vocabulary_is_refused(bench: Make, token: int) -> None:
    one = bench()
    with pytest.raises(RequestError, match=str(token)):
        one.ask([1, token])
    with pytest.raises(RequestError, match=str(token)):
        one.engine.logits([1, token])


def test_a_bias_outside_the_vocabulary_is_refused(bench: Make) -> None:
    with pytest.raises(RequestError, match=str(VOCAB)) as caught:
        bench().ask([1], replace(GREEDY, logit_bias={VOCAB: 1.0}))
    assert caught.value.param == "logit_bias"


# -- logits and jobs -------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 7, 8, 9, 16, 17, 40, 64])
def test_logits_are_those_of_every_position(bench: Make, length: int) -> None:
    ids = np.random.default_rng(length).integers(0, VOCAB, length).tolist()
    got = bench().engine.logits(ids)
    assert got.dtype == np.float32
    assert np.array_equal(got, [scrambled(ids[: t + 1]) for t in range(length)])


def test_wide_chunks_give_their_logits_in_several_pieces(bench: Make) -> None:
    ids = np.random.default_rng(1).integers(0, VOCAB, 60).tolist()
    got = bench(chunk=64).engine.logits(ids)
    assert np.array_equal(got, [scrambled(ids[: t + 1]) for t in range(60)])


def test_forced_logits_of_several_sequences_are_kept_apart(bench: Make) -> None:
    sequences = [[1, 2, 3, 4], [9], [7, 7, 7, 7, 7, 7, 7], [5, 6], [3]]
    got: dict[tuple[int, int], Logits] = {}
    one = bench()
    for (position, sequence), piece in one.engine.prompt_logits(sequences, 2):
        for i, row in enumerate(piece):
            got[sequence, position + i] = row
    wanted = {
        (s, t): scrambled(ids[: t + 1]) for s, ids in enumerate(sequences) for t in range(len(ids))
    }
    assert got.keys() == wanted.keys()
    assert all(np.array_equal(got[key], wanted[key]) for key in wanted)
    assert max(len(parts) for parts in one.model.steps) > 1


def test_logits_between_the_tokens_of_a_reply_do_not_change_it(bench: Make) -> None:
    one = bench(context=512, pages=128)
    reply = one.ask([1, 2, 3], replace(GREEDY, max_tokens=200))
    for count in (5, 50, 100):
        reply.wait_for_tokens(count)
        assert np.array_equal(one.engine.logits([4, 5])[1], scrambled([4, 5]))
    assert reply.wait().reason is FinishReason.LENGTH
    assert reply.ids == follow(scrambled, [1, 2, 3], 200)


def test_logits_over_the_context_are_refused(bench: Make) -> None:
    one = bench(context=64)
    with pytest.raises(RequestError, match="65"):
        one.engine.logits([1] * 65)
    with pytest.raises(RequestError, match="65"):
        one.engine.prompt_logits([[1], [1] * 65], 8)
    with pytest.raises(RequestError):
        one.engine.stream_prompt_logits([[]], 8, lambda position, sequence, rows: None)


def test_a_job_that_fails_fails_alone(bench: Make) -> None:
    one = bench()

    def job() -> None:
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        one.engine.run_on_engine_thread(job)
    assert one.ask([1]).wait().error is None


def test_status_counts_requests_and_tokens(bench: Make) -> None:
    gate = Gate()
    one = bench(gate=gate, sequences=1)
    first = one.ask([1] * 5, replace(GREEDY, max_tokens=4))
    gate.arrival()
    second = one.ask([2] * 3, replace(GREEDY, max_tokens=2))
    found: dict[str, Any] = {}
    looker = threading.Thread(target=lambda: found.update(one.engine.status()))
    looker.start()
    time.sleep(0.05)
    gate.open()
    looker.join(PATIENCE_S)
    assert (found["running"], found["waiting"]) == (1, 1)
    first.wait()
    second.wait()
    after = one.engine.status()
    assert (after["running"], after["waiting"]) == (0, 0)
    assert after["tokens"] == {"prompt": 8, "completion": 6}


# -- what goes wrong -------------------------------------------------------------------------------


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
def test_a_step_that_fails_ends_its_requests_and_the_engine_goes_on(
    bench: Make, error: Exception, at: int
) -> None:
    one = bench()
    one.model.before = Failing(at, error)
    broken = one.ask([1] * 12)
    finish = broken.wait()
    assert finish.reason is FinishReason.ERROR
    assert isinstance(finish.error, OsmiumError)
    assert not isinstance(finish.error, EngineStopped)
    assert "a bug" in str(finish.error)
    again = one.ask([1] * 12)
    assert again.wait().error is None
    assert again.ids == follow(scrambled, [1] * 12, 8)
    assert one.kv_cache.free_pages == one.kv_cache.num_pages


def test_a_cuda_error_that_leaves_the_context_whole_ends_one_step_only(bench: Make) -> None:
    one = bench()
    one.model.before = Failing(1, CudaError("busy", call="c", name="N", code=1, context_lost=False))
    assert isinstance(one.ask([1]).wait().error, CudaError)
    assert one.ask([1]).wait().error is None


def lost() -> CudaError:
    return CudaError("gone", call="cuCtxSynchronize", name="N", code=700, context_lost=True)


def test_a_lost_context_stops_the_engine_for_everybody(bench: Make) -> None:
    gate = Gate()
    one = bench(gate=gate, sequences=1)
    running = one.ask([1])
    gate.arrival()
    waiting = one.ask([2])
    one.model.before = Failing(2, lost())
    gate.open()
    for reply in (running, waiting):
        finish = reply.wait()
        assert finish.reason is FinishReason.ERROR
        assert isinstance(finish.error, EngineStopped)
    assert len(running.ids) in (1, 2)  # a step may be launched before the last one is looked at
    with pytest.raises(EngineStopped, match="gone"):
        one.ask([1])
    with pytest.raises(EngineStopped):
        one.engine.status()


def test_jobs_that_wait_when_the_context_is_lost_are_told(bench: Make) -> None:
    gate = Gate()
    one = bench(gate=gate)
    running = one.ask([1])
    gate.arrival()
    told: list[OsmiumError] = []

    def client() -> None:
        try:
            one.engine.logits([3])
        except OsmiumError as error:
            told.append(error)

    threads = [threading.Thread(target=client) for _ in range(3)]
    for thread in threads:
        thread.start()
    time.sleep(0.05)
    one.model.before = Failing(1, lost())
    gate.open()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert sorted(type(error).__name__ for error in told) == [
        "CudaError", "EngineStopped", "EngineStopped",
    ]  # fmt: skip
    assert isinstance(running.wait().error, EngineStopped)


def test_a_context_lost_inside_a_job_is_told_and_stops_the_engine(bench: Make) -> None:
    one = bench()
    one.model.before = Failing(1, lost())
    with pytest.raises(CudaError):
        one.engine.logits([3])
    until(lambda: one.engine.stopped is not None)
    with pytest.raises(EngineStopped):
        one.engine.logits([3])


def test_logits_that_are_no_numbers_fail_the_reply(bench: Make) -> None:
    def rule(history: list[int]) -> Logits:
        return np.full(VOCAB, np.nan, np.float32)

    finish = bench(rule).ask([1]).wait()
    assert isinstance(finish.error, OsmiumError)
    assert "not finite" in str(finish.error)


def test_a_callback_that_raises_loses_its_own_reply_and_no_other(bench: Make) -> None:
    one = bench()
    calls = []

    def broken(event: Event) -> None:
        calls.append(event)
        raise RuntimeError("the client's loop is closed")

    other = one.ask([2], replace(GREEDY, max_tokens=20))
    one.engine.submit([1], LONG, broken)
    assert other.wait().error is None
    assert other.ids == follow(scrambled, [2], 20)
    until(lambda: len(calls) == 2)
    assert [type(event) for event in calls] == [Token, Finish]
    assert one.engine.status()["running"] == 0


@pytest.mark.parametrize("method", ["push", "flush"])
def test_a_decoder_that_fails_ends_its_own_reply_with_an_error(bench: Make, method: str) -> None:
    class Broken:
        def push(self, token: int) -> str:
            return self.fail("push")

        def flush(self) -> str:
            return self.fail("flush")

        def fail(self, mine: str) -> str:
            if mine == method:
                raise ValueError("no such id")
            return ""

        def decoder(self) -> "Broken":
            return self

    one = bench(tokenizer=Broken())
    for _ in range(2):  # the engine goes on
        finish = one.ask([1]).wait()
        assert finish.reason is FinishReason.ERROR
        assert "no such id" in str(finish.error)


# -- the end ---------------------------------------------------------------------------------------


def test_closing_ends_who_runs_and_who_waits_and_refuses_who_comes(bench: Make) -> None:
    one = bench(context=4096, pages=3072, sequences=1)
    replies = [one.ask([i], LONG) for i in range(1, 4)]
    replies[0].wait_for_tokens(2)
    one.engine.close()
    for reply in replies:
        assert reply.is_over
        finish = reply.wait()
        assert (finish.reason, type(finish.error)) == (FinishReason.ERROR, EngineStopped)
    for late in (lambda: one.ask([1]), lambda: one.engine.logits([1]), one.engine.status):
        with pytest.raises(EngineStopped):
            late()
    one.engine.close()


def test_generate_raises_when_the_engine_closes_under_it_and_gives_what_there_was(
    bench: Make,
) -> None:
    one = bench(context=4096, pages=3072)
    said = []
    with pytest.raises(EngineStopped):
        for token in one.engine.generate([5], LONG):
            said.append(token.id)
            if len(said) == 4:
                threading.Thread(target=one.engine.close).start()
    assert said == follow(scrambled, [5], len(said))
    assert len(said) >= 4


def test_closing_from_a_callback_does_not_wait_for_itself(bench: Make) -> None:
    one = bench()
    done = threading.Event()

    def close(event: Event) -> None:
        one.engine.close()
        done.set()

    one.engine.submit([1], LONG, close)
    assert done.wait(PATIENCE_S)
    one.engine.close()
    assert one.engine.stopped is not None


def test_the_threads_own_first_and_last_calls_are_made_on_it(bench: Make) -> None:
    calls: list[tuple[str, str]] = []

    def note(what: str) -> Callable[[], None]:
        return lambda: calls.append((what, threading.current_thread().name))

    one = bench(on_thread=note("first"), on_close=note("last"))
    one.ask([1]).wait()
    one.engine.close()
    assert [what for what, _ in calls] == ["first", "last"]
    assert {name for _, name in calls} == {"osmium-engine"}


def test_a_thread_that_cannot_begin_tells_everybody(bench: Make) -> None:
    def fail() -> None:
        raise OsmiumError("the device is gone")

    one = bench(on_thread=fail)
    until(lambda: one.engine.stopped is not None)
    with pytest.raises(EngineStopped, match="the device is gone"):
        one.ask([1])
