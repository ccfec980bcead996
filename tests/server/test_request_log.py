"""What stderr and the log have of requests: nothing, unless --log-requests asks for it."""

import json
import logging
import re
from typing import Any

import pytest
from starlette.testclient import TestClient

from osmium.cli.parser import parse
from osmium.engine.request import delivery_error
from osmium.server import tokens
from osmium.server.limits import Limits
from tests.server.running import connect, run_limited
from tests.server.scripted import PATIENCE_S, ScriptedEngine, client_of

SECRET = "s3cret-w0rd"

CHAT = {"messages": [{"role": "user", "content": SECRET}], "max_tokens": 3}


def post(client: TestClient, **fields: Any) -> None:
    answer = client.post("/v1/chat/completions?key=" + SECRET, json={**CHAT, **fields})
    assert answer.status_code == 200


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    captured = capsys.readouterr()
    assert not captured.out
    return captured.err.splitlines()


def test_nothing_of_a_request_is_logged_by_default(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "osmium")
    with client_of(ScriptedEngine()) as client:
        post(client)
        post(client, stream=True)
        client.post("/v1/completions", json={"prompt": SECRET, "temperature": SECRET})
        client.post("/v1/completions", content=SECRET.encode())
        client.get(f"/{SECRET}")
        client.get("/health", headers={"Host": SECRET})
    assert lines(capsys) == [] and not caplog.records


def test_a_line_has_method_path_status_tokens_and_time(capsys: pytest.CaptureFixture[str]) -> None:
    engine = ScriptedEngine()
    with client_of(engine, log_requests=1) as client:
        post(client)
        post(client, stream=True, n=2)
        client.get("/health")
        client.get("/no/such%0apath")
        client.post("/v1/completions", json={"prompt": 5})
    chat, stream, health, unknown, refused = lines(capsys)
    number = r"\d+\.\d ms"
    prompt = len(engine.requests[0].ids)
    assert re.fullmatch(
        rf"osmium: POST /v1/chat/completions 200, {prompt} \+ 3 tokens, {number}", chat
    )
    assert re.fullmatch(
        rf"osmium: POST /v1/chat/completions 200, {prompt} \+ 6 tokens, {number}", stream
    )
    assert re.fullmatch(rf"osmium: GET /health 200, {number}", health)
    assert re.fullmatch(rf"osmium: GET /no/such%0Apath 404, {number}", unknown)
    assert re.fullmatch(rf"osmium: POST /v1/completions 400, {number}", refused)


def test_the_second_level_has_the_body_on_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with client_of(ScriptedEngine(), log_requests=2) as client:
        client.post("/tokenize", content=b'{"prompt":\n"a\xc3\xa9\x1b[2J \xff"}')
        client.post("/tokenize", json={"prompt": "x" * 100_000})
        client.get("/health")
    first, body, second, long_body, health = lines(capsys)
    assert first.startswith("osmium: POST /tokenize ")
    assert body == 'osmium: body: {"prompt":\\x0a"aé\\x1b[2J \\xff"}'
    assert second.startswith("osmium: POST /tokenize ")
    left = len(b'{"prompt":""}') + 100_000 - (64 << 10)
    assert long_body.endswith(f"xxx ... and {left} bytes")
    assert health.startswith("osmium: GET /health 200")


def test_a_refused_host_and_a_wrong_key_have_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with client_of(ScriptedEngine(), log_requests=2, api_key="k") as client:
        client.get("/v1/models", headers={"Host": "evil.example"})
        client.get("/v1/models", headers={"Authorization": f"Bearer {SECRET}"})
    host, key = lines(capsys)
    assert " 403, " in host and " 401, " in key
    assert "evil" not in host and SECRET not in key


def test_a_client_that_disconnects_has_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    engine = ScriptedEngine("the end " * 500, context=10**6, pace_s=0.005)
    raw = json.dumps({**CHAT, "max_tokens": None, "stream": True}).encode()
    with run_limited(engine, Limits(), log_requests=1) as server:
        with connect(server.port, "POST /v1/chat/completions", raw,
                     content_length=str(len(raw))) as connection:  # fmt: skip
            assert b"200 OK" in connection.recv(4096)
        engine.requests[0].wait()
    (line,) = lines(capsys)
    assert re.search(r" 200, \d+ \+ \d+ tokens, [\d.]+ ms, disconnected$", line)


# -- exceptions ------------------------------------------------------------------------------------


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """An endpoint whose exception quotes the request."""

    def fail(*args: Any) -> None:
        try:
            raise KeyError(SECRET)
        except KeyError:
            raise ValueError(f"bad {SECRET}")  # noqa: B904 - with its context

    monkeypatch.setattr(tokens, "check_ids", fail)


def ask_broken(log_requests: int = 0) -> None:
    with run_limited(ScriptedEngine(), Limits(), log_requests=log_requests) as server:
        raw = b'{"tokens": [1]}'
        with connect(server.port, "POST /detokenize", raw,
                     content_length=str(len(raw))) as connection:  # fmt: skip
            connection.settimeout(PATIENCE_S)
            assert b" 500 " in connection.recv(4096)


@pytest.mark.usefixtures("broken")
def test_an_internal_error_is_logged_without_values(caplog: pytest.LogCaptureFixture) -> None:
    ask_broken()
    text = caplog.text
    assert "POST of detokenize failed" in text
    assert "ValueError" in text and "KeyError" in text and "tokens.py" in text
    assert SECRET not in text


@pytest.mark.usefixtures("broken")
def test_with_bodies_an_internal_error_is_logged_whole(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    ask_broken(log_requests=2)
    assert f"ValueError: bad {SECRET}" in caplog.text
    assert "POST /detokenize 500" in capsys.readouterr().err


def test_a_failed_delivery_is_logged_without_text(caplog: pytest.LogCaptureFixture) -> None:
    error = delivery_error(UnicodeEncodeError("ascii", SECRET, 0, 1, "no"))
    assert SECRET in str(error), "the client may have its own text"
    assert "UnicodeEncodeError" in caplog.text and SECRET not in caplog.text


def test_the_flag_counts() -> None:
    for flags, level in (([], 0), (["--log-requests"], 1), (["--log-requests"] * 2, 2)):
        _, args = parse(["serve", *flags, "demo"])
        assert args.log_requests == level
