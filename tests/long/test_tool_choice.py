"""1,000 random tools in each format of calls: each call is read back and satisfies its schema."""

from collections.abc import Iterator

import numpy as np
import pytest

import osmium
from osmium.engine.engine import Engine
from osmium.text import grammar_ending
from osmium.text.grammar import GrammarCompiler
from osmium.text.tool_formats import ToolFormat
from tests.text.test_call_grammar import FORMATS, check_random_tools

CASES = 1000


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    made = osmium.load(device="cpu")
    yield made
    made.close()


@FORMATS
def test_calls_of_many_random_tools_satisfy_their_schemas(
    engine: Engine, rng: np.random.Generator, form: ToolFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar_ending, "CLOSING_S", 10.0)
    eos = engine.config.eos_token_ids
    compiler = GrammarCompiler(engine.tokenizer, engine.config.vocab_size, eos)
    ended = check_random_tools(engine, compiler, rng, form, CASES)
    assert 50 < ended < CASES - 50, "some are cut, and some are not"
