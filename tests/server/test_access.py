"""Access: names of the host, origins of web pages, API keys, and the warning of an open server."""

import logging
from typing import Any

import pytest
import uvicorn
from starlette.testclient import TestClient

from osmium.config import Progress
from osmium.engine.engine import Engine
from osmium.errors import ConfigError
from osmium.server import app as server
from osmium.server.access import is_loopback, open_to, parse_hosts, parse_keys, parse_origins
from osmium.server.app import BackgroundLoader, create_app
from tests.server.scripted import ScriptedEngine, client_of

PATHS = [("GET", "/health"), ("GET", "/"), ("GET", "/metrics"), ("GET", "/v1/models"),
         ("POST", "/v1/chat/completions"), ("POST", "/v1/completions"), ("GET", "/none"),
         ("OPTIONS", "/v1/chat/completions")]  # fmt: skip


def error_of(answer: Any, status: int) -> Any:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


# -- host ------------------------------------------------------------------------------------------

HOSTS = [
    "localhost", "localhost:8012", "LocalHost:1", "localhost.", "a.localhost:80", "127.0.0.1",
    "127.0.0.1:8012", "127.9.9.9", "[::1]", "[::1]:8012", "192.168.1.5:8012", "8.8.8.8", "0.0.0.0",
    "[2001:db8::1]:443", "[::ffff:10.0.0.1]", "[fe80::1%25eth0]:8012", "127.1", "2130706433",
    "0x7f.1", "localhost:",
]  # fmt: skip
NAMES = [
    "evil.example", "evil.example:8012", "localhost.evil.example", "evil-localhost", "localhosts",
    "127.0.0.1.evil.example", "127.0.0.1.nip.io:8012", "user@localhost", "localhost@evil.example",
    "", " ", "localhost:8012x", "localhost:x", "[::1", "::1]", "[evil]", "1.2.3.4.5", "999.1.1.1",
    "0x", "a b", "localhost,evil.example", "localhost/evil", "box.lan", "testserver", "*",
    ".localhost.evil.example", "evil..localhost.x",
]  # fmt: skip


@pytest.mark.parametrize("host", HOSTS)
def test_loopback_names_and_literal_addresses_are_allowed_hosts(host: str) -> None:
    with client_of() as client:
        assert client.get("/health", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("host", NAMES)
def test_another_name_is_refused(host: str) -> None:
    with client_of() as client:
        answer = client.get("/health", headers={"Host": host})
    assert error_of(answer, 403)["code"] == "host_not_allowed"


@pytest.mark.parametrize(("method", "path"), PATHS)
def test_a_wrong_name_is_refused_on_every_path_before_anything_runs(method: str, path: str) -> None:
    engine = ScriptedEngine()
    with client_of(engine, api_key="k") as client:
        answer = client.request(method, path, headers={"Host": "evil.example"}, content=b"{")
        assert error_of(answer, 403)["code"] == "host_not_allowed"
        answer = client.request(method, path, headers={"Origin": "https://evil.example"})
        assert error_of(answer, 403)["code"] == "origin_not_allowed"
        assert "access-control-allow-origin" not in answer.headers
    assert not engine.requests


@pytest.mark.parametrize(
    ("allowed", "host", "status"),
    [
        (["box.lan"], "box.lan:8012", 200),
        (["box.lan"], "BOX.lan.", 200),
        (["box.lan"], "a.box.lan", 403),
        (["box.lan"], "boxxlan", 403),
        (["a.lan", "box.lan"], "box.lan", 200),
        (["a.lan, box.lan"], "box.lan", 200),
        ("box.lan:8012", "box.lan", 200),
        (["*.box.lan"], "a.b.box.lan", 200),
        (["*.box.lan"], "box.lan", 403),
        (["*.box.lan"], "evilbox.lan", 403),
        ([".box.lan"], "box.lan", 200),
        ([".box.lan"], "a.box.lan", 200),
        ([".box.lan"], "evilbox.lan", 403),
        (["*"], "evil.example", 200),
        (["bücher.example"], "xn--bcher-kva.example", 200),
    ],
)
def test_an_allowed_host_is_a_name_or_all_names_below_one(
    allowed: Any, host: str, status: int
) -> None:
    with client_of(allowed_host=allowed) as client:
        assert client.get("/health", headers={"Host": host}).status_code == status


@pytest.mark.parametrize("host", ["", "http://box.lan", "box.lan/", "a b", "a*b", "*.", "box.*"])
def test_a_host_that_is_no_name_is_refused_at_start(host: str) -> None:
    with pytest.raises(ConfigError, match="--allowed-host"):
        parse_hosts([host])


# -- origin ----------------------------------------------------------------------------------------

LOCAL = [
    "http://localhost", "http://localhost:3000", "https://localhost:8443", "http://127.0.0.1:5173",
    "http://[::1]:3000", "http://app.localhost:80", "tauri://localhost", "http://127.0.0.2",
    "http://tauri.localhost", "capacitor://localhost", "HTTP://LOCALHOST", "http://[::ffff:7f00:1]",
]  # fmt: skip
FOREIGN = [
    "https://evil.example", "http://localhost.evil.example", "http://localhost@evil.example",
    "http://evil.example:80@localhost", "http://evil.example#localhost", "null", "file://", "",
    "http://192.168.1.5:3000", "http://127.0.0.1.nip.io", "chrome-extension://abcdef",
    "moz-extension://0-1", "vscode-webview://x", "localhost", "http://", "http:///localhost",
    "http://localhost:80/evil", "http://localhost evil", "http://localhost, http://evil.example",
    "http://0.0.0.0:3000", "javascript:localhost", "//localhost", "http://evil.example/localhost",
    "*", "http://localhost\\.evil.example", "http://notlocalhost",
]  # fmt: skip


@pytest.mark.parametrize("origin", LOCAL)
def test_pages_of_this_machine_are_allowed(origin: str) -> None:
    with client_of() as client:
        answer = client.get("/v1/models", headers={"Origin": origin})
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == origin
        assert answer.headers["vary"] == "Origin"
        assert "access-control-allow-origin" not in client.get("/v1/models").headers


@pytest.mark.parametrize("origin", FOREIGN)
def test_other_pages_are_refused(origin: str) -> None:
    with client_of() as client:
        answer = client.get("/v1/models", headers={"Origin": origin})
    assert error_of(answer, 403)["code"] == "origin_not_allowed"


@pytest.mark.parametrize(
    ("listed", "origin", "status"),
    [
        ("https://app.example", "https://app.example", 200),
        (["https://app.example/"], "https://app.example", 200),
        (["https://app.example:443"], "https://app.example", 200),
        (["https://APP.example"], "https://app.example:443", 200),
        (["https://app.example"], "http://app.example", 403),
        (["https://app.example"], "https://app.example:8443", 403),
        (["https://app.example"], "https://appxexample", 403),
        (["https://a.example", "https://b.example"], "https://b.example", 200),
        (["https://a.example,https://b.example"], "https://b.example", 200),
        (["https://*.example"], "https://a.b.example", 200),
        (["https://*.example"], "https://example", 403),
        (["https://*.example"], "https://evil.test:1.example", 403),
        (["http://192.168.1.5:*"], "http://192.168.1.5:3000", 200),
        (["http://192.168.1.5:*"], "http://192.168.1.5.evil.example:3000", 403),
        (["chrome-extension://*"], "chrome-extension://abcdef", 200),
        (["chrome-extension://abc"], "chrome-extension://abcdef", 403),
        (["null"], "null", 200),
        (["null"], "https://null", 403),
        (["file://"], "file://", 200),
        (["https://app.example"], "http://localhost:3000", 200),
        (["*"], "https://evil.example", 200),
        (["*"], "null", 200),
    ],
)
def test_a_listed_origin_is_allowed(listed: Any, origin: str, status: int) -> None:
    with client_of(cors_origin=listed) as client:
        answer = client.get("/v1/models", headers={"Origin": origin})
    assert answer.status_code == status
    wanted = None if status == 403 else "*" if listed == ["*"] else origin
    assert answer.headers.get("access-control-allow-origin") == wanted


@pytest.mark.parametrize("origin", ["", "app.example", "https://", "https://a/b", "https://a b"])
def test_an_origin_that_is_none_is_refused_at_start(origin: str) -> None:
    with pytest.raises(ConfigError, match="--cors-origin"):
        parse_origins([origin])
    with pytest.raises(ConfigError, match="--cors-origin"):
        create_app(BackgroundLoader(lambda progress: None), cors_origin=origin)  # type: ignore[arg-type, return-value]


PREFLIGHT = {"Access-Control-Request-Method": "POST",
             "Access-Control-Request-Headers": "authorization,content-type"}  # fmt: skip


def test_a_preflight_is_answered_without_a_key() -> None:
    with client_of(api_key="k", cors_origin="https://app.example") as client:
        for origin in ("https://app.example", "http://localhost:3000"):
            headers = {"Origin": origin, **PREFLIGHT}
            answer = client.options("/v1/chat/completions", headers=headers)
            assert answer.status_code == 200
            assert answer.headers["access-control-allow-origin"] == origin
            assert "POST" in answer.headers["access-control-allow-methods"]
            allowed = answer.headers["access-control-allow-headers"]
            assert allowed == PREFLIGHT["Access-Control-Request-Headers"]
            assert "access-control-allow-private-network" not in answer.headers
            headers["Access-Control-Request-Private-Network"] = "true"
            answer = client.options("/v1/chat/completions", headers=headers)
            assert answer.headers["access-control-allow-private-network"] == "true"
        refused = client.get("/v1/models", headers={"Origin": "https://app.example"})
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == "https://app.example"


def test_web_pages_may_read_the_report_of_ignored_fields() -> None:
    with client_of() as client:
        body = {"messages": [{"role": "user", "content": "Hello"}], "strange": 1}
        headers = {"Origin": "http://localhost:3000"}
        answer = client.post("/v1/chat/completions", json=body, headers=headers)
    exposed = answer.headers["access-control-expose-headers"].split(", ")
    assert {"x-osmium-ignored", "x-osmium-did-you-mean", "request-id"} <= set(exposed)
    assert answer.headers["x-osmium-ignored"] == "strange"


def test_one_foreign_origin_of_several_is_refused() -> None:
    with client_of() as client:
        answer = client.get(
            "/health", headers=[("Origin", "http://localhost"), ("Origin", "https://evil.example")]
        )
        assert answer.status_code == 403
        answer = client.get("/health", headers=[("Host", "localhost"), ("Host", "evil.example")])
        assert answer.status_code == 403


# -- key -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "header",
    [
        ("Authorization", "Bearer s3cret"), ("Authorization", "bearer s3cret"),
        ("authorization", "BEARER   s3cret  "), ("Authorization", "bEaReR\ts3cret"),
        ("x-api-key", "s3cret"), ("X-API-Key", " s3cret "), ("Authorization", "Bearer other"),
    ],
)  # fmt: skip
def test_a_key_is_accepted_in_any_case_and_spacing(header: tuple[str, str]) -> None:
    with client_of(api_key=["other", "s3cret"]) as client:
        assert client.get("/v1/models", headers=[header]).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {}, {"Authorization": ""}, {"Authorization": "Bearer"}, {"Authorization": "Bearer "},
        {"Authorization": "Bearer wrong"}, {"Authorization": "s3cret"},
        {"Authorization": "Bearers3cret"}, {"Authorization": "Bearer s3crets"},
        {"Authorization": "Bearer s3cre"}, {"Authorization": "Bearer S3CRET"},
        {"Authorization": "Basic s3cret"}, {"x-api-key": ""}, {"x-api-key": "Bearer s3cret"},
        {"Cookie": "s3cret"},
    ],
)  # fmt: skip
def test_without_the_key_a_request_is_refused(headers: dict[str, str]) -> None:
    engine = ScriptedEngine()
    with client_of(engine, api_key="s3cret") as client:
        answer = client.get("/v1/models", headers=headers)
        assert error_of(answer, 401)["code"] == "invalid_api_key"
        assert answer.headers["www-authenticate"] == "Bearer"
        assert client.post("/v1/completions", headers=headers, content=b"{").status_code == 401
        assert client.get("/metrics", headers=headers).status_code == 401
        assert client.get("/health", headers=headers).status_code == 200
        assert client.get("/health/", headers=headers).status_code == 401
    assert not engine.requests


@pytest.mark.parametrize("key", ["sésame", "鍵", "a b"])
def test_a_key_of_other_letters_is_accepted_as_clients_encode_it(key: str) -> None:
    with client_of(api_key=key) as client:
        for code in ("utf-8", "latin1") if key == "sésame" else ("utf-8",):
            headers = {b"Authorization": b"Bearer " + key.encode(code)}
            assert client.get("/v1/models", headers=headers).status_code == 200
        assert client.get("/v1/models", headers={b"Authorization": b"Bearer "}).status_code == 401


@pytest.mark.parametrize("key", ["", " ", "a\nb", "a\x00"])
def test_a_key_that_no_header_can_have_is_refused_without_showing_it(key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_keys(["good", key])
    assert "a\n" not in str(caught.value)
    with pytest.raises(ConfigError):
        create_app(BackgroundLoader(lambda progress: None), api_key=key)  # type: ignore[arg-type, return-value]


# -- start -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "hosts", "origins", "has_key", "words"),
    [
        ("127.0.0.1", [], [], False, None),
        ("::1", ["box.lan"], ["https://app.example"], False, None),
        ("0.0.0.0", [], [], True, None),
        ("127.0.0.1", ["*"], ["*"], True, None),
        ("0.0.0.0", [], [], False, ["0.0.0.0", "--api-key-file"]),
        ("::", [], [], False, ["::"]),
        ("192.168.1.5", [], [], False, ["192.168.1.5"]),
        ("127.0.0.1", [], ["*"], False, ["web page", "--cors-origin"]),
        ("127.0.0.1", ["*"], [], False, ["--allowed-host"]),
        ("0.0.0.0", ["*"], ["*"], False, ["0.0.0.0", "--cors-origin", "--allowed-host"]),
    ],
)
def test_a_server_that_is_open_wider_without_a_key_says_so(
    address: str, hosts: list[str], origins: list[str], has_key: bool, words: list[str] | None
) -> None:
    warning = open_to(address, hosts, origins, has_key)
    assert (warning is None) == (words is None)
    assert all(word in str(warning) for word in words or [])


@pytest.mark.parametrize(
    ("options", "warns"),
    [({}, False), ({"address": "0.0.0.0"}, True), ({"address": "0.0.0.0", "api_key": "k"}, False),
     ({"cors_origin": ["*"]}, True)],
)  # fmt: skip
def test_the_start_warns_in_the_log(
    options: dict[str, Any], warns: bool, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(uvicorn.Server, "run", lambda self, sockets: None)

    def load(progress: Progress) -> Engine:
        raise AssertionError("the server does not run")

    with caplog.at_level(logging.WARNING):
        server.serve(BackgroundLoader(load), port=0, **options)
    assert ("no API key" in caplog.text) == warns


def test_the_name_that_the_server_listens_on_is_an_allowed_host(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[Any] = []
    usual = server.create_app

    def create(*args: Any, **options: Any) -> Any:
        made.append(usual(*args, **options))
        return made[0]

    monkeypatch.setattr(uvicorn.Server, "run", lambda self, sockets: None)
    monkeypatch.setattr(server, "create_app", create)
    listen = server._listen
    monkeypatch.setattr(server, "_listen", lambda address, port: listen("127.0.0.1", 0))
    server.serve(BackgroundLoader(lambda progress: None), address="box.lan", port=0)  # type: ignore[arg-type, return-value]
    client = TestClient(made[0])
    assert client.get("/health", headers={"Host": "box.lan:8012"}).status_code == 503
    assert client.get("/health", headers={"Host": "other.lan"}).status_code == 403


@pytest.mark.parametrize(
    ("host", "wanted"),
    [("localhost", True), ("a.localhost", True), ("127.0.0.1", True), ("[::1]", True),
     ("::1", True), ("::ffff:127.0.0.1", True), ("10.0.0.1", False), ("::", False),
     ("0.0.0.0", False), ("example", False), ("::ffff:10.0.0.1", False), ("", False)],
)  # fmt: skip
def test_loopback_hosts(host: str, wanted: bool) -> None:
    assert is_loopback(host) == wanted
