"""The sampler against a simple reimplementation and against statistics."""

import math
from typing import Any

import numpy as np
import pytest

from osmium.engine.min_tokens import EndMask
from osmium.engine.request import Request, SamplingParams
from osmium.engine.sampler import log_softmax, sample
from osmium.errors import OsmiumError, RequestError

VOCAB = 60


def request_of(
    params: SamplingParams,
    prompt: list[int] | None = None,
    response: list[int] | None = None,
    seed: int = 0,
) -> Request:
    """A request that has generated `response` already."""
    request = Request(prompt or [0], params, lambda event: None, None, seed)
    request.tokens += response or []
    return request


def logits(rng: np.random.Generator) -> np.ndarray[Any, np.dtype[np.float32]]:
    return rng.normal(0, 2, VOCAB).astype(np.float32)


# -- reimplementation: one token at a time, in Python floats ---------------------------------------


def adjusted(row: Any, prompt: list[int], response: list[int], p: SamplingParams) -> list[float]:
    scores = [float(x) for x in row]
    for token in range(len(scores)):
        if token in prompt or token in response:
            better = scores[token] > 0
            scores[token] *= 1 / p.repetition_penalty if better else p.repetition_penalty
        if token in response:
            scores[token] -= p.presence_penalty + p.frequency_penalty * response.count(token)
        scores[token] += p.logit_bias.get(token, 0.0)
    return scores


def survivors(scores: list[float], p: SamplingParams) -> tuple[list[tuple[int, float]], float]:
    """(token, probability), most likely first, and the distance to the nearest filter threshold."""
    order = sorted(range(len(scores)), key=lambda token: -scores[token])
    if p.top_k > 0:
        order = order[: p.top_k]
    weights = [math.exp((scores[token] - scores[order[0]]) / p.temperature) for token in order]
    probabilities = [w / math.fsum(weights) for w in weights]
    kept, total, distance = [], 0.0, 1.0
    for token, probability in zip(order, probabilities, strict=True):
        kept.append((token, probability))
        total += probability
        if p.top_p < 1:
            distance = min(distance, abs(total - p.top_p))
            if total >= p.top_p:
                break
    if p.min_p > 0:
        distance = min([distance, *(abs(s / probabilities[0] - p.min_p) for _, s in kept)])
        kept = [(token, s) for token, s in kept if s >= p.min_p * probabilities[0]]
    total_probability = math.fsum(probability for _, probability in kept)
    return [(token, probability / total_probability) for token, probability in kept], distance


def inverse_cdf(kept: list[tuple[int, float]], uniform: float) -> tuple[int, float]:
    """The token whose interval of [0, 1) contains the number, and the distance to its borders."""
    total, distance = 0.0, 1.0
    for token, probability in kept:
        total += probability
        distance = min(distance, abs(total - uniform))
        if uniform < total:
            return token, distance
    return kept[-1][0], distance


def test_all_filters_and_penalties_together_equal_the_reimplementation(
    rng: np.random.Generator,
) -> None:
    checked = 0
    for case in range(400):
        row = logits(rng)
        prompt = rng.integers(0, VOCAB, 9).tolist()
        response = rng.integers(0, VOCAB, int(rng.integers(0, 30))).tolist()
        params = SamplingParams(
            temperature=float(rng.uniform(0.2, 2)),
            top_k=int(rng.choice([0, -1, 3, 17, VOCAB, VOCAB + 5])),
            top_p=float(rng.choice([1.0, rng.uniform(0.05, 1)])),
            min_p=float(rng.choice([0.0, rng.uniform(0, 0.3)])),
            presence_penalty=float(rng.uniform(-2, 2)),
            frequency_penalty=float(rng.uniform(-2, 2)),
            repetition_penalty=float(rng.uniform(0.5, 2)),
            logit_bias={int(rng.integers(0, VOCAB)): float(rng.uniform(-3, 3))},
        )
        seed = int(rng.integers(0, 2**63))
        key = np.array([seed, len(response)], np.uint64)
        uniform = float(np.random.Generator(np.random.Philox(key=key)).random())
        kept, distance = survivors(adjusted(row, prompt, response, params), params)
        token, border_distance = inverse_cdf(kept, uniform)
        if min(distance, border_distance) > 1e-5:  # scores are f32, so closer decisions may differ
            got, _, _ = sample(row, request_of(params, prompt, response, seed))
            assert got == token, (case, params)
            checked += 1
    assert checked > 350


def test_sampled_tokens_follow_the_probabilities(rng: np.random.Generator) -> None:
    row = logits(rng)
    params = SamplingParams(temperature=0.8, top_k=12)
    kept, _ = survivors(adjusted(row, [], [], params), params)
    n = 6000
    counts: dict[int, int] = {}
    for seed in rng.integers(0, 2**63, n).tolist():
        token, _, _ = sample(row, request_of(params, seed=seed))
        counts[token] = counts.get(token, 0) + 1
    assert set(counts) <= {token for token, _ in kept}
    chi_square = sum((counts.get(t, 0) - n * p) ** 2 / (n * p) for t, p in kept)
    assert chi_square < 45  # chi-square with 11 degrees of freedom: 5e-6 above


def test_positions_of_one_seed_are_independent(rng: np.random.Generator) -> None:
    flat = np.zeros(4, np.float32)
    seed = int(rng.integers(0, 2**63))
    tokens = [
        sample(flat, request_of(SamplingParams(), response=[0] * i, seed=seed))[0]
        for i in range(4000)
    ]
    pairs = np.zeros((4, 4))
    np.add.at(pairs, (tokens[:-1], tokens[1:]), 1)
    assert ((pairs - 3999 / 16) ** 2 / (3999 / 16)).sum() < 55  # 15 degrees: 2e-6 above


@pytest.mark.parametrize("seed", [0, 7, -1, 2**63, 2**80 + 3])
def test_the_same_seed_and_position_give_the_same_token(
    rng: np.random.Generator, seed: int
) -> None:
    row = logits(rng) / np.float32(4)  # no token is nearly certain
    one = [
        sample(row, request_of(SamplingParams(), response=[1] * i, seed=seed))[0] for i in range(40)
    ]
    two = [
        sample(row, request_of(SamplingParams(), response=[1] * i, seed=seed))[0] for i in range(40)
    ]
    assert one == two
    assert len(set(one)) > 1


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0),
        SamplingParams(temperature=0, top_k=5, top_p=0.5, min_p=0.1),
        SamplingParams(top_k=1),
        SamplingParams(top_p=1e-9),
        SamplingParams(min_p=1.0),
        SamplingParams(temperature=1e-9),
        SamplingParams(temperature=1e-300),
        SamplingParams(temperature=5e-324),
    ],
)
def test_filters_that_keep_one_token_sample_the_most_likely(
    rng: np.random.Generator, params: SamplingParams
) -> None:
    for seed in range(20):
        row = logits(rng)
        assert sample(row, request_of(params, seed=seed))[0] == int(row.argmax())


def test_the_first_of_equally_large_logits_wins() -> None:
    row = np.array([0, 3, 1, 3, 3], np.float32)
    assert sample(row, request_of(SamplingParams(temperature=0)))[0] == 1


def best(row: Any, prompt: list[int], response: list[int], **params: Any) -> int:
    return sample(
        np.array(row, np.float32),
        request_of(SamplingParams(temperature=0, **params), prompt, response),
    )[0]


def test_the_presence_penalty_applies_once_and_only_to_generated_tokens() -> None:
    row = [2.0, 1.6, 1.0]
    assert best(row, [0], [], presence_penalty=1.0) == 0  # prompt tokens do not count
    assert best(row, [2], [0], presence_penalty=0.3) == 0
    assert best(row, [2], [0, 0, 0, 0], presence_penalty=0.3) == 0
    assert best(row, [2], [0], presence_penalty=0.5) == 1


def test_the_frequency_penalty_applies_for_each_occurrence() -> None:
    row = [2.0, 1.6, 1.0]
    assert best(row, [2], [0], frequency_penalty=0.3) == 0
    assert best(row, [2], [0, 0], frequency_penalty=0.3) == 1
    assert best(row, [0, 0, 0, 0], [], frequency_penalty=2.0) == 0


def test_the_repetition_penalty_lowers_logits_of_either_sign() -> None:
    assert best([2.0, 1.6, 1.0], [0], [], repetition_penalty=1.5) == 1
    assert best([2.0, 1.6, 1.0], [2], [0], repetition_penalty=1.5) == 1
    assert best([-1.0, -1.2, -3.0], [0], [], repetition_penalty=1.5) == 1
    # once, not per occurrence
    assert best([2.0, 1.6, 1.0], [0, 0, 0], [0], repetition_penalty=1.2) == 0


def test_a_logit_bias_forces_and_bans_tokens() -> None:
    assert best([2.0, 1.6, 1.0], [0], [], logit_bias={2: 100.0}) == 2
    assert best([2.0, 1.6, 1.0], [0], [], logit_bias={0: -100.0, 1: -100.0}) == 2


def test_log_probabilities_are_of_the_models_own_logits(rng: np.random.Generator) -> None:
    row = logits(rng)
    wanted = row.astype(np.float64) - math.log(math.fsum(math.exp(float(x)) for x in row))
    params = SamplingParams(temperature=0, logprobs=4, logit_bias={11: 100.0}, repetition_penalty=2)
    token, logprob, top = sample(row, request_of(params, [3, 4]))
    assert token == 11
    assert logprob == pytest.approx(wanted[11], abs=1e-9)
    assert [t for t, _ in top] == np.argsort(-row)[:4].tolist()
    assert [p for _, p in top] == pytest.approx([wanted[t] for t, _ in top], abs=1e-9)


def test_alternatives_are_returned_only_on_request(rng: np.random.Generator) -> None:
    row = logits(rng)
    assert sample(row, request_of(SamplingParams(temperature=0)))[1:] == (None, ())
    _, logprob, top = sample(row, request_of(SamplingParams(temperature=0, logprobs=0)))
    assert logprob is not None
    assert top == ()


def test_sampling_does_not_modify_the_logits(rng: np.random.Generator) -> None:
    row = logits(rng)
    kept = row.copy()
    params = SamplingParams(
        repetition_penalty=1.3, presence_penalty=1, logit_bias={1: 5.0}, top_k=4, logprobs=2
    )
    sample(row, request_of(params, [1, 2], [3]))
    assert np.array_equal(row, kept)


def test_log_softmax_handles_huge_and_tiny_logits() -> None:
    rows = np.array([[1e4, 0, -1e4], [-3e38, -3e38, -3e38]], np.float32)
    got = log_softmax(rows)
    assert got[0].tolist() == [0.0, -1e4, -2e4]
    assert got[1] == pytest.approx(-math.log(3))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_non_finite_logits_are_an_error(value: float, temperature: float) -> None:
    row = np.zeros(VOCAB, np.float32)
    row[5] = value
    with pytest.raises(OsmiumError, match="not finite"):
        sample(row, request_of(SamplingParams(temperature=temperature)))


def test_extreme_but_allowed_parameters_still_choose_a_token(rng: np.random.Generator) -> None:
    row = logits(rng)
    for params in (
        SamplingParams(repetition_penalty=0.01, temperature=5e-324),
        SamplingParams(repetition_penalty=100),
        SamplingParams(temperature=100, min_p=0.99, top_p=0.999),
        SamplingParams(logit_bias=dict.fromkeys(range(VOCAB), -100.0)),
    ):
        assert 0 <= sample(row, request_of(params, [1, 2, 3], [4]))[0] < VOCAB


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1), ("temperature", math.nan), ("temperature", math.inf),
        ("temperature", "1"), ("temperature", True), ("temperature", None),
        ("top_k", -2), ("top_k", 1.5), ("top_k", True), ("top_k", None),
        ("top_p", 0), ("top_p", 0.0), ("top_p", 1.01), ("top_p", math.nan),
        ("min_p", -0.1), ("min_p", 1.1),
        ("presence_penalty", 2.1), ("presence_penalty", -2.1), ("frequency_penalty", math.nan),
        ("repetition_penalty", 0), ("repetition_penalty", 0.009), ("repetition_penalty", 101),
        ("seed", 1.0), ("seed", "7"), ("seed", True),
        ("max_tokens", -1), ("max_tokens", 2.0),
        ("logprobs", -1), ("logprobs", 21), ("logprobs", True),
        ("stop", ("",)), ("stop", (7,)), ("stop", "END"), ("stop", None),
        ("logit_bias", {1: 101.0}), ("logit_bias", {1: math.nan}), ("logit_bias", {1: "x"}),
        ("logit_bias", {"1": 1.0}), ("logit_bias", {True: 1.0}), ("logit_bias", {-1: 1.0}),
        ("logit_bias", {1: None}), ("logit_bias", [1, 2]), ("logit_bias", None),
    ],
)  # fmt: skip
def test_a_parameter_out_of_its_range_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**{field: value})
    assert caught.value.param == field


def test_the_borders_of_the_ranges_are_allowed() -> None:
    SamplingParams(
        temperature=0, top_k=-1, top_p=1, min_p=1, presence_penalty=-2, frequency_penalty=2,
        repetition_penalty=0.01, seed=-5, max_tokens=1, logprobs=20, stop=("a", "b"),
        logit_bias={0: -100, 5: 100},
    )  # fmt: skip


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_end_tokens_are_not_sampled_before_min_tokens(
    rng: np.random.Generator, temperature: float
) -> None:
    params = SamplingParams(temperature=temperature, min_tokens=3, top_k=2, logit_bias={5: 100})
    row = logits(rng)
    row[[5, 7]] = 50, 40
    for generated in range(6):
        mask = EndMask({7, 5}, 3)
        request = Request([0], params, lambda event: None, None, generated, token_mask=mask)
        for _ in range(generated):
            request.tokens.append(1)
            mask.push(1)
        token, _, _ = sample(row, request)
        assert (token == 5) is (generated >= 3)
        assert generated >= 3 or token != 7
