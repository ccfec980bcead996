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
from osmium.errors import RequestError
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
    return compile_calls(compiler, form, entries, "tool_choice", several=several)


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


def check_random_tools(
    engine: Engine,
    compiler: GrammarCompiler,
    rng: np.random.Generator,
    form: ToolFormat,
    cases: int,
) -> int:
    """Check sampled calls of random tools; returns how many an end token ended."""
    ended = 0
    ends = ["\n</parameter>\n", '"', "}", "]"]
    for _ in range(cases):
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
    return ended


@FORMATS
def test_calls_of_random_tools_satisfy_their_schemas(
    engine: Engine, compiler: GrammarCompiler, rng: np.random.Generator, form: ToolFormat
) -> None:
    """tests/long has 1,000 of each format."""
    ended = check_random_tools(engine, compiler, rng, form, 120)
    assert 5 < ended < 115, "some are cut, and some are not"


def allowed(mask: Any, engine: Engine) -> set[int]:
    words = np.zeros(-(-engine.config.vocab_size // 32), np.int32)
    mask.fill(words)
    bits = np.unpackbits(words.view(np.uint8), bitorder="little")
    return set(map(int, np.flatnonzero(bits)))


def push(mask: Any, engine: Engine, *texts: str) -> bool:
    """Push the tokens of texts, of which control tokens are whole; whether all were allowed."""
    for text in texts:
        control = engine.tokenizer.control_tokens.id_of(text)
        ids = engine.tokenizer.encode(text, specials=False) if control is None else [control]
        for token in ids:
            if token not in allowed(mask, engine):
                return False
            mask.push(token)
    return True


DAYS = of(["days"], days={"type": "integer", "maximum": 9})

BEGIN = {"qwen_xml": "\n<function=f>\n<parameter=days>\n",
         "hermes": '\n{"name": "f", "arguments": {"days":'}  # fmt: skip
CLOSE = {"qwen_xml": "\n</parameter>\n</function>\n", "hermes": "}}\n"}


@FORMATS
def test_only_calls_follow_a_grammar_in_free_text(
    engine: Engine, compiler: GrammarCompiler, form: ToolFormat
) -> None:
    grammar = compiled(engine, compiler, form, [tool("f", DAYS, strict=True)])
    vocab, eos = engine.config.vocab_size, engine.config.eos_token_ids[0]
    mask = grammar.call_mask(200)
    assert push(mask, engine, 'Any text, "`<tool_call>`", {')
    for _ in range(2):
        assert len(allowed(mask, engine)) >= vocab
        assert push(mask, engine, "\n", "<tool_call>", BEGIN[form.name])
        assert eos not in allowed(mask, engine)
        assert not push(mask, engine, "x") and not push(mask, engine, "10")
        assert push(mask, engine, CLOSE[form.name], "</tool_call>")
    assert eos in allowed(mask, engine) and not mask.completion()


@FORMATS
def test_a_call_in_free_text_that_is_cut_is_completed(
    engine: Engine, compiler: GrammarCompiler, form: ToolFormat
) -> None:
    tools = [tool("f", DAYS, strict=True)]
    mask = compiled(engine, compiler, form, tools).call_mask(300)
    text = f"<tool_call>{BEGIN[form.name]}7"
    assert push(mask, engine, "<tool_call>", BEGIN[form.name], "7")
    ((_, arguments, complete),) = read(
        text + engine.tokenizer.decode(mask.completion()), form, tools
    )
    assert complete and str(arguments["days"]).startswith("7")


def test_a_tag_in_backticks_or_in_the_thinking_begins_no_call(
    engine: Engine, compiler: GrammarCompiler
) -> None:
    grammar = compiled(engine, compiler, QWEN_XML, [tool("f", DAYS, strict=True)])
    mask: Any = grammar.call_mask(200)
    assert push(mask, engine, "the tag `", "<tool_call>", "` is text")
    call = engine.tokenizer.id_of("<tool_call>")
    for mask in (grammar.call_mask(200, thinking=True), grammar.mask(200, thinking=True)):
        assert call not in allowed(mask, engine)
        assert push(mask, engine, "I think.", "</think>", "\n\n", "<tool_call>")
        assert not push(mask, engine, "anything")


@FORMATS
def test_free_tools_may_have_any_arguments(
    engine: Engine, compiler: GrammarCompiler, form: ToolFormat
) -> None:
    tools = [tool("f", DAYS, strict=True), tool("g", DAYS)]
    entries = [CallableEntry(tools[0], "tools[0]"), CallableEntry(tools[1], "tools[1]", True)]
    mask = compile_calls(compiler, form, entries, "tools").call_mask(200)
    begin = BEGIN[form.name].replace("=f>", "=g>").replace('"f"', '"g"')
    assert push(mask, engine, "<tool_call>", begin, "anything <b>", "</tool_call>", "text")


@FORMATS
def test_several_calls_may_follow_each_other(
    engine: Engine, compiler: GrammarCompiler, form: ToolFormat
) -> None:
    eos = engine.config.eos_token_ids[0]
    call = ["<tool_call>", BEGIN[form.name], "7", CLOSE[form.name], "</tool_call>"]
    for several in (True, False):
        mask = compiled(engine, compiler, form, [tool("f", DAYS)], several).mask(200)
        assert push(mask, engine, *call)
        assert eos in allowed(mask, engine)
        assert push(mask, engine, "\n", *call) is several


@pytest.mark.parametrize(
    ("schema", "values"),
    [
        ({"type": "string"}, ["", "\n", " a ", "null", "5", '"quoted"', "a\r", "<b>", "</", "{"]),
        ({"type": ["string", "null"]}, ["nul", "x", "null", "5", "[", "nullable"]),
        ({"type": ["string", "integer"]}, ["2024-01-15", "1.5.2", "-", "7", "07", "1e"]),
        ({"anyOf": [{"type": "string"}, {"type": "boolean"}]}, ["yes", "true", "trueish"]),
        ({"anyOf": [{"type": "string"}, {"type": "object"}]}, ["a {", '{"a": 1}', "5"]),
        ({}, ["5", "null", "text", '{"a": [1]}', "[", "[1, 2]"]),
    ],
)
def test_a_text_is_read_back_as_the_type_that_the_grammar_meant(
    engine: Engine, compiler: GrammarCompiler, schema: Entry, values: list[str]
) -> None:
    tools = [tool("f", of(["v"], v=schema))]
    grammar = compiled(engine, compiler, QWEN_XML, tools)
    for value in values:
        mask = grammar.mask(300)
        body = f"\n<function=f>\n<parameter=v>\n{value}\n</parameter>\n</function>\n"
        assert push(mask, engine, "<tool_call>", body, "</tool_call>"), value
        ((_, arguments, _),) = read(f"<tool_call>{body}</tool_call>", QWEN_XML, tools)
        jsonschema.validate(arguments["v"], schema)
        assert arguments["v"] == value or arguments["v"] == json.loads(value)


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        ({"type": "string"}, "a</parameter>b"), ({"type": "string"}, "<tool_call>"),
        ({"type": "string"}, "\n<function=f>"), ({"type": "string"}, '<parameter name="v">'),
        ({"type": "string"}, "</function>"), ({"type": "string"}, "</tool_call>"),
        ({"type": ["string", "null"], "maxLength": 3}, "abcd"),
        ({"type": ["string", "null"], "maxLength": 3}, "None"),
        ({"anyOf": [{"type": "string"}, {"type": "integer", "minimum": 7}]}, "6"),
        ({"type": ["string", "boolean"], "enum": ["a", True]}, "b"),
        ({"type": "string", "pattern": "^a+$"}, "ab"), ({"type": "string", "pattern": "b$"}, "ba"),
        ({"type": "string", "format": "date"}, "2024-13-01"),
        ({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "null"}}]}, "[1]"),
    ],
)  # fmt: skip
def test_a_text_that_would_be_read_otherwise_is_not_allowed(
    engine: Engine, compiler: GrammarCompiler, schema: Entry, value: str
) -> None:
    mask = compiled(engine, compiler, QWEN_XML, [tool("f", of(["v"], v=schema))]).mask(300)
    body = f"\n<function=f>\n<parameter=v>\n{value}\n</parameter>\n</function>\n"
    assert not push(mask, engine, "<tool_call>", body, "</tool_call>")


@FORMATS
def test_references_and_additional_properties_are_followed(
    engine: Engine, compiler: GrammarCompiler, rng: np.random.Generator, form: ToolFormat
) -> None:
    node = {"type": "object", "required": ["n"], "additionalProperties": False, "properties": {
        "n": {"type": "integer"}, "next": {"$ref": "#/$defs/node"}}}  # fmt: skip
    refs = of(
        ["a", "b", "c"], a={"$ref": "#/$defs/node"}, b={"allOf": [{"$ref": "#/$defs/kind"}]},
        c={"$ref": "#/properties/b"},
    )  # fmt: skip
    refs["$defs"] = {"node": node, "kind": {"enum": ["x", "y"]}}
    refs["additionalProperties"] = False
    extra = {"type": "object", "additionalProperties": {"type": "integer"}}
    for schema in (refs, extra):
        tools = [tool("f", schema, strict=True)]
        grammar = compiled(engine, compiler, form, tools)
        for _ in range(6):
            text, _ = sampled(engine, grammar, rng, 60, ["\n</parameter>\n", "}"])
            ((_, arguments, _),) = read(text, form, tools)
            jsonschema.Draft202012Validator(schema).validate(arguments)


@pytest.mark.parametrize(
    ("parameters", "param"),
    [
        (of(a={"not": {}}), "tools[0].function.parameters"),
        (of(a={"type": "string", "pattern": "a^b"}), "tools[0].function.parameters.properties.a"),
        (of(a={"type": "string", "minLength": 3, "maxLength": 2}),
         "tools[0].function.parameters.properties.a"),
        (of(a={"enum": ["</parameter>"]}), "tools[0].function.parameters.properties.a"),
        (of(["a>b"], **{"a>b": {}}), "tools[0].function.parameters.properties.a>b"),
        (of([""], **{"": {}}), "tools[0].function.parameters.properties."),
        (of(a={"$ref": "#/none"}), "tools[0].function.parameters.properties.a"),
        ({"$ref": "#/none"}, "tools[0].function.parameters"),
        ({"anyOf": [of(), of()]}, "tools[0].function.parameters"),
        ({"type": "array"}, "tools[0].function.parameters"),
        ({"type": "object", "properties": []}, "tools[0].function.parameters"),
        ({"type": "object", "required": "a"}, "tools[0].function.parameters"),
        (of(a={"type": 5}), "tools[0].function.parameters"),
        (of(a={"type": [["string"]]}), "tools[0].function.parameters"),
        (of(a={"type": [{}]}), "tools[0].function.parameters"),
        (of(a={"anyOf": True}), "tools[0].function.parameters"),
        (of(a={"enum": 0.5}), "tools[0].function.parameters"),
    ],
)  # fmt: skip
def test_a_strict_schema_that_cannot_be_enforced_is_refused_by_name(
    engine: Engine, compiler: GrammarCompiler, parameters: Entry, param: str
) -> None:
    with pytest.raises(RequestError) as raised:
        compiled(engine, compiler, QWEN_XML, [tool("f", parameters, strict=True)])
    assert raised.value.param == param and raised.value.status == 400
    for form in (QWEN_XML, HERMES):
        compiled(engine, compiler, form, [tool("f", parameters)])


def test_a_name_that_the_format_cannot_write_is_refused(
    engine: Engine, compiler: GrammarCompiler
) -> None:
    with pytest.raises(RequestError) as raised:
        compiled(engine, compiler, QWEN_XML, [tool("a b")])
    assert raised.value.param == "tools[0].function.name"
    compiled(engine, compiler, HERMES, [tool("a b")])


def test_many_tools_compile_in_time(engine: Engine, compiler: GrammarCompiler) -> None:
    tools = [
        tool(f"tool_{i}", of(["a"], a={"type": "string"}, b={"type": "array", "items": {
            "type": "object", "properties": {f"k{i}": {"type": "integer"}}}}, c={}))
        for i in range(60)
    ]  # fmt: skip
    mask = compiled(engine, compiler, QWEN_XML, tools, several=True).mask(100)
    assert push(mask, engine, "<tool_call>", "\n<function=tool_59>\n<parameter=a>\n")
