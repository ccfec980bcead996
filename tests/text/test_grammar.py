"""Grammars and token masks, with a sampler that takes any allowed token."""

import json
import re
import time
from collections.abc import Iterator
from typing import Any

import jsonschema
import numpy as np
import pytest

import osmium
from osmium.engine.engine import Engine
from osmium.errors import RequestError
from osmium.text import grammar as grammar_module
from osmium.text.grammar import Grammar, GrammarCompiler
from tests.server.schemas import random_schema

THINK, END = "<think>", "</think>"


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    made = osmium.load(device="cpu")
    yield made
    made.close()


@pytest.fixture(scope="module")
def compiler(engine: Engine) -> GrammarCompiler:
    return GrammarCompiler(engine.tokenizer, engine.config.vocab_size, engine.config.eos_token_ids)


def response(
    engine: Engine, grammar: Grammar, rng: np.random.Generator, max_tokens: int,
    thinking: str = "",
) -> tuple[str, bool]:  # fmt: skip
    """The text of random allowed tokens, and whether an end token ended it.

    With `thinking` the response begins with the tokens of this text.
    """
    mask = grammar.mask(max_tokens, bool(thinking))
    forced = engine.tokenizer.encode(thinking) if thinking else []
    vocab = engine.config.vocab_size
    words = np.full(-(-vocab // 32), 0x5A5A5A5A, np.int32)
    ids: list[int] = []
    while len(ids) < max_tokens:
        mask.fill(words)
        allowed = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))
        assert len(allowed) and allowed[-1] < vocab
        token = forced.pop(0) if forced else int(rng.choice(allowed))
        assert token in allowed
        mask.push(token)
        if token in engine.config.eos_token_ids:
            return engine.tokenizer.decode(ids), True
        ids.append(token)
    return engine.tokenizer.decode([*ids, *mask.completion()]), False


def test_random_schemas_always_give_valid_json(
    engine: Engine, compiler: GrammarCompiler, rng: np.random.Generator
) -> None:
    ended = 0
    for _ in range(200):  # about three seconds: each has its own schema
        schema = random_schema(rng)
        grammar = compiler.compile("json", schema, "schema")
        text, by_end = response(engine, grammar, rng, int(rng.choice([1, 3, 10, 40])))
        jsonschema.Draft202012Validator(schema).validate(json.loads(text))
        ended += by_end
    assert 10 < ended < 190, "some are cut, and some are not"


@pytest.mark.parametrize(
    ("kind", "value", "pattern"),
    [
        ("regex", r"\d{3}-[a-c]+", r"[0-9]{3}-[a-c]+"),
        ("regex", r"[\dx]\w?\.", r"[0-9x][A-Za-z0-9_]?\."),
        ("regex", "^abc$", "abc"),
        ("regex", "", ""),
        ("choice", ["yes", "no", 'a "b"\n', "ü"], 'yes|no|a "b"\n|ü'),
        ("grammar", 'start: "a" b+\nb: "x" | "y"', "a[xy]+"),
        ("grammar", 'root ::= "a" [0-9]+ "z"', "a[0-9]+z"),
    ],
)
@pytest.mark.parametrize("max_tokens", [1, 2, 50])
def test_a_text_matches_its_rule(
    engine: Engine, compiler: GrammarCompiler, rng: np.random.Generator,
    kind: Any, value: Any, pattern: str, max_tokens: int,
) -> None:  # fmt: skip
    grammar = compiler.compile(kind, value, "rule")
    for _ in range(5):
        text, _ = response(engine, grammar, rng, max_tokens)
        assert re.fullmatch(pattern, text), text


def test_the_grammar_begins_after_the_thinking(
    engine: Engine, compiler: GrammarCompiler, rng: np.random.Generator
) -> None:
    grammar = compiler.compile("choice", ["yes", "no"], "rule")
    thought = 'Anything {"a": here} <th</think'
    for end in (f"{END}\n\n", f"{END}\n", END):
        text, by_end = response(engine, grammar, rng, 60, thinking=f"{thought}\n{end}")
        assert by_end
        assert text.partition(END)[2].lstrip("\n") in ("yes", "no")


def test_the_thinking_may_end_in_ordinary_tokens(engine: Engine, compiler: GrammarCompiler) -> None:
    grammar = compiler.compile("choice", ["yes"], "rule")
    mask = grammar.mask(100, thinking=True)
    words = np.zeros(-(-engine.config.vocab_size // 32), np.int32)
    for char in "a</think>":
        mask.fill(words)
        (token,) = engine.tokenizer.encode(char)
        assert words[token // 32] >> token % 32 & 1
        mask.push(token)
    mask.fill(words)
    allowed = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))
    assert {engine.tokenizer.decode([i]) for i in allowed} <= {"y", "ye", "yes"}


def test_no_end_token_is_allowed_while_the_model_thinks_or_before_the_text_is_complete(
    engine: Engine, compiler: GrammarCompiler
) -> None:
    grammar = compiler.compile("choice", ["yes"], "rule")
    words = np.zeros(-(-engine.config.vocab_size // 32), np.int32)

    def ends() -> bool:
        mask.fill(words)
        found = {bool(words[i // 32] >> i % 32 & 1) for i in engine.config.eos_token_ids}
        assert len(found) == 1
        return found.pop()

    mask = grammar.mask(100, thinking=True)
    assert not ends()
    for token in engine.tokenizer.encode(END):
        mask.push(token)
    assert not ends()
    for token in engine.tokenizer.encode("yes"):
        mask.push(token)
    assert ends()


def test_a_response_that_is_cut_while_it_thinks_gets_no_text(compiler: GrammarCompiler) -> None:
    assert not compiler.compile("choice", ["yes"], "rule").mask(3, thinking=True).completion()


def test_a_response_keeps_within_its_tokens_where_the_text_fits(
    engine: Engine, compiler: GrammarCompiler, rng: np.random.Generator
) -> None:
    schema = {"type": "array", "items": {"type": "string"}}
    mask = compiler.compile("json", schema, "schema").mask(20)
    words = np.zeros(-(-engine.config.vocab_size // 32), np.int32)
    (quote,) = engine.tokenizer.encode('"')
    for i in range(20):
        mask.fill(words)
        allowed = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))
        longer = [t for t in allowed if t != quote and t not in engine.config.eos_token_ids]
        mask.push(int(rng.choice(longer or allowed)) if i else engine.tokenizer.encode("[")[0])
    assert len(mask.completion()) <= 2


def test_spaces_between_json_tokens_are_bounded(
    engine: Engine, compiler: GrammarCompiler, rng: np.random.Generator
) -> None:
    grammar = compiler.compile("json", {"type": "array", "items": {"type": "null"}}, "schema")
    for _ in range(20):
        text, _ = response(engine, grammar, rng, 30)
        assert re.fullmatch(r"(( |\r?\n[ \t]{0,32})?(\[|\]|,|null))*\s*", text), repr(text)


def test_control_tokens_are_no_text(engine: Engine, compiler: GrammarCompiler) -> None:
    mask = compiler.compile("regex", "(?s:.*)", "rule").mask(100)
    words = np.zeros(-(-engine.config.vocab_size // 32), np.int32)
    mask.fill(words)
    allowed = set(np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")))
    assert allowed & set(engine.tokenizer.added_ids) == set(engine.config.eos_token_ids)


def test_masks_of_one_grammar_are_independent(engine: Engine, compiler: GrammarCompiler) -> None:
    grammar = compiler.compile("choice", ["yes", "no"], "rule")
    first, second = grammar.mask(9), grammar.mask(9)
    first.push(engine.tokenizer.encode("y")[0])
    assert engine.tokenizer.decode(first.completion()) == "es"
    second.push(engine.tokenizer.encode("n")[0])
    assert engine.tokenizer.decode(second.completion()) == "o"


@pytest.mark.parametrize(
    ("schema", "word"),
    [
        ({"not": {"type": "string"}}, "not"),
        ({"properties": {"a": {"items": {"uniqueItems": True}}}}, "/properties/a/items"),
        ({"anyOf": [{}, {"if": {}}]}, "/anyOf/1"),
        ({"$defs": {"x": {"contains": {}}}}, "contains"),
        ({"type": "object", "x-guidance": {"lenient": True}, "dependentRequired": {"a": ["b"]}},
         "dependentRequired"),
        ({"type": "string", "format": "iri"}, "iri"),
        ({"oneOf": [{"type": "string"}, {"type": "string", "minLength": 1}]}, "oneOf"),
    ],
)  # fmt: skip
def test_a_keyword_that_cannot_be_enforced_is_refused_by_name(
    compiler: GrammarCompiler, schema: Any, word: str
) -> None:
    with pytest.raises(RequestError, match=re.escape(word)) as raised:
        compiler.compile("json", schema, "some.schema")
    assert raised.value.param == "some.schema" and raised.value.status == 400


@pytest.mark.parametrize("wrong", [None, 5, True, "x", {"a": 1}])
@pytest.mark.parametrize(
    "key", ["type", "enum", "required", "properties", "anyOf", "oneOf", "allOf", "prefixItems",
            "$ref", "pattern", "minimum", "maxItems", "patternProperties"]
)  # fmt: skip
def test_a_keyword_with_a_value_of_another_kind_is_refused_by_name(
    compiler: GrammarCompiler, key: str, wrong: Any
) -> None:
    fits = {
        "type": "x", "$ref": "x", "pattern": "x", "minimum": 5, "maxItems": 5,
        "properties": {"a": 1}, "patternProperties": {"a": 1},
    }  # fmt: skip
    if wrong == fits.get(key) and wrong is not True:
        return
    with pytest.raises(RequestError, match=re.escape(f"{key!r} of {wrong!r} at /items")) as raised:
        compiler.compile("json", {"type": "array", "items": {key: wrong}}, "some.schema")
    assert (raised.value.param, raised.value.code) == ("some.schema", "invalid_schema")


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "format": "password", "writeOnly": True},
        {"type": "array", "uniqueItems": False, "items": {"type": "null"}},
        {"properties": {"not": {"type": "null"}, "if": {}}, "type": "object"},
        {"enum": [{"not": 1}]},
        {"const": {"x-guidance": 1}},
        {"oneOf": [{"properties": {"k": {"const": k}}, "required": ["k"]} for k in "ab"],
         "type": "object", "discriminator": {"propertyName": "k"}},
        {"$schema": "http://example.com/mine", "type": "null", "title": "T", "default": 1},
        {"$schema": "http://json-schema.org/draft-07/schema#", "type": "null"},
        {"definitions": {"a": {"type": "null"}}, "$ref": "#/definitions/a"},
        {"type": "array", "items": {"type": "null"}, "minItems": 2.0, "maxItems": 2.0},
        True,
        '{"type": "null"}',
    ],
)  # fmt: skip
def test_annotations_and_names_that_look_like_keywords_are_accepted(
    engine: Engine, compiler: GrammarCompiler, rng: np.random.Generator, schema: Any
) -> None:
    text, _ = response(engine, compiler.compile("json", schema, "schema"), rng, 30)
    value = json.loads(text)
    if isinstance(schema, dict) and "example.com" not in str(schema):
        jsonschema.Draft202012Validator(schema).validate(value)


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("json", {"type": "foo"}), ("json", {"type": 5}), ("json", 5), ("json", []),
        ("json", False), ("json", "nope"), ("json", {"$ref": "#"}), ("json", {"enum": []}),
        ("json", {"$ref": "http://example.com/x"}), ("json", {"$ref": "file:///etc/passwd"}),
        ("json", {"properties": {"a": {"$ref": "#/none"}}}), ("json", {"pattern": "(?=a)"}),
        ("json", {"const": "\ud800"}), ("json", {"minimum": float("nan")}),
        ("json", {"minLength": 5, "maxLength": 3, "type": "string"}),
        ("json", {"title": "x" * (1 << 19)}),
        ("regex", "("), ("regex", "(?=a)b"), ("regex", "a\\b"), ("regex", 5), ("regex", "\ud800"),
        ("regex", "(a{1000}){1000}"), ("regex", "[^\\x00-\\U0010FFFF]"), ("regex", "a" * (1 << 16)),
        ("choice", []), ("choice", "yes"), ("choice", ["a", 5]), ("choice", ["\ud800"]),
        ("grammar", ""), ("grammar", "foo"), ("grammar", "start: foo"), ("grammar", ["start"]),
        ("grammar", "root ::= " + "( " * 10_000), ("grammar", "start: <none>"),
        ("grammar", 'start: %json {"not": {}}'), ("grammar", 'start: start "a"'),
    ],
)  # fmt: skip
def test_what_cannot_be_compiled_is_refused(
    compiler: GrammarCompiler, kind: Any, value: Any
) -> None:
    with pytest.raises(RequestError) as raised:
        compiler.compile(kind, value, "some.field")
    assert raised.value.param == "some.field"
    assert raised.value.status == 400
    assert "<state>" not in str(raised.value) and len(str(raised.value)) < 700


def test_compiling_ends_after_its_time(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar_module, "COMPILE_TIMEOUT_S", 0.05)
    monkeypatch.setattr(
        GrammarCompiler,
        "_compiled",
        lambda self, *_: time.sleep(0.4),
    )
    for _ in range(grammar_module.MAX_COMPILING):
        with pytest.raises(RequestError, match="takes more than") as raised:
            compiler.compile("regex", "some", "field")
        assert raised.value.code == "grammar_too_complex"
    with pytest.raises(RequestError) as raised:
        compiler.compile("regex", "some", "field")
    assert raised.value.status == 429
    time.sleep(0.5)


def test_a_grammar_is_compiled_once(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler.compile("regex", "once", "field")
    monkeypatch.setattr(GrammarCompiler, "_compiled", lambda self, *_: pytest.fail("compiled"))
    compiler.compile("regex", "once", "field")
    for i in range(grammar_module.CACHED_GRAMMARS):
        compiler._cache[("regex", str(i))] = compiler._cache[("regex", "once")]
    monkeypatch.undo()
    compiler.compile("regex", "another", "field")
    assert len(compiler._cache) == grammar_module.CACHED_GRAMMARS


def test_a_response_may_be_a_tool_call_instead_of_the_text(
    engine: Engine, compiler: GrammarCompiler
) -> None:
    call = engine.tokenizer.id_of("<tool_call>")
    words = np.zeros(-(-engine.config.vocab_size // 32), np.int32)

    def allowed(token: int) -> bool:
        mask.fill(words)
        return bool(words[token // 32] >> token % 32 & 1)

    grammar = compiler.compile("choice", ["yes"], "rule")
    mask = grammar.mask(9)
    assert not allowed(call)
    mask = grammar.mask(100, call=call)
    assert allowed(call)
    mask.push(engine.tokenizer.encode("y")[0])
    assert not allowed(call), "only instead of the text"
    mask = grammar.mask(100, call=call)
    mask.push(call)
    for token in engine.tokenizer.encode("anything"):
        assert allowed(token)
        mask.push(token)
    assert allowed(engine.config.eos_token_ids[0]) and not mask.completion()
