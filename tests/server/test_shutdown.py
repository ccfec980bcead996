"""SIGTERM and Ctrl-C: running requests get an error in OpenAI's form, and the process ends."""

import json
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from osmium.server.limits import Limits
from tests.server.running import address_of, connect, process, read_all, run_limited
from tests.server.scripted import PATIENCE_S, ScriptedEngine

PATHS = ("/v1/chat/completions", "/v1/completions")

EXIT_S = 3.0

SIGNALS = [signal.SIGINT, signal.SIGTERM]


def ask(port: int, path: str, part: int | None = None, **fields: Any) -> socket.socket:
    """Send a request, or the beginning of its body."""
    messages = [{"role": "user", "content": "Hello"}]
    body = json.dumps({"messages": messages, "prompt": "Hello", **fields}).encode()
    length = {"Content_Length": str(len(body))}
    return connect(port, f"POST {path}", body[:part], **length)


def stream_of(connection: socket.socket) -> list[str]:
    """The events of a stream until the connection is closed."""
    raw = b""
    with connection:
        while part := connection.recv(65536):
            raw += part
    lines = raw.decode().splitlines()
    return [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]


def assert_shutting_down(error: Any) -> None:
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "server_error"
    assert "shutting down" in error["message"]


@contextmanager
def ended(child: "subprocess.Popen[str]", end: signal.Signals) -> Iterator[None]:
    """Send a signal; the process must end in time, without a traceback."""
    start = time.monotonic()
    child.send_signal(end)
    yield
    out, err = child.communicate(timeout=PATIENCE_S)
    assert time.monotonic() - start < EXIT_S
    assert "Traceback" not in err and "Traceback" not in out, err
    assert child.returncode == (130 if end is signal.SIGINT else -end)


@pytest.mark.parametrize("end", SIGNALS)
def test_every_running_request_gets_openais_error_and_the_process_ends(
    end: signal.Signals,
) -> None:
    with process("serves") as child:
        port = int(address_of(child).rpartition(":")[2])
        streams = [ask(port, path, stream=True) for path in PATHS]
        whole = [ask(port, path) for path in PATHS]
        uploading = ask(port, PATHS[0], part=10)
        idle = connect(port)
        for connection in streams:
            assert connection.recv(4096).startswith(b"HTTP/1.1 200")
        time.sleep(0.3)
        with ended(child, end):
            for connection in streams:
                *_, error, done = stream_of(connection)
                assert done == "[DONE]"
                assert_shutting_down(json.loads(error)["error"])
            for connection in (*whole, uploading):
                status, answer, _ = read_all(connection)
                assert status == 503
                assert_shutting_down(answer["error"])
            assert read_all(idle)[0] == 0


@pytest.mark.parametrize("end", SIGNALS)
def test_a_client_that_reads_nothing_does_not_delay_the_end(end: signal.Signals) -> None:
    with process("serves") as child:
        port = int(address_of(child).rpartition(":")[2])
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.connect(("127.0.0.1", port))
        body = b'{"prompt":"Hello","stream":true}'
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n"
        with connection:
            connection.sendall(head % len(body) + body)
            time.sleep(0.3)
            with ended(child, end):
                pass


def test_an_engine_in_a_long_step_does_not_delay_the_end() -> None:
    with process("stuck") as child:
        port = int(address_of(child).rpartition(":")[2])
        stream = ask(port, PATHS[0], stream=True)
        assert stream.recv(4096).startswith(b"HTTP/1.1 200")
        with ended(child, signal.SIGINT):
            assert stream_of(stream)[-1] == "[DONE]"


def test_a_second_ctrl_c_ends_the_process_at_once() -> None:
    with process("stuck") as child:
        address_of(child)
        assert child.stdout is not None
        child.send_signal(signal.SIGINT)
        while child.stdout.readline() != "closing\n":
            pass
        start = time.monotonic()
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=PATIENCE_S)
        assert time.monotonic() - start < 0.5
        assert "Traceback" not in err
        assert child.returncode == 130


def test_a_request_that_comes_during_the_shutdown_is_a_503() -> None:
    engine = ScriptedEngine()
    with run_limited(engine, Limits()) as running:
        running.shutdown._begun.set()
        status, answer, _ = read_all(
            connect(running.port, "POST /v1/completions", b'{"prompt":"Hello"}',
                    Content_Length="18", Connection="close")
        )  # fmt: skip
        assert status == 503
        assert_shutting_down(answer["error"])
        assert not engine.requests
