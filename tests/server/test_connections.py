"""Connections on a real socket: timeouts, the limit, bytes that are not HTTP, descriptors."""

import asyncio
import errno
import json
import signal
import socket
import time
from typing import Any

import pytest

from osmium.server import connections
from osmium.server.connections import HttpConfig
from osmium.server.limits import Limits
from osmium.server.metrics import exposition
from tests.server.running import address_of, connect, process, read_all, run_limited
from tests.server.scripted import PATIENCE_S, ScriptedEngine

HEALTH = "GET /health"

CHAT = "POST /v1/chat/completions"

BODY = json.dumps({"messages": [{"role": "user", "content": "Hello"}], "stream": True}).encode()

SHORT = Limits(head_timeout_s=0.3)


def health(port: int) -> int:
    return read_all(connect(port, HEALTH, Connection="close"))[0]


def closed_after(connection: socket.socket, drip: bytes = b"") -> tuple[float, bytes]:
    """Seconds until the server closes the connection, while `drip` is sent; what it sent."""
    start, raw = time.monotonic(), b""
    connection.settimeout(0.05)
    with connection:
        while time.monotonic() - start < PATIENCE_S:
            try:
                if drip:
                    connection.sendall(drip)
                part = connection.recv(65536)
            except TimeoutError:
                continue
            except OSError:
                break
            if not part:
                break
            raw += part
        else:
            pytest.fail("the connection stays open")
    return time.monotonic() - start, raw


# -- timeouts --------------------------------------------------------------------------------------


def test_a_connection_without_a_request_is_closed() -> None:
    with run_limited(ScriptedEngine(), SHORT) as running:
        seconds, raw = closed_after(connect(running.port))
    assert 0.2 < seconds < 3 and raw == b""


def test_headers_that_arrive_slowly_are_a_408() -> None:
    with run_limited(ScriptedEngine(), SHORT) as running:
        connection = connect(running.port)
        connection.sendall(b"GET /health HTTP/1.1\r\n")
        seconds, raw = closed_after(connection, b"A: b\r\n")
    assert 0.2 < seconds < 3
    assert not raw or raw.startswith(b"HTTP/1.1 408 "), "a reset may discard the response"


def test_slow_headers_of_a_second_request_close_the_connection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with run_limited(ScriptedEngine(), SHORT) as running:
        running.server.config.timeout_keep_alive = 0.2  # type: ignore[assignment]
        connection = connect(running.port, HEALTH)
        assert connection.recv(4096).startswith(b"HTTP/1.1 200")
        seconds, _ = closed_after(connection, b"X")
    assert seconds < 3


def test_a_body_that_no_route_reads_does_not_keep_the_connection_open(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("osmium.server.app.DRAIN_S", 0.2)
    with run_limited(ScriptedEngine(), SHORT) as running:
        running.server.config.timeout_keep_alive = 0.2  # type: ignore[assignment]
        connection = connect(running.port, "POST /v1/nothing", Content_Length="1000000")
        seconds, raw = closed_after(connection, b" ")
    assert raw.startswith(b"HTTP/1.1 404 ")
    assert seconds < 3


def test_a_request_may_run_longer_than_the_header_timeout() -> None:
    engine = ScriptedEngine("the end", pace_s=0.2)
    with run_limited(engine, SHORT) as running:
        length = {"Content_Length": str(len(BODY)), "Connection": "close"}
        with connect(running.port, CHAT, BODY, **length) as connection:
            raw = b""
            while part := connection.recv(65536):
                raw += part
    assert b"data: [DONE]" in raw


def test_a_client_that_does_not_read_its_response_is_disconnected() -> None:
    engine = ScriptedEngine("the end " * 20_000, context=10**6)
    limits = Limits(write_timeout_s=0.3)
    with run_limited(engine, limits) as running:
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", running.port))
        head = f"{CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(BODY)}\r\n\r\n"
        with connection:
            connection.sendall(head.encode() + BODY)
            engine.wait_for_request().wait()
            wait_until(lambda: len(running.server.server_state.connections) == 0)


def wait_until(condition: Any) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


# -- the limit -------------------------------------------------------------------------------------


def test_a_connection_over_the_limit_is_a_503() -> None:
    engine = ScriptedEngine()
    engine.prefill.clear()
    with run_limited(engine, Limits(max_connections=2)) as running:
        length = {"Content_Length": str(len(BODY)), "Connection": "close"}
        served = [connect(running.port, CHAT, BODY, **length) for _ in range(2)]
        for _ in served:
            engine.wait_for_request()
        status, answer, _ = read_all(connect(running.port, HEALTH))
        assert status == 503
        assert answer["error"]["type"] == "server_error"
        assert "--max-connections" in answer["error"]["message"]
        seconds, raw = closed_after(connect(running.port))
        assert seconds < 3 and raw == b"", "a refused connection is not kept"
        engine.prefill.set()
        for connection in served:
            with connection:
                raw = b""
                while part := connection.recv(65536):
                    raw += part
            assert b"data: [DONE]" in raw, "connections within the limit are served"
        assert health(running.port) == 200


def test_an_idle_connection_makes_room_for_a_new_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "REFUSED_S", 0.1)
    with run_limited(ScriptedEngine(), Limits(max_connections=2)) as running:
        first = connect(running.port)
        time.sleep(0.05)
        second = connect(running.port)
        time.sleep(0.2)
        assert health(running.port) == 200
        assert closed_after(first)[0] < 3
        with second:
            second.settimeout(0.05)
            with pytest.raises(TimeoutError):
                second.recv(1)


# -- bytes that are not HTTP -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b"\x00\xff\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: x\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nA: " + b"b" * 70_000, 431),
    ],
)
def test_bytes_that_are_not_http_are_refused_with_openais_error(raw: bytes, status: int) -> None:
    with run_limited(ScriptedEngine(), Limits()) as running:
        connection = connect(running.port)
        connection.sendall(raw)
        found, answer, _ = read_all(connection)
    if found or len(raw) < 60_000:  # a reset may discard the response to the longest
        assert (found, answer["error"]["type"]) == (status, "invalid_request_error")


def test_a_body_in_tiny_chunks_is_refused_and_one_in_few_is_not() -> None:
    tiny = b"".join(b"1\r\n%c\r\n" % byte for byte in b" " * 400)
    end = b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)
    with run_limited(ScriptedEngine(), Limits()) as running:
        chunked = {"Transfer_Encoding": "chunked", "Connection": "close"}
        status, answer, _ = read_all(connect(running.port, CHAT, tiny + end, **chunked))
        assert status in (400, 0)
        assert not answer or "larger chunks" in answer["error"]["message"]
        few = b"1\r\n \r\n" * 100 + end
        with connect(running.port, CHAT, few, **chunked) as connection:
            assert connection.recv(4096).startswith(b"HTTP/1.1 200")


def test_garbage_during_a_response_ends_the_connection_without_a_traceback(
    caplog: pytest.LogCaptureFixture,
) -> None:
    engine = ScriptedEngine("the end " * 100, context=10**4, pace_s=0.002)
    with run_limited(engine, Limits()) as running:
        headers = {"Transfer_Encoding": "chunked"}
        chunk = b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)
        connection = connect(running.port, CHAT, chunk, **headers)
        assert connection.recv(100).startswith(b"HTTP/1.1 200")
        closed_after(connection, b"\x00\r\n\r\n")
        assert health(running.port) == 200
    assert not [one for one in caplog.records if one.exc_info]


def test_a_message_is_logged_at_most_once_per_second(caplog: pytest.LogCaptureFixture) -> None:
    with run_limited(ScriptedEngine(), Limits()) as running:
        for _ in range(50):
            connection = connect(running.port)
            connection.sendall(b"\x00\r\n\r\n")
            read_all(connection)
    found = [one for one in caplog.records if "Invalid HTTP" in one.getMessage()]
    assert len(found) <= 3


# -- file descriptors ------------------------------------------------------------------------------


def test_without_file_descriptors_connections_are_closed_and_a_line_per_second_is_logged() -> None:
    with process("few_files") as child:
        port = int(address_of(child).rpartition(":")[2])
        clients = [connect(port) for _ in range(200)]
        start = time.monotonic()
        while True:
            try:
                if health(port) == 200:
                    break
            except OSError:
                pass  # closed, as the others
            assert time.monotonic() - start < PATIENCE_S
            time.sleep(0.1)
        for client in clients:
            assert closed_after(client)[0] < 15
        assert health(port) == 200
        child.send_signal(signal.SIGTERM)
        _, err = child.communicate(timeout=PATIENCE_S)
    lines = [line for line in err.splitlines() if line]
    assert lines and all("ulimit -n" in line for line in lines), err
    assert len(lines) <= time.monotonic() - start + 1


def test_metrics_are_served_without_file_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr("psutil.Process", fail)
    assert b"osmium_ready 0" in exposition(None)


def test_the_event_loop_is_asyncios_own_even_where_uvloop_is_installed() -> None:
    config = HttpConfig(None, Limits())
    factory = config.get_loop_factory()
    assert factory is not None
    loop = factory()
    assert isinstance(loop, asyncio.SelectorEventLoop)
    loop.close()


# -- upgrades --------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", ["websocket", "h2c"])
def test_a_request_to_upgrade_is_served_without_it_and_without_a_warning(
    protocol: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with run_limited(ScriptedEngine(), Limits()) as running:
        for _ in range(2):
            connection = connect(
                running.port, HEALTH, Connection="Upgrade, close", Upgrade=protocol
            )
            assert read_all(connection)[0] == 200
    assert "upgrade" not in capfd.readouterr().err.lower()
