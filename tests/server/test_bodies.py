"""Bodies that are not plain JSON: compressed, empty, or with a byte order mark."""

import gzip
import json
from typing import Any

import pytest

from tests.server.scripted import ScriptedEngine, client_of

BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hello"}]},
    "/v1/completions": {"prompt": "Hello"},
    "/v1/responses": {"input": "Hello"},
    "/v1/messages": {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4},
    "/v1/messages/count_tokens": {"messages": [{"role": "user", "content": "Hello"}]},
    "/tokenize": {"prompt": "Hello"},
}


@pytest.mark.parametrize("encoding", ["gzip", "GZip", "br", "zstd", "identity, deflate"])
@pytest.mark.parametrize("path", BODIES)
def test_a_compressed_body_is_refused_by_its_encoding(path: str, encoding: str) -> None:
    data = gzip.compress(json.dumps(BODIES[path]).encode())
    engine = ScriptedEngine()
    with client_of(engine) as client:
        answer = client.post(path, content=data, headers={"Content-Encoding": encoding})
    error = answer.json()["error"]
    assert answer.status_code == 415
    assert repr(encoding) in error["message"] and "without compression" in error["message"]
    assert not engine.requests


def test_the_encoding_identity_is_none() -> None:
    path = "/v1/chat/completions"
    with client_of() as client:
        headers = {"Content-Encoding": "Identity"}
        assert client.post(path, json=BODIES[path], headers=headers).status_code == 200


@pytest.mark.parametrize("path", BODIES)
def test_a_byte_order_mark_is_left_out(path: str) -> None:
    data = b"\xef\xbb\xbf" + json.dumps({**BODIES[path], "strange": 1}).encode()
    with client_of() as client:
        answer = client.post(path, content=data)
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-osmium-ignored"] == "strange"


@pytest.mark.parametrize("body", [b"", b" \r\n", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("path", BODIES)
def test_an_empty_body_is_refused_as_such(path: str, body: bytes) -> None:
    with client_of() as client:
        answer = client.post(path, content=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == "The body is empty; send a JSON object."
