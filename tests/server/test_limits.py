"""Limits of requests: each refusal is OpenAI's error, with the number found and the limit."""

import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient

from osmium.errors import RequestError
from osmium.server import prepare
from osmium.server.limits import MAX_MESSAGES, MAX_STOP_CHARS, MAX_STOP_TEXTS, MAX_TOOLS, Limits
from osmium.server.openai import MAX_ERROR_CHARS
from osmium.server.schema import ChatRequest, CompletionRequest, parse
from osmium.text.json_shape import MAX_DEPTH, MAX_VALUES
from tests.server.floods import bodies
from tests.server.running import connect, read_all, run_limited
from tests.server.scripted import PATIENCE_S, ScriptedEngine, client_of

HELLO = [{"role": "user", "content": "Hello"}]

CHAT = "POST /v1/chat/completions"


def refusal(kind: Any, body: Any, **options: Any) -> RequestError:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    with pytest.raises(RequestError) as caught:
        parse(raw, kind, **options)
    return caught.value


@pytest.mark.parametrize(
    ("fields", "param", "numbers"),
    [
        ({"stop": ["a"] * (MAX_STOP_TEXTS + 1)}, "stop", (MAX_STOP_TEXTS + 1, MAX_STOP_TEXTS)),
        ({"stop": "a" * 1025}, "stop", (1025, MAX_STOP_CHARS)),
        ({"stop": ["a", "é" * 1025]}, "stop[1]", (1025, MAX_STOP_CHARS)),
        ({"messages": HELLO * (MAX_MESSAGES + 1)}, "messages", (MAX_MESSAGES + 1, MAX_MESSAGES)),
        ({"tools": [{}] * (MAX_TOOLS + 1)}, "tools", (MAX_TOOLS + 1, MAX_TOOLS)),
        ({"user": [[]] * MAX_VALUES}, None, (MAX_VALUES,)),
        ({"tools": [{"a": [{"b": [1]}] * MAX_VALUES}]}, None, (MAX_VALUES,)),
    ],
)
def test_too_many_items_are_refused_with_their_number_and_the_limit(
    fields: dict[str, Any], param: str | None, numbers: tuple[int, ...]
) -> None:
    error = refusal(ChatRequest, {"messages": HELLO, **fields})
    assert (error.status, error.param) == (400, param)
    for number in numbers:
        assert str(number) in str(error)


def test_the_largest_requests_within_the_limits_are_accepted() -> None:
    tools = [{"type": "function", "function": {"name": f"f{i}"}} for i in range(MAX_TOOLS)]
    fields = {
        "messages": HELLO * MAX_MESSAGES, "tools": tools,
        "stop": ["é" * 512] * MAX_STOP_TEXTS,
    }  # fmt: skip
    assert parse(json.dumps(fields).encode(), ChatRequest).stop == fields["stop"]
    ids = list(range(300_000))
    raw = json.dumps({"prompt": ids}).encode()
    assert parse(raw, CompletionRequest, max_ids=300_000).prompt == ids


def test_more_token_ids_than_the_context_are_refused_with_both_numbers() -> None:
    error = refusal(CompletionRequest, {"prompt": [5] * 2_000_000}, max_ids=4096)
    assert "2000002 or more" in str(error) and "at most 4096 token ids" in str(error)


@pytest.mark.parametrize("field", ["tools", "chat_template_kwargs", "unknown"])
def test_deep_json_is_refused_with_its_depth(field: str) -> None:
    value = b'[{"a":' * 60 + b"1" + b"}]" * 60
    raw = b'{"messages":[{"role":"user","content":""}],"%s":%s}' % (field.encode(), value)
    error = refusal(ChatRequest, raw)
    assert error.code == "json_too_deep"
    assert "121" in str(error) and str(MAX_DEPTH) in str(error)


@pytest.mark.parametrize("encodings", [1, 2, 3])
def test_json_in_the_arguments_of_calls_has_the_same_limits(encodings: int) -> None:
    def chat(arguments: Any, count: int = 1) -> dict[str, Any]:
        for _ in range(encodings - 1):
            arguments = json.dumps(arguments)
        call = {"function": {"name": "f", "arguments": arguments}}
        return {"messages": [{"role": "assistant", "content": "", "tool_calls": [call] * count}]}

    assert refusal(ChatRequest, chat("[" * 200)).code == "json_too_deep"
    assert refusal(ChatRequest, chat("[[]," * MAX_VALUES)).code == "too_many_values"
    shared = refusal(ChatRequest, chat(json.dumps([[]] * 1000), MAX_VALUES // 1000 + 1))
    assert shared.code == "too_many_values", "the limit is for all calls together"
    parse(json.dumps(chat(json.dumps({"a": [1, "["]}), 100)).encode(), ChatRequest)


def test_an_error_does_not_repeat_a_long_value() -> None:
    long = "x" * 100_000
    with client_of(ScriptedEngine()) as client:
        for fields in (
            {"messages": [{"role": long, "content": ""}]},
            {"messages": HELLO, "response_format": {"type": long}},
            {"messages": HELLO, "logit_bias": {long: 1}},
            {"messages": HELLO, "tool_choice": {"a": long}},
            {"messages": [{"role": "user", "content": [{"type": long}]}]},
        ):
            answer = client.post("/v1/chat/completions", json=fields)
            assert answer.status_code == 400
            assert len(answer.json()["error"]["message"]) <= MAX_ERROR_CHARS + 10


# -- the prompt's length ---------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_a_prompt_that_cannot_fit_is_refused_before_it_is_tokenized(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = ScriptedEngine(context=200)
    assert engine.tokenizer is not None
    monkeypatch.setattr(engine.tokenizer, "encode", lambda *_: pytest.fail("it is tokenized"))
    text = "the " * 20_000
    body = {"messages": [{"role": "user", "content": text}], "prompt": text}
    with client_of(engine) as client:
        answer = client.post(path, json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (400, "context_length_exceeded")
    assert error["param"] == ("messages" if "chat" in path else "prompt")
    assert error["message"].startswith(
        "This model's maximum context length is 200 tokens. However, your prompt has "
    )
    assert not engine.requests


# -- bodies ----------------------------------------------------------------------------------------


def test_a_declared_body_over_the_limit_is_refused_before_it_arrives() -> None:
    with run_limited(ScriptedEngine(), Limits(max_body_bytes=1000)) as running:
        length = {"Content_Length": "1001", "Connection": "close"}
        with connect(running.port, CHAT, b"{", **length) as connection:
            connection.settimeout(2)
            raw = b""
            while not raw.endswith(b"}}"):
                raw += connection.recv(65536)
        assert raw.startswith(b"HTTP/1.1 413 ")
        error = json.loads(raw.partition(b"\r\n\r\n")[2])["error"]
        assert error["code"] == "body_too_large"
        assert "1001" in error["message"] and "1000" in error["message"]
        assert "--max-body-mb" in error["message"]


@pytest.mark.parametrize("chunked", [False, True])
def test_a_client_that_sends_all_of_a_refused_body_receives_the_error(chunked: bool) -> None:
    body = b" " * (8 << 20)
    headers = {"Connection": "close"}
    if chunked:
        headers["Transfer_Encoding"] = "chunked"
        body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    else:
        headers["Content_Length"] = str(len(body))
    with run_limited(ScriptedEngine(), Limits(max_body_bytes=1 << 20)) as running:
        status, answer, _ = read_all(connect(running.port, CHAT, body, **headers))
        assert (status, answer["error"]["code"]) == (413, "body_too_large")
        route = "POST /v1/nothing"
        assert read_all(connect(running.port, route, body, **headers))[0] == 404


def test_a_body_that_stops_is_a_408() -> None:
    limits = Limits(body_timeout_s=0.3)
    with run_limited(ScriptedEngine(), limits) as running:
        connection = connect(running.port, CHAT, b'{"messages"', Content_Length="500")
        status, answer, seconds = read_all(connection)
    assert (status, answer["error"]["code"]) == (408, "body_timeout")
    assert "11 bytes" in answer["error"]["message"]
    assert 0.2 < seconds < 5


def test_a_slow_body_at_the_lowest_rate_is_read() -> None:
    limits = Limits(body_timeout_s=0.3, min_body_rate=100)
    body = json.dumps({"messages": HELLO, "user": "x" * 200}).encode()
    length = {"Content_Length": str(len(body)), "Connection": "close"}
    with run_limited(ScriptedEngine(), limits) as running:
        connection = connect(running.port, CHAT, body[:100], **length)
        time.sleep(0.6)
        connection.sendall(body[100:])
        assert read_all(connection)[0] == 200


def wait_until(condition: Any) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_large_bodies_wait_for_a_place_and_small_ones_do_not() -> None:
    limits = Limits(large_body_bytes=1000, large_bodies=2, queue_timeout_s=0.3)
    large = json.dumps({"messages": HELLO, "user": "x" * 2000}).encode()
    small = json.dumps({"messages": HELLO}).encode()

    def send(body: bytes, part: int | None = None) -> Any:
        length = {"Content_Length": str(len(body)), "Connection": "close"}
        return connect(running.port, CHAT, body[:part], **length)

    with run_limited(ScriptedEngine(), limits) as running:
        waiting = [send(large, 100), send(large, 100)]
        places = running.server.config.app.state.bodies._places  # type: ignore[union-attr]
        wait_until(places.locked)
        status, answer, _ = read_all(send(large))
        assert (status, answer["error"]["code"]) == (429, "too_many_large_bodies")
        assert read_all(send(small))[0] == 200
        for connection in waiting:
            connection.sendall(large[100:])
            assert read_all(connection)[0] == 200
        assert read_all(send(large))[0] == 200, "the places are free again"


def test_the_place_of_a_disconnected_client_is_free_again() -> None:
    limits = Limits(large_body_bytes=10, large_bodies=1, queue_timeout_s=PATIENCE_S)
    body = json.dumps({"messages": HELLO}).encode()
    length = {"Content_Length": str(len(body)), "Connection": "close"}
    with run_limited(ScriptedEngine(), limits) as running:
        for _ in range(3):
            connect(running.port, CHAT, body[:20], **length).close()
        assert read_all(connect(running.port, CHAT, body, **length))[0] == 200


# -- worker threads --------------------------------------------------------------------------------


@pytest.fixture
def blocked(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """While the event is not set, preparing blocks."""
    go, prepared = threading.Event(), prepare.encode_prompt

    def wait(engine: Any, prompt: str, params: Any) -> list[int]:
        assert go.wait(PATIENCE_S)
        return prepared(engine, prompt, params)

    monkeypatch.setattr(prepare, "encode_prompt", wait)
    yield go
    go.set()


def in_threads(client: TestClient, count: int, **fields: Any) -> list[threading.Thread]:
    body = {"messages": HELLO, **fields}
    threads = [
        threading.Thread(target=client.post, args=["/v1/chat/completions"], kwargs={"json": body})
        for _ in range(count)
    ]
    for thread in threads:
        thread.start()
    return threads


def test_health_responds_and_a_small_body_is_served_while_a_large_one_is_tokenized(
    monkeypatch: pytest.MonkeyPatch, blocked: threading.Event
) -> None:
    encode, engine = prepare.encode_prompt, ScriptedEngine(context=100_000)
    small_encode = blocked, encode

    def only_large(engine: Any, prompt: str, params: Any) -> list[int]:
        if len(prompt) > 1000:
            return small_encode[1](engine, prompt, params)
        return list(engine.tokenizer.encode(prompt))

    monkeypatch.setattr(prepare, "encode_prompt", only_large)
    with client_of(engine, limits=Limits(large_body_bytes=1000)) as client:
        large = [{"role": "user", "content": "x" * 5000}]
        threads = in_threads(client, 3, messages=large)
        assert client.get("/health").status_code == 200
        small = client.post("/v1/chat/completions", json={"messages": HELLO})
        assert small.status_code == 200
        assert len(engine.requests) == 1, "the large ones wait"
        blocked.set()
        for thread in threads:
            thread.join(PATIENCE_S)
    assert len(engine.requests) == 4


def test_bodies_are_prepared_on_a_bounded_number_of_threads(
    blocked: threading.Event,
) -> None:
    engine = ScriptedEngine()
    with client_of(engine, limits=Limits(workers=2)) as client:
        threads = in_threads(client, 8)
        wait_until(lambda: client.app.state.bodies._small.running == 2)  # type: ignore[attr-defined]
        time.sleep(0.05)
        assert client.app.state.bodies._small.running == 2  # type: ignore[attr-defined]
        assert client.get("/health").status_code == 200
        blocked.set()
        for thread in threads:
            thread.join(PATIENCE_S)
    assert len(engine.requests) == 8
    end = time.monotonic() + PATIENCE_S
    while any(one.name.startswith("osmium-prepare") for one in threading.enumerate()):
        assert time.monotonic() < end, "the threads end with the server"
        time.sleep(0.01)


def test_costly_bodies_at_once_do_not_delay_health() -> None:
    """The smaller form of tests/long/test_flood.py; one thread took 13 s for these bodies."""
    with run_limited(ScriptedEngine(context=4096), Limits()) as running:
        floods = [
            threading.Thread(
                target=lambda path, body: read_all(
                    connect(running.port, f"POST {path}", body, Content_Length=str(len(body)),
                            Connection="close")
                ),
                args=one,
            )
            for one in bodies(4 << 20)
        ]  # fmt: skip
        for thread in floods:
            thread.start()
        longest = 0.0
        while any(thread.is_alive() for thread in floods):
            start = time.monotonic()
            assert read_all(connect(running.port, "GET /health", Connection="close"))[0] == 200
            longest = max(longest, time.monotonic() - start)
        assert longest < 1.5, "generous, as the clients share the process"
