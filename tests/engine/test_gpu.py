"""The engine on a GPU: recorded steps, requests side by side, what comes back, what is held."""

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


def test_recorded_steps_say_what_launched_ones_say(rng: np.random.Generator) -> None:
    engine = demo()
    try:
        asked = prompts(engine, rng, 3)
        launched = replies(engine, asked)
        engine._runner.recording = True
        assert replies(engine, asked) == launched
        assert engine._runner._replays
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
        before = ops.bytes_to_host
        count = len(list(engine.generate(ids, GREEDY)))
        assert ops.bytes_to_host - before == count * engine.config.vocab * 4
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
