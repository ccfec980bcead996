"""Anthropic's Messages API over the scripted engine: prompts, responses, streams, errors."""

import json
import threading
from typing import Any

import jsonschema
import pytest

from osmium.errors import EngineStopped, OsmiumError, RequestError
from osmium.server.anthropic import convert
from osmium.server.anthropic_prompt import chat_messages
from osmium.server.anthropic_schema import MessagesRequest
from osmium.server.anthropic_signature import signature, signed_thinking
from osmium.server.anthropic_tools import chat_tools
from osmium.server.anthropic_writer import MessageWriter, _arguments
from osmium.server.limits import Limits
from tests.server.scripted import TOKENIZER, ScriptedEngine, client_of
from tests.server.test_tool_calls import CALL, TWO_CALLS, engine_of

MESSAGES, COUNT = "/v1/messages", "/v1/messages/count_tokens"
HELLO: list[dict[str, Any]] = [{"role": "user", "content": "Hello"}]
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
}
WEATHER = {"name": "weather", "description": "The weather", "input_schema": SCHEMA}

ALL = (
    "{#- <tool_call>\n<function=example>\n<parameter=name>\nvalue #}"
    "{%- for tool in tools or [] %}[{{ tool.function.name }}]{% endfor %}"
    "{%- for m in messages %}{{ m.role }}:"
    "{%- if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}{{ m.content }}"
    "{%- for c in m.tool_calls or [] %}"
    "<{{ c.function.name }} {{ c.function.arguments | tojson }}>{% endfor %}"
    "{%- if m.tool_call_id %}#{{ m.tool_call_id }}={{ m.name }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{%- if add_generation_prompt %}assistant:"
    "{%- if enable_thinking %}<think>{{ '\\n' }}{% endif %}{% endif %}"
)
"""A template that shows every part of a message."""


def post(client: Any, path: str = MESSAGES, **fields: Any) -> Any:
    given = {"messages": HELLO, "max_tokens": 1000, **fields}
    return client.post(path, json={key: value for key, value in given.items() if value != "-"})


def ask(text: str = "the end", **fields: Any) -> dict[str, Any]:
    """The message of a response with this text."""
    with client_of(engine_of(text)) as client:
        response = post(client, **fields)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


def prompt_of(messages: Any = HELLO, **fields: Any) -> str:
    """The prompt of a request, after the check that its tokens are counted as they are run."""
    engine = ScriptedEngine(template=ALL, context=5000)
    with client_of(engine) as client:
        response = post(client, messages=messages, **fields)
        count = post(client, COUNT, messages=messages, max_tokens="-", **fields)
    assert response.status_code == 200, response.text
    used = response.json()["usage"]["input_tokens"]
    assert count.json() == {"input_tokens": used}
    assert len(engine.requests[0].ids) == used
    return engine.requests[0].prompt


def error_of(response: Any, status: int, kind: str) -> str:
    """The text of an error in Anthropic's form."""
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"type", "error", "request_id"} and body["type"] == "error"
    assert set(body["error"]) == {"type", "message"}
    assert body["error"]["type"] == kind
    assert body["request_id"].startswith("req_")
    assert response.headers["request-id"] == body["request_id"]
    message: str = body["error"]["message"]
    return message


def events_of(response: Any) -> list[dict[str, Any]]:
    """The events of a stream; each has its type as its name."""
    events = []
    for part in response.text.split("\n\n"):
        lines = [line for line in part.split("\n") if line and not line.startswith(":")]
        if lines:
            name, data = lines
            value = json.loads(data.removeprefix("data: "))
            assert name == f"event: {value['type']}"
            events.append(value)
    return events


def message_of(events: list[dict[str, Any]]) -> dict[str, Any]:
    """The message that a stream's events make, as a client adds them up."""
    first, ping, *blocks, delta, last = events
    assert [one["type"] for one in (first, ping, delta, last)] == [
        "message_start", "ping", "message_delta", "message_stop",
    ]  # fmt: skip
    content: list[dict[str, Any]] = []
    pieces: list[str] = []
    is_open = False
    for event in blocks:
        if event["type"] == "ping":  # a slow response has more of them
            continue
        if event["type"] == "content_block_start":
            assert not is_open and event["index"] == len(content)
            content.append(event["content_block"])
            is_open, pieces = True, []
            continue
        assert is_open and event["index"] == len(content) - 1
        block = content[-1]
        if event["type"] == "content_block_stop":
            is_open = False
            if block["type"] == "tool_use":
                block["input"] = json.loads("".join(pieces))
            continue
        match event["delta"]:
            case {"type": "text_delta", "text": text}:
                block["text"] += text
            case {"type": "thinking_delta", "thinking": text}:
                block["thinking"] += text
            case {"type": "signature_delta", "signature": text}:
                block["signature"] = text
            case {"type": "input_json_delta", "partial_json": text}:
                pieces.append(text)
            case other:
                raise AssertionError(other)
    assert not is_open
    message = first["message"] | delta["delta"] | {"content": content}
    assert first["message"]["usage"]["output_tokens"] == 0
    assert first["message"]["usage"]["input_tokens"] == delta["usage"]["input_tokens"]
    found: dict[str, Any] = {**message, "usage": delta["usage"]}
    return found


# -- responses -------------------------------------------------------------------------------------


def test_a_message_has_anthropics_form() -> None:
    message = ask()
    assert message.pop("id").startswith("msg_")
    assert message == {
        "type": "message", "role": "assistant", "model": "scripted",
        "content": [{"type": "text", "text": "the end"}],
        "stop_reason": "end_turn", "stop_sequence": None,
        "usage": {
            "input_tokens": len(TOKENIZER.encode("user: Hello\nassistant:")),
            "output_tokens": len(TOKENIZER.encode("the end")) + 1,
            "cache_creation_input_tokens": 0, "cache_read_input_tokens": 0,
        },
    }  # fmt: skip


THINKING = {"thinking": {"type": "adaptive"}}


@pytest.mark.parametrize(
    ("text", "fields", "kinds", "reason"),
    [
        ("the end", {}, ["text"], "end_turn"),
        ("", {}, [], "end_turn"),
        ("I see</think>yes", THINKING, ["thinking", "text"], "end_turn"),
        ("I see", THINKING, ["thinking"], "end_turn"),
        ("<think>I see</think>yes", {}, ["thinking", "text"], "end_turn"),
        (CALL, {"tools": [WEATHER]}, ["text", "tool_use"], "tool_use"),
        (CALL, {"tools": [WEATHER], "tool_choice": {"type": "none"}}, ["text"], "end_turn"),
        (CALL, {}, ["text"], "end_turn"),
        (TWO_CALLS, {"tools": [WEATHER]}, ["text", "tool_use", "tool_use"], "tool_use"),
        (f"Mm</think>{CALL} Then.", {"tools": [WEATHER], **THINKING},
         ["thinking", "text", "tool_use", "text"], "tool_use"),
        (f"Mm {CALL[CALL.index('<') :]}", {"tools": [WEATHER], **THINKING},
         ["thinking", "tool_use"], "tool_use"),
        (CALL, {"tools": [WEATHER], "max_tokens": 90}, ["text", "tool_use"], "max_tokens"),
        ("the end", {"max_tokens": 3}, ["text"], "max_tokens"),
        ("the end", {"stop_sequences": ["nd", "e e"]}, ["text"], "stop_sequence"),
    ],
)  # fmt: skip
def test_a_stream_adds_up_to_the_whole_message(
    text: str, fields: dict[str, Any], kinds: list[str], reason: str
) -> None:
    whole = ask(text, **fields)
    assert [block["type"] for block in whole["content"]] == kinds
    assert whole["stop_reason"] == reason
    with client_of(engine_of(text)) as client:
        response = post(client, stream=True, **fields)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["request-id"].startswith("req_")
    streamed = message_of(events_of(response))
    for message in (whole, streamed):
        message.pop("id")
        for block in message["content"]:
            assert block.pop("id", "toolu_").startswith("toolu_")
    assert streamed == whole


def test_the_blocks_have_thinking_text_and_the_calls_typed_arguments() -> None:
    thinking, text, call = ask(f"I see\n</think>\n\n{CALL}", tools=[WEATHER], **THINKING)["content"]
    assert thinking == {"type": "thinking", "thinking": "I see", "signature": signature()}
    assert thinking["signature"]
    assert text == {"type": "text", "text": "I look it up."}
    assert call.pop("id").startswith("toolu_")
    assert call == {"type": "tool_use", "name": "weather", "input": {"city": "Paris", "days": 3}}


@pytest.mark.parametrize(
    ("stops", "text", "found"),
    [
        (["end"], "the ", "end"),
        (["zz", "he"], "t", "he"),
        (["zz"], "the end", None),
        ([], "the end", None),
        (["d", "n"], "the e", "n"),
    ],
)
def test_the_stop_sequence_that_matched_is_named(
    stops: list[str], text: str, found: str | None
) -> None:
    message = ask("the end", stop_sequences=stops)
    assert [block["text"] for block in message["content"]] == [text]
    assert message["stop_sequence"] == found
    assert message["stop_reason"] == ("stop_sequence" if found else "end_turn")


def test_a_stop_sequence_does_not_count_in_the_thinking() -> None:
    message = ask("end</think>the end", stop_sequences=["end"], **THINKING)
    thinking, text = message["content"]
    assert (thinking["thinking"], text["text"]) == ("end", "the ")
    assert message["stop_sequence"] == "end"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("single", [None, False, True])
def test_disable_parallel_tool_use_leaves_the_first_call(single: bool | None, stream: bool) -> None:
    choice = {"type": "auto", "disable_parallel_tool_use": single}
    with client_of(engine_of(TWO_CALLS)) as client:
        response = post(client, tools=[WEATHER], tool_choice=choice, stream=stream)
    message = message_of(events_of(response)) if stream else response.json()
    calls = [block for block in message["content"] if block["type"] == "tool_use"]
    assert [call["input"]["city"] for call in calls] == ["Paris", "Rome"][: 1 if single else 2]
    assert message["stop_reason"] == "tool_use"


def test_numbers_of_a_call_that_json_cannot_have_are_bounded() -> None:
    found = _arguments('{"a": 1e999, "b": -1e999, "c": 1' + "0" * 5000 + ', "d": 12, "e": 0.5}')
    json.dumps(found, allow_nan=False)
    assert (found["d"], found["e"]) == (12, 0.5)
    assert found["a"] == -found["b"] > 1e308 and found["c"] > 10**308
    assert _arguments("") == {}


# -- thinking --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("thinking", "thinks"),
    [
        ("-", False),
        (None, False),
        ({"type": "disabled"}, False),
        ({"type": "adaptive"}, True),
        ({"type": "adaptive", "display": "omitted"}, True),
        ({"type": "enabled", "budget_tokens": -1, "display": "summarized"}, True),
    ],
)
def test_the_model_thinks_where_the_client_asks_for_it(thinking: Any, thinks: bool) -> None:
    assert ("<think>" in prompt_of(thinking=thinking)) is thinks


@pytest.mark.parametrize("stream", [False, True])
def test_omitted_thinking_returns_with_the_signature(stream: bool) -> None:
    with client_of(engine_of("I see, é</think>yes")) as client:
        response = post(client, thinking={"type": "adaptive", "display": "omitted"}, stream=stream)
    message = message_of(events_of(response)) if stream else response.json()
    thinking, text = message["content"]
    assert (thinking["thinking"], text["text"]) == ("", "yes")
    assert "thinking_delta" not in response.text
    turns = [*HELLO, {"role": "assistant", "content": [thinking, text]}, *HELLO]
    assert "assistant:(I see, é)yes\n" in prompt_of(turns)


@pytest.mark.parametrize(
    "value", [None, "", "abc", "osmium:é", "osmium:x", "osmium:/w==", "osmium:"]
)
def test_a_foreign_signature_has_no_text(value: Any) -> None:
    assert signed_thinking(value) == ""
    assert signed_thinking(signature("é 1")) == "é 1"


# -- prompts ---------------------------------------------------------------------------------------


def text(value: str, **more: Any) -> dict[str, Any]:
    return {"type": "text", "text": value, **more}


def result(name: str, **more: Any) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": name, **more}


CACHE = {"cache_control": {"type": "ephemeral"}}
USE = {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Rome"}, **CACHE}


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        ("Hello", "user:Hello\n"),
        ([text("a", **CACHE), text("b", citations=None)], "user:ab\n"),
        ([], "user:\n"),
        ([result("t1", content="sunny")], "tool:sunny#t1=\n"),
        ([result("t1", content=[text("a"), text("b")])], "tool:a\nb#t1=\n"),
        ([result("t1")], "tool:#t1=\n"),
        ([result("t1", content=None, is_error=False)], "tool:#t1=\n"),
        ([result("t1", content="no such city", is_error=True)], "tool:Error: no such city#t1=\n"),
        ([result("t1", content="Error 5", is_error=True)], "tool:Error 5#t1=\n"),
        ([result("t1", is_error=True)], "tool:Error#t1=\n"),
        ([result("t1", content="a"), result("t2", content="b", **CACHE), text("c"), text("d")],
         "tool:a#t1=\ntool:b#t2=\nuser:cd\n"),
        ([text("c"), result("t1", content="a"), text("d")], "user:c\ntool:a#t1=\nuser:d\n"),
        ([{"type": "document", "source": {"type": "text", "media_type": "text/plain",
                                          "data": "word"}, "title": "A title"}, text("?")],
         "user:A title\nword?\n"),
        ([{"type": "document", "source": {"type": "content", "content": [text("a")]}}],
         "user:a\n"),
        ([{"type": "document", "source": {"type": "content", "content": "a"}}], "user:a\n"),
    ],
)  # fmt: skip
def test_a_user_turn_keeps_the_order_of_its_blocks(content: Any, wanted: str) -> None:
    assert prompt_of([{"role": "user", "content": content}]) == wanted + "assistant:"


def test_a_round_with_a_tool_has_reasoning_call_and_named_result() -> None:
    turns = [
        *HELLO,
        {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "I ", "signature": "foreign"},
            {"type": "redacted_thinking", "data": "AAAA"},
            {"type": "thinking", "thinking": "think", "signature": ""},
            text("Let me see."), USE, {**USE, "id": "t2", "input": None}]},
        {"role": "user", "content": [result("t1", content="a"), result("t2", content="b")]},
    ]  # fmt: skip
    assert prompt_of(turns, tools=[{**WEATHER, **CACHE, "type": "custom"}], system="S") == (
        "[weather]system:S\nuser:Hello\n"
        'assistant:(I \n\nthink)Let me see.<weather {"city": "Rome"}><weather {}>\n'
        "tool:a#t1=weather\ntool:b#t2=weather\nassistant:"
    )


BILLING = "x-anthropic-billing-header: cc_version=1; cch=5f2a;"


@pytest.mark.parametrize(
    ("system", "wanted"),
    [
        ("Be brief.", "Be brief."),
        ([text("A", **CACHE), text("B")], "A\n\nB"),
        ([text(BILLING), text("A", **CACHE)], "A"),
        (f"{BILLING}\n\nA\nB", "A\nB"),
        (f"A {BILLING}", f"A {BILLING}"),
        ([text(BILLING)], None),
        (BILLING, None),
        ("", None),
        ([], None),
        (None, None),
    ],
)
def test_the_system_prompt_has_no_billing_header(system: Any, wanted: str | None) -> None:
    head = "" if wanted is None else f"system:{wanted}\n"
    assert prompt_of(system=system) == f"{head}user:Hello\nassistant:"
    turns = [{"role": "system", "content": system or ""}, *HELLO]
    assert prompt_of(turns) == f"{head}user:Hello\nassistant:"


def test_a_conversation_without_any_text_has_an_empty_user_turn() -> None:
    assert prompt_of([{"role": "system", "content": [text(BILLING)]}]) == "user:\nassistant:"


def test_a_system_message_between_the_turns_is_part_of_the_prompt() -> None:
    turns = [{"role": "system", "content": "B"}, *HELLO, {"role": "system", "content": [text("C")]}]
    assert prompt_of(turns, system="A") == "system:A\n\nB\nuser:Hello\nuser:C\nassistant:"


@pytest.mark.parametrize("content", ["The sum is ", [text("The sum "), text("is ")]])
def test_a_last_assistant_message_is_continued(content: Any) -> None:
    turns = [*HELLO, {"role": "assistant", "content": content}]
    assert prompt_of(turns) == "user:Hello\nassistant:The sum is "
    assert [block["text"] for block in ask("4", messages=turns)["content"]] == ["4"]


def test_a_long_turn_of_many_blocks_is_converted_in_linear_time() -> None:
    blocks = [text("a" * 100)] * 60_000
    (message,) = chat_messages(None, [{"role": "user", "content": blocks}])
    assert len(message["content"]) == 6_000_000


def test_sampling_fields_reach_the_engine() -> None:
    engine = ScriptedEngine()
    with client_of(engine) as client:
        post(client, temperature=0.5, top_p=0.9, top_k=7, max_tokens=5, stop_sequences=["q"])
    params = engine.requests[0].params
    assert (params.temperature, params.top_p, params.top_k) == (0.5, 0.9, 7)
    assert (params.max_tokens, params.stop) == (5, ("q",))


# -- tools -----------------------------------------------------------------------------------------


SERVER_TOOLS = (
    "web_search_20250305", "bash_20250124", "text_editor_20250728", "computer_20251124",
    "code_execution_20250825", "memory_20250818", "web_fetch_20250910", "mcp_toolset",
    "tool_search_tool_bm25", "something_new_20270101",
)  # fmt: skip


def test_tools_of_anthropics_servers_are_left_out_and_reported() -> None:
    tools = [{"type": kind, "name": f"n{i}"} for i, kind in enumerate(SERVER_TOOLS)]
    engine = ScriptedEngine(template=ALL, context=1000)
    with client_of(engine) as client:
        response = post(client, tools=[*tools, WEATHER], tool_choice={"type": "auto"})
        alone = post(client, tools=tools)
        count = post(client, COUNT, tools=tools)
    assert engine.requests[0].prompt.startswith("[weather]user")
    assert engine.requests[1].prompt.startswith("user")
    names = ", ".join(f"tools.{kind}" for kind in SERVER_TOOLS)
    for one in (response, alone, count):
        assert one.headers["x-osmium-ignored"] == names


@pytest.mark.parametrize(
    ("choice", "wanted", "parallel"),
    [
        ({"type": "auto"}, "auto", None),
        ({"type": "none"}, "none", None),
        ({"type": "any", "disable_parallel_tool_use": True}, "required", False),
        ({"type": "any", "disable_parallel_tool_use": False}, "required", None),
        ({"type": "tool", "name": "weather"},
         {"type": "function", "function": {"name": "weather"}}, None),
        (None, None, None),
    ],
)  # fmt: skip
def test_tool_choice_becomes_a_chats(choice: Any, wanted: Any, parallel: bool | None) -> None:
    found = chat_tools([{**WEATHER, "strict": True}], choice)
    assert (found.choice, found.parallel) == (wanted, parallel)
    function = {"name": "weather", "description": "The weather", "strict": True}
    assert found.tools == [{"type": "function", "function": {**function, "parameters": SCHEMA}}]


# -- refused and ignored fields --------------------------------------------------------------------


def user(*blocks: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [*blocks]}]


def assistant(*blocks: Any) -> list[dict[str, Any]]:
    return [*HELLO, {"role": "assistant", "content": [*blocks]}, *HELLO]


IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AA"}}
PDF = {"type": "document", "source": {"type": "base64", "media_type": "application/pdf"}}


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "-"}, "messages"),
        ({"messages": "Hello"}, "messages"),
        ({"messages": [5]}, "messages[0]"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": {}}]}, "messages[0].content"),
        ({"messages": [{"content": "a"}]}, "messages[0].role"),
        ({"messages": [*HELLO, {"role": "tool", "content": "a"}]}, "messages[1].role"),
        ({"messages": [{"role": ["user"], "content": "a"}]}, "messages[0].role"),
        ({"messages": user("a")}, "messages[0].content[0]"),
        ({"messages": user({"text": "a"})}, "messages[0].content[0].type"),
        ({"messages": user({"type": ["text"]})}, "messages[0].content[0].type"),
        ({"messages": user(text("a"), {"type": "text"})}, "messages[0].content[1].text"),
        ({"messages": user(text("a"), IMAGE)}, "messages[0].content[1]"),
        ({"messages": user(PDF)}, "messages[0].content[0]"),
        ({"messages": user({"type": "document", "source": "x"})}, "messages[0].content[0]"),
        ({"messages": user({"type": "search_result"})}, "messages[0].content[0]"),
        ({"messages": user({"type": "audio"})}, "messages[0].content[0]"),
        ({"messages": user(USE)}, "messages[0].content[0]"),
        ({"messages": user({"type": "thinking", "thinking": "a"})}, "messages[0].content[0]"),
        ({"messages": user({"type": "tool_result"})}, "messages[0].content[0].tool_use_id"),
        ({"messages": user(result("t", is_error="yes"))}, "messages[0].content[0].is_error"),
        ({"messages": user(result("t", content=5))}, "messages[0].content[0].content"),
        ({"messages": user(result("t", content=[text("a"), IMAGE]))},
         "messages[0].content[0].content[1]"),
        ({"messages": assistant(result("t"))}, "messages[1].content[0]"),
        ({"messages": assistant(IMAGE)}, "messages[1].content[0]"),
        ({"messages": assistant({"type": "thinking"})}, "messages[1].content[0].thinking"),
        ({"messages": assistant({"type": "thinking", "thinking": "", "signature": 5})},
         "messages[1].content[0].signature"),
        ({"messages": assistant({**USE, "id": 5})}, "messages[1].content[0].id"),
        ({"messages": assistant({**USE, "name": ""})}, "messages[1].content[0].name"),
        ({"messages": assistant({**USE, "input": "{}"})}, "messages[1].content[0].input"),
        ({"messages": assistant(USE)[:2]}, "messages[1]"),
        ({"system": [IMAGE]}, "system[0]"),
        ({"system": [text("a"), {"type": "text", "text": 5}]}, "system[1].text"),
        ({"system": 5}, "system"),
        ({"tools": [WEATHER, {"input_schema": {}}]}, "tools[1].name"),
        ({"tools": [{"name": " ", "input_schema": {}}]}, "tools[0].name"),
        ({"tools": [WEATHER, WEATHER]}, "tools[1].name"),
        ({"tools": [{"name": "a"}]}, "tools[0].input_schema"),
        ({"tools": [{"name": "a", "input_schema": []}]}, "tools[0].input_schema"),
        ({"tools": [{**WEATHER, "description": 5}]}, "tools[0].description"),
        ({"tools": [{**WEATHER, "strict": "yes"}]}, "tools[0].strict"),
        ({"tools": [{"type": "function", "function": {"name": "a"}}]}, "tools[0].type"),
        ({"tools": [{**WEATHER, "type": 5}]}, "tools[0].type"),
        ({"tools": {"a": 1}}, "tools"),
        ({"tools": [WEATHER], "tool_choice": {"type": "required"}}, "tool_choice.type"),
        ({"tools": [WEATHER], "tool_choice": {}}, "tool_choice.type"),
        ({"tools": [WEATHER], "tool_choice": "auto"}, "tool_choice"),
        ({"tool_choice": {"type": "any"}}, "tool_choice.type"),
        ({"tools": [WEATHER], "tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "x"}}, "tool_choice.name"),
        ({"tools": [WEATHER], "tool_choice": {"type": "tool", "name": []}}, "tool_choice.name"),
        ({"tool_choice": {"type": "auto", "disable_parallel_tool_use": 1}},
         "tool_choice.disable_parallel_tool_use"),
        ({"max_tokens": "-"}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "10"}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"top_k": -5}, "top_k"),
        ({"stop_sequences": "a"}, "stop_sequences"),
        ({"stop_sequences": [""]}, "stop_sequences"),
        ({"stop_sequences": ["a"] * 100}, "stop_sequences"),
        ({"stop_sequences": ["a", "b" * 2000]}, "stop_sequences[1]"),
        ({"stream": "yes"}, "stream"),
        ({"thinking": {}}, "thinking.type"),
        ({"thinking": {"type": "auto"}}, "thinking.type"),
        ({"thinking": True}, "thinking"),
        ({"thinking": {"type": "enabled", "budget_tokens": "9"}}, "thinking.budget_tokens"),
        ({"thinking": {"type": "disabled", "budget_tokens": True}}, "thinking.budget_tokens"),
        ({"thinking": {"type": "adaptive", "budget_tokens": []}}, "thinking.budget_tokens"),
        ({"thinking": {"type": "adaptive", "display": "all"}}, "thinking.display"),
        ({"output_config": {"effort": "banana"}}, "output_config.effort"),
        ({"output_config": {"effort": 5}}, "output_config.effort"),
        ({"output_config": {"format": {"type": "json_object"}}}, "output_config.format.type"),
        ({"output_config": {"format": "json"}}, "output_config.format.type"),
        ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format.schema"),
        ({"output_format": {"type": "json_schema", "schema": 5}}, "output_format.schema"),
        ({"output_format": {"type": "json_schema", "schema": {}},
          "output_config": {"format": {"type": "json_schema", "schema": {}}}},
         "output_config.format and output_format"),
        ({"metadata": 5}, "metadata"),
        ({"chat_template_kwargs": {"a": 1}}, "chat_template_kwargs"),
        ({"functions": [{"name": "a"}]}, "functions"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
def test_a_wrong_value_is_refused_by_its_path(
    fields: dict[str, Any], path: str, stream: bool
) -> None:
    with client_of() as client:
        response = post(client, **{"stream": stream, **fields})
    message = error_of(response, 400, "invalid_request_error")
    assert message.startswith(path) and message[len(path)] in " :.", message


@pytest.mark.parametrize(
    "thread", [{"type": "create"}, {"type": "continue", "previous_message_id": "msg_1"}]
)
def test_a_thread_is_refused_so_that_clients_send_the_whole_conversation(
    thread: dict[str, Any],
) -> None:
    """Else a client sends the next messages alone, and the model does not see the others."""
    with client_of() as client:
        for path in (MESSAGES, COUNT):
            response = post(client, path, thread=thread, max_tokens=10)
            error = response.json()["error"]
            assert response.status_code == 400 and error["type"] == "invalid_request_error"
            assert error["message"].startswith("thread is {")
            assert error["details"]["error_code"] == "thread_unsupported_request"
        refused = post(client, compaction={"type": "enabled"})
        assert refused.status_code == 400 and "details" not in refused.json()["error"]
        assert post(client, thread=None, compaction=None).status_code == 200


def test_an_error_of_a_tool_names_its_place_beside_dropped_tools() -> None:
    dropped = {"type": "bash_20250124", "name": "bash"}
    with pytest.raises(RequestError) as caught:
        chat_tools([dropped, WEATHER, dropped, WEATHER], None)
    assert caught.value.param == "tools[3].name"


@pytest.mark.parametrize(
    ("param", "wanted"),
    [
        ("tools[1].function.parameters.a", "tools[3].input_schema.a"),
        ("tools[1]", "tools[3]"),
        ("tools[1].function.name", "tools[3].name"),
        ("tools", "tools"),
        ("tool_choice.function.name", "tool_choice.name"),
        ("tool_choice", "tool_choice"),
        ("stop", "stop_sequences"),
        ("stop[2]", "stop_sequences[2]"),
        ("reasoning_effort", "output_config.effort"),
        ("response_format.json_schema.schema", "output_config.format.schema"),
        ("thinking.budget_tokens", "thinking.budget_tokens"),
        ("messages", "messages"),
        (None, None),
    ],
)
def test_errors_of_the_chat_have_the_bodys_names(param: str | None, wanted: str | None) -> None:
    dropped: dict[str, Any] = {"type": "bash_20250124", "name": "bash"}
    tools = [dropped, WEATHER, dropped, {**WEATHER, "name": "b"}]
    converted = convert(
        bytearray(b"{}"), MessagesRequest(messages=HELLO, max_tokens=1, tools=tools)
    )
    error = converted.in_clients_names(RequestError(f"{param} is 5.", param=param))
    assert (error.param, str(error)) == (wanted, f"{wanted} is 5.")


def test_count_tokens_checks_the_same_fields() -> None:
    with client_of() as client:
        message = error_of(post(client, COUNT, messages=user(IMAGE)), 400, "invalid_request_error")
        assert "messages[0].content[0]" in message
        for fields in (
            {"thinking": {"type": "x"}}, {"stop_sequences": [""]}, {"temperature": -1},
            {"max_tokens": 0}, {"output_config": {"effort": "banana"}},
        ):  # fmt: skip
            response = post(client, COUNT, **fields)
            error_of(response, 400, "invalid_request_error")


def test_a_prompt_longer_than_the_context_is_counted() -> None:
    with client_of(ScriptedEngine(context=50)) as client:
        response = post(client, COUNT, messages=user(text("a" * 500)))
    assert response.json()["input_tokens"] > 500


def test_fields_without_effect_are_reported() -> None:
    harmless: dict[str, Any] = {
        "model": "claude", "metadata": {"user_id": "a"}, "betas": ["x"], "service_tier": "auto",
        "cache_control": {"type": "ephemeral"}, "mcp_servers": [], "speed": "standard",
        "context_management": {"edits": []}, "container": None, "stream": False,
    }  # fmt: skip
    with client_of(ScriptedEngine(context=1000)) as client:
        assert "x-osmium-ignored" not in post(client, **harmless).headers
        for path in (MESSAGES, COUNT):
            headers = post(
                client, path, max_token=5, stop=["x"], container="c", speed="fast",
                mcp_servers=[{"name": "a"}], service_tier="priority", tools=[{**WEATHER, "x": 1}],
                context_management={"edits": [{"type": "clear_tool_uses_20250919"}]},
                output_config={"effort": "high", "task_budget": {}},
                tool_choice={"type": "auto", "y": 1}, thinking={"type": "disabled", "z": 1},
            ).headers  # fmt: skip
            assert headers["x-osmium-ignored"] == (
                "max_token, stop, service_tier, speed, context_management, container, mcp_servers, "
                "thinking.z, output_config.task_budget, tool_choice.y, tools.x"
            )
            assert headers["x-osmium-did-you-mean"] == (
                "max_token -> max_tokens, stop -> stop_sequences"
            )


def test_beta_and_version_headers_change_nothing() -> None:
    headers = {"anthropic-beta": "context-1m-2025-08-07,x", "anthropic-version": "2023-06-01"}
    with client_of() as client:
        body = {"messages": HELLO, "max_tokens": 9}
        response = client.post(f"{MESSAGES}?beta=true", json=body, headers=headers)
        assert response.json()["content"][0]["text"] == "the end"
        assert "x-osmium-ignored" not in response.headers


# -- errors ----------------------------------------------------------------------------------------


def test_a_prompt_that_does_not_fit_is_refused_with_both_numbers() -> None:
    engine = ScriptedEngine(context=200)
    empty = len(TOKENIZER.encode("user: \nassistant:"))
    with client_of(engine) as client:
        for count, maximum in ((500, 200), (201, 200), (200, 199)):
            for stream in (False, True):
                response = post(client, messages=user(text("a" * (count - empty))), stream=stream)
                assert error_of(response, 400, "invalid_request_error") == (
                    f"prompt is too long: {count} tokens > {maximum} maximum"
                )
        assert post(client, messages=user(text("a" * (199 - empty)))).status_code == 200


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff", b'"a"', b"null"])
@pytest.mark.parametrize("path", [MESSAGES, COUNT])
def test_a_body_that_is_no_object_is_refused(body: bytes, path: str) -> None:
    with client_of() as client:
        error_of(client.post(path, content=body), 400, "invalid_request_error")


VERSION = {"anthropic-version": "2023-06-01"}


def test_keys_hosts_paths_methods_and_sizes_have_anthropics_errors() -> None:
    limits = Limits(max_body_bytes=1000)
    with client_of(api_key="secret", limits=limits) as client:
        for headers in ({}, {"x-api-key": "wrong"}, {"authorization": "Bearer wrong"}):
            client.headers.update(headers)
            message = error_of(post(client), 401, "authentication_error")
            assert "x-api-key" in message
        error_of(client.get("/v1/models", headers=VERSION), 401, "authentication_error")
        client.headers = {"x-api-key": "secret"}
        assert post(client).status_code == 200
        error_of(post(client, messages=user(text("a" * 1000))), 413, "request_too_large")
        error_of(client.get(MESSAGES), 405, "invalid_request_error")
        assert client.get(COUNT).headers["allow"] == "POST"
        error_of(client.post("/v1/messages/batches", json={}), 404, "not_found_error")
        error_of(client.post("/v1/complete", json={}, headers=VERSION), 404, "not_found_error")
        text_of_twice = error_of(client.post("/v1/v1/messages"), 404, "not_found_error")
        assert "has no /v1" in text_of_twice
        refused = client.post(MESSAGES, json={}, headers={"origin": "https://evil.example"})
        error_of(refused, 403, "permission_error")
        client.headers = {"authorization": "Bearer secret"}
        assert post(client).status_code == 200


def test_openais_paths_keep_openais_errors() -> None:
    with client_of(api_key="secret") as client:
        response = client.post("/v1/chat/completions", json={}, headers=VERSION)
    assert response.json()["error"]["code"] == "invalid_api_key"
    assert "request-id" not in response.headers


@pytest.mark.parametrize("path", [MESSAGES, COUNT])
def test_a_server_without_an_engine_answers_overloaded(path: str) -> None:
    engine = ScriptedEngine()
    engine.stopped = EngineStopped("The engine has stopped.")
    for unable in (engine, OsmiumError("no")):
        with client_of(unable) as client:
            error_of(post(client, path), 503, "overloaded_error")


def test_an_internal_error_is_an_api_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(MessageWriter, "body", fail)
    with client_of() as client:
        assert "ZeroDivisionError" in error_of(post(client), 500, "api_error")


def test_an_error_in_a_stream_is_an_error_event_and_the_end() -> None:
    with client_of(ScriptedEngine(fails_after=2)) as client:
        response = post(client, stream=True)
        error_of(post(client), 503, "overloaded_error")
    *_, last = events_of(response)
    assert last["type"] == "error"
    assert last["error"]["type"] == "overloaded_error"
    assert last["error"]["message"].startswith("The engine has stopped")
    assert last["request_id"] == response.headers["request-id"]
    assert "[DONE]" not in response.text and "message_stop" not in response.text


def test_a_template_that_fails_is_a_request_error() -> None:
    with client_of() as client:
        response = post(client, messages=user(text("refuse")))
    assert "not this one" in error_of(response, 400, "invalid_request_error")


# -- the wire --------------------------------------------------------------------------------------


def test_pings_come_with_the_comments_of_the_prefill(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("osmium.server.answer.PING_INTERVAL_S", 0.02)
    engine = ScriptedEngine("the end")
    engine.prefill.clear()
    with client_of(engine) as client:
        threading.Timer(0.1, engine.prefill.set).start()
        response = post(client, stream=True)
    first, *events = events_of(response)
    assert first["type"] == "message_start"
    kinds = [event["type"] for event in events]
    assert kinds[:2] == ["ping", "ping"], "the stream is not silent before the first token"
    count = len(engine.requests[0].ids)
    assert f": prefill 0/{count}\nevent: ping\n" in response.text
    assert first["message"]["usage"]["input_tokens"] == count


def test_models_have_both_apis_fields_for_anthropics_clients() -> None:
    with client_of(served_model_name="a/b") as client:
        plain = client.get("/v1/models").json()
        listed = client.get("/v1/models?limit=5", headers=VERSION).json()
        one = client.get("/v1/models/claude-x", headers=VERSION).json()
    (entry,) = listed["data"]
    assert entry == one
    assert (listed["has_more"], listed["first_id"], listed["last_id"]) == (False, "a/b", "a/b")
    assert (entry["type"], entry["display_name"], entry["id"]) == ("model", "a/b", "a/b")
    assert entry["created_at"].endswith("Z")
    assert set(plain) == {"object", "data"} and set(plain["data"][0]) < set(entry)


def test_a_disconnected_client_cancels_its_message() -> None:
    engine = ScriptedEngine("the end " * 100, context=10**6, pace_s=0.005)
    with client_of(engine) as client:
        body = {"messages": HELLO, "max_tokens": 500, "stream": True}
        with client.stream("POST", MESSAGES, json=body) as response:
            next(response.iter_lines())
    assert engine.requests[0].cancelled.is_set()


def test_the_start_of_claude_code_is_answered() -> None:
    with client_of() as client:
        assert client.head("/").status_code == 200
        response = client.post(f"{MESSAGES}?beta=true", json={"messages": HELLO, "max_tokens": 1})
    assert response.json()["stop_reason"] == "max_tokens"


# -- the OpenAPI document --------------------------------------------------------------------------


def test_requests_and_responses_are_those_of_the_openapi_document() -> None:
    said = f"I see</think>{TWO_CALLS}"
    body = {
        "messages": [
            {"role": "system", "content": [text("a")]}, *HELLO,
            {"role": "assistant", "content": [
                {"type": "thinking", "thinking": "a", "signature": "b"},
                {"type": "redacted_thinking", "data": "a"}, text("a", **CACHE), USE]},
            *user(result("t1", content=[text("a")], is_error=True), text("b"), result("t2")),
        ],
        "max_tokens": 1000, "tools": [{**WEATHER, "type": "custom"}, {"type": "bash_20250124"}],
        "system": [text(BILLING), text("a", **CACHE)], "stop_sequences": ["zz"], "temperature": 1,
        "tool_choice": {"type": "auto", "disable_parallel_tool_use": False}, **THINKING,
        "output_config": {"effort": "high"},
    }  # fmt: skip
    with client_of(engine_of(said)) as client:
        document = client.get("/openapi.json").json()

        def check(name: str, value: Any) -> None:
            schema = {"$ref": f"#/components/schemas/{name}", "components": document["components"]}
            jsonschema.validate(value, schema)

        check("MessagesRequest", body)
        response = client.post(MESSAGES, json=body)
        assert [block["type"] for block in response.json()["content"]][2:] == ["tool_use"] * 2
        check("MessageResponse", response.json())
        for event in events_of(client.post(MESSAGES, json={**body, "stream": True})):
            check("MessageEvent", event)
        check("TokenCount", client.post(COUNT, json=body).json())
        check("AnthropicErrorBody", post(client, max_tokens=0).json())
        wrong: list[dict[str, Any]] = [
            {"messages": user(IMAGE)}, {"system": [IMAGE]}, {"tools": [{"name": "a"}]},
            {"thinking": {"type": "x"}}, {"max_tokens": 0}, {"stop_sequences": [""]},
            {"messages": []}, {"output_config": {"format": {"type": "x"}}},
        ]  # fmt: skip
        for fields in wrong:
            with pytest.raises(jsonschema.ValidationError):
                check("MessagesRequest", {**body, **fields})
