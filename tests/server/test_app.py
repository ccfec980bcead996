"""The API over ASGI: responses whole and streamed, errors, health."""

import json
import re
import threading
from typing import Any, cast

import pytest
from starlette.testclient import TestClient

from osmium.config import Progress
from osmium.engine.engine import Engine
from osmium.engine.request import Finish, FinishReason, Token
from osmium.errors import CheckpointError, EngineStopped
from osmium.server import answer as server
from osmium.server.anthropic_writer import MessageWriter
from osmium.server.app import BackgroundLoader, create_app
from osmium.server.choices import Choices
from osmium.server.limits import Limits
from osmium.server.openai import ResponseBuilder
from osmium.server.responses_writer import ResponsesWriter
from tests.server.scripted import BASE_URL, PATIENCE_S, TOKENIZER, ScriptedEngine, chunks, client_of

HELLO = [{"role": "user", "content": "Hello"}]


def ask(client: TestClient, **fields: Any) -> Any:
    return client.post("/v1/chat/completions", json={"messages": HELLO, **fields})


def complete(client: TestClient, **fields: Any) -> Any:
    return client.post("/v1/completions", json={"prompt": "Hello", **fields})


def fixed(text: str) -> str:
    """`text` with the ids and times of responses replaced by constants, without `timings`."""
    text = re.sub(r'"id":\s*"(chatcmpl|cmpl)-[0-9a-f]{24}"', r'"id":"\1-X"', text)
    text = re.sub(r',"timings":\{[^}]*\}', "", text)
    return re.sub(r'"created":\s*\d+', '"created":0', text)


# -- whole answers ---------------------------------------------------------------------------------


def test_a_chat_response_has_openais_format() -> None:
    with client_of(ScriptedEngine("the end")) as client:
        answer = ask(client, model="any name at all")
    assert answer.status_code == 200
    assert json.loads(fixed(answer.text)) == {
        "id": "chatcmpl-X",
        "object": "chat.completion",
        "created": 0,
        "model": "scripted",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "the end"},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": len(TOKENIZER.encode("user: Hello\nassistant:")),
            "completion_tokens": len(TOKENIZER.encode("the end")) + 1,
            "total_tokens": len(TOKENIZER.encode("user: Hello\nassistant:the end")) + 1,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
    }


def test_a_completion_has_openais_format_and_keeps_its_first_newline() -> None:
    engine = ScriptedEngine("\n    return x\n")
    with client_of(engine) as client:
        answer = complete(client, prompt="def f(x):")
    body = json.loads(fixed(answer.text))
    assert body["object"] == "text_completion"
    assert body["id"] == "cmpl-X"
    assert body["choices"] == [
        {"index": 0, "text": "\n    return x\n", "logprobs": None, "finish_reason": "stop"}
    ]
    assert engine.requests[0].prompt == "def f(x):"


def test_a_prompt_may_be_token_ids() -> None:
    engine = ScriptedEngine(tokenizer=None)
    with client_of(engine) as client:
        assert complete(client, prompt=[5, 6, 7]).status_code == 200
        assert complete(client, prompt="text").status_code == 400
        assert ask(client).status_code == 400
    assert [one.ids for one in engine.requests] == [[5, 6, 7]]


def test_reasoning_is_returned_separately_from_the_answer() -> None:
    with client_of(ScriptedEngine("I see.\n</think>\n\nParis.")) as client:
        whole = ask(client, chat_template_kwargs={"enable_thinking": True}).json()
        streamed = ask(client, enable_thinking=True, stream=True)
        unsplit = ask(client).json()
    assert whole["choices"][0]["message"] == {
        "role": "assistant",
        "content": "Paris.",
        "reasoning_content": "I see.",
        "reasoning": "I see.",
    }
    deltas = [one["choices"][0]["delta"] for one in chunks(streamed.text)]
    assert "".join(one.get("reasoning_content", "") for one in deltas) == "I see."
    assert "".join(one.get("content", "") for one in deltas) == "Paris."
    assert unsplit["choices"][0]["message"]["content"] == "I see.\n</think>\n\nParis."


def test_tools_reach_the_template_unless_the_choice_is_none() -> None:
    engine = ScriptedEngine()
    tools = [{"type": "function", "function": {"name": "find"}}]
    with client_of(engine) as client:
        ask(client, tools=tools)
        ask(client, tools=tools, tool_choice="none")
    assert ["find" in one.prompt for one in engine.requests] == [True, False]


@pytest.mark.parametrize(
    ("fields", "text", "reason"),
    [
        ({}, "the end", "stop"),
        ({"max_tokens": 2}, "the ", "length"),
        ({"max_completion_tokens": 1}, "the", "length"),
        ({"stop": "e e"}, "th", "stop"),
        ({"stop": ["zzz", " en"]}, "the", "stop"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_finish_reason_is_stop_or_length(
    fields: dict[str, Any], text: str, reason: str, stream: bool
) -> None:
    with client_of(ScriptedEngine("the end")) as client:
        answer = ask(client, stream=stream, **fields)
    if stream:
        found = [one["choices"][0] for one in chunks(answer.text)]
        assert "".join(one["delta"].get("content", "") for one in found) == text
        assert [one["finish_reason"] for one in found] == [None] * (len(found) - 1) + [reason]
    else:
        (choice,) = answer.json()["choices"]
        assert (choice["message"]["content"], choice["finish_reason"]) == (text, reason)


def test_a_full_context_ends_a_response_with_length() -> None:
    prompt = len(TOKENIZER.encode("Hello"))
    with client_of(ScriptedEngine("the end", context=prompt + 3)) as client:
        answer = complete(client, max_tokens=1000).json()
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["total_tokens"] == prompt + 3


def test_the_models_sampling_defaults_hold_unless_a_request_sets_them() -> None:
    engine = ScriptedEngine(defaults={"temperature": 0.6, "top_k": 20})
    with client_of(engine) as client:
        ask(client)
        ask(client, temperature=0)
    assert [(one.params.temperature, one.params.top_k) for one in engine.requests] == [
        (0.6, 20), (0.0, 20),
    ]  # fmt: skip


# -- streams ---------------------------------------------------------------------------------------


def test_a_chat_stream_has_these_bytes() -> None:
    with client_of(ScriptedEngine("the né")) as client:
        answer = ask(client, stream=True, stream_options={"include_usage": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    head = '"id":"chatcmpl-X","object":"chat.completion.chunk","created":0,"model":"scripted"'

    def event(delta: str, finish: str = "null") -> str:
        choice = f'{{"index":0,"delta":{delta},"logprobs":null,"finish_reason":{finish}}}'
        return f'data: {{{head},"choices":[{choice}]}}\n\n'

    usage = (
        '"usage":{"prompt_tokens":21,"completion_tokens":6,"total_tokens":27,'
        '"prompt_tokens_details":{"cached_tokens":0}}'
    )
    assert fixed(answer.text) == (
        event('{"role":"assistant","content":""}')
        + event('{"content":"the"}')
        + event('{"content":" "}')
        + event('{"content":"n"}')
        + event('{"content":"é"}')
        + event("{}", '"stop"')
        + f'data: {{{head},"choices":[],{usage}}}\n\n'
        + "data: [DONE]\n\n"
    )
    assert len(set(re.findall(r'"id":"([^"]+)"', answer.text))) == 1


def test_a_completion_stream_has_these_bytes() -> None:
    with client_of(ScriptedEngine("\nin")) as client:
        answer = complete(client, stream=True)
    head = '"id":"cmpl-X","object":"text_completion","created":0,"model":"scripted"'

    def event(text: str, finish: str = "null") -> str:
        choice = f'{{"index":0,"text":{text},"logprobs":null,"finish_reason":{finish}}}'
        return f'data: {{{head},"choices":[{choice}]}}\n\n'

    assert fixed(answer.text) == (
        event('"\\n"') + event('"in"') + event('""', '"stop"') + "data: [DONE]\n\n"
    )


def test_usage_is_streamed_only_on_request() -> None:
    with client_of(ScriptedEngine()) as client:
        assert "usage" not in ask(client, stream=True).text
        off = ask(client, stream=True, stream_options={"include_usage": False})
        assert "usage" not in off.text
        last = chunks(complete(client, stream=True, stream_options={"include_usage": True}).text)
    assert last[-1]["choices"] == []
    assert last[-1]["usage"]["total_tokens"] > 0


def test_unicode_line_separators_do_not_split_events() -> None:
    said = "a\u2028b\u2029c\x85d\r\ne"
    with client_of(ScriptedEngine(said)) as client:
        answer = ask(client, stream=True)
    assert not set("\u2028\u2029\x85\r") & set(answer.text)
    found = [one["choices"][0]["delta"].get("content", "") for one in chunks(answer.text)]
    assert "".join(found) == said


def test_comments_keep_an_idle_stream_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "PING_INTERVAL_S", 0.02)
    engine = ScriptedEngine("the end")
    engine.prefill.clear()
    with client_of(engine) as client:
        threading.Timer(0.3, engine.prefill.set).start()
        answer = ask(client, stream=True)
    events = answer.text.split("\n\n")
    assert '"role":"assistant"' in events[0], "the first chunk does not wait for prefill"
    prompt = len(TOKENIZER.encode("user: Hello\nassistant:"))
    assert events[1:4] == [f": prefill 0/{prompt}"] * 3
    assert len(chunks(answer.text)) == 6


def test_an_error_in_a_stream_is_sent_and_ends_it() -> None:
    with client_of(ScriptedEngine("the end", fails_after=2)) as client:
        answer = ask(client, stream=True)
    events = answer.text.strip().split("\n\n")
    assert "[DONE]" not in answer.text
    assert json.loads(events[-1].removeprefix("data: ")) == {
        "error": {
            "message": "The engine has stopped: the card is gone.",
            "type": "server_error",
            "param": None,
            "code": None,
        }
    }
    assert '"content":"the"' in events[1]


# -- log-probabilities -----------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_of_chat_have_the_bytes_of_each_token(stream: bool) -> None:
    with client_of(ScriptedEngine("the é")) as client:
        answer = ask(client, logprobs=True, top_logprobs=2, stream=stream)
    if stream:
        found = [one["choices"][0]["logprobs"] for one in chunks(answer.text)]
        entries = [entry for one in found if one for entry in one["content"]]
    else:
        entries = answer.json()["choices"][0]["logprobs"]["content"]
    assert [one["bytes"] for one in entries] == [[*b"the"], [0x20], [0xC3], [0xA9]]
    assert [one["token"] for one in entries] == ["the", " ", "\ufffd", "\ufffd"]
    assert [one["logprob"] for one in entries] == [-0.5] * 4
    assert [len(one["top_logprobs"]) for one in entries] == [2] * 4
    assert entries[0]["top_logprobs"][0] == {"token": "the", "logprob": -0.5, "bytes": [*b"the"]}


def test_logprobs_without_alternatives_cover_the_tokens_only() -> None:
    with client_of(ScriptedEngine("the")) as client:
        (entry,) = ask(client, logprobs=True).json()["choices"][0]["logprobs"]["content"]
    assert (entry["token"], entry["logprob"], entry["top_logprobs"]) == ("the", -0.5, [])


@pytest.mark.parametrize("stream", [False, True])
def test_completion_logprobs_have_text_offsets(stream: bool) -> None:
    with client_of(ScriptedEngine("\nthe end")) as client:
        answer = complete(client, logprobs=1, stream=stream)
    if stream:
        parts = [one["choices"][0]["logprobs"] for one in chunks(answer.text)]
        found = {
            key: [value for part in parts if part for value in part[key]]
            for key in ("tokens", "token_logprobs", "top_logprobs", "text_offset")
        }
    else:
        found = answer.json()["choices"][0]["logprobs"]
    assert found["tokens"] == ["\n", "the", " ", "en", "d"]
    assert found["token_logprobs"] == [-0.5] * 5
    assert found["top_logprobs"][1] == {"the": -0.5}
    assert found["text_offset"] == [0, 1, 4, 5, 7]


def entries_of(response: Any, stream: bool) -> list[dict[str, Any]]:
    """The log-probabilities of a chat response."""
    if not stream:
        logprobs = response.json()["choices"][0]["logprobs"]
        return list(logprobs["content"]) if logprobs else []
    found = [one["choices"][0]["logprobs"] for one in chunks(response.text)]
    return [entry for one in found if one for entry in one["content"]]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("says", "stop", "wanted"),
    [
        ("ab\n</think>\n\nthe end", None, "the end"),
        ("ab\n</think>\n\n é the", None, " é the"),
        ("ab\n</think>\n\nthe end", ["b", "n"], "the e"),
        ("ab\n</think>\n\nthe end", ["end"], "the "),
        ("ab\n</think>\n\nthe end", ["the"], ""),
        ("ab\n</think>", None, ""),
        ("ab the end", None, ""),
    ],
)
def test_logprobs_are_those_of_the_answer(
    says: str, stop: list[str] | None, wanted: str, stream: bool
) -> None:
    with client_of(ScriptedEngine(says)) as client:
        response = ask(client, logprobs=True, enable_thinking=True, stop=stop, stream=stream)
    found = b"".join(bytes(one["bytes"]) for one in entries_of(response, stream))
    # A stop text may begin inside a token: that token is part of the answer.
    assert found == (wanted.encode() if stop != ["b", "n"] else b"the en")


def test_a_token_at_the_border_of_reasoning_and_answer_is_the_answers() -> None:
    """</think> of letters, so that one token has a part of both."""
    response = ResponseBuilder("m", TOKENIZER, chat=True, thinking=True)
    text = "</think>\nab"
    token = Token(TOKENIZER.encode("ab")[0], text, -0.5, (), 0, len(text))
    response.push(token)
    response.push(Finish(FinishReason.STOP))
    assert response.choice()["logprobs"]["content"][0]["token"] == "ab"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("chat", [False, True])
def test_logprobs_of_a_stop_text_are_not_returned(stream: bool, chat: bool) -> None:
    with client_of(ScriptedEngine("the end a b")) as client:
        request, logprobs = (ask, True) if chat else (complete, 1)
        response = request(client, logprobs=logprobs, stop=["end a", "ab"], stream=stream)
    if chat:
        assert [one["token"] for one in entries_of(response, stream)] == ["the", " "]
        return
    parts = chunks(response.text) if stream else [response.json()]
    found = [one["choices"][0]["logprobs"] for one in parts]
    assert [token for part in found if part for token in part["tokens"]] == ["the", " "]
    assert [at for part in found if part for at in part["text_offset"]] == [0, 3]


@pytest.mark.parametrize("stream", [False, True])
def test_text_offsets_count_text_that_is_held_back(stream: bool) -> None:
    """While "the en" may become a stop text, the next tokens' offsets count it."""
    with client_of(ScriptedEngine("the end")) as client:
        response = complete(client, logprobs=0, stop="the enz", stream=stream)
    parts = chunks(response.text) if stream else [response.json()]
    found = [one["choices"][0]["logprobs"] for one in parts]
    assert [at for part in found if part for at in part["text_offset"]] == [0, 3, 4, 6]
    assert "".join(one["choices"][0]["text"] for one in parts) == "the end"


def test_tokens_without_text_keep_their_logprobs() -> None:
    with client_of(ScriptedEngine("the <|im_start|>")) as client:
        response = ask(client, logprobs=True)
        cut = ask(client, logprobs=True, max_tokens=2)
    assert [one["token"] for one in entries_of(response, False)] == ["the", " ", "<|im_start|>"]
    assert [one["token"] for one in entries_of(cut, False)] == ["the", " "]


# -- stops -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("stop", "wanted"),
    [("France", "Paris in "), ("\n", "Paris in France"), ("\n\n", "Paris in France"),
     ("see", "Paris in France"), ("</think>", ""), ("P", "")],
)  # fmt: skip
def test_a_stop_text_counts_after_the_thinking(stop: str, wanted: str, stream: bool) -> None:
    with client_of(ScriptedEngine("I see\n\nFrance.\n</think>\n\nParis in France")) as client:
        response = ask(client, stop=stop, enable_thinking=True, stream=stream)
    if stream:
        deltas = [one["choices"][0]["delta"] for one in chunks(response.text)]
    else:
        deltas = [response.json()["choices"][0]["message"]]
    assert "".join(one.get("reasoning", "") for one in deltas) == "I see\n\nFrance."
    assert "".join(one.get("content", "") for one in deltas) == wanted


def test_without_thinking_a_stop_text_counts_everywhere() -> None:
    with client_of(ScriptedEngine("I see</think>\n\nParis")) as client:
        assert ask(client, stop="see").json()["choices"][0]["message"]["content"] == "I "
        assert complete(client, stop="\n").json()["choices"][0]["text"] == "I see</think>"


@pytest.mark.parametrize("fields", [{"stop": "<|im_start|>"}, {"stop": ["x", "<|im_start|>"]},
    {"stop_token_ids": [TOKENIZER.id_of("<|im_start|>")]},
    {"stop_token_ids": [TOKENIZER.id_of("<|im_start|>")], "stop": "zz"}])  # fmt: skip
def test_a_special_token_stops_by_its_text_and_by_its_id(fields: dict[str, Any]) -> None:
    with client_of(ScriptedEngine("the <|im_start|>end")) as client:
        for response in (ask(client, **fields), complete(client, **fields)):
            (choice,) = response.json()["choices"]
            assert (choice["finish_reason"], response.json()["usage"]["completion_tokens"]) == (
                "stop", 3)  # fmt: skip
            assert (choice.get("text") or choice["message"]["content"]) == "the "


# -- models, health and the rest -------------------------------------------------------------------


def test_models_are_listed_with_their_context() -> None:
    with client_of(ScriptedEngine(context=77)) as client:
        found = client.get("/v1/models").json()
        one = client.get("/v1/models/scripted").json()
        others = [client.get(f"/v1/models/{name}") for name in ("org/other", "gpt-4o", "a%2Fb", "")]
    assert found["object"] == "list"
    assert found["data"] == [one]
    assert (one["id"], one["max_model_len"], one["context_length"]) == ("scripted", 77, 77)
    assert [other.json() for other in others] == [one, one, one, found]


def test_the_served_model_name_replaces_the_models_name() -> None:
    with client_of(ScriptedEngine(), served_model_name="org/mine") as client:
        assert ask(client, model="gpt-4o").json()["model"] == "org/mine"
        assert client.get("/v1/models/org/mine").status_code == 200
        assert client.get("/health").json() == {"status": "ok", "model": "org/mine"}


def test_the_root_responds_to_liveness_probes() -> None:
    with client_of() as client:
        assert client.head("/").status_code == 200
        assert client.get("/").json()["name"] == "osmium"


def test_health_reports_loading_progress_and_other_routes_return_503() -> None:
    go, error_of = threading.Event(), threading.Event()

    def load(progress: Progress) -> Engine:
        progress("packing", 3, 8)
        error_of.set()
        assert go.wait(PATIENCE_S)
        return cast(Engine, ScriptedEngine())

    host = BackgroundLoader(load)
    done = threading.Event()
    host.on_done = done.set
    with TestClient(create_app(host), base_url=BASE_URL) as client:
        assert error_of.wait(PATIENCE_S)
        health = client.get("/health")
        assert health.status_code == 503
        assert health.json() == {"status": "loading", "stage": "packing", "done": 3, "total": 8}
        early = ask(client)
        assert early.status_code == 503
        assert "packing" in early.json()["error"]["message"]
        assert client.get("/v1/models").status_code == 503
        go.set()
        assert done.wait(PATIENCE_S)
        assert client.get("/health").status_code == 200
        assert ask(client).status_code == 200


def test_health_reports_why_loading_failed() -> None:
    with client_of(CheckpointError("model-00002 is missing")) as client:
        health = client.get("/health")
        assert (health.status_code, health.json()["status"]) == (503, "failed")
        assert "model-00002 is missing" in health.json()["error"]
        assert ask(client).status_code == 503


def test_a_stopped_engine_is_a_503() -> None:
    engine = ScriptedEngine()
    engine.stopped = EngineStopped("The engine has stopped: the card is gone.")
    with client_of(engine) as client:
        for answer in (ask(client), ask(client, stream=True), complete(client)):
            assert answer.status_code == 503
            assert answer.json()["error"]["type"] == "server_error"
        assert client.get("/health").status_code == 503


def test_an_engine_error_in_an_unstreamed_response_is_a_503() -> None:
    with client_of(ScriptedEngine("the end", fails_after=2)) as client:
        assert ask(client).status_code == 503


def test_the_engine_is_closed_with_the_server() -> None:
    engine = ScriptedEngine()
    with client_of(engine):
        assert not engine.closed
    assert engine.closed


# -- errors ----------------------------------------------------------------------------------------


def error_of(answer: Any, status: int) -> dict[str, Any]:
    """The error object of a response in OpenAI's format."""
    assert answer.status_code == status, answer.text
    assert set(answer.json()) == {"error"}
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert error["message"]
    return error


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff", b"null"])
def test_a_malformed_body_is_a_400(path: str, body: bytes) -> None:
    with client_of() as client:
        assert error_of(client.post(path, content=body), 400)["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": "Hello"}, "messages", "invalid_type"),
        ({"temperature": "hot"}, "temperature", "invalid_type"),
        ({"temperature": -1}, "temperature", "invalid_value"),
        ({"top_k": 10**400}, "top_k", "invalid_value"),
        ({"max_tokens": 10**400}, "max_tokens", "invalid_value"),
        ({"temperature": 10**400}, "temperature", "invalid_type"),
        ({"logit_bias": {str(10**400): 1}}, "logit_bias", "invalid_value"),
        ({"n": 9}, "n", "unsupported_value"),
        ({"max_completion_tokens": -1}, "max_completion_tokens", "invalid_value"),
        ({"messages": [{"role": "user", "content": "refuse"}]}, "messages", "template_error"),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [{"type": "image_url", "image_url": {"url": "data:,"}}],
                    }
                ]
            },
            "messages[0].content[0]",
            "unsupported_content",
        ),
        (
            {"messages": [{"role": "user", "content": "Hello" * 100}]},
            "messages",
            "context_length_exceeded",
        ),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_an_invalid_request_is_a_400_that_names_the_field(
    fields: dict[str, Any], param: str, code: str, stream: bool
) -> None:
    with client_of() as client:
        error = error_of(ask(client, stream=stream, **fields), 400)
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", param, code)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"max_tokens": -1}, "max_tokens is -1; it must be an integer of at least 1."),
        ({"max_tokens": 0}, "max_tokens is 0; it must be an integer of at least 1."),
        ({"stop": ["a", ""]}, "stop is ['a', '']; it must be a list of texts"),
        ({"stop_token_ids": [-1]}, "stop_token_ids is [-1]; it must be a list of token ids"),
    ],
)
def test_a_refused_value_is_shown_with_a_rule_that_holds(
    fields: dict[str, Any], words: str
) -> None:
    with client_of() as client:
        assert error_of(ask(client, **fields), 400)["message"].startswith(words)


def test_a_prompt_over_the_context_is_refused_in_openais_words() -> None:
    with client_of(ScriptedEngine(context=20)) as client:
        chat = error_of(ask(client), 400)
        plain = error_of(complete(client, prompt="Hello" * 10), 400)
    for error in (chat, plain):
        assert re.match(
            r"This model's maximum context length is 20 tokens\. However, your prompt has \d+ ",
            error["message"],
        )
        assert error["code"] == "context_length_exceeded"
    assert (chat["param"], plain["param"]) == ("messages", "prompt")


def test_an_empty_prompt_is_refused_by_field() -> None:
    with client_of() as client:
        prompts: list[Any] = ["", [], [""], [[]]]
        for prompt in prompts:
            assert error_of(complete(client, prompt=prompt), 400)["param"] == "prompt"


def test_a_body_over_the_limit_is_a_413() -> None:
    with client_of(limits=Limits(max_body_bytes=1000)) as client:
        error_of(ask(client, user="x" * 1000), 413)
        assert ask(client, user="x" * 100).status_code == 200


def test_an_unexpected_error_is_a_500_without_details(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = ScriptedEngine()

    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("a secret")

    monkeypatch.setattr(engine, "submit", fail)
    with client_of(engine) as client:
        error = error_of(ask(client), 500)
    assert "secret" not in error["message"]
    assert "a secret" in caplog.text, "the log has the details"


@pytest.mark.parametrize(
    ("path", "fields", "writer"),
    [
        ("/v1/chat/completions", {"messages": HELLO}, Choices),
        ("/v1/completions", {"prompt": "Hello"}, Choices),
        ("/v1/responses", {"input": "Hello"}, ResponsesWriter),
        ("/v1/messages", {"messages": HELLO, "max_tokens": 9}, MessageWriter),
    ],
)
def test_an_unexpected_error_in_a_stream_is_its_last_event(
    path: str,
    fields: dict[str, Any],
    writer: type,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("a " + "secret")

    monkeypatch.setattr(writer, "push", fail)
    engine = ScriptedEngine("the end " * 50, pace_s=0.01, context=1000)
    with client_of(engine) as client:
        answer = client.post(path, json={**fields, "stream": True})
        assert engine.requests[0].cancelled.wait(PATIENCE_S)
    last = json.loads(answer.text.rstrip().rpartition("data: ")[2])
    assert answer.status_code == 200
    assert "Internal error: ZeroDivisionError." in json.dumps(last)
    assert "a secret" not in answer.text + caplog.text
    assert "ZeroDivisionError" in caplog.text
