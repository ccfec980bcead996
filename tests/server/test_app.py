"""The API over ASGI: answers whole and in streams, errors, and what a health check sees."""

import json
import re
import threading
from typing import Any, cast

import pytest
from starlette.testclient import TestClient

from osmium.config import Progress
from osmium.engine.engine import Engine
from osmium.errors import CheckpointError, EngineStopped
from osmium.server import app as server
from osmium.server.app import BackgroundLoader, create_app
from tests.server.scripted import PATIENCE_S, TOKENIZER, Scripted, chunks, client_of

HELLO = [{"role": "user", "content": "Hello"}]


def ask(client: TestClient, **fields: Any) -> Any:
    return client.post("/v1/chat/completions", json={"messages": HELLO, **fields})


def complete(client: TestClient, **fields: Any) -> Any:
    return client.post("/v1/completions", json={"prompt": "Hello", **fields})


def fixed(text: str) -> str:
    """With the id and the time that no two answers share replaced."""
    text = re.sub(r'"id":\s*"(chatcmpl|cmpl)-[0-9a-f]{24}"', r'"id":"\1-X"', text)
    return re.sub(r'"created":\s*\d+', '"created":0', text)


# -- whole answers ---------------------------------------------------------------------------------


def test_a_chat_answer_is_openais() -> None:
    with client_of(Scripted("the end")) as client:
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


def test_a_completion_is_openais_and_keeps_its_first_newline() -> None:
    engine = Scripted("\n    return x\n")
    with client_of(engine) as client:
        answer = complete(client, prompt="def f(x):")
    body = json.loads(fixed(answer.text))
    assert body["object"] == "text_completion"
    assert body["id"] == "cmpl-X"
    assert body["choices"] == [
        {"index": 0, "text": "\n    return x\n", "logprobs": None, "finish_reason": "stop"}
    ]
    assert engine.asked[0].prompt == "def f(x):"


def test_a_prompt_may_be_token_ids() -> None:
    engine = Scripted(tokenizer=None)
    with client_of(engine) as client:
        assert complete(client, prompt=[5, 6, 7]).status_code == 200
        assert complete(client, prompt="text").status_code == 400
        assert ask(client).status_code == 400
    assert [one.ids for one in engine.asked] == [[5, 6, 7]]


def test_thinking_is_told_apart_from_the_answer() -> None:
    with client_of(Scripted("I see.\n</think>\n\nParis.")) as client:
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
    engine = Scripted()
    tools = [{"type": "function", "function": {"name": "find"}}]
    with client_of(engine) as client:
        ask(client, tools=tools)
        ask(client, tools=tools, tool_choice="none")
    assert ["find" in one.prompt for one in engine.asked] == [True, False]


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
def test_a_finish_reason_says_why_it_ended(
    fields: dict[str, Any], text: str, reason: str, stream: bool
) -> None:
    with client_of(Scripted("the end")) as client:
        answer = ask(client, stream=stream, **fields)
    if stream:
        found = [one["choices"][0] for one in chunks(answer.text)]
        assert "".join(one["delta"].get("content", "") for one in found) == text
        assert [one["finish_reason"] for one in found] == [None] * (len(found) - 1) + [reason]
    else:
        (choice,) = answer.json()["choices"]
        assert (choice["message"]["content"], choice["finish_reason"]) == (text, reason)


def test_a_full_context_ends_an_answer_with_length() -> None:
    prompt = len(TOKENIZER.encode("Hello"))
    with client_of(Scripted("the end", context=prompt + 3)) as client:
        answer = complete(client, max_tokens=1000).json()
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["total_tokens"] == prompt + 3


def test_the_models_defaults_are_sampled_with_unless_told_otherwise() -> None:
    engine = Scripted(defaults={"temperature": 0.6, "top_k": 20})
    with client_of(engine) as client:
        ask(client)
        ask(client, temperature=0)
    assert [(one.params.temperature, one.params.top_k) for one in engine.asked] == [
        (0.6, 20), (0.0, 20),
    ]  # fmt: skip


# -- streams ---------------------------------------------------------------------------------------


def test_a_chat_stream_byte_for_byte() -> None:
    with client_of(Scripted("the né")) as client:
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


def test_a_completion_stream_byte_for_byte() -> None:
    with client_of(Scripted("\nin")) as client:
        answer = complete(client, stream=True)
    head = '"id":"cmpl-X","object":"text_completion","created":0,"model":"scripted"'

    def event(text: str, finish: str = "null") -> str:
        choice = f'{{"index":0,"text":{text},"logprobs":null,"finish_reason":{finish}}}'
        return f'data: {{{head},"choices":[{choice}]}}\n\n'

    assert fixed(answer.text) == (
        event('"\\n"') + event('"in"') + event('""', '"stop"') + "data: [DONE]\n\n"
    )


def test_usage_is_streamed_only_when_asked_for() -> None:
    with client_of(Scripted()) as client:
        assert "usage" not in ask(client, stream=True).text
        off = ask(client, stream=True, stream_options={"include_usage": False})
        assert "usage" not in off.text
        last = chunks(complete(client, stream=True, stream_options={"include_usage": True}).text)
    assert last[-1]["choices"] == []
    assert last[-1]["usage"]["total_tokens"] > 0


def test_line_ends_of_unicode_do_not_break_a_streams_lines() -> None:
    said = "a\u2028b\u2029c\x85d\r\ne"
    with client_of(Scripted(said)) as client:
        answer = ask(client, stream=True)
    assert not set("\u2028\u2029\x85\r") & set(answer.text)
    found = [one["choices"][0]["delta"].get("content", "") for one in chunks(answer.text)]
    assert "".join(found) == said


def test_comments_come_while_nothing_else_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "PING_INTERVAL_S", 0.02)
    engine = Scripted("the end")
    engine.prefill.clear()
    with client_of(engine) as client:
        threading.Timer(0.3, engine.prefill.set).start()
        answer = ask(client, stream=True)
    events = answer.text.split("\n\n")
    assert '"role":"assistant"' in events[0], "the first chunk does not wait for prefill"
    assert events[1:4] == [": keep-alive"] * 3
    assert len(chunks(answer.text)) == 6


def test_a_failure_in_a_stream_is_told_and_ends_it() -> None:
    with client_of(Scripted("the end", fails_after=2)) as client:
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
    with client_of(Scripted("the é")) as client:
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


def test_logprobs_without_alternatives_are_of_the_tokens_alone() -> None:
    with client_of(Scripted("the")) as client:
        (entry,) = ask(client, logprobs=True).json()["choices"][0]["logprobs"]["content"]
    assert (entry["token"], entry["logprob"], entry["top_logprobs"]) == ("the", -0.5, [])


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_of_completions_know_where_tokens_stand(stream: bool) -> None:
    with client_of(Scripted("\nthe end")) as client:
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


# -- models, health and the rest -------------------------------------------------------------------


def test_models_are_listed_with_their_context() -> None:
    with client_of(Scripted(context=77)) as client:
        found = client.get("/v1/models").json()
        one = client.get("/v1/models/scripted").json()
        missing = client.get("/v1/models/org/other")
    assert found["object"] == "list"
    assert found["data"] == [one]
    assert (one["id"], one["max_model_len"], one["context_length"]) == ("scripted", 77, 77)
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "model_not_found"
    assert "org/other" in missing.json()["error"]["message"]


def test_the_served_model_name_goes_before_the_models() -> None:
    with client_of(Scripted(), served_model_name="org/mine") as client:
        assert ask(client, model="gpt-4o").json()["model"] == "org/mine"
        assert client.get("/v1/models/org/mine").status_code == 200
        assert client.get("/health").json() == {"status": "ok", "model": "org/mine"}


def test_the_root_answers_who_looks_whether_somebody_is_here() -> None:
    with client_of() as client:
        assert client.head("/").status_code == 200
        assert client.get("/").json()["name"] == "osmium"


def test_health_tells_how_far_loading_is_and_others_wait() -> None:
    go, told = threading.Event(), threading.Event()

    def load(progress: Progress) -> Engine:
        progress("packing", 3, 8)
        told.set()
        assert go.wait(PATIENCE_S)
        return cast(Engine, Scripted())

    host = BackgroundLoader(load)
    done = threading.Event()
    host.on_done = done.set
    with TestClient(create_app(host)) as client:
        assert told.wait(PATIENCE_S)
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


def test_health_tells_why_loading_failed() -> None:
    with client_of(CheckpointError("model-00002 is missing")) as client:
        health = client.get("/health")
        assert (health.status_code, health.json()["status"]) == (503, "failed")
        assert "model-00002 is missing" in health.json()["error"]
        assert ask(client).status_code == 503


def test_a_stopped_engine_is_told_at_once() -> None:
    engine = Scripted()
    engine.stopped = EngineStopped("The engine has stopped: the card is gone.")
    with client_of(engine) as client:
        for answer in (ask(client), ask(client, stream=True), complete(client)):
            assert answer.status_code == 503
            assert answer.json()["error"]["type"] == "server_error"
        assert client.get("/health").status_code == 503


def test_an_engine_that_fails_during_a_whole_answer_is_a_503() -> None:
    with client_of(Scripted("the end", fails_after=2)) as client:
        assert ask(client).status_code == 503


def test_the_engine_is_closed_with_the_server() -> None:
    engine = Scripted()
    with client_of(engine):
        assert not engine.closed
    assert engine.closed


# -- errors ----------------------------------------------------------------------------------------


def told(answer: Any, status: int) -> dict[str, Any]:
    """An error in OpenAI's form."""
    assert answer.status_code == status, answer.text
    assert set(answer.json()) == {"error"}
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert error["message"]
    return error


def test_a_route_or_method_that_is_not_there_is_openais_error() -> None:
    with client_of() as client:
        assert "/v1/nothing" in told(client.get("/v1/nothing"), 404)["message"]
        told(client.get("/v1/chat/completions"), 405)
        told(client.post("/v1/models"), 405)
        assert "mbeddings" in told(client.post("/v1/embeddings", json={}), 404)["message"]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff", b"null"])
def test_a_body_that_is_no_request_is_a_400(path: str, body: bytes) -> None:
    with client_of() as client:
        assert told(client.post(path, content=body), 400)["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": "Hello"}, "messages", "invalid_type"),
        ({"temperature": "hot"}, "temperature", "invalid_type"),
        ({"temperature": -1}, "temperature", "invalid_value"),
        ({"n": 3}, "n", "unsupported_value"),
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
def test_a_request_that_cannot_be_served_is_a_400_that_names_the_field(
    fields: dict[str, Any], param: str, code: str, stream: bool
) -> None:
    with client_of() as client:
        error = told(ask(client, stream=stream, **fields), 400)
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", param, code)


def test_a_prompt_over_the_context_is_told_in_the_words_that_clients_know() -> None:
    with client_of(Scripted(context=20)) as client:
        chat = told(ask(client), 400)
        plain = told(complete(client, prompt="Hello" * 10), 400)
    for error in (chat, plain):
        assert re.match(
            r"This model's maximum context length is 20 tokens\. However, your prompt has \d+ ",
            error["message"],
        )
        assert error["code"] == "context_length_exceeded"
    assert (chat["param"], plain["param"]) == ("messages", "prompt")


def test_an_empty_prompt_is_refused_by_its_own_name() -> None:
    with client_of() as client:
        prompts: list[Any] = ["", [], [""], [[]]]
        for prompt in prompts:
            assert told(complete(client, prompt=prompt), 400)["param"] == "prompt"


def test_a_body_over_the_limit_is_a_413(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "BODY_LIMIT", 1000)
    with client_of() as client:
        told(ask(client, user="x" * 1000), 413)
        assert ask(client, user="x" * 100).status_code == 200


def test_what_nobody_foresaw_is_a_500_without_its_insides(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = Scripted()

    def fail(*_: Any) -> None:
        raise ZeroDivisionError("a secret")

    monkeypatch.setattr(engine, "submit", fail)
    with client_of(engine) as client:
        error = told(ask(client), 500)
    assert "secret" not in error["message"]
    assert "a secret" in caplog.text, "but whoever runs the server reads it"


# -- who may ask -----------------------------------------------------------------------------------


def test_with_a_key_only_who_has_it_is_served() -> None:
    with client_of(Scripted(), api_key="sésame") as client:
        for given in ("", "Bearer wrong", "sésame", "Bearer sésamee"):
            headers = {b"Authorization": given.encode()}
            answer = client.get("/v1/models", headers=headers)
            assert told(answer, 401)["code"] == "invalid_api_key"
            assert client.post("/v1/completions", headers=headers).status_code == 401
        right = {b"Authorization": "Bearer sésame".encode()}
        assert client.get("/v1/models", headers=right).status_code == 200
        assert client.get("/health").status_code == 200


ORIGIN = {"Origin": "http://page.example"}
ASKING = {**ORIGIN, "Access-Control-Request-Method": "POST",
          "Access-Control-Request-Headers": "authorization,content-type"}  # fmt: skip


def test_a_page_may_ask_from_any_origin_unless_one_is_named() -> None:
    with client_of(Scripted(), api_key="k") as client:
        before = client.options("/v1/chat/completions", headers=ASKING)
        assert before.status_code == 200
        assert before.headers["access-control-allow-origin"] == "*"
        refused = client.get("/v1/models", headers=ORIGIN)
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == "*"
    with client_of(Scripted(), cors_origin="http://mine.example") as client:
        assert client.options("/v1/chat/completions", headers=ASKING).status_code == 400
        answer = client.get("/v1/models", headers=ORIGIN)
        assert "access-control-allow-origin" not in answer.headers
