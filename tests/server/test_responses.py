"""POST /v1/responses over the scripted engine: items in, items and events out."""

import json
from typing import Any

import pytest
from openai.types.responses import Response, ResponseStreamEvent
from openai.types.responses.input_token_count_response import InputTokenCountResponse
from openai.types.responses.response_item_list import ResponseItemList
from pydantic import BaseModel, TypeAdapter

from osmium.errors import RequestError
from osmium.server.responses_store import KeptResponse, ResponseStore
from tests.server.scripted import PATIENCE_S, TOKENIZER, ScriptedEngine, client_of
from tests.server.test_tool_calls import CALL, TWO_CALLS, XML_TEMPLATE

PATH = "/v1/responses"

WEATHER: dict[str, Any] = {
    "type": "function",
    "name": "weather",
    "strict": True,
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        "required": ["city", "days"],
        "additionalProperties": False,
    },
}

HISTORY_TEMPLATE = (
    "{%- for tool in tools or [] %}{{ tool | tojson }}{% endfor %}"
    "{%- for m in messages %}[{{ m.role }}|{{ m.reasoning_content }}|{{ m.content }}"
    "{%- for c in m.tool_calls or [] %}|{{ c.function.name }}{{ c.function.arguments | tojson }}"
    "{%- endfor %}]{% endfor %}assistant:"
)
"""A template that shows every part of the messages."""

THOUGHT = "I think.\n</think>\n\n"

EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


def engine_of(
    text: str = "the end", template: str = XML_TEMPLATE, **options: Any
) -> ScriptedEngine:
    return ScriptedEngine(text, template=template, **{"context": 4000, **options})


def post(client: Any, given: Any = "Hello", **fields: Any) -> Any:
    return client.post(PATH, json={"input": given, **fields})


def checked(kind: type[BaseModel], body: dict[str, Any]) -> dict[str, Any]:
    """A body that the openai package's type accepts, strictly."""
    kind.model_validate_json(json.dumps(body), strict=True)
    return body


def made(client: Any, given: Any = "Hello", **fields: Any) -> dict[str, Any]:
    answer = post(client, given, **fields)
    assert answer.status_code == 200, answer.text
    return checked(Response, answer.json())


def events_of(text: str) -> list[dict[str, Any]]:
    """The events of a stream: named, numbered, and of the openai package's types."""
    blocks = [block for block in text.split("\n\n") if block and not block.startswith(":")]
    found = []
    for number, block in enumerate(blocks):
        name, _, data = block.partition("\n")
        event: dict[str, Any] = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}" and event["sequence_number"] == number
        EVENT.validate_json(data.removeprefix("data: "), strict=True)
        found.append(event)
    return found


def streamed(client: Any, given: Any = "Hello", **fields: Any) -> list[dict[str, Any]]:
    return events_of(post(client, given, stream=True, **fields).text)


def prompt_of(items: Any, **fields: Any) -> str:
    """The prompt of a request, in HISTORY_TEMPLATE."""
    engine = engine_of(template=HISTORY_TEMPLATE)
    with client_of(engine) as client:
        answer = post(client, items, **fields)
    assert answer.status_code == 200, answer.text
    return engine.requests[-1].prompt


def refusal(items: Any = "Hello", **fields: Any) -> dict[str, Any]:
    with client_of(engine_of()) as client:
        answer = post(client, items, **fields)
    assert 400 <= answer.status_code < 500, answer.text
    error: dict[str, Any] = answer.json()["error"]
    return error


# -- the response ----------------------------------------------------------------------------------


def test_a_response_repeats_its_parameters_and_counts_its_tokens() -> None:
    fields: dict[str, Any] = {
        "instructions": "Be brief.", "temperature": 0.5, "top_p": 0.9, "max_output_tokens": 100,
        "metadata": {"a": "b"}, "user": "u", "safety_identifier": "s", "prompt_cache_key": "k",
        "parallel_tool_calls": False, "max_tool_calls": 3, "reasoning": {"effort": "low"},
        "text": {"format": {"type": "text"}}, "tools": [WEATHER], "tool_choice": "auto",
    }  # fmt: skip
    with client_of(engine_of("the end")) as client:
        body = made(client, model="x", **fields)
    for name, value in fields.items():
        if name not in ("text", "reasoning"):
            assert body[name] == value
    assert body["text"] == {"format": {"type": "text"}, "verbosity": "medium"}
    assert body["reasoning"]["effort"] == "low" and body["model"] == "scripted"
    (message,) = body["output"]
    assert message["content"][0]["text"] == "the end" and message["status"] == "completed"
    usage = body["usage"]
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
    assert usage["output_tokens"] == len(TOKENIZER.encode("the end")) + 1
    assert usage["output_tokens_details"]["reasoning_tokens"] == 0


def test_reasoning_text_and_calls_are_items_in_order() -> None:
    with client_of(engine_of(THOUGHT + TWO_CALLS)) as client:
        body = made(client, tools=[WEATHER], enable_thinking=True)
    kinds = [item["type"] for item in body["output"]]
    assert kinds == ["reasoning", "message", "function_call", "function_call"]
    assert body["output"][0]["content"] == [{"type": "reasoning_text", "text": "I think."}]
    assert body["output"][0]["summary"] == [] and "encrypted_content" not in body["output"][0]
    assert json.loads(body["output"][3]["arguments"]) == {"city": "Rome", "days": 3}
    tokens = body["usage"]["output_tokens_details"]["reasoning_tokens"]
    assert tokens == len(TOKENIZER.encode("I think.\n</think>"))


@pytest.mark.parametrize("stream", [False, True])
def test_without_parallel_tool_calls_the_first_call_is_the_only_one(stream: bool) -> None:
    with client_of(engine_of(TWO_CALLS)) as client:
        fields = {"tools": [WEATHER], "parallel_tool_calls": False}
        body = streamed(client, **fields)[-1]["response"] if stream else made(client, **fields)
    assert [item["type"] for item in body["output"]] == ["message", "function_call"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_response_cut_at_its_limit_is_incomplete(stream: bool) -> None:
    with client_of(engine_of("the end")) as client:
        if stream:
            last = streamed(client, max_output_tokens=3)[-1]
            assert last["type"] == "response.incomplete"
            body = last["response"]
        else:
            body = made(client, max_output_tokens=3)
    assert body["status"] == "incomplete" and body["completed_at"] is None
    assert body["incomplete_details"] == {"reason": "max_output_tokens"}
    assert body["output"][0]["status"] == "incomplete"
    assert body["output"][0]["content"][0]["text"] == TOKENIZER.decode(
        TOKENIZER.encode("the end")[:3]
    )


def test_arguments_of_a_call_that_is_cut_stay_invalid_so_that_no_client_runs_it() -> None:
    length = len(CALL.partition("aris")[0])
    with client_of(engine_of(CALL)) as client:
        body = made(client, tools=[WEATHER], max_output_tokens=length)
        events = streamed(client, tools=[WEATHER], max_output_tokens=length)
    for output in (body["output"], events[-1]["response"]["output"]):
        assert output[1]["status"] == "incomplete"
        with pytest.raises(ValueError, match="Unterminated"):
            json.loads(output[1]["arguments"])
    deltas = [event["delta"] for event in events if event["type"].endswith("arguments.delta")]
    assert "".join(deltas) == events[-1]["response"]["output"][1]["arguments"]


def test_a_call_without_its_end_in_a_complete_response_is_completed() -> None:
    with client_of(engine_of(CALL.removesuffix("\n</function>\n</tool_call>"))) as client:
        call = made(client, tools=[WEATHER])["output"][1]
    assert call["status"] == "completed"
    assert json.loads(call["arguments"]) == {"city": "Paris", "days": 3}


def test_a_response_of_reasoning_alone_has_an_empty_message() -> None:
    with client_of(engine_of("I think.")) as client:
        output = made(client, enable_thinking=True)["output"]
    assert [item["type"] for item in output] == ["reasoning", "message"]
    assert output[1]["content"][0]["text"] == ""


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("template", ["", "<think>"])
def test_log_probabilities_are_those_of_the_messages_tokens(stream: bool, template: str) -> None:
    thinks = bool(template)
    fields: dict[str, Any] = {
        "include": ["message.output_text.logprobs"], "top_logprobs": 2, "enable_thinking": thinks,
    }  # fmt: skip
    with client_of(engine_of(f"{THOUGHT if thinks else ''}the end")) as client:
        if stream:
            events = streamed(client, **fields)
            deltas = [one for one in events if one["type"] == "response.output_text.delta"]
            entries = [entry for delta in deltas for entry in delta["logprobs"]]
            body = events[-1]["response"]
        else:
            body = made(client, **fields)
            entries = body["output"][-1]["content"][0]["logprobs"]
    assert "".join(entry["token"] for entry in entries) == "the end"
    assert all(len(entry["top_logprobs"]) == 2 for entry in entries)
    assert body["output"][-1]["content"][0]["logprobs"] == entries


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, None),
        ({"include": ["message.output_text.logprobs"]}, 0),
        ({"top_logprobs": 3}, 3),
        ({"top_logprobs": 0}, None),
    ],
)
def test_log_probabilities_are_computed_when_they_are_asked_for(
    fields: dict[str, Any], expected: int | None
) -> None:
    engine = engine_of()
    with client_of(engine) as client:
        made(client, **fields)
    assert engine.requests[-1].params.logprobs == expected


def test_sampling_fields_reach_the_engine() -> None:
    engine = engine_of(defaults={"temperature": 0.6, "top_p": 0.8})
    with client_of(engine) as client:
        assert made(client)["temperature"] == 0.6
        made(client, temperature=0, top_p=0.5, max_output_tokens=9, top_k=3, seed=4, min_p=0.1)
    params = engine.requests[-1].params
    assert (params.temperature, params.top_p, params.max_tokens) == (0, 0.5, 9)
    assert (params.top_k, params.seed, params.min_p) == (3, 4, 0.1)


# -- streams ---------------------------------------------------------------------------------------


def test_events_of_a_stream_come_in_order() -> None:
    with client_of(engine_of(THOUGHT + CALL)) as client:
        answer = post(client, stream=True, tools=[WEATHER], enable_thinking=True)
        events = events_of(answer.text)
        whole = made(client, tools=[WEATHER], enable_thinking=True)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert "[DONE]" not in answer.text
    kinds = [event["type"].removeprefix("response.") for event in events]
    order = [kind for i, kind in enumerate(kinds) if kind != kinds[i - 1] or i == 0]
    assert order == [
        "created", "in_progress",
        "output_item.added", "content_part.added", "reasoning_text.delta", "reasoning_text.done",
        "content_part.done", "output_item.done",
        "output_item.added", "content_part.added", "output_text.delta", "output_text.done",
        "content_part.done", "output_item.done",
        "output_item.added", "function_call_arguments.delta", "function_call_arguments.done",
        "output_item.done", "completed",
    ]  # fmt: skip
    assert events[0]["response"]["output"] == [] and events[0]["response"]["usage"] is None
    final = events[-1]["response"]
    checked(Response, final)
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert done == final["output"] and final["id"] == events[0]["response"]["id"]
    for name in ("type", "content", "arguments", "name", "status"):
        assert [item.get(name) for item in final["output"]] == [
            item.get(name) for item in whole["output"]
        ]
    assert final["usage"] == whole["usage"]


def test_pieces_of_a_stream_add_up_to_their_items() -> None:
    with client_of(engine_of(THOUGHT + TWO_CALLS)) as client:
        events = streamed(
            client, tools=[WEATHER], enable_thinking=True, reasoning={"summary": "auto"}
        )
    texts: dict[tuple[int, str], str] = {}
    for event in events:
        kind, _, step = event["type"].removeprefix("response.").rpartition(".")
        if step == "delta":
            key = (event["output_index"], kind)
            texts[key] = texts.get(key, "") + event["delta"]
    output = events[-1]["response"]["output"]
    assert texts[0, "reasoning_text"] == texts[0, "reasoning_summary_text"] == "I think."
    assert output[0]["summary"] == [{"type": "summary_text", "text": "I think."}]
    assert texts[1, "output_text"] == output[1]["content"][0]["text"] == "I look it up."
    for index in (2, 3):
        assert texts[index, "function_call_arguments"] == output[index]["arguments"]
    ids = {event["item_id"] for event in events if "item_id" in event}
    assert ids == {item["id"] for item in output}


def test_the_first_events_come_before_the_prefill() -> None:
    engine = engine_of()
    engine.prefill.clear()
    with (
        client_of(engine) as client,
        client.stream("POST", PATH, json={"input": "Hello", "stream": True}) as answer,
    ):
        lines = answer.iter_lines()
        assert next(lines) == "event: response.created"
        engine.prefill.set()
        assert any("response.completed" in line for line in lines)


@pytest.mark.parametrize("fails_after", [0, 3])
def test_a_failed_stream_ends_with_the_response_and_the_error(fails_after: int) -> None:
    with client_of(engine_of("the end", fails_after=fails_after)) as client:
        events = streamed(client)
        plain = post(client)
        kept = client.get(f"{PATH}/{events[0]['response']['id']}")
    failed, error = events[-2:]
    assert failed["type"] == "response.failed" and error["type"] == "error"
    body = checked(Response, failed["response"])
    assert body["status"] == "failed" and body["error"]["code"] == "server_error"
    assert "the card is gone" in body["error"]["message"]
    assert error["message"] == body["error"]["message"]
    assert [item["status"] for item in body["output"]] == (["incomplete"] if fails_after else [])
    assert plain.status_code == 503 and kept.status_code == 404


# -- input -----------------------------------------------------------------------------------------


def text_item(role: str, text: str, kind: str = "input_text") -> dict[str, Any]:
    return {"type": "message", "role": role, "content": [{"type": kind, "text": text}]}


def test_instructions_come_first_and_roles_are_those_of_the_chat() -> None:
    items = [
        text_item("developer", "Dev."),
        {"role": "user", "content": "Hi"},
        text_item("assistant", "Hello", "output_text"),
        text_item("user", "Go"),
    ]
    assert prompt_of(items, instructions="Inst.") == (
        "[system||Inst.\n\nDev.][user||Hi][assistant||Hello][user||Go]assistant:"
    )
    assert prompt_of("Hi") == "[user||Hi]assistant:"


def test_reasoning_text_and_calls_of_one_turn_are_one_message() -> None:
    items = [
        {"role": "user", "content": "Hi"},
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "R"}]},
        text_item("assistant", "T", "output_text"),
        {"type": "function_call", "call_id": "1", "name": "f", "arguments": '{"a": 1}'},
        {"type": "function_call", "call_id": "2", "name": "g", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "1", "output": "one"},
        {"type": "function_call_output", "call_id": "2",
         "output": [{"type": "input_text", "text": "two"}]},
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "S"}]},
        text_item("assistant", "U", "output_text"),
        {"type": "message", "role": "assistant",
         "content": [{"type": "refusal", "refusal": "No."}]},
    ]  # fmt: skip
    assert prompt_of(items) == (
        '[user||Hi][assistant|R|T|f{"a": 1}|g{}][tool||one][tool||two]'
        "[assistant|S|U][assistant||No.]assistant:"
    )


def test_encrypted_content_brings_the_reasoning_back() -> None:
    engine = engine_of("Ünder</think>\n\nthe end", HISTORY_TEMPLATE + "<think>\n")
    with client_of(engine) as client:
        fields = {"include": ["reasoning.encrypted_content"], "store": False}
        reasoning, message = made(client, **fields)["output"]
        assert reasoning.pop("content")[0]["text"] == "Ünder"
        made(client, [{"role": "user", "content": "Hi"}, reasoning, message], store=False)
    assert "[assistant|Ünder|the end]" in engine.requests[-1].prompt


@pytest.mark.parametrize(
    "encrypted", ["gAAAAABfoo", "osmium-reasoning-1:!", "osmium-reasoning-1:_w=="]
)
def test_encrypted_content_of_another_server_is_reported(encrypted: str) -> None:
    item = {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": encrypted}
    with client_of(engine_of()) as client:
        answer = post(client, [{"role": "user", "content": "Hi"}, item])
    assert answer.status_code == 200
    assert answer.headers["x-osmium-ignored"] == "input.encrypted_content"


def test_items_of_tools_that_other_servers_run_are_left_out_and_reported() -> None:
    items = [{"role": "user", "content": "Hi"}, {"type": "web_search_call", "id": "ws_1"}]
    with client_of(engine_of()) as client:
        answer = post(client, items)
    assert answer.status_code == 200
    assert answer.headers["x-osmium-ignored"] == "input.web_search_call"


IMAGE = {"type": "input_image", "image_url": "data:image/png;base64,AAAA"}


@pytest.mark.parametrize(
    ("items", "param"),
    [
        ([{"role": "user", "content": [{"type": "input_text", "text": "a"}, IMAGE]}],
         "input[0].content[1]"),
        ([{"role": "user", "content": [{"type": "input_file", "file_id": "f"}]}],
         "input[0].content[0]"),
        ([{"role": "user", "content": [{"type": "input_audio"}]}], "input[0].content[0]"),
        ([{"role": "user", "content": [{"type": "input_text"}]}], "input[0].content[0]"),
        ([{"role": "user", "content": [7]}], "input[0].content[0]"),
        ([{"role": "user", "content": None}], "input[0].content"),
        ([{"role": "user"}], "input[0].content"),
        ([{"role": "tool", "content": "x"}], "input[0].role"),
        ([{"type": "message", "content": "x"}], "input[0].role"),
        ([{"type": "nonsense"}], "input[0].type"),
        ([{}], "input[0].type"),
        ([{"type": "computer_call_output", "call_id": "1", "output": {}}], "input[0].type"),
        ([{"type": "compaction", "encrypted_content": "x"}], "input[0].type"),
        ([{"type": "function_call", "name": "f", "arguments": "{}"}], "input[0].call_id"),
        ([{"type": "function_call", "call_id": "1", "arguments": "{}"}], "input[0].name"),
        ([{"type": "function_call", "call_id": "1", "name": "f"}], "input[0].arguments"),
        ([{"type": "function_call_output", "call_id": "1", "output": "x"}], "input[0].call_id"),
        ([{"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
          {"type": "function_call_output", "call_id": "1", "output": [IMAGE]}],
         "input[1].output[0]"),
        ([{"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
          {"type": "function_call_output", "call_id": "1"}], "input[1].output"),
        ([{"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}",
           "namespace": []}], "input[0].namespace"),
        ([{"type": []}], "input[0].type"),
        ([{"type": "reasoning", "summary": 3}], "input[0].summary"),
        ([{"type": "item_reference", "id": "msg_x"}], "input[0].id"),
        ([{"id": "msg_x"}], "input[0].id"),
        ([], "input"),
        (None, "input"),
        ([{"type": "custom_tool_call", "call_id": "1", "name": " ", "input": ""}],
         "input[0].name"),
        (["text"], "input[0]"),
        (3, "input"),
        ([{"role": "user", "content": "x"}] * 8193, "input"),
    ],
)  # fmt: skip
def test_a_wrong_item_is_refused_by_its_path(items: Any, param: str) -> None:
    assert refusal(items)["param"] == param


def test_a_prompt_that_is_too_long_is_refused_as_in_a_chat() -> None:
    error = refusal("word " * 4000)
    assert error["code"] == "context_length_exceeded" and error["param"] == "input"
    assert "maximum context length is 4000 tokens" in error["message"]


def test_arguments_that_are_nested_too_deep_are_refused_by_their_path() -> None:
    item = {"type": "function_call", "call_id": "1", "name": "f", "arguments": "[" * 500}
    error = refusal([item])
    assert error["code"] == "json_too_deep"
    assert error["message"].startswith("input[0].arguments has 500 lists")


def test_an_error_of_the_template_names_the_input() -> None:
    assert refusal("refuse")["param"] == "input"


# -- tools -----------------------------------------------------------------------------------------


NAMESPACE: dict[str, Any] = {
    "type": "namespace", "name": "agents", "description": "Sub-agents.",
    "tools": [{**WEATHER, "description": "Of the namespace."},
              {**WEATHER, "name": "wait", "description": "Waits."},
              {"type": "mcp"}],
}  # fmt: skip


def test_codex_tools_are_offered_or_reported() -> None:
    fields = {"tools": [WEATHER, NAMESPACE, {"type": "web_search"}], "client_metadata": {"a": "b"}}
    prompt = prompt_of("Hi", **fields)
    assert '"name": "weather"' in prompt and '"name": "agents__weather"' in prompt
    assert '"name": "wait"' in prompt and "agents: Sub-agents.\\n\\nOf the namespace." in prompt
    assert '"strict": true' in prompt and prompt.count("Sub-agents.") == 1
    with client_of(engine_of()) as client:
        answer = post(client, **fields)
    assert answer.headers["x-osmium-ignored"] == "tools.mcp, tools.web_search"
    assert [tool["type"] for tool in checked(Response, answer.json())["tools"]] == [
        "function", "namespace",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "own", "namespace"),
    [("weather", "weather", None), ("agents__weather", "weather", "agents"),
     ("wait", "wait", "agents")],
)  # fmt: skip
def test_a_call_of_a_namespace_has_its_own_name_and_comes_back(
    name: str, own: str, namespace: str | None
) -> None:
    engine = engine_of(CALL.replace("=weather", f"={name}"))
    tools = [WEATHER, {**NAMESPACE, "tools": NAMESPACE["tools"][:2]}]
    with client_of(engine) as client:
        call = made(client, tools=tools)["output"][1]
    assert (call["name"], call.get("namespace")) == (own, namespace)
    output = {"type": "function_call_output", "call_id": call["call_id"], "output": "Sun"}
    prompt = prompt_of([{"role": "user", "content": "Hi"}, call, output], tools=tools)
    assert f'|{name}{{"city": "Paris", "days": 3}}]' in prompt


@pytest.mark.parametrize("stream", [False, True])
def test_a_custom_tool_gets_a_text(stream: bool) -> None:
    grammar = {"type": "grammar", "syntax": "lark", "definition": 'start: "x"'}
    tool = {"type": "custom", "name": "patch", "description": "Edits files.", "format": grammar}
    text = '*** Begin\n+"a"\n*** End'
    call = (
        f"<tool_call>\n<function=patch>\n<parameter=input>\n{text}\n</parameter>\n</function>\n"
        "</tool_call>"
    )
    with client_of(engine_of(call)) as client:
        if stream:
            events = streamed(client, tools=[tool])
            kinds = [event["type"].removeprefix("response.") for event in events[2:-1]]
            assert kinds == ["output_item.added", "custom_tool_call_input.delta",
                             "custom_tool_call_input.done", "output_item.done"]  # fmt: skip
            (item,) = events[-1]["response"]["output"]
        else:
            (item,) = made(client, tools=[tool])["output"]
    assert (item["type"], item["name"], item["input"]) == ("custom_tool_call", "patch", text)
    output = {"type": "custom_tool_call_output", "call_id": item["call_id"], "output": "Done"}
    prompt = prompt_of([{"role": "user", "content": "Hi"}, item, output], tools=[tool])
    assert f"|patch{json.dumps({'input': text})}][tool||Done]" in prompt
    assert "this grammar (lark)" in prompt


@pytest.mark.parametrize(
    ("tools", "param"),
    [
        ([{"type": "function"}], "tools[0].name"),
        ([WEATHER, WEATHER], "tools[1].name"),
        ([{"name": "x"}], "tools[0].type"),
        ([{**WEATHER, "parameters": 3}], "tools[0].parameters"),
        ([{**WEATHER, "strict": "yes"}], "tools[0].strict"),
        ([WEATHER, {"type": "web_search"}, {"type": "function"}], "tools[2].name"),
        ([{"type": "namespace", "name": "a"}], "tools[0].tools"),
        ([{"type": "namespace", "name": "a", "tools": [{"type": "function"}]}],
         "tools[0].tools[0].name"),
        ([{"type": "namespace", "name": "a", "tools": [3]}], "tools[0].tools[0]"),
        ([{"type": "custom", "name": "a", "format": "x"}], "tools[0].format"),
        ([{"type": "custom"}], "tools[0].name"),
        ([{"type": "custom", "name": "a", "description": {"b": 1}}], "tools[0].description"),
        (["x"], "tools[0]"),
        ([{"type": "web_search"}] * 1025, "tools"),
        ([{"type": "namespace", "name": "a",
           "tools": [{"type": "function", "name": f"f{i}"} for i in range(1025)]}], "tools"),
    ],
)  # fmt: skip
def test_a_malformed_tool_is_refused_by_its_path(tools: Any, param: str) -> None:
    error = refusal(tools=tools)
    assert error["param"] == param and "function." not in error["message"]


def test_the_form_of_a_chats_tools_is_accepted() -> None:
    function = {key: value for key, value in WEATHER.items() if key != "type"}
    with client_of(engine_of(CALL)) as client:
        body = made(client, tools=[{"type": "function", "function": function}])
    assert body["output"][1]["name"] == "weather" and body["tools"] == [WEATHER]


def test_tool_choice_none_offers_no_tools() -> None:
    with client_of(engine_of(CALL)) as client:
        body = made(client, tools=[WEATHER], tool_choice="none")
    assert [item["type"] for item in body["output"]] == ["message"]


@pytest.mark.parametrize(
    ("choice", "param"),
    [
        ({"type": "web_search_preview"}, "tool_choice.type"),
        ({"type": "function"}, "tool_choice.name"),
        ({"type": "function", "name": "weather", "namespace": []}, "tool_choice.namespace"),
        ({"type": "allowed_tools", "mode": "auto"}, "tool_choice.tools"),
        ({"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function"}]},
         "tool_choice.tools[0].name"),
        ({}, "tool_choice.type"),
        ("sometimes", "tool_choice"),
        (3, "tool_choice"),
    ],
)  # fmt: skip
def test_a_wrong_tool_choice_is_refused_by_name(choice: Any, param: str) -> None:
    assert refusal(tools=[WEATHER], tool_choice=choice)["param"] == param


# -- fields ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"background": True}, "background"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"messages": []}, "messages"),
        ({"max_tokens": 5}, "max_tokens"),
        ({"reasoning_effort": "low"}, "reasoning_effort"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"n": 2}, "n"),
        ({"logprobs": True}, "logprobs"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_output_tokens": "x"}, "max_output_tokens"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"temperature": -1}, "temperature"),
        ({"reasoning": {"effort": "banana"}}, "reasoning.effort"),
        ({"reasoning": {"summary": "long"}}, "reasoning.summary"),
        ({"reasoning": "high"}, "reasoning"),
        ({"truncation": "middle"}, "truncation"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
        ({"text": {"format": {"type": "json_schema", "name": "a"}}}, "text.format.schema"),
        ({"text": {"format": {"type": "json_schema", "name": "a", "schema": {}, "strict": 1}}},
         "text.format.strict"),
        ({"text": {"verbosity": "loud"}}, "text.verbosity"),
        ({"metadata": {"a": 1}}, "metadata"),
        ({"include": "x"}, "include"),
        ({"previous_response_id": "resp_x"}, "previous_response_id"),
        ({"stream": "yes"}, "stream"),
    ],
)  # fmt: skip
def test_a_field_that_cannot_be_honoured_is_refused_by_name(
    fields: dict[str, Any], param: str
) -> None:
    error = refusal(**fields)
    assert str(error["param"]).startswith(param) and param.split(".")[0] in error["message"]


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"truncation": "auto"}, "truncation"),
        ({"truncation": "disabled", "background": False, "service_tier": "auto"}, None),
        ({"service_tier": "flex"}, "service_tier"),
        ({"text": {"verbosity": "low", "tone": "x"}}, "text.tone, text.verbosity"),
        ({"reasoning": {"mode": "pro", "foo": 1}}, "reasoning.foo, reasoning.mode"),
        ({"include": ["file_search_call.results", "x"]}, "include.x"),
        ({"stream_options": {"include_obfuscation": True, "foo": 1}}, "stream_options.foo"),
        ({"temprature": 1, "context_management": []}, "temprature, context_management"),
        ({"prompt_cache_key": "k", "client_metadata": {}, "max_tool_calls": 1}, None),
        ({"text": None, "reasoning": None, "tools": None, "include": None, "metadata": None}, None),
    ],
)  # fmt: skip
def test_a_field_without_effect_is_reported(fields: dict[str, Any], names: str | None) -> None:
    with client_of(engine_of()) as client:
        answer = post(client, **fields)
    assert answer.status_code == 200, answer.text
    checked(Response, answer.json())
    assert answer.headers.get("x-osmium-ignored") == names


def test_reasoning_options_are_those_of_the_chat() -> None:
    with client_of(engine_of(THOUGHT + "the end")) as client:
        shown = made(client, reasoning={"enabled": True})["output"]
        hidden = made(client, reasoning={"enabled": True, "exclude": True})["output"]
        none = made(client, enable_thinking=True, reasoning={"effort": "none"})["output"]
    assert [item["type"] for item in shown] == ["reasoning", "message"]
    assert [item["type"] for item in hidden] == ["message"]
    assert none[0]["type"] == "reasoning", "the more specific field counts"


# -- kept responses --------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_previous_response_id_continues_the_conversation(stream: bool) -> None:
    engine = engine_of(CALL, HISTORY_TEMPLATE + XML_TEMPLATE.partition("{#-")[2].join(("{#-", "")))
    with client_of(engine) as client:
        fields = {"tools": [WEATHER], "instructions": "Old."}
        first = streamed(client, **fields)[-1]["response"] if stream else made(client, **fields)
        output = {"type": "function_call_output", "output": "Sun",
                  "call_id": first["output"][1]["call_id"]}  # fmt: skip
        second = made(client, [output], previous_response_id=first["id"], instructions="New.")
        assert second["previous_response_id"] == first["id"]
        made(client, "Bye", previous_response_id=second["id"])
    call = 'I look it up.|weather{"city": "Paris", "days": 3}]'
    assert engine.requests[1].prompt == (
        f"[system||New.][user||Hello][assistant||{call}[tool||Sun]assistant:"
    )
    assert engine.requests[2].prompt == (
        f"[user||Hello][assistant||{call}[tool||Sun][assistant||{CALL}][user||Bye]assistant:"
    )


def test_a_response_is_kept_until_it_is_deleted() -> None:
    with client_of(engine_of()) as client:
        body = made(client)
        path = f"{PATH}/{body['id']}"
        assert client.get(path).json() == body
        cancel = client.post(f"{path}/cancel")
        assert cancel.status_code == 400 and "completed" in cancel.json()["error"]["message"]
        assert client.get(path, params={"stream": "true"}).status_code == 400
        deleted = client.delete(path)
        assert deleted.json() == {"id": body["id"], "object": "response", "deleted": True}
        for answer in (client.get(path), client.delete(path), client.post(f"{path}/cancel"),
                       client.get(f"{path}/input_items")):  # fmt: skip
            assert answer.status_code == 404
            assert answer.json()["error"]["code"] == "response_not_found"
        missing = post(client, previous_response_id=body["id"])
    assert missing.status_code == 400
    assert missing.json()["error"]["code"] == "previous_response_not_found"


@pytest.mark.parametrize("fields", [{}, {"input": None}, {"input": []}])
def test_a_response_is_continued_without_input(fields: dict[str, Any]) -> None:
    engine = engine_of(template=HISTORY_TEMPLATE)
    with client_of(engine) as client:
        first = made(client)
        answer = client.post(PATH, json={"previous_response_id": first["id"], **fields})
        missing = client.post(PATH, json=fields)
    assert answer.status_code == 200, answer.text
    assert engine.requests[-1].prompt == "[user||Hello][assistant||the end]assistant:"
    assert missing.status_code == 400
    assert missing.json()["error"]["param"] == "input"


def test_the_output_of_an_unknown_call_is_a_bad_request() -> None:
    output = {"type": "function_call_output", "call_id": "call_1", "output": "Sun"}
    with client_of(engine_of()) as client:
        answer = post(client, [output])
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (400, "call_not_found")
    assert error["param"] == "input[0].call_id"


@pytest.mark.parametrize("stream", [False, True])
def test_a_response_with_store_false_is_not_kept(stream: bool) -> None:
    with client_of(engine_of()) as client:
        if stream:
            body = streamed(client, store=False)[-1]["response"]
        else:
            body = made(client, store=False)
        assert body["store"] is False
        assert client.get(f"{PATH}/{body['id']}").status_code == 404


def test_an_item_is_referenced_by_its_id() -> None:
    engine = engine_of(template=HISTORY_TEMPLATE)
    with client_of(engine) as client:
        first = made(client)
        items = client.get(f"{PATH}/{first['id']}/input_items").json()["data"]
        references = [
            {"type": "item_reference", "id": items[0]["id"]},
            {"id": first["output"][0]["id"]},
            {"role": "user", "content": "Again"},
        ]
        made(client, references)
    assert engine.requests[-1].prompt == (
        "[user||Hello][assistant||the end][user||Again]assistant:"
    )


def test_input_items_are_listed_in_pages() -> None:
    items = [{"role": "user", "content": str(i)} for i in range(5)]
    items += [{"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
              {"type": "function_call_output", "call_id": "1", "output": "x"}]  # fmt: skip
    with client_of(engine_of()) as client:
        path = f"{PATH}/{made(client, items)['id']}/input_items"
        whole = checked(ResponseItemList, client.get(path, params={"order": "asc"}).json())
        ids = [item["id"] for item in whole["data"]]
        assert len(ids) == 7 and not whole["has_more"]
        page = client.get(path, params={"limit": 2, "after": ids[5]}).json()
        assert [item["id"] for item in page["data"]] == [ids[4], ids[3]] and page["has_more"]
        assert (page["first_id"], page["last_id"]) == (ids[4], ids[3])
        for query in ({"limit": "0"}, {"limit": "x"}, {"order": "up"}, {"after": "msg_x"},
                      {"limit": "9" * 30}):  # fmt: skip
            answer = client.get(path, params=query)
            assert answer.status_code == 400 and answer.json()["error"]["param"] in query


def kept(response_id: str, size: int = 0) -> KeptResponse:
    item = {"type": "message", "id": f"msg_{response_id}"}
    return KeptResponse({"id": response_id, "output": [item]}, ({"id": "shared"},), size, 1)


def test_the_store_drops_the_least_recently_used_responses() -> None:
    store = ResponseStore(max_responses=3, max_bytes=1000)
    for name in "abc":
        store.keep(kept(name))
    store.get("a")
    store.keep(kept("d"))
    with pytest.raises(RequestError, match="'b'"):
        store.previous("b")
    assert store.item("msg_b") is None and store.item("msg_a") and store.item("shared")
    store.keep(kept("e", 999))
    assert store.get("e") and store.item("msg_a") is None
    store.keep(kept("f", 5000))
    with pytest.raises(RequestError):
        store.get("f")
    assert store.item("shared") is None, "an item without a response is dropped"


def test_input_tokens_are_those_of_the_response() -> None:
    fields = {"instructions": "Be brief.", "tools": [WEATHER]}
    with client_of(engine_of()) as client:
        usage = made(client, **fields)["usage"]
        answer = client.post(f"{PATH}/input_tokens", json={"input": "Hello", **fields})
        for wrong in ({"input": "refuse"}, {"input": "x", "temperature": -1}):
            assert client.post(f"{PATH}/input_tokens", json=wrong).status_code == 400
    counted = checked(InputTokenCountResponse, answer.json())
    assert counted["input_tokens"] == usage["input_tokens"]


def test_other_methods_and_compact_are_refused() -> None:
    with client_of(engine_of()) as client:
        assert client.get(PATH).status_code == 405
        put = client.put(f"{PATH}/resp_1")
        assert put.status_code == 405 and put.headers["allow"] == "DELETE, GET, HEAD"
        assert "use DELETE, GET, HEAD." in put.json()["error"]["message"]
        compact = client.post(f"{PATH}/compact", json={})
    assert compact.status_code == 404
    assert compact.json()["error"]["code"] == "unsupported_endpoint"


def test_a_dropped_stream_cancels_its_request() -> None:
    engine = engine_of("the end " * 100, pace_s=0.01, context=10**6)
    with (
        client_of(engine) as client,
        client.stream("POST", PATH, json={"input": "Hello", "stream": True}) as answer,
    ):
        next(answer.iter_lines())
    assert engine.requests[0].done.wait(PATIENCE_S)
