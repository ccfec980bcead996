"""From a request to its response: JSON or a stream of server-sent events.

A disconnect cancels the request's choices; an error in a stream is its last event.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar, cast

from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from osmium.engine.engine import Engine
from osmium.engine.request import Event, Finish, Token
from osmium.errors import RequestError
from osmium.server.choices import Choices, Handle, timings
from osmium.server.openai import error_body
from osmium.server.prepare import Prepare, Prepared, prepare_chat, prepare_completion
from osmium.server.shutdown import Events, Shutdown
from osmium.server.status import served_name

__all__ = ["chat_completions", "completions", "work_on_body"]

T = TypeVar("T")

PING_INTERVAL_S = 5
"""Seconds between two comments of a stream; clients time out on silent streams."""

PROGRESS_INTERVAL_S = 0.25
"""Seconds between two looks at the progress of a prefill, for return_progress."""


async def chat_completions(request: Request) -> Response:
    """POST /v1/chat/completions"""
    return await _handle(request, prepare_chat)


async def completions(request: Request) -> Response:
    """POST /v1/completions"""
    try:
        return await _handle(request, prepare_completion)
    except RequestError as error:
        if error.param == "messages":  # the engine's name for a prompt
            error.param = "prompt"
        raise


async def work_on_body(request: Request, work: Callable[[Engine, str, bytearray], T]) -> T:
    """Read a request's body, and run work(engine, served name, body) on a worker thread.

    Raises: EngineStopped before the body is read, if requests cannot be served.
    """
    state = request.app.state
    engine: Engine = state.loader.ready()
    name = served_name(request, engine)

    async def result() -> T:
        async with state.bodies.read(request) as (body, workers):
            return cast(T, await workers.run(lambda: work(engine, name, body)))

    shutdown: Shutdown = state.shutdown
    return await shutdown.unless_begun(result())


async def _handle(request: Request, prepare: Prepare) -> Response:
    prepared = await work_on_body(request, prepare)
    engine: Engine = request.app.state.loader.ready()
    headers = request.app.state.ignored.headers(prepared.ignored)
    return await _Answer(request, engine, prepared).respond(headers)


class _Answer:
    """One request that runs in the engine, once for each choice."""

    def __init__(self, request: Request, engine: Engine, prepared: Prepared) -> None:
        """Submit the request.  Raises: RequestError, EngineStopped."""
        self.request, self.engine, self.prepared = request, engine, prepared
        self.choices: Choices = prepared.choices
        self.shutdown: Shutdown = request.app.state.shutdown
        self.events: Events = asyncio.Queue()
        self.submitted = time.perf_counter()
        self.has_token = False
        self.shutdown.watch(self.events)
        loop = asyncio.get_running_loop()
        self.handles: list[Any] = []
        try:
            for index, params in enumerate(prepared.params):
                on_event = self._receiver(loop, index)
                mask = prepared.token_mask() if prepared.token_mask is not None else None
                handle = engine.submit(prepared.ids, params, on_event, token_mask=mask)
                self.handles.append(handle)
        except BaseException:
            self.cancel()
            raise

    def _receiver(self, loop: asyncio.AbstractEventLoop, index: int) -> Callable[[Event], None]:
        """The engine's callback for a choice."""
        put = self.events.put_nowait

        def on_event(event: Event) -> None:  # on the engine's thread
            try:
                loop.call_soon_threadsafe(put, (index, event))
            except RuntimeError:
                pass  # the server has stopped, and its event loop is closed

        return on_event

    def cancel(self) -> None:
        """Cancel all choices; does nothing to finished ones."""
        for handle in self.handles:
            self.engine.cancel(handle)

    async def respond(self, headers: dict[str, str]) -> Response:
        """The response.  Raises: the engine's error, unless it is a stream."""
        if self.prepared.stream:
            return EventSourceResponse(
                self._stream(),
                sep="\n",
                background=BackgroundTask(self.cancel),  # for a stream that never started
                ping=PING_INTERVAL_S,
                ping_message_factory=self._comment,
                headers={"Cache-Control": "no-cache", **headers},
            )
        watch = asyncio.create_task(_watch(self.request, self.events))
        try:
            while not self.choices.finished:
                event = await self.events.get()
                if event is None:
                    return Response(status_code=499)
                self._push(event)
        finally:
            watch.cancel()
            self.cancel()
        if self.choices.error is not None:
            raise self.choices.error
        body = self.choices.body()
        return JSONResponse({**body, "timings": self._timings(body["usage"])}, headers=headers)

    def _push(self, event: tuple[int, Event] | Finish) -> list[dict[str, Any]]:
        """The chunks of an event; the shutdown's has no index."""
        index, one = (0, event) if isinstance(event, Finish) else event
        self.has_token = True
        return self.choices.push(index, one)

    def _timings(self, usage: dict[str, Any]) -> dict[str, Any]:
        return timings(cast(list[Handle], self.handles), usage["completion_tokens"])

    def _comment(self) -> ServerSentEvent:
        """The comment of a stream without events, with the prefill's progress until its end."""
        text = "keep-alive"
        if not self.has_token:
            done, total = self.handles[0].prompt_progress
            text = f"prefill {done}/{total}"
        return ServerSentEvent(comment=text, sep="\n")

    # -- streams -----------------------------------------------------------------------------------

    async def _stream(self) -> AsyncIterator[dict[str, str]]:
        """Yield the response as server-sent events.  Its end, for any reason, cancels it."""
        choices, prepared = self.choices, self.prepared
        try:
            for chunk in choices.first():
                yield _data(chunk)
            if prepared.shows_progress:
                async for chunk in self._progress():
                    yield _data(chunk)
            count = 0
            while not choices.finished:
                event = await self.events.get()
                assert event is not None, "_watch runs for responses without a stream"
                chunks = self._push(event)
                if prepared.timings_per_token:
                    count += isinstance(event, tuple) and isinstance(event[1], Token)
                    for chunk in chunks:
                        chunk["timings"] = timings(self.handles, count)
                if choices.finished and choices.error is None and not prepared.usage:
                    chunks[-1]["timings"] = self._timings(choices.usage())
                for chunk in chunks:
                    yield _data(chunk)
            if choices.error is not None:
                yield _data(error_body(choices.error))
                if not self.shutdown.begun:
                    return  # without [DONE], a client knows that the engine failed
            elif prepared.usage:
                last = choices.usage_chunk()
                yield _data({**last, "timings": self._timings(last["usage"])})
            yield {"data": "[DONE]"}
        finally:
            self.cancel()

    async def _progress(self) -> AsyncIterator[dict[str, Any]]:
        """Chunks with the prefill's progress, until the first event is there."""
        handle: Handle = self.handles[0]
        shown = -1
        while True:
            ready = not self.events.empty()
            done, total = handle.prompt_progress
            if done != shown:
                shown = done
                yield self.choices.progress(done, total, time.perf_counter() - self.submitted)
            if ready:
                return
            await self._wait_for_event(PROGRESS_INTERVAL_S)

    async def _wait_for_event(self, seconds: float) -> None:
        end = time.perf_counter() + seconds
        while self.events.empty() and time.perf_counter() < end:
            await asyncio.sleep(0.01)


async def _watch(request: Request, events: Events) -> None:
    """Queue None after the client has disconnected."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    events.put_nowait(None)


def _data(value: dict[str, Any]) -> dict[str, str]:
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return {"data": text.translate(_LINE_ENDS)}


_LINE_ENDS = {ord(char): f"\\u{ord(char):04x}" for char in "\x85\u2028\u2029"}
"""Unicode line ends, escaped: JSON allows them, but some clients split the stream's lines there."""
