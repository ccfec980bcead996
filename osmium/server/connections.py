"""Connections: timeouts for headers and unread responses, a limit, and a lack of descriptors.

What uvicorn lacks of these.  Bodies are in server/body.py.
"""

import asyncio
import errno
import json
import logging
import os
import resource
import socket
import ssl
import sys
import time
from collections.abc import Collection, Iterable
from typing import Any, cast

import h11
import uvicorn
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol
from uvicorn.server import ServerState

from osmium.errors import EngineStopped, RequestError
from osmium.server.anthropic_errors import error_form
from osmium.server.limits import Limits
from osmium.server.openai import error_body
from osmium.server.tls import Handshake, close_late

__all__ = ["AcceptErrors", "HttpConfig", "HttpProtocol", "OncePerSecond"]

log = logging.getLogger("osmium.server")

REFUSED_S = 1.0
"""Seconds in which a connection over the limit may send its request, for its 503."""

RESERVED_FILES = 128
"""File descriptors that are not for connections."""

SMALL_CHUNK_BYTES = 64
FREE_SMALL_CHUNKS = 256
"""Chunks of a body that may be smaller on average: each takes the event loop about 15 us."""

OUT_OF_FILES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class HttpConfig(uvicorn.Config):
    """uvicorn's configuration, with our limits."""

    def __init__(
        self, app: Any, limits: Limits, tls: ssl.SSLContext | None = None, **options: Any
    ) -> None:
        """With `tls` connections begin with a handshake."""
        # uvloop, which uvicorn would take where it is installed, starts TLS in another way and
        # does not report a lack of descriptors.
        super().__init__(app, http=HttpProtocol, ws="none", loop="asyncio", **options)
        self.tls = tls
        self.handshakes: set[Handshake] = set()
        """Those that run."""
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        room = max(8, files - RESERVED_FILES) if files > 0 else limits.max_connections
        self.limits = limits
        self.max_connections = min(limits.max_connections, room)

    def load(self) -> None:
        super().load()
        if self.tls is not None:
            self.http_protocol_class = self._handshake  # type: ignore[assignment]

    def _handshake(self, *, server_state: ServerState, **options: Any) -> Handshake:
        """The protocol of a new connection with TLS."""
        assert self.tls is not None, "called by uvicorn with TLS"

        def has_room() -> bool:
            others = len(server_state.connections) + len(self.handshakes)
            return (
                others < self.max_connections
                or bool(close_late(self.handshakes, REFUSED_S, most=1))
                or bool(_close_idle(server_state.connections, most=1))
            )

        def make() -> HttpProtocol:
            return HttpProtocol(server_state=server_state, **options)

        return Handshake(self.tls, self.limits.head_timeout_s, self.handshakes, has_room, make)


class HttpProtocol(H11Protocol):
    """One connection."""

    def __init__(
        self,
        config: uvicorn.Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._config = cast(HttpConfig, config)
        size = config.h11_max_incomplete_event_size
        self.conn = _Connection(h11.SERVER, size or 16 << 10)
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self.idle_since = time.monotonic()
        """When the connection was opened, or its last response ended."""

    @property
    def busy(self) -> bool:
        """Whether a request is served."""
        return self.cycle is not None and not self.cycle.response_complete

    def is_idle_since(self, moment: float) -> bool:
        """Whether no request has been served since `moment`, and none is."""
        return not self.busy and self.idle_since < moment and not self.transport.is_closing()

    # -- events of the connection ------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        seconds = self._config.limits.head_timeout_s
        if len(self.connections) > self._config.max_connections and not _close_idle(
            self.connections, most=1
        ):
            self.app = _too_many_connections
            seconds = min(seconds, REFUSED_S)
        self._wait_for_head(seconds)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        for timer in (self._head_timer, self._write_timer):
            if timer is not None:
                timer.cancel()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.busy and self._head_timer is not None:
            self._head_timer.cancel()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self.idle_since = time.monotonic()
        if not self.busy:
            # The time also covers the unread rest of a refused body.
            self._wait_for_head(self._config.limits.head_timeout_s + self.timeout_keep_alive)

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._write_timer is None:
            self._write_timer = self.loop.call_later(
                self._config.limits.write_timeout_s, self.transport.abort
            )

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _should_upgrade(self) -> bool:
        """Never: a request to upgrade is served as HTTP/1.1, without uvicorn's warnings, as
        clients try WebSockets and HTTP/2 first."""
        return False

    # -- refusals ----------------------------------------------------------------------------------

    def send_400_response(self, msg: str) -> None:
        """Answer bytes that are not HTTP; uvicorn calls it with h11's error as the current one."""
        error = sys.exc_info()[1]
        status = getattr(error, "error_status_hint", 400)
        self._refuse(status, f"{msg.rstrip('.')}: {error}." if error else msg)

    def _refuse(self, status: int, text: str) -> None:
        """Send an error outside of the app, and close the connection."""
        if self.busy:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = json.dumps(error_body(RequestError(text))).encode()
            headers = [
                (b"content-type", b"application/json"),
                (b"content-length", str(len(body)).encode()),
                (b"connection", b"close"),
            ]
            reason = STATUS_PHRASES.get(status, b"")
            for event in (
                h11.Response(status_code=status, headers=headers, reason=reason),
                h11.Data(data=body),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _wait_for_head(self, seconds: float) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
        self._head_timer = self.loop.call_later(seconds, self._head_is_late)

    def _head_is_late(self) -> None:
        if self.busy or self.transport.is_closing():
            return
        if self.conn.our_state is h11.IDLE and self.conn.trailing_data[0]:
            limit = self._config.limits.head_timeout_s
            self._refuse(408, f"The request's headers did not arrive within {limit:g} s.")
        else:
            self.transport.close()


class _Connection(h11.Connection):
    """h11's parser, which refuses bodies in tiny chunks."""

    _chunks = 0
    _chunk_bytes = 0

    def next_event(self) -> Any:
        event = super().next_event()
        if isinstance(event, h11.Data) and event.chunk_start:
            self._chunks += 1
            self._chunk_bytes += len(event.data)
            if (
                self._chunks > FREE_SMALL_CHUNKS
                and self._chunk_bytes < self._chunks * SMALL_CHUNK_BYTES
            ):
                raise h11.RemoteProtocolError(
                    f"{self._chunks} chunks have {self._chunk_bytes} bytes; send larger chunks"
                )
        return event

    def start_next_cycle(self) -> None:
        super().start_next_cycle()
        self._chunks = self._chunk_bytes = 0


async def _too_many_connections(scope: Scope, receive: Receive, send: Send) -> None:
    """The app of a connection over the limit."""
    error = EngineStopped("The server has too many connections (--max-connections); try again.")
    headers = {"Connection": "close", "Retry-After": "5"}
    body, form_headers = error_form(scope, error)
    await JSONResponse(body, 503, {**headers, **form_headers})(scope, receive, send)


# -- file descriptors ------------------------------------------------------------------------------


class AcceptErrors:
    """Handles errors of the event loop: without file descriptors it closes connections.

    asyncio would leave them waiting, and log a traceback for each attempt to accept one.
    """

    def __init__(
        self,
        listening: Iterable[socket.socket],
        state: ServerState,
        handshakes: Collection[Handshake] = (),
    ) -> None:
        self._listening, self._state, self._handshakes = list(listening), state, handshakes
        self._spare: int | None = os.open(os.devnull, os.O_RDONLY)
        """Closed for a moment, so that a connection can be accepted and closed."""
        self._logged = 0.0
        self._closed = 0

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if isinstance(error, OSError) and error.errno in OUT_OF_FILES and "socket" in context:
            self._shed(error)
        else:
            loop.default_exception_handler(context)

    def close(self) -> None:
        if self._spare is not None:
            os.close(self._spare)
            self._spare = None

    def _shed(self, error: OSError) -> None:
        """Close idle connections, and those that wait to be accepted."""
        now = time.monotonic()
        self._closed += _close_idle(self._state.connections)
        self._closed += close_late(self._handshakes, REFUSED_S)
        self.close()
        try:
            for listening in self._listening:
                self._closed += _accept_and_close(listening)
        finally:
            try:
                self._spare = os.open(os.devnull, os.O_RDONLY)
            except OSError:
                self._spare = None  # the next connections wait in the kernel
        if now - self._logged >= 1:
            log.warning(
                "No file descriptor for a connection (%s): %d connections closed. Raise the limit "
                "(ulimit -n), or lower --max-connections.", error.strerror, self._closed,
            )  # fmt: skip
            self._logged, self._closed = now, 0


def _close_idle(connections: Iterable[Any], most: int = 1 << 16) -> int:
    """Close the connections that are idle for longest and REFUSED_S; returns their number."""
    end = time.monotonic() - REFUSED_S
    idle = sorted(
        (c for c in connections if isinstance(c, HttpProtocol) and c.is_idle_since(end)),
        key=lambda connection: connection.idle_since,
    )[:most]
    for connection in idle:
        connection.transport.abort()
    return len(idle)


def _accept_and_close(listening: socket.socket) -> int:
    """Close the connections that wait; returns their number."""
    for count in range(1 << 16):
        try:
            connection, _ = listening.accept()
        except OSError:  # none waits, or another thread took the descriptor
            return count
        connection.close()
    return 1 << 16


class OncePerSecond(logging.Filter):
    """Passes each message of a logger at most once per second."""

    def __init__(self) -> None:
        super().__init__()
        self._last: dict[str, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        now = time.monotonic()
        if now - self._last.get(str(record.msg), -1.0) < 1:
            return False
        self._last[str(record.msg)] = now
        return True
