"""Required, named, allowed and strict tools over HTTP, with the demo model on the CPU."""

import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
from starlette.testclient import TestClient

import osmium
from osmium.server.app import BackgroundLoader, create_app
from osmium.text.chat import ChatTemplate
from tests.server.scripted import BASE_URL, TEMPLATE, chunks

ASK = [{"role": "user", "content": "What is the weather in Paris?"}]

HERMES = TEMPLATE.replace("'assistant:'", "'<|im_start|>assistant\\n'") + (
    '{#- <tool_call>\n{"name": "x", "arguments": {}}\n</tool_call> #}'
)
"""A template that tells the model to write calls as Hermes does."""

WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 20},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
        "unit": {"type": "string", "enum": ["C", "F"]},
    },
    "required": ["city", "unit"],
    "additionalProperties": False,
}
STOCK = {"type": "object", "properties": {"tickers": {"type": "array", "items": {
    "type": "string", "maxLength": 4}, "maxItems": 2}}, "required": ["tickers"]}  # fmt: skip


def tool(name: str, schema: Any = None, **fields: Any) -> dict[str, Any]:
    given = {} if schema is None else {"parameters": schema}
    return {"type": "function", "function": {"name": name, **given, **fields}}


TOOLS = [tool("weather", WEATHER), tool("stock", STOCK), tool("now")]
SCHEMAS: dict[str, dict[str, Any]] = {
    "weather": WEATHER,
    "stock": STOCK,
    "now": {"type": "object", "maxProperties": 0},
}


@pytest.fixture(scope="module", params=["qwen_xml", "hermes"])
def client(request: pytest.FixtureRequest) -> Iterator[TestClient]:
    engine = osmium.load(device="cpu")
    if request.param == "hermes":
        engine.template = ChatTemplate(HERMES)
    assert engine.template.tool_format.name == request.param
    with TestClient(
        create_app(BackgroundLoader(lambda progress: engine)), base_url=BASE_URL
    ) as made:
        while made.get("/health").status_code == 503:
            pass
        yield made


def ask(client: TestClient, **fields: Any) -> Any:
    body = {"messages": ASK, "tools": TOOLS, "max_tokens": 120, "temperature": 0, **fields}
    return client.post("/v1/chat/completions", json=body)


def calls_of(answer: Any) -> list[tuple[str, Any]]:
    assert answer.status_code == 200, answer.text
    (choice,) = answer.json()["choices"]
    message = choice["message"]
    assert message["content"] is None
    found = [
        (one["function"]["name"], json.loads(one["function"]["arguments"]))
        for one in message["tool_calls"]
    ]
    for name, arguments in found:
        jsonschema.validate(arguments, SCHEMAS[name])
    return found


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


@pytest.mark.parametrize("name", [*SCHEMAS])
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("seed", [None, 1])
def test_a_named_tool_is_called_once(
    client: TestClient, name: str, flat: bool, seed: int | None
) -> None:
    choice = {"type": "function", "name": name} if flat else named(name)
    sampling = {} if seed is None else {"seed": seed, "temperature": 1.5}
    answer = ask(client, tool_choice=choice, **sampling)
    assert [one for one, _ in calls_of(answer)] == [name]
    if name == "now":
        assert answer.json()["choices"][0]["finish_reason"] == "tool_calls"


@pytest.mark.parametrize("seed", range(4))
def test_a_required_call_is_one_of_the_tools(client: TestClient, seed: int) -> None:
    answer = ask(
        client, tool_choice="required", parallel_tool_calls=False, seed=seed, temperature=1
    )
    assert len(calls_of(answer)) == 1


def test_a_required_call_is_streamed_in_the_usual_form(client: TestClient) -> None:
    streamed = chunks(ask(client, tool_choice=named("weather"), stream=True).text)
    choices = [chunk["choices"][0] for chunk in streamed]
    pieces = [call for choice in choices for call in choice["delta"].get("tool_calls", [])]
    assert pieces[0]["id"] and pieces[0]["function"] == {"name": "weather", "arguments": ""}
    jsonschema.validate(
        json.loads("".join(one["function"]["arguments"] for one in pieces)), WEATHER
    )
    assert not "".join(choice["delta"].get("content") or "" for choice in choices)


@pytest.mark.parametrize("max_tokens", [1, 5, 12, 25])
def test_a_call_that_is_cut_is_valid_and_says_length(client: TestClient, max_tokens: int) -> None:
    answer = ask(client, tool_choice=named("weather"), max_tokens=max_tokens, temperature=1, seed=3)
    assert len(calls_of(answer)) == 1
    assert answer.json()["choices"][0]["finish_reason"] in ("length", "tool_calls")


@pytest.mark.parametrize("flat", [False, True])
def test_of_allowed_tools_alone_one_is_called(client: TestClient, flat: bool) -> None:
    listed = [{"type": "function", "name": "now"}, named("stock")]
    inner = {"mode": "required", "tools": listed}
    choice = {"type": "allowed_tools", **(inner if flat else {"allowed_tools": inner})}
    for seed in range(3):
        answer = ask(
            client, tool_choice=choice, seed=seed, temperature=2, parallel_tool_calls=False
        )
        assert {name for name, _ in calls_of(answer)} <= {"now", "stock"}
    inner["mode"] = "auto"
    choice = {"type": "allowed_tools", **(inner if flat else {"allowed_tools": inner})}
    assert ask(client, tool_choice=choice, max_tokens=8).status_code == 200


def test_a_required_call_wins_over_a_response_format(client: TestClient) -> None:
    form = {"type": "json_object"}
    answer = ask(client, tool_choice=named("now"), response_format=form)
    assert calls_of(answer) == [("now", {})]


def test_a_call_follows_the_thinking(client: TestClient) -> None:
    answer = ask(client, tool_choice=named("now"), enable_thinking=True, thinking_budget=8)
    assert calls_of(answer) == [("now", {})]
    assert answer.json()["choices"][0]["message"]["reasoning"]


def test_several_choices_are_calls_each(client: TestClient) -> None:
    answer = ask(client, tool_choice=named("now"), n=3).json()
    assert [len(one["message"]["tool_calls"]) for one in answer["choices"]] == [1, 1, 1]


@pytest.mark.parametrize(
    ("choice", "param"),
    [
        ("sometimes", "tool_choice"), ("any", "tool_choice"), (5, "tool_choice"),
        ([], "tool_choice"), ({}, "tool_choice.type"), ({"type": "auto"}, "tool_choice.type"),
        ({"type": "custom", "custom": {"name": "now"}}, "tool_choice.type"),
        ({"type": ["function"]}, "tool_choice.type"),
        ({"type": "function"}, "tool_choice.function"),
        ({"type": "function", "function": "now"}, "tool_choice.function"),
        ({"type": "function", "function": {}}, "tool_choice.function.name"),
        ({"type": "function", "function": {"name": "nope"}}, "tool_choice.function.name"),
        ({"type": "function", "name": 5}, "tool_choice.name"),
        ({"type": "allowed_tools"}, "tool_choice.allowed_tools"),
        ({"type": "allowed_tools", "allowed_tools": []}, "tool_choice.allowed_tools"),
        ({"type": "allowed_tools", "allowed_tools": {"mode": "none", "tools": [named("now")]}},
         "tool_choice.allowed_tools.mode"),
        ({"type": "allowed_tools", "mode": "auto"}, "tool_choice.tools"),
        ({"type": "allowed_tools", "mode": "auto", "tools": []}, "tool_choice.tools"),
        ({"type": "allowed_tools", "mode": "auto", "tools": ["now"]}, "tool_choice.tools[0]"),
        ({"type": "allowed_tools", "mode": "auto", "tools": [named("now"), named("x")]},
         "tool_choice.tools[1].function.name"),
    ],
)  # fmt: skip
def test_a_malformed_choice_is_refused_by_its_path(
    client: TestClient, choice: Any, param: str
) -> None:
    answer = ask(client, tool_choice=choice)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param, answer.text


@pytest.mark.parametrize("tools", [None, []])
@pytest.mark.parametrize("choice", ["required", named("now")])
def test_a_required_call_needs_tools(client: TestClient, tools: Any, choice: Any) -> None:
    answer = ask(client, tool_choice=choice, tools=tools)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"].startswith("tool_choice")


ODD = [
    {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}, "b": {"not": {}},
     "c": {"type": "str", "pattern": "("}, "d": "text", "e": {"$ref": "http://x/y"},
     "f": {"type": "string", "format": "iri"}, "g": {"oneOf": [{"type": "string"}, {}]}},
     "required": ["a", "b", "c", "d", "e", "f", "g", "h"]},
    {"$schema": 5, "type": "any", "properties": {"a": None}, "required": "a"},
    {"anyOf": [{"properties": {"a": {"type": "null"}}, "required": ["a"]}, {"minProperties": 1}]},
    {"type": "object", "additionalProperties": {"type": "integer"}, "patternProperties": {"(": {}}},
    {"properties": {"a b\n>": {}, "c": {"enum": []}, "d": {"type": "integer", "minimum": 10**30}}},
]  # fmt: skip


@pytest.mark.parametrize("schema", ODD)
def test_an_odd_schema_is_relaxed_unless_it_is_strict(client: TestClient, schema: Any) -> None:
    odd = tool("odd", schema)
    answer = ask(client, tool_choice="required", tools=[odd], max_tokens=40)
    assert answer.status_code == 200, answer.text
    message = answer.json()["choices"][0]["message"]
    assert isinstance(json.loads(message["tool_calls"][0]["function"]["arguments"]), dict)
    odd["function"]["strict"] = True
    answer = ask(client, tool_choice="required", tools=[TOOLS[0], odd])
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"].startswith("tools[1].function.parameters")


def test_a_required_call_that_cannot_end_is_refused(client: TestClient) -> None:
    answer = ask(client, tool_choice="required", ignore_eos=True)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "ignore_eos"


def test_without_a_known_format_only_a_required_call_is_refused(client: TestClient) -> None:
    engine = client.app.state.loader.engine  # type: ignore[attr-defined]
    template, engine.template = engine.template, ChatTemplate(TEMPLATE)
    try:
        assert ask(client, max_tokens=4).status_code == 200
        answer = ask(client, tool_choice="required")
    finally:
        engine.template = template
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "tool_choice"


# -- strict tools, budgets -------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_strict_tools_are_enforced_with_tool_choice_auto(client: TestClient, seed: int) -> None:
    """A bias makes the model begin a call, which the grammar then restricts."""
    engine = client.app.state.loader.engine  # type: ignore[attr-defined]
    call = str(engine.tokenizer.id_of("<tool_call>"))
    answer = ask(
        client, tools=[tool("weather", WEATHER, strict=True), tool("stock", STOCK, strict=True)],
        logit_bias={call: 100}, max_tokens=40, temperature=1, seed=seed,
    )  # fmt: skip
    assert len(calls_of(answer)) >= 1


def test_strict_tools_leave_other_text_free(client: TestClient) -> None:
    engine = client.app.state.loader.engine  # type: ignore[attr-defined]
    call = str(engine.tokenizer.id_of("<tool_call>"))
    answer = ask(
        client, tools=[tool("weather", WEATHER, strict=True)], max_tokens=12,
        logit_bias={call: -100}, response_format={"type": "text"},
    )  # fmt: skip
    assert answer.json()["choices"][0]["message"]["content"]


def test_a_strict_tool_is_enforced_beside_a_response_format(client: TestClient) -> None:
    engine = client.app.state.loader.engine  # type: ignore[attr-defined]
    call = str(engine.tokenizer.id_of("<tool_call>"))
    fields = {
        "tools": [tool("weather", WEATHER, strict=True)], "max_tokens": 40,
        "response_format": {"type": "json_object"},
    }  # fmt: skip
    assert calls_of(ask(client, logit_bias={call: 100}, **fields))
    content = ask(client, logit_bias={call: -100}, **fields).json()["choices"][0]["message"]
    assert isinstance(json.loads(content["content"]), dict)


BUDGETS: list[dict[str, Any]] = [
    {"thinking_token_budget": 5}, {"reasoning_budget_tokens": 5}, {"thinking_budget": 5},
    {"thinking": {"type": "enabled", "budget_tokens": 5}}, {"reasoning": {"max_tokens": 5}},
]  # fmt: skip


@pytest.mark.parametrize("fields", BUDGETS)
def test_a_budget_ends_the_thinking_and_the_answer_goes_on(
    client: TestClient, fields: dict[str, Any]
) -> None:
    body = {"tools": None, "enable_thinking": True, "max_tokens": 60}
    free, limited = (ask(client, **body, **more).json() for more in ({}, fields))
    text = limited["choices"][0]["message"]["reasoning"]
    count = client.post("/tokenize", json={"prompt": text}).json()["count"]
    assert 1 <= count <= 5
    assert free["choices"][0]["message"]["reasoning"].startswith(text)
    assert limited["choices"][0]["message"]["content"]


def test_a_budget_above_max_tokens_changes_nothing(client: TestClient) -> None:
    body = {"tools": None, "enable_thinking": True, "max_tokens": 10}
    free, limited = (
        ask(client, **body, **more).json()["choices"][0]
        for more in ({}, {"thinking_budget": 10_000})
    )
    assert free == limited
