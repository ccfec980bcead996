"""The end of the server: SIGTERM and Ctrl-C.

Requests that run get an error in OpenAI's form: 503, or in a stream an error event and [DONE].  The
process exits within three seconds, and at a second signal at once.
"""

import asyncio
import logging
import os
import socket
import sys
import threading
import time
import weakref
from collections.abc import Awaitable, Callable
from contextlib import suppress
from types import FrameType
from typing import NoReturn, TypeVar

import uvicorn
from sse_starlette.sse import AppStatus

from osmium.engine.request import Event, Finish, FinishReason
from osmium.errors import EngineStopped
from osmium.server.connections import AcceptErrors, HttpConfig, HttpProtocol, OncePerSecond
from osmium.server.tls import close_late

__all__ = ["Events", "Server", "Shutdown", "exit_now"]

T = TypeVar("T")

Events = asyncio.Queue[tuple[int, Event] | Finish | None]
"""Events of a request: (choice, event), the Finish of the shutdown, or None at a disconnect."""

RESPOND_S = 0.7
"""Seconds in which clients receive the errors of their requests."""

CLOSE_S = 1.0
"""Seconds to wait for the engine, which ends after its step."""

BACKLOG = 1024
"""Connections that wait in the kernel."""


class Shutdown:
    """Whether the server ends, and what waits for a response meanwhile."""

    def __init__(self) -> None:
        self._begun = asyncio.Event()
        self._queues: weakref.WeakSet[Events] = weakref.WeakSet()
        self.engine_runs = False
        """Whether the engine was still in a step after CLOSE_S."""

    @property
    def begun(self) -> bool:
        return self._begun.is_set()

    def begin(self) -> None:
        """End all requests with an error; on the event loop's thread."""
        self._begun.set()
        for events in list(self._queues):
            events.put_nowait(Finish(FinishReason.ERROR, error=self.error()))

    def error(self) -> EngineStopped:
        return EngineStopped("The server is shutting down; try again when it runs.")

    def watch(self, events: Events) -> None:
        """End the queue of a request's events with an error once the server ends.
        Raises: EngineStopped if it ends already."""
        if self.begun:
            raise self.error()
        self._queues.add(events)

    async def unless_begun(self, awaitable: Awaitable[T]) -> T:
        """The awaitable's result.  Raises: EngineStopped as soon as the server ends."""
        work = asyncio.ensure_future(awaitable)
        end = asyncio.ensure_future(self._begun.wait())
        try:
            await asyncio.wait({work, end}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise self.error()
            return work.result()
        finally:
            work.cancel()
            end.cancel()

    async def close(self, close: Callable[[], None]) -> None:
        """Run `close`, which waits for the engine's step, for at most CLOSE_S."""
        loop, done = asyncio.get_running_loop(), asyncio.Event()
        errors: list[BaseException] = []

        def run() -> None:
            try:
                close()
            except BaseException as error:
                errors.append(error)
            with suppress(RuntimeError):  # it took longer, and the event loop is closed
                loop.call_soon_threadsafe(done.set)

        threading.Thread(target=run, name="osmium-close", daemon=True).start()
        try:
            async with asyncio.timeout(CLOSE_S if self.begun else None):
                await done.wait()
        except TimeoutError:
            self.engine_runs = True
        if errors:
            raise errors[0]


class Server(uvicorn.Server):
    """uvicorn's server, which ends as above and closes connections without file descriptors."""

    def __init__(self, config: HttpConfig, shutdown: Shutdown) -> None:
        super().__init__(config)
        self._shutdown, self._handshakes = shutdown, config.handshakes
        self._accept_errors: AcceptErrors | None = None
        # sse-starlette would cancel streams before they send their error.
        AppStatus.enable_automatic_graceful_drain = False
        logging.getLogger("uvicorn.error").addFilter(_ONCE_PER_SECOND)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The handler of SIGTERM and Ctrl-C."""
        if self._captured_signals:
            exit_now(sig)
        self._captured_signals.append(sig)
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._accept_errors = AcceptErrors(sockets or [], self.server_state, self._handshakes)
        asyncio.get_running_loop().set_exception_handler(self._accept_errors)
        for listening in sockets or []:
            listening.listen(BACKLOG)  # uvicorn's backlog is also the accepts of one loop turn

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for server in self.servers:
            server.close()  # no further connection
        close_late(self._handshakes, 0)
        self._shutdown.begin()
        end = time.monotonic() + RESPOND_S
        while self.server_state.tasks and time.monotonic() < end:
            await asyncio.sleep(0.02)
        for connection in list(self.server_state.connections):
            if isinstance(connection, HttpProtocol) and connection.busy:
                connection.transport.abort()  # the client does not read its response
        await super().shutdown(sockets)
        if self._accept_errors is not None:
            self._accept_errors.close()


_ONCE_PER_SECOND = OncePerSecond()


def exit_now(signal_number: int) -> NoReturn:
    """End the process without waiting for threads."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, RuntimeError):  # closed, or in the middle of a write
            stream.flush()
    os._exit(128 + signal_number)
