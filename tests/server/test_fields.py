"""No field of a request vanishes: each is honoured, refused by name, or reported as ignored."""

import json
import logging
from typing import Any

import h11
import pytest

from osmium.errors import RequestError
from osmium.server.fields import (
    CHAT_ONLY,
    HINTS,
    MAX_LOGGED,
    MAX_NAMES,
    REFUSED,
    IgnoredFields,
    unknown_fields,
)
from osmium.server.limits import MAX_TOOLS
from osmium.server.schema import ChatRequest, CompletionRequest, parse
from osmium.server.thinking import (
    EFFORTS,
    efforts_to_try,
    shows_reasoning,
    thinking_budget,
    thinking_options,
)
from tests.server.scripted import ScriptedEngine, client_of

HELLO = [{"role": "user", "content": "Hello"}]
TOOL = {"type": "function", "function": {"name": "find", "parameters": {"type": "object"}}}


def post(client: Any, path: str = "/v1/chat/completions", **fields: Any) -> Any:
    prompt = {"messages": HELLO} if "chat" in path else {"prompt": "Hello"}
    return client.post(path, json={**prompt, **fields})


def ignored(**fields: Any) -> tuple[str, ...]:
    return unknown_fields(json.dumps(fields).encode(), ChatRequest.__struct_fields__)


# -- refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_field_that_would_change_the_answer_is_refused_by_name(name: str) -> None:
    with pytest.raises(RequestError) as caught:
        ignored(**{name: {"some": "value"}})
    assert (caught.value.param, caught.value.code) == (name, "unsupported_value")
    assert ignored(**{name: None}) == ()
    for harmless in REFUSED[name][0]:
        assert ignored(**{name: harmless}) == ()


@pytest.mark.parametrize(
    ("name", "value"),
    [("length_penalty", True), ("use_beam_search", 0), ("top_a", False), ("mirostat", 1)],
)
def test_a_number_is_no_flag(name: str, value: Any) -> None:
    with pytest.raises(RequestError):
        ignored(**{name: value})


@pytest.mark.parametrize("name", sorted(CHAT_ONLY))
def test_a_field_of_chats_is_refused_in_a_completion(name: str) -> None:
    def found(value: Any) -> tuple[str, ...]:
        raw = json.dumps({name: value}).encode()
        return unknown_fields(raw, CompletionRequest.__struct_fields__)

    with pytest.raises(RequestError) as caught:
        found({"some": "value"})
    assert caught.value.param == name
    assert name in ChatRequest.__struct_fields__
    assert [found(value) for value in CHAT_ONLY[name]] == [()] * len(CHAT_ONLY[name])


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"function_call": {"name": "f"}}, "function_call"),
        ({"guided_whitespace_pattern": " "}, "guided_whitespace_pattern"),
        ({"structural_tag": {"format": {}}}, "structural_tag"),
        ({"logits_processors": ["a"]}, "logits_processors"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"audio": {"voice": "x"}}, "audio"),
        ({"thinking": {"type": "maybe"}}, "thinking.type"),
        ({"thinking": {}}, "thinking.type"),
        ({"thinking": {"type": "enabled", "budget_tokens": "9"}}, "thinking.budget_tokens"),
        ({"thinking": {"type": "enabled", "budgetTokens": 100}}, "thinking.budgetTokens"),
        ({"reasoning": {"effort": "banana"}}, "reasoning.effort"),
        ({"reasoning": {"effort": 7}}, "reasoning.effort"),
        ({"reasoning": {"max_tokens": 1.5}}, "reasoning.max_tokens"),
        ({"reasoning": {"enabled": "yes"}}, "reasoning.enabled"),
        ({"reasoning": {"exclude": 1}}, "reasoning.exclude"),
        ({"reasoning": {"efort": "low"}}, "reasoning.efort"),
        ({"reasoning_effort": "banana"}, "reasoning_effort"),
        ({"reasoning_effort": ""}, "reasoning_effort"),
        ({"thinking_token_budget": True}, "thinking_token_budget"),
        ({"reasoning_budget_tokens": 2.5}, "reasoning_budget_tokens"),
        ({"thinking_budget": -2}, "thinking_budget"),
        ({"n": 9}, "n"),
        ({"min_tokens": 6, "max_tokens": 5}, "min_tokens"),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages"),
        ({"chat_template_kwargs": {"tools": None}}, "chat_template_kwargs.tools"),
        ({"chat_template_kwargs": {"thinking_budget": "9"}},
         "chat_template_kwargs.thinking_budget"),
        ({"chat_template_kwargs": {"enable_thinking": "false"}},
         "chat_template_kwargs.enable_thinking"),
        ({"chat_template_kwargs": {"add_generation_prompt": 1}},
         "chat_template_kwargs.add_generation_prompt"),
        ({"continue_final_message": True, "add_generation_prompt": True},
         "continue_final_message"),
    ],
)  # fmt: skip
def test_a_field_that_is_not_honoured_is_a_400_that_names_it(
    fields: dict[str, Any], param: str
) -> None:
    with client_of() as client:
        answer = post(client, **fields)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
    assert param in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("tool", "path"),
    [
        ({}, ".type"),
        ({"type": 7}, ".type"),
        ({"type": "web_search"}, ".type"),
        ({"name": "find", "parameters": {}}, ".type"),
        ({"type": "function"}, ".function"),
        ({"type": "function", "function": "find"}, ".function"),
        ({"type": "function", "function": []}, ".function"),
        ({"type": "function", "function": {}}, ".function.name"),
        ({"type": "function", "function": {"name": ""}}, ".function.name"),
        ({"type": "function", "function": {"name": " "}}, ".function.name"),
        ({"type": "function", "function": {"name": ["f"]}}, ".function.name"),
        ({"type": "function", "function": {"name": "f", "description": 7}},
         ".function.description"),
        ({"type": "function", "function": {"name": "f", "parameters": "{}"}},
         ".function.parameters"),
        ({"type": "function", "function": {"name": "f", "strict": "no"}}, ".function.strict"),
        (TOOL, ".function.name"),
    ],
)  # fmt: skip
def test_a_malformed_tool_is_refused_by_its_path(tool: dict[str, Any], path: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse(json.dumps({"messages": HELLO, "tools": [TOOL, tool]}).encode(), ChatRequest)
    assert caught.value.param == f"tools[1]{path}"


def test_tools_of_openais_form_are_accepted() -> None:
    full: dict[str, Any] = {
        "name": "a.b-c",
        "description": None,
        "parameters": {},
        "strict": False,
        "x": 1,
    }
    tools = [TOOL, {"type": "function", "function": full, "cache_control": {}}]
    for choice in (None, "auto", "none"):
        raw = json.dumps({"messages": HELLO, "tools": tools, "tool_choice": choice}).encode()
        assert parse(raw, ChatRequest).tools == tools
    assert len(tools) < MAX_TOOLS


# -- reasoning -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"thinking": {"type": "enabled"}}, {"enable_thinking": True}),
        ({"thinking": {"type": "adaptive", "display": "x"}}, {"enable_thinking": True}),
        ({"thinking": {"type": "auto"}}, {}),
        ({"thinking": {"type": "disabled"}}, {"enable_thinking": False}),
        ({"thinking": {"type": "enabled", "budget_tokens": 0}}, {"enable_thinking": False}),
        ({"thinking": False}, {"enable_thinking": False}),
        ({"thinking": True, "enable_thinking": False}, {"enable_thinking": False}),
        ({"reasoning": {"effort": "high", "summary": "auto"}}, {"reasoning_effort": "high"}),
        ({"reasoning": {"enabled": False}}, {"enable_thinking": False}),
        ({"reasoning": {"max_tokens": 0}}, {"enable_thinking": False}),
        ({"reasoning": {"effort": "low"}, "reasoning_effort": "max"}, {"reasoning_effort": "max"}),
        ({"reasoning": {"effort": "none"}},
         {"reasoning_effort": "none", "enable_thinking": False}),
        ({"reasoning_effort": "none", "enable_thinking": True},
         {"reasoning_effort": "none", "enable_thinking": True}),
        ({"thinking_token_budget": 0}, {"enable_thinking": False}),
        ({"thinking_token_budget": -1, "reasoning_budget_tokens": -1}, {}),
        ({"chat_template_kwargs": {"enable_thinking": True, "a": 1}, "thinking_budget": 0},
         {"enable_thinking": False, "a": 1}),
    ],
)  # fmt: skip
def test_fields_of_reasoning_become_variables_of_the_template(
    fields: dict[str, Any], wanted: dict[str, Any]
) -> None:
    raw = json.dumps({"messages": HELLO, **fields}).encode()
    assert thinking_options(parse(raw, ChatRequest)) == wanted


@pytest.mark.parametrize(
    ("fields", "budget"),
    [
        ({}, None), ({"thinking_token_budget": -1}, None), ({"thinking_token_budget": 0}, 0),
        ({"thinking_budget": 5, "reasoning_budget_tokens": 7}, 5),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, 1024),
        ({"thinking": {"type": "disabled", "budget_tokens": 3}}, None),
        ({"thinking": True, "reasoning": {"max_tokens": 9}}, 9),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024.0}}, 1024),
        ({"reasoning": {"max_tokens": 9.0}}, 9),
        ({"chat_template_kwargs": {"thinking_budget": 8}, "thinking_budget": 9}, 8),
        ({"chat_template_kwargs": {"thinking_budget": -1}}, None),
    ],
)  # fmt: skip
def test_the_least_budget_of_the_reasoning_counts(
    fields: dict[str, Any], budget: int | None
) -> None:
    raw = json.dumps({"messages": HELLO, "max_tokens": 4, **fields}).encode()
    assert thinking_budget(parse(raw, ChatRequest)) == budget


@pytest.mark.parametrize(
    ("fields", "shown"),
    [({}, True), ({"include_reasoning": False}, False), ({"include_reasoning": True}, True),
     ({"reasoning": {"exclude": True}}, False), ({"reasoning": {"exclude": False}}, True)],
)  # fmt: skip
def test_reasoning_can_be_left_out_of_the_response(fields: dict[str, Any], shown: bool) -> None:
    assert (
        shows_reasoning(parse(json.dumps({"messages": HELLO, **fields}).encode(), ChatRequest))
        is shown
    )
    with client_of(ScriptedEngine("I see</think>yes")) as client:
        (choice,) = post(client, enable_thinking=True, **fields).json()["choices"]
        streamed = post(client, enable_thinking=True, stream=True, **fields).text
    assert choice["message"]["content"] == "yes"
    assert choice["message"].get("reasoning_content") == ("I see" if shown else None)
    assert ("reasoning" in streamed) is shown


def test_a_template_gets_the_nearest_effort_that_it_takes() -> None:
    template = (
        "{% if reasoning_effort not in ['low', 'medium', 'xhigh'] %}"
        "{{ raise_exception('effort') }}{% endif %}{{ reasoning_effort }}"
    )
    engine = ScriptedEngine(template=template)
    with client_of(engine) as client:
        for effort in EFFORTS[1:]:
            assert post(client, reasoning_effort=effort).status_code == 200
        kwargs = post(client, chat_template_kwargs={"reasoning_effort": "banana"})
        assert (kwargs.status_code, kwargs.json()["error"]["code"]) == (400, "template_error")
    prompts = [request.prompt for request in engine.requests]
    assert prompts == ["low", "low", "medium", "medium", "xhigh", "xhigh"]
    assert efforts_to_try(["low"]) == []


# -- reported --------------------------------------------------------------------------------------


def test_an_unknown_field_is_reported_in_a_header_and_one_log_line(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING, "osmium.server")
    with client_of() as client:
        for path in ("/v1/chat/completions", "/v1/completions"):
            for stream in (False, True):
                answer = post(
                    client, path, stream=stream, foo=1, temprature=2, verbosity="low",
                    stream_options={"include_usage": True, "bar": 1},
                )  # fmt: skip
                assert answer.status_code == 200
                found = answer.headers["x-osmium-ignored"]
                assert found == "foo, temprature, verbosity, stream_options.bar"
                assert answer.headers["x-osmium-did-you-mean"] == "temprature -> temperature"
        assert "x-osmium-ignored" not in post(client).headers
    (record,) = [one for one in caplog.records if "Ignoring" in one.message]
    assert "temprature (did you mean temperature?)" in record.message
    assert "foo, " in record.message


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/tokenize"])
def test_a_variable_that_the_template_does_not_read_is_reported(path: str) -> None:
    given = {"enable_thinking": False, "thinking_budget": 5, "thinking": True, "a b": None, "x": 1}
    with client_of() as client:
        found = client.post(path, json={"messages": HELLO, "chat_template_kwargs": given})
    assert found.status_code == 200
    assert found.headers["x-osmium-ignored"] == (
        "chat_template_kwargs.thinking, chat_template_kwargs.x"
    )


@pytest.mark.parametrize("name", sorted(HINTS))
def test_a_hint_is_accepted_and_one_that_asks_for_more_is_reported(name: str) -> None:
    values = HINTS[name]
    raw = {"user": 1, "parallel_tool_calls": 1}
    if name not in raw:
        assert ignored(**{name: "x"}) == (() if values is None else (name,))
    for value in values or ():
        assert ignored(**{name: value}) == ()


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("temprature", "temperature"), ("max_token", "max_tokens"), ("maxTokens", "max_tokens"),
        ("Temperature", "temperature"), ("top-p", "top_p"), ("num_predict", "max_tokens"),
        ("toolChoice", "tool_choice"), ("guided_jsn", "guided_json"), ("xyz", None),
        ("temperature", None), ("a" * 100_000, None), ("stream_options.bar", None),
        ("stream_options.include_usag", "stream_options.include_usage"),
    ],
)  # fmt: skip
def test_a_misspelt_field_is_suggested(name: str, known: str | None) -> None:
    assert IgnoredFields(ChatRequest.__struct_fields__).suggestion(name) == known


def test_names_cannot_break_the_header_nor_fill_the_log(caplog: pytest.LogCaptureFixture) -> None:
    names: dict[str, Any] = {"a\r\nX-Evil: 1": 1, "é\U0001f600": 1, "": 1, "x" * 5000: 1, "a, b": 1}
    numbered: dict[str, Any] = {f"field{i}": i for i in range(1000)}
    with client_of() as client:
        answer = post(client, **names)
        many = post(client, **numbered)
        for i in range(MAX_LOGGED):
            IgnoredFields(()).headers((f"n{i}",))
    assert answer.status_code == many.status_code == 200
    assert "x-evil" not in answer.headers
    listed = answer.headers["x-osmium-ignored"].split(", ")
    assert len(listed) == len(names)
    assert max(map(len, listed)) < 200
    assert many.headers["x-osmium-ignored"].endswith(f"and {1000 - MAX_NAMES} more")
    fields = IgnoredFields(())
    caplog.clear()
    for i in range(2 * MAX_LOGGED):
        fields.headers((f"other{i}",))
    assert len(caplog.records) == MAX_LOGGED


def test_fields_after_half_a_surrogate_pair_are_checked() -> None:
    body = rb'{"messages": [{"role": "user", "content": "a\ud800"}], "stop_regex": "\ud800x", '
    body += rb'"\udc00": 1}'
    with client_of() as client:
        answer = client.post("/v1/chat/completions", content=body)
        assert answer.json()["error"]["param"] == "stop_regex"
        answer = client.post("/v1/chat/completions", content=body.replace(b"stop_regex", b"bar"))
    assert (answer.status_code, answer.headers["x-osmium-ignored"]) == (200, "bar, %EF%BF%BD")


@pytest.mark.parametrize("names", [("",), ("prompt_ids", ""), (" ",), ("x", " y "), ("\n", "\0")])
def test_any_name_of_an_ignored_field_gives_a_valid_header(names: tuple[str, ...]) -> None:
    headers = IgnoredFields(()).headers(names)
    h11.Response(status_code=200, headers=list(headers.items()))
    assert headers["x-osmium-ignored"].count(", ") == len(names) - 1


@pytest.mark.parametrize("field", [b'"max_toke\xee": 3', b'"x": "\xff"', b'"x": {"a": "\xc3"}'])
def test_bytes_that_are_not_utf_8_in_an_unknown_field_are_never_a_server_error(
    field: bytes,
) -> None:
    body = b'{"messages": [{"role": "user", "content": "Hello"}], %s}' % field
    with client_of(ScriptedEngine()) as client:
        answer = client.post("/v1/chat/completions", content=body)
    assert answer.status_code in (200, 400)
    assert answer.status_code == 200 or answer.json()["error"]["code"] == "invalid_json"
