"""Thousands of mutated requests: no 5xx, no hang, and the server stays healthy."""

import json
import random
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import pytest

from tests.long.mutations import (
    CHAT,
    CHAT_PROMPT,
    COMPLETION,
    MESSAGE,
    RESPONSE,
    damaged,
    mutated,
    varied,
)
from tests.long.server import ANSWER_S, Server, run_server

CASES, LEAST, MOST_S = 3000, 500, 90.0
"""Seconds for mutated JSON bodies, and their minimum number.

Half as many requests have damaged bytes, and some are not HTTP.
"""

PATHS = (
    "/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/models", "/v1/models/demo",
    "/health", "/metrics", "/", "/v1/nothing", "/v1/models/%00", "/v1/models/" + "x" * 3000,
)  # fmt: skip

BODIES: tuple[tuple[str, dict[str, Any]], ...] = (
    (PATHS[0], CHAT), (PATHS[0], CHAT), (PATHS[1], COMPLETION), ("/v1/responses", RESPONSE),
    ("/v1/messages", MESSAGE), ("/v1/messages/count_tokens", MESSAGE), ("/tokenize", CHAT_PROMPT),
)  # fmt: skip

METHODS = ("POST", "GET", "PUT", "DELETE", "OPTIONS", "HEAD", "PATCH", "TRACE", "NONSENSE")


@pytest.fixture(scope="module")
def small_server() -> Iterator[Server]:
    """A small context, so that no mutated request runs long."""
    with run_server("--context", "256") as server:
        yield server


def case_numbers(max_cases: int) -> Iterator[int]:
    """Case numbers until the time is over, at least the minimum."""
    end = time.monotonic() + MOST_S
    for case in range(max_cases):
        if case >= LEAST and time.monotonic() > end:
            print(f"{case} of {max_cases} cases in {MOST_S:.0f} s")
            return
        yield case


def check(server: Server, method: str, path: str, body: bytes | None, **headers: str) -> int:
    """Send one request; it must not get a 5xx, and a refusal must be OpenAI's error object."""
    request_text = f"{method} {path} {body!r:.2000} {headers}"
    try:
        status, raw = server.ask(method, path, body, **headers)
    except TimeoutError:
        pytest.fail(f"hangs: {request_text}")
    assert status < 500, f"{status} {raw!r}: {request_text}"
    if status >= 400 and method not in ("HEAD",) and status not in (404, 405):
        assert json.loads(raw)["error"]["message"], request_text
    return status


def test_mutated_bodies_succeed_or_are_refused(
    small_server: Server, seed: int, record_property: Callable[[str, object], None]
) -> None:
    rng = random.Random(seed)
    seen: dict[int, int] = {}
    for _ in case_numbers(CASES):
        path, body = rng.choice(BODIES)
        base = dict(body)
        if rng.random() < 0.3:
            base["stream"] = True
        if path == PATHS[1] and rng.random() < 0.3:
            base["prompt"] = base["prompt_ids"]
        status = check(
            small_server,
            "POST",
            path,
            json.dumps(rng.choice((mutated, varied))(rng, base)).encode(),
        )
        seen[status] = seen.get(status, 0) + 1
    record_property("cases", sum(seen.values()))
    assert seen[200] > 20 and seen[400] > 20, seen
    small_server.wait_until_idle()
    small_server.assert_healthy()


def test_damaged_bodies_succeed_or_are_refused(
    small_server: Server, seed: int, record_property: Callable[[str, object], None]
) -> None:
    rng = random.Random(seed)
    done = 0
    for _ in case_numbers(CASES // 2):
        path, body = rng.choice(BODIES)
        done += 1
        check(small_server, "POST", path, damaged(rng, json.dumps(body).encode()))
    record_property("cases", done)
    small_server.wait_until_idle()
    small_server.assert_healthy()


def test_any_method_on_any_path_gets_a_response(small_server: Server, seed: int) -> None:
    rng = random.Random(seed)
    for method in METHODS:
        for path in PATHS:
            body = rng.choice((None, b"", b"{}", json.dumps(CHAT).encode()))
            headers = rng.choice(({}, {"Accept": "\xff"}, {"Authorization": "x" * 9000}, {
                "Content-Type": "text/plain", "Content-Encoding": "gzip", "Origin": "http://localhost",
            }))  # fmt: skip
            check(small_server, method, path, body, **headers)
    small_server.assert_healthy()


def test_bytes_that_are_not_http_end_only_their_own_connection(
    small_server: Server, seed: int
) -> None:
    rng = random.Random(seed)
    good = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 40\r\n\r\n{}"
    chunked = (
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    for _ in range(300):
        raw = rng.choice((
            rng.randbytes(rng.randrange(1, 400)), damaged(rng, good), damaged(rng, chunked + b"zz"),
            b"GET / HTTP/9.9\r\n\r\n", b"\x16\x03\x01" + rng.randbytes(60), b"GET " + b"/" * 70_000,
            b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 5000 + b"\r\n", chunked + b"ffffffffff\r\nx",
        ))  # fmt: skip
        with closing(
            socket.create_connection(("127.0.0.1", small_server.port), ANSWER_S)
        ) as connection:
            try:
                connection.sendall(raw)
                if rng.random() < 0.5:
                    connection.shutdown(socket.SHUT_WR)
                    answer = connection.recv(4096)
                    assert b" 500 " not in answer.split(b"\r\n")[0], raw
            except (ConnectionError, BrokenPipeError):
                pass  # the server may close the connection at any time
    small_server.wait_until_idle()
    small_server.assert_healthy()
