"""Log-probabilities of a prompt's tokens, and requests that compute a prompt alone."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from osmium.engine.prompt_logprobs import BLOCK, PromptLogprobs
from osmium.engine.request import FinishReason, SamplingParams
from osmium.engine.sampler import log_softmax
from osmium.errors import OsmiumError, RequestError
from osmium.ops.sampling import largest_tokens
from tests.engine.fakes import EOS, GREEDY, VOCAB, EngineHarness, Gate, Logits, always, scrambled

Make = Callable[..., EngineHarness]

SCORE = SamplingParams(max_tokens=0, prompt_logprobs=3)


def expected(prompt: list[int], at: int) -> tuple[float, int, list[int]]:
    """Log-probability and rank of a prompt's token, and the three likeliest tokens there."""
    logits = scrambled(prompt[:at])
    logprobs = log_softmax(logits)
    order = np.argsort(-logits, kind="stable").tolist()
    rank = int(np.count_nonzero(logits > logits[prompt[at]])) + 1  # equal tokens have the same
    return float(logprobs[prompt[at]]), rank, order[:3]


def check(response_prompt: list[int], found: PromptLogprobs | None) -> None:
    assert found is not None
    entries = list(found.entries())
    assert len(entries) == len(response_prompt) and entries[0] is None
    for at, entry in enumerate(entries[1:], 1):
        assert entry is not None
        logprob, rank, best = expected(response_prompt, at)
        assert (entry[0], entry[2]) == (response_prompt[at], rank)
        assert entry[1] == pytest.approx(logprob, abs=1e-5)
        assert [token for token, _ in entry[3]] == best
        for token, value in entry[3]:
            wanted = log_softmax(scrambled(response_prompt[:at]))[token]
            assert value == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 17, 25, 63, 64])
@pytest.mark.parametrize("chunk", [1, 8, 40])
def test_a_prompt_is_scored_without_a_generated_token(
    harness_of: Make, rng: np.random.Generator, length: int, chunk: int
) -> None:
    prompt = rng.integers(0, VOCAB, length).tolist()
    harness = harness_of(chunk=chunk)
    response = harness.submit(prompt, SCORE)
    finish = response.wait()
    assert (finish.reason, finish.text, response.tokens) == (FinishReason.LENGTH, "", [])
    assert (finish.prompt_tokens, finish.completion_tokens) == (length, 0)
    check(prompt, response.request.prompt_logprobs)
    assert response.request.times.ended > 0


def test_a_prompt_longer_than_the_context_cannot_be_scored(harness_of: Make) -> None:
    harness = harness_of(context=16)
    with pytest.raises(RequestError, match="17 tokens"):
        harness.submit([1] * 17, SCORE)
    with pytest.raises(RequestError, match="16 tokens"):
        harness.submit([1] * 16, replace(SCORE, max_tokens=1))


def test_scores_do_not_change_the_response_and_are_there_at_its_first_token(
    harness_of: Make, rng: np.random.Generator
) -> None:
    prompt = rng.integers(0, VOCAB, 21).tolist()
    harness = harness_of()
    plain = harness.submit(prompt)
    scored = harness.submit(prompt, replace(GREEDY, prompt_logprobs=3))
    scored.wait_for_tokens(1)
    check(prompt, scored.request.prompt_logprobs)
    plain.wait(), scored.wait()
    assert scored.ids == plain.ids
    assert plain.request.prompt_logprobs is None


def test_a_preempted_prompt_is_scored_once(harness_of: Make, rng: np.random.Generator) -> None:
    """Two requests do not fit; one is preempted while it generates, and computed again."""
    gate = Gate()
    harness = harness_of(pages=16, sequences=2, gate=gate)
    prompts = [rng.integers(0, VOCAB, 20).tolist() for _ in range(2)]
    params = replace(GREEDY, max_tokens=30, prompt_logprobs=3)
    responses = [harness.submit(prompt, params) for prompt in prompts]
    gate.open()  # both are submitted before the first step ends
    for prompt, response in zip(prompts, responses, strict=True):
        assert response.wait().completion_tokens == 30
        check(prompt, response.request.prompt_logprobs)
    starts = [past for step in harness.model.steps for _, past, _ in step if past == 0]
    assert len(starts) > 2, "no request was preempted"


def test_scored_prompts_run_beside_other_requests(
    harness_of: Make, rng: np.random.Generator
) -> None:
    harness = harness_of()
    prompts = [rng.integers(0, VOCAB, int(n)).tolist() for n in rng.integers(1, 60, 24)]
    responses = [
        harness.submit(prompt, SCORE if i % 2 else GREEDY) for i, prompt in enumerate(prompts)
    ]
    for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        response.wait()
        if i % 2:
            check(prompt, response.request.prompt_logprobs)
        else:
            assert len(response.ids) == min(8, 64 - len(prompt))


def test_a_scored_prompt_can_be_cancelled_between_two_chunks(harness_of: Make) -> None:
    gate = Gate()
    harness = harness_of(gate=gate)
    response = harness.submit(list(range(40)), SCORE)
    gate.pass_steps()
    gate.arrival()
    harness.engine.cancel(response.request)
    gate.open()
    assert response.wait().reason is FinishReason.CANCELLED
    assert len(harness.model.steps) == 2


def test_logits_that_are_not_finite_fail_the_scored_prompt_alone(harness_of: Make) -> None:
    def rule(history: list[int]) -> Logits:
        value = np.nan if history[-1] == 5 else 0.0
        return np.full(VOCAB, value, np.float32)

    harness = harness_of(rule)
    failed, fine = harness.submit([1, 5, 2], SCORE), harness.submit([1, 2, 3], SCORE)
    error = failed.wait().error
    assert isinstance(error, OsmiumError) and "before token 2" in str(error)
    assert fine.wait().reason is FinishReason.LENGTH


def test_an_end_token_comes_with_the_finish_and_its_log_probability(harness_of: Make) -> None:
    harness = harness_of(always(104, EOS))
    params = replace(GREEDY, ignore_eos=False, logprobs=1)
    end = harness.submit([1], params).wait().end
    assert end is not None and (end.id, end.text, end.start, end.end) == (EOS, "", 1, 1)
    assert end.logprob is not None and end.top == ((EOS, end.logprob),)
    assert harness.submit([1], replace(params, logprobs=None)).wait().end is None
    assert harness.submit([1], replace(params, max_tokens=1)).wait().end is None


@pytest.mark.parametrize("vocab", [1, 7, BLOCK, 40 * BLOCK + 3])
@pytest.mark.parametrize("count", [0, 1, 2, 20])
def test_the_likeliest_tokens_are_those_of_a_sort(
    rng: np.random.Generator, vocab: int, count: int
) -> None:
    """Rounded logits have many ties."""
    for _ in range(5):
        logits = np.round(rng.normal(0, 3, (1, vocab)), 1).astype(np.float32)
        found = PromptLogprobs([0, 0], count)
        found.add(0, logits)
        _, entry = found.entries()
        assert entry is not None
        wanted = largest_tokens(logits[0], count).tolist()
        assert [token for token, _ in entry[3]][: len(wanted)] == wanted
