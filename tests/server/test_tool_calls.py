"""Tool calls over the OpenAI API: whole and streamed, with the official client."""

import json
from typing import Any

import openai
import pytest
from openai.lib.streaming.chat import ContentDeltaEvent

from tests.server.scripted import BASE_URL, TEMPLATE, ScriptedEngine, chunks, client_of

XML_TEMPLATE = TEMPLATE + "{#- <tool_call>\n<function=example>\n<parameter=name>\nvalue #}"
"""A template that tells the model to write calls as Qwen3.5 does."""

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        },
    },
}

CALL = (
    "I look it up.\n\n<tool_call>\n<function=weather>\n<parameter=city>\nParis\n</parameter>\n"
    "<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>"
)

TWO_CALLS = f"{CALL}\n{CALL.split('up.')[1].strip().replace('Paris', 'Rome')}"


def engine_of(text: str) -> ScriptedEngine:
    return ScriptedEngine(text, template=XML_TEMPLATE, context=2000)


def ask(client: Any, **fields: Any) -> Any:
    message = {"role": "user", "content": "Hello"}
    return client.post("/v1/chat/completions", json={"messages": [message], **fields})


def test_a_call_becomes_tool_calls_with_arguments_of_the_schemas_types() -> None:
    with client_of(engine_of(CALL)) as client:
        (choice,) = ask(client, tools=[WEATHER]).json()["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "I look it up."
    (call,) = choice["message"]["tool_calls"]
    assert call["type"] == "function" and call["id"].startswith("call_")
    assert call["function"]["name"] == "weather"
    assert json.loads(call["function"]["arguments"]) == {"city": "Paris", "days": 3}


def test_content_is_null_in_a_message_of_calls_alone() -> None:
    with client_of(engine_of(CALL.partition("\n\n")[2])) as client:
        (choice,) = ask(client, tools=[WEATHER]).json()["choices"]
    assert choice["message"]["content"] is None and len(choice["message"]["tool_calls"]) == 1


def test_streamed_calls_have_an_id_and_a_name_first_and_fragments_that_add_up() -> None:
    with client_of(engine_of(TWO_CALLS)) as client:
        streamed = chunks(ask(client, tools=[WEATHER], stream=True).text)
    choices = [chunk["choices"][0] for chunk in streamed]
    assert choices[-1]["finish_reason"] == "tool_calls"
    pieces = [call for choice in choices for call in choice["delta"].get("tool_calls", [])]
    for index, city in enumerate(("Paris", "Rome")):
        first, *rest = [piece for piece in pieces if piece["index"] == index]
        assert first["id"] and first["type"] == "function"
        assert first["function"] == {"name": "weather", "arguments": ""}
        assert all(piece.keys() == {"index", "function"} for piece in rest)
        text = "".join(piece["function"]["arguments"] for piece in rest)
        assert json.loads(text) == {"city": city, "days": 3}
    assert "".join(choice["delta"].get("content") or "" for choice in choices) == "I look it up."


@pytest.mark.parametrize("stream", [False, True])
def test_half_a_surrogate_pair_in_a_call_is_no_server_error(stream: bool) -> None:
    call = '{"name": "weath\\ud83der", "arguments": "{\\"city\\": \\"\\ude00\\"}"}'
    with client_of(engine_of(f"<tool_call>\n{call}\n</tool_call>")) as client:
        answer = ask(client, tools=[WEATHER], stream=stream)
    assert answer.status_code == 200 and "weath\ufffder" in answer.text
    assert "tool_calls" in answer.text and "error" not in answer.text


@pytest.mark.parametrize("fields", [{}, {"tools": [WEATHER], "tool_choice": "none"}])
def test_without_offered_tools_a_call_is_text(fields: dict[str, Any]) -> None:
    with client_of(engine_of(CALL)) as client:
        (choice,) = ask(client, **fields).json()["choices"]
    assert choice["finish_reason"] == "stop" and choice["message"]["content"] == CALL
    assert "tool_calls" not in choice["message"]


def test_a_call_cut_at_max_tokens_has_valid_arguments_and_the_reason_length() -> None:
    with client_of(engine_of(CALL)) as client:
        length = len(CALL.partition("3\n")[0])
        (choice,) = ask(client, tools=[WEATHER], max_tokens=length - 20).json()["choices"]
    assert choice["finish_reason"] == "length"
    json.loads(choice["message"]["tool_calls"][0]["function"]["arguments"])


def test_calls_after_reasoning_leave_both_apart() -> None:
    with client_of(engine_of(f"I think.\n</think>\n\n{CALL}")) as client:
        (choice,) = ask(client, tools=[WEATHER], enable_thinking=True).json()["choices"]
    message = choice["message"]
    assert (message["reasoning_content"], message["content"]) == ("I think.", "I look it up.")
    assert choice["finish_reason"] == "tool_calls"


def test_the_official_client_assembles_streamed_calls() -> None:
    with client_of(engine_of(TWO_CALLS)) as http:
        client = openai.OpenAI(base_url=f"{BASE_URL}/v1", api_key="none", http_client=http)
        with client.chat.completions.stream(
            model="any",
            messages=[{"role": "user", "content": "Hello"}],
            tools=[WEATHER],  # type: ignore[list-item]
        ) as stream:
            text = "".join(event.delta for event in stream if isinstance(event, ContentDeltaEvent))
            final = stream.get_final_completion()
    assert text == "I look it up."
    calls = final.choices[0].message.tool_calls
    assert calls is not None
    assert [json.loads(call.function.arguments)["city"] for call in calls] == ["Paris", "Rome"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("parallel", [None, True, False])
def test_without_parallel_tool_calls_the_first_call_is_the_only_one(
    parallel: bool | None, stream: bool
) -> None:
    with client_of(engine_of(TWO_CALLS)) as client:
        answer = ask(client, tools=[WEATHER], parallel_tool_calls=parallel, stream=stream, n=2)
    for index in range(2):
        if stream:
            choices = [
                choice
                for chunk in chunks(answer.text)
                for choice in chunk["choices"]
                if choice["index"] == index
            ]
            calls = [one for choice in choices for one in choice["delta"].get("tool_calls", [])]
            count = len({call["index"] for call in calls})
        else:
            choices = [answer.json()["choices"][index]]
            count = len(choices[0]["message"]["tool_calls"])
        assert count == (1 if parallel is False else 2)
        assert choices[-1]["finish_reason"] == "tool_calls"
