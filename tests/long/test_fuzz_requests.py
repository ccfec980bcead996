"""Thousands of mutated requests: no 5xx, no hang, and the server stays healthy."""

import json
import random
import socket
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest

from tests.long.server import ANSWER_S, Server, run_server

CASES, LEAST, MOST_S = 3000, 500, 90.0
"""Seconds for mutated JSON bodies, and their minimum number.

Half as many requests have damaged bytes, and some are not HTTP.
"""

CHAT: dict[str, Any] = {
    "model": "demo", "temperature": 0.7, "top_p": 0.9, "top_k": 20, "min_p": 0.05, "seed": 3,
    "messages": [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": [{"type": "text", "text": "Hello"}]},
        {"role": "assistant", "content": "Hi", "reasoning_content": "greet", "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{\"a\": 1}"}}
        ]},
        {"role": "tool", "tool_call_id": "1", "content": "4"},
        {"role": "user", "content": "And?"},
    ],
    "tools": [{"type": "function", "function": {
        "name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}}}],
    "tool_choice": "auto", "stream": False, "stream_options": {"include_usage": True},
    "stop": ["\n\n", "END"], "max_tokens": 4, "max_completion_tokens": 3, "n": 1,
    "presence_penalty": 0.1, "frequency_penalty": 0.1, "repetition_penalty": 1.1,
    "logit_bias": {"5": 1.5}, "logprobs": True, "top_logprobs": 2, "user": "u",
    "response_format": {"type": "text"}, "chat_template_kwargs": {"enable_thinking": False},
    "enable_thinking": False, "reasoning_effort": "none", "ignore_eos": False,
}  # fmt: skip

COMPLETION: dict[str, Any] = {
    "model": "demo", "prompt": "The capital of", "max_tokens": 3, "temperature": 0, "logprobs": 2,
    "echo": False, "suffix": None, "best_of": 1, "stop": "x", "stream": False, "seed": 1,
    "logit_bias": {"7": -3}, "n": 1, "prompt_ids": [1, 2, 3],
}  # fmt: skip

NASTY: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, -(2**63) - 1, 10**400, 1e308, -1e-308, 0.5,
    float("nan"), float("inf"), "", " ", "\0", "\ud800", "é🙂", "a" * 5000, "{{ 7 * 7 }}",
    "{% for i in range(10**9) %}x{% endfor %}", "<|im_end|>", "</think>", "user", "image_url",
    [], [[]], {}, {"": None}, [None], [1, "a", {}], {"type": "text"}, {"role": "user"},
    {"type": "image_url", "image_url": {"url": "x"}}, [[1, 2], [3]], [-1], [10**9], ["a", "b"],
    {"function": 3}, {"function": {"name": 5, "arguments": []}}, {"a": {"b": {"c": []}}},
]  # fmt: skip

PATHS = (
    "/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/models", "/v1/models/demo",
    "/health", "/metrics", "/", "/v1/nothing", "/v1/models/%00", "/v1/models/" + "x" * 3000,
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


def paths_of(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value inside `value`."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, one in items:
        yield (*path, key)
        if isinstance(one, dict | list):
            yield from paths_of(one, (*path, key))


def mutated(rng: random.Random, body: dict[str, Any]) -> Any:
    """A body with a few wrong values."""
    made: Any = json.loads(json.dumps(body))
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
        if not isinstance(made, dict) or not made:
            return made
        path = rng.choice(list(paths_of(made)))
        parent = made
        for key in path[:-1]:
            parent = parent[key]
        value = json.loads(json.dumps(rng.choice(NASTY)))
        match rng.randrange(6):
            case 0:
                del parent[path[-1]]
            case 1 if isinstance(parent, dict):
                parent[rng.choice(("type", "content", "role", "x", "", "function"))] = value
            case 2 if isinstance(parent, list):
                parent.extend([parent[path[-1]]] * rng.choice((1, 50)))
            case 3:
                parent[path[-1]] = [value] if rng.random() < 0.5 else {"text": value}
            case _:
                parent[path[-1]] = value
    if rng.random() < 0.01:
        return rng.choice(NASTY)
    return made


def damaged(rng: random.Random, raw: bytes) -> bytes:
    """Bytes changed, removed or doubled."""
    made = bytearray(raw)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(len(made) + 1)
        match rng.randrange(5):
            case 0:
                del made[at:]
            case 1:
                made[at:at] = rng.choice((b"\0", b"\xff\xfe", b"[" * 5000, b'"', b"\\u", b"{}"))
            case 2:
                made[at : at + rng.randrange(1, 9)] = b""
            case _ if at < len(made):
                made[at] ^= 1 << rng.randrange(8)
    return bytes(made)


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


def test_mutated_bodies_succeed_or_are_refused(small_server: Server, seed: int) -> None:
    rng = random.Random(seed)
    seen: dict[int, int] = {}
    for _ in case_numbers(CASES):
        path, body = rng.choice(((PATHS[0], CHAT), (PATHS[0], CHAT), (PATHS[1], COMPLETION)))
        base = dict(body)
        if rng.random() < 0.3:
            base["stream"] = True
        if path == PATHS[1] and rng.random() < 0.3:
            base["prompt"] = base["prompt_ids"]
        status = check(small_server, "POST", path, json.dumps(mutated(rng, base)).encode())
        seen[status] = seen.get(status, 0) + 1
    assert seen[200] > 20 and seen[400] > 20, seen
    small_server.wait_until_idle()
    small_server.assert_healthy()


def test_damaged_bodies_succeed_or_are_refused(small_server: Server, seed: int) -> None:
    rng = random.Random(seed)
    for _ in case_numbers(CASES // 2):
        path, body = rng.choice(((PATHS[0], CHAT), (PATHS[1], COMPLETION)))
        check(small_server, "POST", path, damaged(rng, json.dumps(body).encode()))
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
