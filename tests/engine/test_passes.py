"""Prefill passes: decode steps, short prompts, cancels and jobs between their parts."""

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from osmium.engine.request import Event, Finish, FinishReason, SamplingParams, Token
from osmium.errors import CudaError, EngineStopped, OsmiumError
from osmium.ops import StepInputs
from tests.engine.fakes import (
    GREEDY,
    PATIENCE_S,
    VOCAB,
    EngineHarness,
    PartGate,
    Response,
    follow,
    scrambled,
)
from tests.engine.test_engine import BUSY, LONG, lost, until

Make = Callable[..., EngineHarness]

PASS, SHORT = 64, 8
"""Most tokens of a pass, and of one beside it."""

PARTS = 4
"""Parts of a pass of the fake model, one for each layer."""

ONE = replace(GREEDY, max_tokens=1)


@pytest.fixture(autouse=True)
def short_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes of at most SHORT tokens may run beside another."""
    monkeypatch.setattr("osmium.models.prefill.SHORT_PROMPT_TOKENS", SHORT)


class Clock:
    """Simulated seconds: steps and parts of the model advance them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, part_s: float, step_s: float) -> None:
        self.now, self.part_s, self.step_s = 1000.0, part_s, step_s
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def run(self, model: Any) -> None:
        """Advance by the steps and parts of this model."""
        model.before, model.before_part = self._step, self._part

    def _step(self, step: StepInputs) -> None:
        self.now += self.step_s if step.tokens == step.sequences else 0.0

    def _part(self, first_row: int, part: int) -> None:
        self.now += self.part_s


class Timed(Response):
    """A response with the simulated time of each token."""

    def __init__(self, then: Callable[[], None] | None = None) -> None:
        """`then` is called after the third token, on the engine's thread."""
        super().__init__()
        self.times: list[float] = []
        self._then = then

    def on_event(self, event: Event) -> None:
        if isinstance(event, Token):
            self.times.append(time.perf_counter())
        super().on_event(event)
        if len(self.tokens) == 3 and self._then is not None:
            then, self._then = self._then, None
            then()


def submit(
    harness: EngineHarness,
    prompt: list[int],
    params: SamplingParams = GREEDY,
    then: Callable[[], None] | None = None,
) -> Timed:
    response = Timed(then)
    response.request = harness.engine.submit(prompt, params, response.on_event)
    return response


def submit_beside(
    harness: EngineHarness, running: SamplingParams, prompt: list[int], params: SamplingParams
) -> tuple[Timed, Timed]:
    """A response to [1], and one to `prompt` that is submitted at the third token of the first."""
    beside = Timed()

    def then() -> None:
        beside.request = harness.engine.submit(prompt, params, beside.on_event)

    first = submit(harness, [1], running, then)
    first.wait_for_tokens(3)
    return first, beside


def wide(make: Make, **options: Any) -> EngineHarness:
    """A harness with passes of PASS tokens."""
    return make(**{"context": 256, "chunk": PASS, **options})


def prompt_of(rng: np.random.Generator, tokens: int) -> list[int]:
    prompt: list[int] = rng.integers(0, VOCAB, tokens).tolist()
    return prompt


def in_thread(call: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    """Call in a thread; its result, or its error, is in the list afterwards."""
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(call())
        except OsmiumError as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, found


def queued(harness: EngineHarness, call: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    """`in_thread`, and wait until the engine has the command; a gate holds the engine's thread."""
    commands = harness.engine._commands
    before = commands.qsize()
    started = in_thread(call)
    until(lambda: commands.qsize() > before)
    return started


# -- decode steps ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("part_s", "parts_per_layer"), [(0.001, 100), (0.005, 40), (0.02, 10)])
def test_gaps_of_running_responses_stay_below_the_limit_while_a_prompt_is_read(
    harness_of: Make, monkeypatch: pytest.MonkeyPatch, part_s: float, parts_per_layer: int
) -> None:
    clock = Clock(monkeypatch, part_s, 0.004)
    harness = wide(harness_of, sequences=4, decode_gap_s=0.1)
    clock.run(harness.model)
    harness.model.parts_per_layer = parts_per_layer
    gate = PartGate()
    harness.model.before_part = gate.part
    other = submit(harness, [2], LONG)
    gate.arrival()
    clock.run(harness.model)
    long = Timed()

    def then() -> None:  # three passes
        long.request = harness.engine.submit([7] * 150, ONE, long.on_event)

    first = Timed(then)
    first.request = harness.engine.submit([1], LONG, first.on_event)
    gate.open()
    assert long.wait().error is None
    for response in (first, other):
        response.wait()
        gaps = np.diff([at for at in response.times if at >= first.times[2]])
        assert gaps.max() <= 0.1 + 1e-9, "a token came late"
        assert np.count_nonzero(gaps > 0.05) >= 5, "passes run between decode steps"


def test_decode_steps_do_not_stop_a_prompt(harness_of: Make) -> None:
    harness = wide(harness_of, decode_gap_s=1e-9)
    log: list[str] = []
    harness.model.before = lambda step: log.append("step") if step.tokens == 1 else None
    harness.model.before_part = lambda first_row, part: log.append("part")
    decoding, long = submit_beside(harness, LONG, [2] * (PASS + 10), ONE)
    assert long.wait().reason is FinishReason.LENGTH
    decoding.wait()
    parts = [i for i, one in enumerate(log) if one == "part"][PARTS:]
    between = log[parts[0] : parts[-1] + 1]
    assert between.count("part") == 2 * PARTS
    assert not any(a == b == "step" for a, b in pairwise(between)), "one decode step at a time"
    assert between.count("step") >= PARTS, "decode steps run between parts"


def test_prompts_without_end_do_not_stop_decoding(
    harness_of: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch, 0.01, 0.001)
    harness = wide(harness_of, sequences=7)
    clock.run(harness.model)
    running, prompts = Timed(), 0
    two = replace(GREEDY, max_tokens=2)

    def again(event: Event) -> None:
        nonlocal prompts
        if isinstance(event, Finish) and not running.is_done and prompts < 500:
            prompts += 1
            harness.engine.submit([3] * 20, two, again)

    def begin(event: Event) -> None:
        if not running.tokens:
            for _ in range(6):
                harness.engine.submit([4] * 20, two, again)
        running.on_event(event)

    harness.engine.submit([1], replace(GREEDY, max_tokens=60), begin)
    running.wait()
    assert 60 <= prompts < 500, "the response ended while prompts came"
    assert max(np.diff(running.times)) <= 0.1


# -- short prompts beside a long one ---------------------------------------------------------------


def test_a_short_prompt_is_answered_while_a_long_one_is_read(
    harness_of: Make, rng: np.random.Generator
) -> None:
    gate = PartGate()
    harness = wide(harness_of, parts=gate)
    long_prompt, short_prompt = prompt_of(rng, PASS), prompt_of(rng, 5)
    long = harness.submit(long_prompt)
    assert gate.arrival() == [(0, 0)]
    short = harness.submit(short_prompt)
    gate.release()
    seen: list[tuple[int, int]] = []
    while not short.is_done and len(seen) < 30:
        seen.append(gate.arrival()[0])
        gate.release()
        if seen[-1] == (PASS, PARTS - 1):
            short.wait_for_tokens(1)
            break
    assert seen == [(PASS, part) for part in range(PARTS)], "its pass runs in rows of its own"
    assert not long.tokens
    gate.open()
    long.wait()
    short.wait()
    assert long.ids == follow(scrambled, long_prompt, 8)
    assert short.ids == follow(scrambled, short_prompt, 8)


def test_a_pass_reads_the_expert_tables_again_after_a_short_pass(harness_of: Make) -> None:
    gate = PartGate()
    harness = wide(harness_of, parts=gate)
    long = harness.submit([1] * PASS)
    gate.arrival()
    short = harness.submit([2] * 3, ONE)
    for part in range(PARTS):
        gate.release()
        assert gate.arrival() == [(PASS, part)]
    before = harness.model.invalidations
    gate.release()
    assert gate.arrival() == [(0, 1)]
    assert harness.model.invalidations > before, "the short pass has changed the expert cache"
    gate.open()
    long.wait()
    short.wait()


def test_a_stream_of_short_prompts_does_not_stop_a_long_one(
    harness_of: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch, 0.01, 0.0)
    harness = wide(harness_of, sequences=3)
    clock.run(harness.model)
    harness.model.parts_per_layer = 4
    shorts = 0
    long: Timed | None = None

    def again(event: Event) -> None:
        nonlocal shorts
        if isinstance(event, Finish) and (long is None or not long.is_done) and shorts < 500:
            shorts += 1
            harness.engine.submit([3] * 5, ONE, again)

    harness.engine.submit([3] * 5, ONE, again)
    long = submit(harness, [2] * (4 * PASS - 10), replace(GREEDY, max_tokens=1))
    began = long.request.times.submitted
    long.wait()
    pass_s = 16 * clock.part_s
    assert 4 <= shorts < 500
    assert long.times[0] - began <= 3 * 4 * pass_s + 5 * pass_s


def test_no_short_pass_runs_beside_a_short_one(harness_of: Make) -> None:
    gate = PartGate()
    harness = wide(harness_of, parts=gate)
    first = harness.submit([1] * SHORT, ONE)
    gate.arrival()
    second = harness.submit([2] * 3, ONE)
    gate.release()
    seen = [gate.arrival()[0]]
    for _ in range(PARTS - 2):
        gate.release()
        seen.append(gate.arrival()[0])
    assert seen == [(0, part) for part in range(1, PARTS)]
    gate.open()
    first.wait()
    second.wait()


def test_a_prompt_above_the_short_limit_waits_for_the_pass(harness_of: Make) -> None:
    gate = PartGate()
    harness = wide(harness_of, parts=gate)
    first = harness.submit([1] * PASS, ONE)
    gate.arrival()
    second = harness.submit([2] * (SHORT + 1), ONE)
    for part in range(1, PARTS):
        gate.release()
        assert gate.arrival() == [(0, part)]
    gate.open()
    first.wait()
    second.wait()


# -- cancelling ------------------------------------------------------------------------------------


def test_cancelling_a_long_prompt_between_two_layers_frees_its_slot_and_pages_at_once(
    harness_of: Make, rng: np.random.Generator
) -> None:
    gate = PartGate()
    harness = wide(harness_of, parts=gate, sequences=1)
    long = harness.submit([1] * (2 * PASS))
    gate.arrival()
    gate.release()
    assert gate.arrival() == [(0, 1)]
    prompt = prompt_of(rng, 20)
    after = harness.submit(prompt)
    harness.engine.cancel(long.request)
    gate.release()
    assert gate.arrival() == [(0, 0)], "the next request's pass begins"
    assert long.wait().reason is FinishReason.CANCELLED
    assert harness.kv_cache.num_pages - harness.kv_cache.free_pages == 5
    gate.open()
    after.wait()
    assert after.ids == follow(scrambled, prompt, 8)


@pytest.mark.parametrize("cancelled", ["short", "long"])
def test_cancelling_one_of_two_passes_leaves_the_other(
    harness_of: Make, rng: np.random.Generator, cancelled: str
) -> None:
    gate = PartGate()
    harness = wide(harness_of, parts=gate)
    prompts = {"long": prompt_of(rng, PASS), "short": prompt_of(rng, 5)}
    responses = {"long": harness.submit(prompts["long"])}
    gate.arrival()
    responses["short"] = harness.submit(prompts["short"])
    gate.release()
    assert gate.arrival() == [(PASS, 0)], "both have begun"
    harness.engine.cancel(responses[cancelled].request)
    gate.release()
    assert gate.arrival() == [(PASS, 1) if cancelled == "long" else (0, 1)]
    assert responses[cancelled].wait().reason is FinishReason.CANCELLED
    more = harness.submit([9] * PASS)
    gate.open()
    other = "long" if cancelled == "short" else "short"
    responses[other].wait()
    assert responses[other].ids == follow(scrambled, prompts[other], 8)
    more.wait()
    assert more.ids == follow(scrambled, [9] * PASS, 8)


# -- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ValueError("a bug"), BUSY])
@pytest.mark.parametrize("failing", ["short", "long"])
def test_an_error_of_a_part_ends_only_its_own_request(
    harness_of: Make, rng: np.random.Generator, error: Exception, failing: str
) -> None:
    gate = PartGate()
    harness = wide(harness_of, parts=gate, sequences=4)
    prompts = {"long": prompt_of(rng, PASS), "short": prompt_of(rng, 5)}
    decoding = harness.submit([1], replace(GREEDY, max_tokens=30))
    gate.pass_steps(PARTS)
    responses = {"long": harness.submit(prompts["long"])}
    gate.arrival()
    responses["short"] = harness.submit(prompts["short"])
    gate.release()
    assert gate.arrival() == [(PASS, 0)]
    first_row = PASS if failing == "short" else 0

    def fail(row: int, part: int) -> None:
        if row == first_row and part == 2:
            harness.model.before_part = lambda first_row, part: None
            raise error

    harness.model.before_part = fail
    gate.open()
    finish = responses[failing].wait()
    assert finish.reason is FinishReason.ERROR and isinstance(finish.error, OsmiumError)
    other = "long" if failing == "short" else "short"
    responses[other].wait()
    assert responses[other].ids == follow(scrambled, prompts[other], 8)
    decoding.wait()
    assert decoding.ids == follow(scrambled, [1], 30)


def test_a_context_lost_in_a_part_ends_every_request(harness_of: Make) -> None:
    gate = PartGate()
    harness = wide(harness_of, parts=gate)
    responses = [harness.submit([1] * PASS), harness.submit([2] * PASS)]
    gate.arrival()

    def fail(row: int, part: int) -> None:
        raise lost()

    harness.model.before_part = fail
    gate.open()
    for response in responses:
        assert isinstance(response.wait().error, EngineStopped)
    assert isinstance(harness.engine.failure, EngineStopped)
    assert isinstance(harness.engine.failure.__cause__, CudaError)


# -- preemption ------------------------------------------------------------------------------------


def test_a_prompt_preempted_between_two_parts_is_read_again(
    harness_of: Make, rng: np.random.Generator
) -> None:
    prompt = prompt_of(rng, 40)
    harness = wide(harness_of, context=100, pages=25, decode_gap_s=1e-9)
    harness.model.parts_per_layer = 20
    running = replace(GREEDY, max_tokens=80)
    decoding, long = submit_beside(harness, running, prompt, GREEDY)
    assert decoding.wait().error is None and long.wait().error is None
    assert harness.engine.stats.scheduler.preemptions >= 1, "no request was preempted"
    assert decoding.ids == follow(scrambled, [1], 80)
    assert long.ids == follow(scrambled, prompt, 8)


@pytest.mark.parametrize("beside", [False, True])
def test_prompt_logits_while_a_pass_runs_preempt_it(
    harness_of: Make, rng: np.random.Generator, beside: bool
) -> None:
    gate = PartGate()
    harness = wide(harness_of, parts=gate)
    prompt = prompt_of(rng, PASS + 5)
    long = harness.submit(prompt)
    gate.arrival()
    if beside:
        short = harness.submit([5] * 5)
        gate.release()
        gate.arrival()
    thread, found = queued(harness, lambda: harness.engine.logits([4, 5]))
    gate.open()
    thread.join(PATIENCE_S)
    assert np.array_equal(found[0][1], scrambled([4, 5]))
    long.wait()
    assert long.ids == follow(scrambled, prompt, 8)
    if beside:
        short.wait()
        assert short.ids == follow(scrambled, [5] * 5, 8)


def test_recording_routing_while_a_pass_runs_begins_it_again_and_then_runs_it_at_once(
    harness_of: Make, rng: np.random.Generator
) -> None:
    gate = PartGate()
    harness = wide(harness_of, parts=gate, decode_gap_s=1e-9)
    prompt = prompt_of(rng, PASS)
    for _ in range(PARTS):
        gate.release()
    decoding, long = submit_beside(harness, LONG, prompt, GREEDY)
    for _ in range(PARTS):
        gate.arrival()
    gate.pass_steps(2)
    gate.arrival()
    thread, _ = queued(harness, harness.engine.record_routing)
    log: list[str] = []
    harness.model.before = lambda step: log.append(f"step {step.tokens}")
    harness.model.before_part = lambda first_row, part: log.append(f"part {part}")
    gate.open()
    thread.join(PATIENCE_S)
    long.wait()
    assert long.ids == follow(scrambled, prompt, 8)
    at = log.index(f"step {PASS}")
    assert log[at : at + 5] == [f"step {PASS}", *(f"part {part}" for part in range(PARTS))]
    decoding.wait()


# -- the end ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["close", "stop"])
def test_ending_the_engine_in_a_pass_ends_its_requests_after_the_part(
    harness_of: Make, how: str
) -> None:
    gate = PartGate()
    harness = wide(harness_of, parts=gate)
    responses = [harness.submit([1] * (3 * PASS)), harness.submit([2] * PASS)]
    gate.arrival()
    responses.append(harness.submit([3] * 3))
    gate.release()
    assert gate.arrival() == [(PASS, 0)]
    if how == "stop":
        harness.engine.stop("out of memory")
    thread, _ = in_thread(harness.engine.close)
    until(lambda: harness.engine._closing)
    gate.release()
    thread.join(PATIENCE_S)
    assert not thread.is_alive()
    for response in responses:
        finish = response.wait()
        assert isinstance(finish.error, EngineStopped)
        assert ("out of memory" in str(finish.error)) == (how == "stop")


# -- jobs ------------------------------------------------------------------------------------------


def test_jobs_and_status_are_answered_between_two_parts(harness_of: Make) -> None:
    gate = PartGate()
    harness = wide(harness_of, parts=gate)
    long = harness.submit([1] * PASS)
    gate.arrival()
    job, found = queued(harness, lambda: harness.engine.run_on_engine_thread(lambda: "done"))
    status, seen = queued(harness, harness.engine.status)
    gate.release()
    assert gate.arrival() == [(0, 1)]
    for thread in (job, status):
        thread.join(PATIENCE_S)
        assert not thread.is_alive(), "it waits for the pass"
    assert found == ["done"]
    assert seen[0]["running"] == 1
    assert seen[0]["tokens"]["prompt"] == 0, "the pass has not ended"
    gate.open()
    long.wait()
    assert harness.engine.status()["tokens"]["prompt"] == PASS


def test_a_pass_reads_the_expert_tables_again_after_a_job_and_not_after_other_commands(
    harness_of: Make,
) -> None:
    gate = PartGate()
    harness = wide(harness_of, parts=gate)
    long = harness.submit([1] * PASS)
    gate.arrival()
    before = harness.model.invalidations
    other = harness.submit([2] * PASS)
    harness.engine.cancel(other.request)
    gate.release()
    gate.arrival()
    assert harness.model.invalidations == before

    def fail() -> None:
        raise OsmiumError("mine")

    for job in (int, fail):
        before = harness.model.invalidations
        thread, _ = queued(harness, partial(harness.engine.run_on_engine_thread, job))
        gate.release()
        gate.arrival()
        thread.join(PATIENCE_S)
        assert harness.model.invalidations > before
    gate.open()
    long.wait()
    other.wait()
    before = harness.model.invalidations
    harness.engine.status()
    assert harness.model.invalidations == before, "no pass runs"


# -- progress --------------------------------------------------------------------------------------


def test_progress_grows_with_each_layer_of_a_pass_and_never_falls(harness_of: Make) -> None:
    harness = wide(harness_of)
    harness.model.parts_per_layer = 2
    seen: list[int] = []
    started = threading.Event()
    response = Response()

    def look(first_row: int, part: int) -> None:
        assert started.wait(PATIENCE_S)
        seen.append(response.request.prompt_progress[0])

    harness.model.before_part = look
    response.request = harness.engine.submit([1] * (2 * PASS), ONE, response.on_event)
    started.set()
    response.wait()
    layer = PASS // PARTS
    assert seen == [layer * (part // 2) for part in range(4 * PARTS)]
    assert response.request.prompt_progress == (2 * PASS, 2 * PASS)


def test_progress_counts_tokens_that_were_computed_before(harness_of: Make) -> None:
    gate = PartGate()
    harness = wide(harness_of, parts=gate)
    response = Response()
    harness.engine.run_on_engine_thread(lambda: None)
    request = harness.engine.submit([1] * PASS, ONE, response.on_event)
    gate.pass_steps(2)
    gate.arrival()
    assert request.prompt_progress == (2 * PASS // PARTS, PASS)
    gate.open()
    response.wait()


# -- what requests may ask for ---------------------------------------------------------------------


class Odd:
    """A token mask that allows odd ids."""

    def __init__(self) -> None:
        self.pushed: list[int] = []

    def fill(self, words: npt.NDArray[np.int32]) -> None:
        words[:] = np.uint32(0xAAAAAAAA).astype(np.int32)

    def push(self, token: int) -> None:
        self.pushed.append(token)

    def completion(self) -> list[int]:
        return []


def masked_follow(prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        logits = scrambled(ids)
        logits[::2] = -np.inf
        ids.append(int(logits.argmax()))
    return ids[len(prompt) :]


def test_controls_hold_for_prompts_in_parts_beside_others(
    harness_of: Make, rng: np.random.Generator
) -> None:
    harness = wide(harness_of, sequences=6, decode_gap_s=1e-9)
    harness.model.parts_per_layer = 3
    prompts = [prompt_of(rng, count) for count in (150, 100, 70, 5, 30)]
    masked, mask = Response(), Odd()

    def then() -> None:
        submit_masked = harness.engine.submit
        masked.request = submit_masked(prompts[0], GREEDY, masked.on_event, token_mask=mask)

    decoding = submit(harness, [1], replace(GREEDY, max_tokens=100), then)
    decoding.wait_for_tokens(3)
    scored = harness.submit(prompts[1], replace(GREEDY, logprobs=2))
    read = harness.submit(prompts[2], replace(GREEDY, max_tokens=0, prompt_logprobs=3))
    short = harness.submit(prompts[3], replace(GREEDY, prompt_logprobs=1))
    choices = [
        harness.submit(prompts[4], replace(GREEDY, temperature=1, seed=seed)) for seed in (1, 2, 1)
    ]
    for response in (masked, scored, read, short, decoding, *choices):
        assert response.wait().error is None
    assert masked.ids == mask.pushed == masked_follow(prompts[0], 8)
    assert scored.ids == follow(scrambled, prompts[1], 8)
    for at, token in enumerate(scored.tokens):
        assert token.logprob == pytest.approx(
            logprob([*prompts[1], *scored.ids], 100 + at), abs=1e-4
        )
        assert len(token.top) == 2
    assert (read.ids, read.wait().reason) == ([], FinishReason.LENGTH)
    for response, prompt in ((read, prompts[2]), (short, prompts[3])):
        entries = list(response.request.prompt_logprobs.entries())
        assert entries[0] is None and len(entries) == len(prompt)
        for at, entry in enumerate(entries[1:], 1):
            assert entry[0] == prompt[at]
            assert entry[1] == pytest.approx(logprob(prompt, at), abs=1e-4)
    assert choices[0].ids == choices[2].ids != choices[1].ids
    assert decoding.ids == follow(scrambled, [1], 100)


def logprob(ids: list[int], at: int) -> float:
    """The log-probability of token `at`, given those before it."""
    logits = scrambled(ids[:at]).astype(np.float64)
    return float(logits[ids[at]] - np.log(np.exp(logits).sum()))


def test_decode_steps_run_while_a_long_prompt_is_scored(
    harness_of: Make, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch, 0.001, 0.001)
    harness = wide(harness_of, context=512, chunk=256, decode_gap_s=0.1)
    clock.run(harness.model)
    head = harness.model.head

    def slow_head(out: Any, rows: Any = None, first_prefill_row: int | None = None) -> None:
        if first_prefill_row is not None:
            clock.now += 0.02
        head(out, rows, first_prefill_row)

    monkeypatch.setattr(harness.model, "head", slow_head)
    prompt = prompt_of(rng, 256)
    read = replace(GREEDY, max_tokens=0, prompt_logprobs=0)
    running, scored = submit_beside(harness, LONG, prompt, read)
    scored.wait()
    entries = list(scored.request.prompt_logprobs.entries())
    assert entries[-1][1] == pytest.approx(logprob(prompt, 255), abs=1e-4)
    running.wait()
    assert np.diff(running.times).max() <= 0.1, "16 chunks of logits take 320 ms"


def test_many_prompts_and_cancels_at_any_part_leave_other_responses_as_they_are(
    harness_of: Make, rng: np.random.Generator
) -> None:
    harness = wide(harness_of, sequences=3, pages=90, decode_gap_s=1e-9)
    harness.model.parts_per_layer = 2
    prompts = [prompt_of(rng, int(rng.choice([1, 5, 40, 100, 180]))) for _ in range(30)]
    responses, cancelled = [], set()
    for i, prompt in enumerate(prompts):
        responses.append(harness.submit(prompt))
        if rng.random() < 0.3:
            time.sleep(rng.uniform(0, 0.003))
            chosen = int(rng.integers(0, i + 1))
            cancelled.add(chosen)
            harness.engine.cancel(responses[chosen].request)
    for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        finish = response.wait()
        assert finish.error is None
        expected = follow(scrambled, prompt, 8)
        if i in cancelled:
            assert response.ids == expected[: len(response.ids)]
        else:
            assert response.ids == expected
