"""Anthropic's Messages API with the demo model on the CPU."""

import json
import re
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
from starlette.testclient import TestClient

import osmium
from osmium.server.app import BackgroundLoader, create_app
from tests.server.scripted import BASE_URL
from tests.server.test_messages import COUNT, MESSAGES, THINKING, WEATHER, events_of, message_of

FRANCE = [{"role": "user", "content": "What is the capital of France?"}]

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    engine = osmium.load(device="cpu")
    host = BackgroundLoader(lambda progress: engine)
    with TestClient(create_app(host), base_url=BASE_URL) as made:
        while made.get("/health").status_code == 503:
            pass
        yield made


def ask(client: TestClient, **fields: Any) -> dict[str, Any]:
    """The message of a request, which is the same as a stream."""
    body = {"messages": FRANCE, "max_tokens": 60, "temperature": 0, **fields}
    answer = client.post(MESSAGES, json=body)
    assert answer.status_code == 200, answer.text
    streamed = message_of(events_of(client.post(MESSAGES, json={**body, "stream": True})))
    whole: dict[str, Any] = answer.json()
    assert whole.pop("id") != streamed.pop("id")
    assert whole == streamed
    unused = ("max_tokens", "temperature", "stop_sequences")
    counted = client.post(COUNT, json={k: v for k, v in body.items() if k not in unused}).json()
    assert counted == {"input_tokens": whole["usage"]["input_tokens"]}
    return whole


def test_the_model_answers_without_thinking(client: TestClient) -> None:
    message = ask(client, system="Be brief.")
    assert message["content"] == [{"type": "text", "text": "Paris."}]
    assert (message["stop_reason"], message["model"]) == ("end_turn", "demo")


def test_thinking_is_a_block_before_the_answer(client: TestClient) -> None:
    message = ask(client, **THINKING)
    assert [block["type"] for block in message["content"]] == ["thinking", "text"]
    assert all(block.get("thinking", block.get("text")) for block in message["content"])
    turns = [*FRANCE, {"role": "assistant", "content": message["content"]}, *FRANCE]
    assert ask(client, messages=turns, **THINKING)["stop_reason"] == "end_turn"


def test_a_stop_sequence_and_max_tokens_end_the_answer(client: TestClient) -> None:
    stopped = ask(client, stop_sequences=["aris"])
    assert [block["text"] for block in stopped["content"]] == ["P"]
    assert (stopped["stop_reason"], stopped["stop_sequence"]) == ("stop_sequence", "aris")
    assert ask(client, max_tokens=1)["stop_reason"] == "max_tokens"


def test_a_last_assistant_message_is_continued(client: TestClient) -> None:
    last = {"role": "assistant", "content": [{"type": "text", "text": "The capital of"}]}
    assert ask(client, messages=[*FRANCE, last])["content"][0]["text"] == " France is Paris."


def test_a_round_with_a_tool_renders(client: TestClient) -> None:
    use = {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Paris"}}
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": "sunny"}
    turns = [
        *FRANCE,
        {"role": "assistant", "content": [use]},
        {"role": "user", "content": [result, {"type": "text", "text": "Well?"}]},
    ]
    without = ask(client, messages=turns)["usage"]["input_tokens"]
    assert ask(client, messages=turns, tools=[WEATHER])["usage"]["input_tokens"] > without


@pytest.mark.parametrize("field", ["output_config", "output_format"])
@pytest.mark.parametrize("max_tokens", [24, 60])
def test_a_schema_is_followed(client: TestClient, field: str, max_tokens: int) -> None:
    value: dict[str, Any] = {"type": "json_schema", "schema": PERSON}
    value = {"format": value} if field == "output_config" else value
    (block,) = ask(client, max_tokens=max_tokens, **{field: value})["content"]
    assert set(json.loads(block["text"])) == {"name", "age"}


def test_a_schema_that_cannot_be_enforced_is_refused_by_its_path(client: TestClient) -> None:
    value = {"type": "json_schema", "schema": {"type": "object", "not": {}}}
    body = {"messages": FRANCE, "max_tokens": 9}
    for fields, path in (
        ({"output_config": {"format": value}}, "output_config.format.schema"),
        ({"output_format": value}, "output_format.schema"),
    ):
        answer = client.post(MESSAGES, json={**body, **fields})
        assert answer.status_code == 400
        assert answer.json()["error"]["message"].startswith(f"{path} has 'not'")


def test_a_prompt_that_does_not_fit_has_both_numbers(client: TestClient) -> None:
    body = {"messages": [{"role": "user", "content": "word " * 20_000}], "max_tokens": 9}
    message = client.post(MESSAGES, json=body).json()["error"]["message"]
    found = re.fullmatch(r"prompt is too long: (\d+) tokens > (\d+) maximum", message)
    assert (
        found
        and int(found[1])
        > int(found[2])
        == client.get("/v1/models").json()["data"][0]["max_model_len"]
    )


CITY = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 20},
        "unit": {"type": "string", "enum": ["C", "F"]},
    },
    "required": ["city", "unit"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "bash_20250124", "name": "bash"},
    {"name": "weather", "input_schema": CITY},
    {"name": "now", "input_schema": {"type": "object", "properties": {}, "maxProperties": 0}},
]


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ({"type": "any"}, {"weather", "now"}),
        ({"type": "any", "disable_parallel_tool_use": True}, {"weather", "now"}),
        ({"type": "tool", "name": "weather"}, {"weather"}),
        ({"type": "tool", "name": "now"}, {"now"}),
    ],
)
@pytest.mark.parametrize("thinking", [{"type": "disabled"}, {"type": "adaptive"}])
def test_a_required_call_is_one_of_the_tools_and_fits_its_schema(
    client: TestClient, choice: dict[str, Any], names: set[str], thinking: dict[str, Any]
) -> None:
    fields = {"tools": TOOLS, "tool_choice": choice, "thinking": thinking, "max_tokens": 200}
    body = {"messages": FRANCE, "temperature": 0, **fields}
    answer = client.post(MESSAGES, json=body)
    assert answer.headers["x-osmium-ignored"] == "tools.bash_20250124"
    whole = answer.json()
    streamed = message_of(events_of(client.post(MESSAGES, json={**body, "stream": True})))
    for message in (whole, streamed):
        calls = [block for block in message["content"] if block["type"] == "tool_use"]
        assert message["stop_reason"] in ("tool_use", "max_tokens") and calls
        assert not [block for block in message["content"] if block["type"] == "text"]
        for call in calls:
            assert call["name"] in names
            jsonschema.validate(call["input"], CITY if call["name"] == "weather" else {})
        if choice.get("disable_parallel_tool_use"):
            assert len(calls) == 1


def test_a_tool_whose_schema_cannot_be_enforced_is_named_by_its_place(client: TestClient) -> None:
    schema = {"type": "object", "properties": {"a": {"not": {}}}}
    tools = [TOOLS[0], {"name": "a", "input_schema": schema, "strict": True}]
    body = {"messages": FRANCE, "max_tokens": 9, "tools": tools}
    answer = client.post(MESSAGES, json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith("tools[1].input_schema")


@pytest.mark.parametrize("budget", [1, 3])
def test_a_thinking_budget_limits_the_thinking(client: TestClient, budget: int) -> None:
    free, short = (
        ask(client, thinking={"type": "enabled", "budget_tokens": tokens})["content"]
        for tokens in (1000, budget)
    )
    assert [block["type"] for block in free] == ["thinking", "text"]
    assert len(short[0]["thinking"]) < len(free[0]["thinking"])
    assert short[-1]["type"] == "text" and short[-1]["text"]
