"""1,000 random schemas and prompts on the demo model: no text is invalid."""

import json
from collections.abc import Callable, Iterator
from queue import SimpleQueue

import jsonschema
import numpy as np
import pytest

import osmium
from osmium.engine.engine import Engine
from osmium.engine.request import Event, Finish, FinishReason, SamplingParams
from osmium.text.grammar import GrammarCompiler
from tests.server.schemas import PROMPTS, Schema, random_schema

CASES, AT_ONCE = 1000, 50


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    made = osmium.load(device="cpu", max_num_seqs=16)
    yield made
    made.close()


def submit(
    engine: Engine, compiler: GrammarCompiler, schema: Schema, rng: np.random.Generator
) -> "SimpleQueue[Event]":
    """Submit a request for a random prompt, with random parameters; returns its events."""
    prompt = PROMPTS[int(rng.integers(len(PROMPTS)))]
    text = engine.template.render([{"role": "user", "content": prompt}], None)
    params = SamplingParams(
        temperature=float(rng.choice([0, 0.7, 2])),
        repetition_penalty=float(rng.choice([1, 1.3])),
        seed=int(rng.integers(1000)),
        max_tokens=int(rng.choice([1, 2, 4, 8, 16])),
    )
    assert params.max_tokens is not None
    mask = compiler.compile("json", schema, "schema").mask(params.max_tokens)
    events: SimpleQueue[Event] = SimpleQueue()
    engine.submit(engine.tokenizer.encode(text), params, events.put, token_mask=mask)
    return events


def test_no_response_to_a_strict_schema_is_invalid(
    engine: Engine, rng: np.random.Generator, record_property: Callable[[str, object], None]
) -> None:
    compiler = GrammarCompiler(
        engine.tokenizer, engine.config.vocab_size, engine.config.eos_token_ids
    )
    reasons: list[FinishReason] = []
    for _ in range(CASES // AT_ONCE):
        schemas = [random_schema(rng) for _ in range(AT_ONCE)]
        responses = [submit(engine, compiler, schema, rng) for schema in schemas]
        for schema, events in zip(schemas, responses, strict=True):
            text = ""
            while not isinstance(event := events.get(), Finish):
                text += event.text
            assert event.error is None
            reasons.append(event.reason)
            jsonschema.Draft202012Validator(schema).validate(json.loads(text + event.text))
    assert len(reasons) == CASES
    record_property("cases", CASES)
    assert {*reasons} == {FinishReason.STOP, FinishReason.LENGTH}
