"""What the log has of requests: nothing, unless --log-requests asks for it.

RequestLog writes a line per request, and at level 2 its body.  `hide_values` keeps the messages of
exceptions, which may quote a request, out of other lines.
"""

import logging
import time
import traceback
from collections.abc import Callable, Iterable
from urllib.parse import quote

from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["TOKENS", "HideValues", "RequestLog", "hide_values"]

TOKENS = "osmium.tokens"
"""Key of a scope: a function that returns the tokens of prompt and response so far."""

MAX_PATH_CHARS = 200

MAX_BODY_BYTES = 64 << 10
"""Bytes of a body in the log; further ones are counted."""

_CONTROLS = {
    code: f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
    for code in (*range(32), *range(127, 160), 0x2028, 0x2029)
}
"""Characters that would end a line or control a terminal, escaped."""


class RequestLog:
    """ASGI middleware that writes a line per request: method, path, status, tokens, time.

    At `level` 2 the next line has the body.  Headers and queries, which may have keys, are left
    out.
    """

    def __init__(self, app: ASGIApp, *, level: int, write: Callable[[str], None]) -> None:
        self.app, self._level, self._write = app, level, write

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, body = time.perf_counter(), _Body()
        status, has_ended = 0, False

        async def receive_body() -> Message:
            message = await receive()
            if message["type"] == "http.request":
                body.add(message.get("body", b""))
            return message

        async def send_status(message: Message) -> None:
            nonlocal status, has_ended
            status = message.get("status", status)
            has_ended = message["type"] == "http.response.body" and not message.get("more_body")
            await send(message)

        try:
            await self.app(scope, receive_body if self._level > 1 else receive, send_status)
        except BaseException:
            status, has_ended = status or 500, True
            raise
        finally:
            ms = 1000 * (time.perf_counter() - start)
            self._write(_line(scope, status, has_ended, ms))
            if self._level > 1 and body.size:
                self._write(f"body: {body.text()}")


def _line(scope: Scope, status: int, has_ended: bool, ms: float) -> str:
    path = quote(scope["path"], safe="/:@")[:MAX_PATH_CHARS]
    tokens = ""
    if TOKENS in scope:
        prompt, generated = scope[TOKENS]()
        tokens = f", {prompt} + {generated} tokens"
    end = "" if has_ended else ", disconnected"
    return f"{scope['method']} {path} {status}{tokens}, {ms:.1f} ms{end}"


class _Body:
    """The beginning of a body, and its size."""

    def __init__(self) -> None:
        self.size = 0
        self._start = bytearray()

    def add(self, data: bytes) -> None:
        self.size += len(data)
        self._start += data[: MAX_BODY_BYTES - len(self._start)]

    def text(self) -> str:
        """The body on one line."""
        text = self._start.decode("utf-8", "backslashreplace").translate(_CONTROLS)
        left = self.size - len(self._start)
        return f"{text} ... and {left} bytes" if left else text


# -- exceptions ------------------------------------------------------------------------------------


class HideValues(logging.Filter):
    """Replaces the exception of a record by its type and its places in the code."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if error is not None:
            first_line = record.getMessage().partition("\n")[0]  # asyncio's next ones have values
            record.msg, record.args = f"{first_line}\n{places(error)}", ()
            record.exc_info = record.exc_text = None
        return True


def places(error: BaseException) -> str:
    """An exception's traceback without its message, and those of its causes."""
    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in chain:
        chain.append(current)
        hidden = current.__suppress_context__
        current = current.__cause__ or (None if hidden else current.__context__)
    return "\n".join(
        "".join(traceback.format_tb(one.__traceback__)) + type(one).__name__
        for one in reversed(chain)
    )


_HIDE_VALUES = HideValues()


def hide_values(
    hide: bool, names: Iterable[str] = ("osmium.server", "uvicorn.error", "asyncio")
) -> None:
    """Let these loggers write no messages of exceptions, or let them again."""
    for name in names:
        logger = logging.getLogger(name)
        if hide:
            logger.addFilter(_HIDE_VALUES)
        else:
            logger.removeFilter(_HIDE_VALUES)
