"""The engine on a GPU: recorded steps, requests side by side, what comes back, what is held."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import osmium
from osmium.cuda.stream import Machine
from osmium.engine.engine import Engine
from osmium.engine.request import SamplingParams
from osmium.errors import NoDevice
from osmium.ops.gpu import GpuOps
from osmium.weights import DEMO

pytestmark = pytest.mark.gpu

GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)


def demo(**options: Any) -> Engine:
    try:
        return osmium.load(DEMO, device="gpu", **options)
    except NoDevice as error:
        pytest.skip(str(error))


def prompts(engine: Engine, rng: np.random.Generator, count: int) -> list[list[int]]:
    return [
        [int(one) for one in rng.integers(0, engine.config.vocab, int(rng.integers(2, 90)))]
        for _ in range(count)
    ]


def replies(engine: Engine, asked: list[list[int]]) -> list[list[int]]:
    """All of them at once."""
    going = [engine.generate(ids, GREEDY) for ids in asked]
    return [[token.id for token in one] for one in going]


def test_replies_of_the_device_are_those_of_the_host(rng: np.random.Generator) -> None:
    """Asked for log-probabilities, the host looks at every row of logits and draws itself."""
    engine = demo()
    try:
        assert engine._runner._replays, "a token was recorded before anybody is served"
        for settings in ({}, {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "seed": 5}):
            params = replace(GREEDY, **settings)  # type: ignore[arg-type]
            for ids in prompts(engine, rng, 3):
                device = [token.id for token in engine.generate(ids, params)]
                host = [token.id for token in engine.generate(ids, replace(params, logprobs=0))]
                assert device == host
    finally:
        engine.close()


def test_a_reply_ends_at_an_end_token(rng: np.random.Generator) -> None:
    engine = demo(sequences=3)
    try:
        params = SamplingParams(temperature=1, max_tokens=200, seed=1)
        asked = prompts(engine, rng, 6)
        going = [engine.generate(ids, params) for ids in asked]
        together = [[token.id for token in one] for one in going]
        host = replace(params, logprobs=0)
        alone = [[token.id for token in engine.generate(ids, host)] for ids in asked]
        same = sum(a == b for a, b in zip(alone, together, strict=True))
        assert same >= 4, f"{same} of 6"  # a sum in another order may flip a draw
    finally:
        engine.close()


@pytest.mark.parametrize("slots", [None, 16, 4])
def test_requests_side_by_side_say_what_they_say_alone(
    rng: np.random.Generator, slots: int | None
) -> None:
    engine = demo(**({} if slots is None else {"slots": slots}), sequences=4)
    try:
        asked = prompts(engine, rng, 10)
        alone = [[token.id for token in engine.generate(ids, GREEDY)] for ids in asked]
        together = replies(engine, asked)
        # A sum in another order may flip a near-tie: almost all of them must be the same.
        same = sum(a == b for a, b in zip(alone, together, strict=True))
        assert same >= 9, f"{same} of 10"
        experts = engine.status()["experts"]
        assert experts["routed"] == experts["hit"] + experts["fetched"]
    finally:
        engine.close()


def test_only_logits_come_back(rng: np.random.Generator) -> None:
    engine = demo(slots=8)
    try:
        (ids,) = prompts(engine, rng, 1)
        ops = engine._runner.ops
        list(engine.generate(ids, GREEDY))
        engine.status()  # whatever that reply still reads has come by now
        before = ops.bytes_to_host
        count = len(list(engine.generate(ids, GREEDY)))
        assert count == GREEDY.max_tokens
        engine.status()
        counters = 3 * engine._runner.store.cache.counters.nbytes  # two looks and a status
        came = ops.bytes_to_host - before - counters
        assert came == engine.config.vocab * 4, "the first token's logits"
    finally:
        engine.close()


def test_nothing_is_allocated_while_serving(rng: np.random.Generator) -> None:
    engine = demo(slots=8)
    try:
        ops = engine._runner.ops
        assert isinstance(ops, GpuOps) and isinstance(ops.machine, Machine)
        pool = ops.machine.pool
        assert pool.frozen
        used = pool.used
        replies(engine, prompts(engine, rng, 3))
        assert pool.used == used
    finally:
        engine.close()
