"""Small endpoints: unknown and unsupported routes, methods, the version, a stopped engine."""

import socket
from typing import Any

import pytest

import osmium
from osmium.errors import CheckpointError, EngineStopped
from osmium.server.app import create_app
from osmium.server.limits import Limits
from osmium.server.route import ApiRoute
from tests.server.running import connect, read_all, run_limited
from tests.server.scripted import TEMPLATE, ScriptedEngine, client_of, host_of


def error_of(answer: Any, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    return error


@pytest.mark.parametrize("method", ["GET", "POST", "DELETE", "PATCH"])
@pytest.mark.parametrize("path", ["/v1/nothing", "/v2/chat/completions", "/a%0ab", "/%00"])
def test_an_unknown_route_names_those_that_exist(method: str, path: str) -> None:
    with client_of() as client:
        error = error_of(client.request(method, path), 404)
    assert error["code"] == "unknown_route"
    for route in (
        "POST /v1/chat/completions", "POST /v1/completions", "GET /v1/models,",
        "GET /v1/models/{id}", "POST /tokenize", "POST /detokenize", "GET /health", "GET /version",
        "GET /metrics",
    ):  # fmt: skip
        assert route in error["message"]
    assert "embeddings" not in error["message"]


@pytest.mark.parametrize(
    ("path", "near"),
    [
        ("/chat/completions", "/v1/chat/completions"),
        ("/v1/v1/chat/completions", "/v1/chat/completions"),
        ("/v1/chat/completion", "/v1/chat/completions"),
        ("/models", "/v1/models"),
        ("/v1/tokenize", "/tokenize"),
        ("/v1/health", "/health"),
        ("/zzz", None),
    ],
)
def test_an_unknown_route_suggests_a_near_one(path: str, near: str | None) -> None:
    with client_of() as client:
        message = error_of(client.post(path), 404)["message"]
    assert (f"Did you mean {near}?" in message) if near else "Did you mean" not in message


def test_a_long_path_is_shortened_in_its_error() -> None:
    with client_of() as client:
        assert len(error_of(client.get("/" + "x" * 5000), 404)["message"]) < 1000


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/v1/chat/completions", {"POST"}),
        ("DELETE", "/v1/completions", {"POST"}),
        ("POST", "/v1/models", {"GET", "HEAD"}),
        ("POST", "/v1/models/x", {"GET", "HEAD"}),
        ("PUT", "/health", {"GET", "HEAD"}),
        ("GET", "/tokenize", {"POST"}),
        ("POST", "/", {"GET", "HEAD"}),
    ],
)
def test_a_wrong_method_is_a_405_with_those_allowed(
    method: str, path: str, allowed: set[str]
) -> None:
    with client_of() as client:
        answer = client.request(method, path)
    message = error_of(answer, 405)["message"]
    assert set(answer.headers["allow"].split(", ")) == allowed
    assert all(name in message for name in allowed)


@pytest.mark.parametrize(
    "path",
    ["/v1/embeddings", "/v1/images/generations", "/v1/images/edits", "/v1/audio/speech",
     "/v1/audio/transcriptions", "/v1/moderations", "/v1/rerank"],
)  # fmt: skip
def test_endpoints_of_other_models_are_named_as_unsupported(path: str) -> None:
    with client_of() as client:
        for answer in (
            client.post(path, json={"input": "x"}),
            client.get(path),
            client.post(path, content=b""),
            client.post(path, files={"file": b"x"}),
        ):
            error = error_of(answer, 404)
            assert error["code"] == "unsupported_endpoint"
            assert path in error["message"]


@pytest.mark.parametrize("path", ["/v1/messages/batches", "/v1/messages/batches/b_1/results"])
def test_batches_of_messages_are_refused_in_anthropics_form(path: str) -> None:
    with client_of() as client:
        answer = client.post(path, json={"requests": []})
    error = answer.json()["error"]
    assert (answer.status_code, error["type"]) == (404, "not_found_error")
    assert path in error["message"] and "Use POST /v1/messages." in error["message"]


def test_the_version_is_the_packages() -> None:
    with client_of() as client:
        assert client.get("/version").json() == {"version": osmium.__version__}


@pytest.mark.parametrize("path", ["/", "/health", "/version", "/v1/models"])
def test_head_has_the_status_of_get(path: str) -> None:
    with client_of() as client:
        assert (client.head(path).status_code, client.get(path).status_code) == (200, 200)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/tokenize"])
def test_a_stopped_engine_is_a_503_before_the_body_arrives(path: str) -> None:
    engine = ScriptedEngine()
    with run_limited(engine, Limits()) as server:
        engine.stopped = EngineStopped("The engine has stopped: the card is gone.")
        connection: socket.socket = connect(
            server.port, f"POST {path}", content_type="application/json", content_length="1000",
        )  # fmt: skip
        connection.settimeout(10)
        connection.sendall(b"{")
        start = connection.recv(65536)
        assert start.startswith(b"HTTP/1.1 503")
        connection.close()
        status, body, _ = read_all(connect(server.port, "GET /v1/models", connection="close"))
        assert (status, body["error"]["type"]) == (503, "server_error")


def test_props_have_llama_servers_names() -> None:
    defaults = {"temperature": 0.6, "top_k": 20}
    engine = ScriptedEngine(context=300, defaults=defaults)
    with client_of(engine, served_model_name="mine") as client:
        props = client.get("/props").json()
    assert props["default_generation_settings"] == {"n_ctx": 300, "params": defaults}
    assert props["n_ctx"] == 300 and props["total_slots"] == engine.max_num_seqs
    assert props["model_alias"] == "mine" and props["chat_template"] == TEMPLATE
    assert props["modalities"] == {"vision": False, "audio": False}
    assert osmium.__version__ in props["build_info"]
    with client_of(ScriptedEngine(template=None)) as client:
        assert client.get("/props").json()["chat_template"] is None
    with client_of(CheckpointError("none")) as client:
        assert client.get("/props").status_code == 503


def test_head_of_every_get_route_has_the_headers_and_no_body() -> None:
    engine = osmium.load("synthetic:tiny", device="cpu", context=64)
    with run_limited(engine, Limits()) as server:
        paths = [
            route.path.replace("{id:any}", "any/model")
            for route in create_app(host_of(ScriptedEngine())).routes
            if isinstance(route, ApiRoute) and "GET" in (route.methods or ())
        ]
        paths = [path for path in paths if "{" not in path]
        assert {"/", "/health", "/metrics", "/openapi.json", "/v1/models/any/model"} <= set(paths)
        for path in paths:
            with connect(server.port, f"HEAD {path}", connection="close") as connection:
                raw = b""
                while part := connection.recv(65536):
                    raw += part
            head, _, body = raw.partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200 OK") and not body, path
            assert b"content-length: 0" not in head, path


def test_a_model_may_have_any_characters_in_its_name() -> None:
    with client_of() as client:
        for name in ("qwen", "a/b", "%0A", "a%0Ab", "%20", "%00", "%F0%9F%98%80"):
            found = client.get(f"/v1/models/{name}")
            assert (found.status_code, found.json()["object"]) == (200, "model"), name
        assert client.get("/v1/models/").json()["object"] == "list"
