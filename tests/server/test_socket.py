"""The server on a real socket: concurrent clients, the openai package, Ctrl-C."""

import json
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from typing import Any

import pytest
import uvicorn

from osmium.engine.request import FinishReason
from osmium.errors import ConfigError
from osmium.server.app import BackgroundLoader, create_app, serve
from tests.server.running import address_of, process
from tests.server.scripted import PATIENCE_S, ScriptedEngine, host_of

HELLO = [{"role": "user", "content": "Hello"}]

LONG = "the end " * 2000


@contextmanager
def running(engine: ScriptedEngine) -> Iterator[str]:
    """Serve on a free port; yields http://127.0.0.1:PORT."""
    host = host_of(engine)
    ready = threading.Event()
    host.on_done = ready.set
    config = uvicorn.Config(
        create_app(host), log_level="error", lifespan="on", timeout_graceful_shutdown=2
    )
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            assert ready.wait(PATIENCE_S)
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(PATIENCE_S)
            assert not thread.is_alive(), "the server does not stop"


def get(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=PATIENCE_S) as answer:
        return json.load(answer)


def post(url: str, body: dict[str, Any]) -> Any:
    asked = urllib.request.Request(url, json.dumps(body).encode(), method="POST")
    with urllib.request.urlopen(asked, timeout=PATIENCE_S) as answer:
        return json.load(answer)


def connect(url: str, body: dict[str, Any]) -> socket.socket:
    """Send a chat request on a connection that the test can break."""
    address, port = url.removeprefix("http://").split(":")
    raw = json.dumps({"messages": HELLO, **body}).encode()
    connection = socket.create_connection((address, int(port)), PATIENCE_S)
    connection.sendall(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
        b"Content-Type: application/json\r\n"
        b"Content-Length: " + str(len(raw)).encode() + b"\r\n\r\n" + raw
    )
    return connection


def test_health_responds_while_a_request_is_in_prefill() -> None:
    engine = ScriptedEngine()
    engine.prefill.clear()
    with running(engine) as url, ThreadPoolExecutor() as pool:
        answer = pool.submit(post, f"{url}/v1/chat/completions", {"messages": HELLO})
        engine.wait_for_request()
        start = time.monotonic()
        assert get(f"{url}/health")["status"] == "ok"
        assert time.monotonic() - start < 2
        assert not answer.done()
        engine.prefill.set()
        assert answer.result(PATIENCE_S)["choices"][0]["message"]["content"] == "the end"


def test_concurrent_clients_get_their_own_responses() -> None:
    engine = ScriptedEngine("the end", pace_s=0.01)
    with running(engine) as url, ThreadPoolExecutor(40) as pool:

        def one(i: int) -> tuple[int, str]:
            body = {"prompt": "x" * (i + 1), "max_tokens": 1 + i % 3}
            answer = post(f"{url}/v1/completions", body)
            return answer["usage"]["prompt_tokens"], answer["choices"][0]["text"]

        found = list(pool.map(one, range(40)))
    assert found == [(i + 1, ["the", "the ", "the en"][i % 3]) for i in range(40)]
    assert len(engine.requests) == 40


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prefill", [False, True])
def test_a_broken_connection_cancels_the_request(stream: bool, prefill: bool) -> None:
    engine = ScriptedEngine(LONG, context=10**6, pace_s=0.005)
    if prefill:
        engine.prefill.clear()
    with running(engine) as url:
        connection = connect(url, {"stream": stream})
        asked = engine.wait_for_request()
        if stream:
            assert b"200 OK" in connection.recv(4096)
        connection.close()
        assert asked.wait().reason is FinishReason.CANCELLED


def test_the_openai_package_works_against_the_server() -> None:
    openai = pytest.importorskip("openai", reason="openai is in the dev extra")
    engine = ScriptedEngine("I see.</think>the é 🙂")
    with running(engine) as url:
        with closing(openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0)) as client:
            (model,) = client.models.list().data
            assert model.id == "scripted"
            whole = client.chat.completions.create(
                model="gpt-4o", messages=HELLO, logprobs=True, top_logprobs=1,
                extra_body={"chat_template_kwargs": {"enable_thinking": True}},
            )  # fmt: skip
            assert whole.choices[0].message.content == "the é 🙂"
            assert whole.choices[0].message.reasoning_content == "I see."
            assert whole.choices[0].logprobs.content[0].token == "the"
            assert whole.usage.total_tokens > 0
            stream = client.chat.completions.create(
                model="gpt-4o", messages=HELLO, stream=True, stream_options={"include_usage": True}
            )
            parts = list(stream)
            text = "".join(one.choices[0].delta.content or "" for one in parts if one.choices)
            assert text == "I see.</think>the é 🙂"
            assert parts[-1].usage.completion_tokens > 0
            plain = client.completions.create(model="m", prompt="Hello", stop="</think>")
            assert plain.choices[0].text == "I see."
            with pytest.raises(openai.BadRequestError) as caught:
                client.chat.completions.create(model="m", messages=[])
            assert caught.value.param == "messages"
            with pytest.raises(openai.BadRequestError) as caught:
                client.completions.create(model="m", prompt="Hello" * 1000)
            assert caught.value.code == "context_length_exceeded"


def test_closing_a_stream_of_the_openai_package_cancels_the_request() -> None:
    openai = pytest.importorskip("openai", reason="openai is in the dev extra")
    engine = ScriptedEngine(LONG, context=10**6, pace_s=0.005)
    with running(engine) as url:
        with closing(openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0)) as client:
            with client.chat.completions.create(model="m", messages=HELLO, stream=True) as stream:
                for i, _ in enumerate(stream):
                    if i == 3:
                        break
            assert engine.requests[0].wait().reason is FinishReason.CANCELLED


# -- serve() ---------------------------------------------------------------------------------------


def test_a_port_in_use_is_refused_before_the_model_is_loaded() -> None:
    def load(progress: Any) -> Any:
        raise AssertionError("the model is loaded")

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"{port}.*--port"):
            serve(BackgroundLoader(load), port=port)


@pytest.mark.parametrize("port", [-1, 65536])
def test_an_invalid_port_is_refused(port: int) -> None:
    with pytest.raises(ConfigError, match=str(port)):
        serve(host_of(ScriptedEngine()), port=port)


def test_an_address_of_another_machine_is_refused() -> None:
    for address in ("203.0.113.7", "no.such.host.invalid"):
        with pytest.raises(ConfigError, match=address):
            serve(host_of(ScriptedEngine()), address=address, port=0)


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_stops_a_server_with_running_requests_within_its_timeout(
    end: signal.Signals,
) -> None:
    with process("serves") as child:
        url = address_of(child)
        with closing(connect(url, {"stream": True})) as open_stream:
            assert b"200 OK" in open_stream.recv(4096)
            start = time.monotonic()
            child.send_signal(end)
            out, err = child.communicate(timeout=PATIENCE_S)
        assert time.monotonic() - start < 10
        assert out.splitlines()[0] == "loading"
        assert "cancelled" in out
        assert out.splitlines()[-1] == "closed"
        assert "Traceback" not in err
        assert child.returncode == (130 if end is signal.SIGINT else -end)


def test_ctrl_c_stops_a_server_that_is_loading() -> None:
    with process("slow") as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "loading\n"
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=PATIENCE_S)
        assert "Traceback" not in err
        assert child.returncode == 130


def test_a_model_that_fails_to_load_stops_the_server_with_its_error() -> None:
    with process("fails") as child:
        out, err = child.communicate(timeout=PATIENCE_S)
        assert out.splitlines() == ["loading", "CheckpointError: model-00002 is missing"]
        assert "Traceback" not in err
        assert child.returncode == 2


def test_an_error_response_reaches_urllib_as_json() -> None:
    with running(ScriptedEngine()) as url:
        with pytest.raises(urllib.error.HTTPError) as caught:
            post(f"{url}/v1/chat/completions", {"messages": []})
        with caught.value:
            assert json.load(caught.value)["error"]["param"] == "messages"
