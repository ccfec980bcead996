"""HTTPS: certificates from files, and handshakes that are slow, broken or too many."""

import http.client
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from osmium.cli import main
from osmium.cli.api_keys import key_password
from osmium.errors import ConfigError
from osmium.server.limits import Limits
from osmium.server.tls import tls_context
from tests.server.running import RunningServer, address_of, process, run_limited
from tests.server.scripted import PATIENCE_S, ScriptedEngine

HERE = Path(__file__).resolve().parent / "certificates"
"""Made by the script in it; they secure nothing."""

CERTIFICATE, KEY, ENCRYPTED, CA = (
    str(HERE / name) for name in ("server.pem", "server.key", "encrypted.key", "ca.pem")
)

QUICK = Limits(max_connections=4, head_timeout_s=0.5)


def client_context(*, with_certificate: bool = False) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=CA)
    if with_certificate:
        context.load_cert_chain(HERE / "client.pem", HERE / "client.key")
    return context


def ask(port: int, context: ssl.SSLContext, path: str = "/health") -> tuple[int, bytes]:
    connection = http.client.HTTPSConnection("localhost", port, timeout=PATIENCE_S, context=context)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


@pytest.fixture
def server() -> Iterator[RunningServer]:
    with run_limited(ScriptedEngine(), QUICK, tls_context(CERTIFICATE, KEY)) as running:
        yield running


def closed_after(connection: socket.socket) -> float:
    """Seconds until the server closes a connection."""
    start = time.monotonic()
    with connection:
        connection.settimeout(PATIENCE_S)
        try:
            while connection.recv(4096):
                pass
        except ConnectionResetError:
            pass
    return time.monotonic() - start


# -- requests --------------------------------------------------------------------------------------


def test_requests_and_streams_are_served_by_https(server: RunningServer) -> None:
    assert ask(server.port, client_context())[0] == 200
    connection = http.client.HTTPSConnection(
        "localhost", server.port, timeout=PATIENCE_S, context=client_context()
    )
    body = b'{"messages": [{"role": "user", "content": "Hello"}], "stream": true}'
    for _ in range(2):  # on one connection
        connection.request("POST", "/v1/chat/completions", body)
        answer = connection.getresponse()
        assert answer.status == 200 and answer.read().endswith(b"data: [DONE]\n\n")
    connection.close()


def test_the_checks_of_hosts_apply_to_https(server: RunningServer) -> None:
    connection = http.client.HTTPSConnection(
        "localhost", server.port, timeout=PATIENCE_S, context=client_context()
    )
    connection.request("GET", "/health", headers={"Host": "evil.example"})
    assert connection.getresponse().status == 403
    connection.close()


def test_a_request_in_the_packet_of_the_handshakes_end_is_served(server: RunningServer) -> None:
    """The client's last bytes of the handshake and its request arrive at once."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = client_context().wrap_bio(incoming, outgoing, server_hostname="localhost")
    with socket.create_connection(("127.0.0.1", server.port), PATIENCE_S) as connection:
        while True:
            try:
                client.do_handshake()
                break
            except ssl.SSLWantReadError:
                connection.sendall(outgoing.read())
                incoming.write(connection.recv(65536))
        client.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        connection.sendall(outgoing.read())
        answer = b""
        while b"}" not in answer:
            incoming.write(connection.recv(65536))
            try:
                answer += client.read(65536)
            except ssl.SSLWantReadError:
                continue
    assert answer.startswith(b"HTTP/1.1 200 OK") and b'"status":"ok"' in answer


def test_a_large_body_arrives_whole() -> None:
    engine = ScriptedEngine(context=10**6)
    text = "word " * 400_000
    with run_limited(engine, Limits(), tls_context(CERTIFICATE, KEY)) as server:
        connection = http.client.HTTPSConnection(
            "localhost", server.port, timeout=PATIENCE_S, context=client_context()
        )
        connection.request("POST", "/tokenize", b'{"prompt": "%s"}' % text.encode())
        answer = connection.getresponse()
        assert answer.status == 200, answer.read()
        connection.close()


# -- clients ---------------------------------------------------------------------------------------


def test_clients_need_a_certificate_if_ca_certs_are_given() -> None:
    context = tls_context(CERTIFICATE, KEY, ca_certs=CA)
    with run_limited(ScriptedEngine(), QUICK, context) as server:
        assert ask(server.port, client_context(with_certificate=True))[0] == 200
        with pytest.raises(OSError):
            ask(server.port, client_context())


def test_a_client_without_tls_is_closed_and_others_are_served(
    server: RunningServer, caplog: pytest.LogCaptureFixture
) -> None:
    for data in (b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\xff", b""):
        connection = socket.create_connection(("127.0.0.1", server.port), PATIENCE_S)
        connection.sendall(data)
        if not data:
            connection.shutdown(socket.SHUT_WR)
        assert closed_after(connection) < 3
    assert ask(server.port, client_context())[0] == 200
    assert not caplog.records


def test_a_slow_handshake_ends_after_the_time_for_headers(server: RunningServer) -> None:
    silent = socket.create_connection(("127.0.0.1", server.port), PATIENCE_S)
    start = time.monotonic()
    assert ask(server.port, client_context())[0] == 200, "others are served meanwhile"
    assert time.monotonic() - start < 0.4
    assert 0.3 < closed_after(silent) + time.monotonic() - start < 3


def test_slow_headers_end_after_the_handshake(server: RunningServer) -> None:
    plain = socket.create_connection(("127.0.0.1", server.port), PATIENCE_S)
    connection = client_context().wrap_socket(plain, server_hostname="localhost")
    connection.sendall(b"GET / HTTP/1.1\r\n")
    assert b" 408 " in connection.recv(4096)
    connection.close()


def test_handshakes_count_as_connections() -> None:
    limits = Limits(max_connections=4, head_timeout_s=PATIENCE_S)
    with run_limited(ScriptedEngine(), limits, tls_context(CERTIFICATE, KEY)) as server:
        silent = [
            socket.create_connection(("127.0.0.1", server.port), PATIENCE_S) for _ in range(4)
        ]
        further = socket.create_connection(("127.0.0.1", server.port), PATIENCE_S)
        assert closed_after(further) < 1, "those that wait are not older than a second"
        time.sleep(1.1)
        assert ask(server.port, client_context())[0] == 200, "it takes the place of the oldest"
        assert closed_after(silent[0]) < 1
        for connection in silent[1:]:
            connection.close()


def test_the_server_ends_while_handshakes_wait() -> None:
    limits = Limits(head_timeout_s=PATIENCE_S)
    with run_limited(ScriptedEngine(), limits, tls_context(CERTIFICATE, KEY)) as server:
        silent = socket.create_connection(("127.0.0.1", server.port), PATIENCE_S)
        ask(server.port, client_context())
        waiter = threading.Thread(target=closed_after, args=(silent,))
        waiter.start()
        server.server.should_exit = True
        waiter.join(5)
        assert not waiter.is_alive()


def test_the_printed_address_says_https() -> None:
    with process("serves_tls") as child:
        assert address_of(child).startswith("https://127.0.0.1:")


# -- files -----------------------------------------------------------------------------------------


def test_an_encrypted_key_needs_its_password() -> None:
    assert tls_context(CERTIFICATE, ENCRYPTED, "secret") is not None
    for password, found in ((None, "encrypted"), ("wrong", "wrong"), ("x" * 5000, "wrong")):
        with pytest.raises(ConfigError, match=found) as caught:
            tls_context(CERTIFICATE, ENCRYPTED, password)
        assert ENCRYPTED in str(caught.value)
        assert password is None or password not in str(caught.value).split()


def test_a_certificate_and_its_key_may_be_in_one_file(tmp_path: Path) -> None:
    both = tmp_path / "both.pem"
    both.write_bytes(Path(CERTIFICATE).read_bytes() + Path(KEY).read_bytes())
    assert tls_context(str(both)) is not None


@pytest.mark.parametrize(
    ("files", "flag"),
    [
        ({"certfile": "missing.pem"}, "--ssl-certfile missing.pem"),
        ({"certfile": CERTIFICATE, "keyfile": "missing.key"}, "--ssl-keyfile missing.key"),
        ({"certfile": str(HERE)}, "--ssl-certfile"),
        ({"certfile": __file__}, "--ssl-certfile"),
        ({"certfile": CERTIFICATE}, "--ssl-certfile"),
        ({"certfile": CERTIFICATE, "keyfile": __file__}, "--ssl-keyfile"),
        ({"certfile": CERTIFICATE, "keyfile": str(HERE / "client.key")}, "is not the key"),
        ({"certfile": CERTIFICATE, "keyfile": KEY, "ca_certs": "no.pem"}, "--ssl-ca-certs no.pem"),
        ({"certfile": CERTIFICATE, "keyfile": KEY, "ca_certs": __file__}, "--ssl-ca-certs"),
        ({"certfile": CERTIFICATE, "keyfile": "a\0b"}, "--ssl-keyfile"),
        ({"certfile": None, "keyfile": KEY}, "--ssl-certfile"),
        ({"certfile": None, "ca_certs": CA}, "--ssl-certfile"),
        ({"certfile": None, "password": "p"}, "--ssl-certfile"),
    ],
)
def test_files_that_cannot_be_used_are_named(files: dict[str, Any], flag: str) -> None:
    with pytest.raises(ConfigError) as caught:
        tls_context(**files)
    assert flag in str(caught.value)


def test_without_files_there_is_no_tls() -> None:
    assert tls_context(None) is None


def test_wrong_files_end_the_command_before_the_model_loads(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["serve", "/no/such/model", "--ssl-certfile", "missing.pem"]) == 2
    assert "--ssl-certfile missing.pem cannot be read" in capsys.readouterr().err


def test_the_password_of_a_key_comes_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text("se cret\nother\n")
    assert key_password(None, str(file)) == "se cret"
    assert key_password("given", None) == "given"
    assert key_password(None, None) is None
    for password, path in (("given", str(file)), (None, str(tmp_path / "missing"))):
        with pytest.raises(ConfigError, match="--ssl-keyfile-password-file"):
            key_password(password, path)
    file.write_text("\n")
    with pytest.raises(ConfigError, match="no password"):
        key_password(None, str(file))
