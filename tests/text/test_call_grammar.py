"""Grammars of tool calls: what they allow is read back by the parser, and satisfies the schema."""

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

import jsonschema
import numpy as np
import pytest

import osmium
from osmium.engine.engine import Engine
from osmium.text import grammar_ending
from osmium.text.call_grammar import CallableEntry, compile_calls
from osmium.text.grammar import Grammar, GrammarCompiler
from osmium.text.response_parser import (
    ContentDelta,
    ResponseParser,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
)
from osmium.text.tool_formats import ToolFormat
from osmium.text.tool_formats.hermes import FORMAT as HERMES
from osmium.text.tool_formats.qwen_xml import FORMAT as QWEN_XML
from tests.server.schemas import random_schema

FORMATS = pytest.mark.parametrize("form", [QWEN_XML, HERMES], ids=lambda one: one.name)

Entry = dict[str, Any]


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    made = osmium.load(device="cpu")
    yield made
    made.close()


@pytest.fixture(scope="module")
def compiler(engine: Engine) -> GrammarCompiler:
    return GrammarCompiler(engine.tokenizer, engine.config.vocab_size, engine.config.eos_token_ids)


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine must not change what is found."""
    monkeypatch.setattr(grammar_ending, "CLOSING_S", 10.0)


def tool(name: str, parameters: Any = None, **fields: Any) -> Entry:
    given = {} if parameters is None else {"parameters": parameters}
    return {"type": "function", "function": {"name": name, **given, **fields}}


def of(required: Sequence[str] = (), **properties: Any) -> Entry:
    return {"type": "object", "properties": properties, "required": list(required)}


def compiled(
    engine: Engine, compiler: GrammarCompiler, form: ToolFormat, tools: Sequence[Entry],
    several: bool = False,
) -> Grammar:  # fmt: skip
    entries = [CallableEntry(one, f"tools[{i}]") for i, one in enumerate(tools)]
    return compile_calls(compiler, engine.tokenizer, form, entries, "tool_choice", several=several)


def sampled(
    engine: Engine, grammar: Grammar, rng: np.random.Generator, max_tokens: int, ends: Sequence[str]
) -> tuple[str, bool]:
    """The text of random allowed tokens, and whether an end token ended it.

    Now and then the tokens of one of `ends` come next, where they are allowed.
    """
    mask = grammar.mask(max_tokens)
    words = np.zeros(-(-engine.config.vocab_size // 32), np.int32)
    ids: list[int] = []
    forced: list[int] = []
    while len(ids) < max_tokens:
        mask.fill(words)
        allowed = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))
        assert len(allowed)
        if not forced and ends and rng.random() < 0.3:
            forced = engine.tokenizer.encode(str(rng.choice(ends)), specials=False)
        token = int(rng.choice(allowed))
        if forced and forced[0] in allowed:
            token = forced.pop(0)
        else:
            forced = []
        mask.push(token)
        if token in engine.config.eos_token_ids:
            return engine.tokenizer.decode(ids), True
        ids.append(token)
    return engine.tokenizer.decode([*ids, *mask.completion()]), False


def read(text: str, form: ToolFormat, tools: Sequence[Entry]) -> list[tuple[str, Any, bool]]:
    """Name, arguments and completeness of each call; the text has nothing else."""
    parser = ResponseParser(form, tools, False)
    pieces = [text[at : at + 7] for at in range(0, len(text), 7)]
    deltas = [one for piece in pieces for one in parser.push(piece)] + parser.finish()
    calls: list[list[Any]] = []
    for delta in deltas:
        match delta:
            case ToolCallStart(_, _, name):
                calls.append([name, "", False])
            case ToolCallArguments(_, fragment):
                calls[-1][1] += fragment
            case ToolCallEnd(_, complete):
                calls[-1][2] = complete
            case ContentDelta(content):
                pytest.fail(f"{content!r} is no part of a call in {text!r}")
    return [(name, json.loads(arguments), complete) for name, arguments, complete in calls]


def written(text: str, form: ToolFormat) -> list[dict[str, Any]]:
    """The arguments of each call by the format's plain definition; strings are raw or JSON."""
    calls = re.findall(r"<tool_call>\n(.*?)</tool_call>(?=\n<tool_call>|$)", text, re.DOTALL)
    if form is HERMES:
        return [json.loads(call)["arguments"] for call in calls]
    value = re.compile(r"<parameter=(.*?)>\n(.*?)\n</parameter>\n", re.DOTALL)
    return [dict(value.findall(call)) for call in calls]


def random_tool(rng: np.random.Generator, name: str) -> Entry:
    """A tool with up to four parameters of random schemas, some of them strings."""
    names = [str(one) for one in rng.permutation(["city", "days", "a-b", "q", "über", "x.y"])]
    names = names[: int(rng.integers(0, 5))]
    strings: list[Entry] = [
        {"type": "string"}, {"type": "string", "enum": ["a", "null", "5", "x\ny", ""]},
        {"type": ["string", "null"], "maxLength": 9}, {}, {"minLength": 2}, {"const": "a b"},
        {"anyOf": [{"type": "string", "pattern": "^[a-f]+$"}, {"type": "integer", "minimum": 7}]},
        {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "integer"}}]},
        {"type": ["string", "boolean", "number"], "minLength": 1}, {"enum": ["5", 6, None]},
        {"type": "string", "format": "date-time"}, {"type": "string", "pattern": "^b+|^/c{2}$"},
    ]  # fmt: skip
    properties = {
        one: dict(rng.choice(strings))  # type: ignore[arg-type]
        if rng.random() < 0.6
        else random_schema(rng, 2)
        for one in names
    }
    required = [one for one in names if rng.random() < 0.6]
    schema = of(required, **properties)
    if rng.random() < 0.5:
        schema["additionalProperties"] = False
    return tool(name, schema, **({"strict": True} if rng.random() < 0.5 else {}))


@FORMATS
def test_calls_of_random_tools_satisfy_their_schemas(
    engine: Engine, compiler: GrammarCompiler, rng: np.random.Generator, form: ToolFormat
) -> None:
    ended = 0
    ends = ["\n</parameter>\n", '"', "}", "]"]
    for _ in range(120):
        tools = [random_tool(rng, name) for name in ("find", "get_x", "find_all")]
        schemas = {one["function"]["name"]: one["function"]["parameters"] for one in tools}
        several = bool(rng.random() < 0.3)
        grammar = compiled(engine, compiler, form, tools, several)
        text, by_end = sampled(engine, grammar, rng, int(rng.choice([1, 6, 20, 60, 200])), ends)
        ended += by_end
        calls = read(text, form, tools)
        assert calls and (several or len(calls) == 1), text
        texts = written(text, form)
        for (name, arguments, complete), plain in zip(calls, texts, strict=True):
            assert complete, text
            assert [*arguments] == [*plain]
            for one, given in zip(arguments.values(), plain.values(), strict=True):
                assert one == given or (form is QWEN_XML and one == json.loads(given)), text
            jsonschema.Draft202012Validator(schemas[name]).validate(arguments)
    assert 5 < ended < 115, "some are cut, and some are not"
