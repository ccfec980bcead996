"""From a request to its response: JSON or a stream of server-sent events.

A disconnect cancels the request's choices; an error in a stream is its last event.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar, cast

from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from osmium.engine.engine import Engine
from osmium.engine.request import Event, Finish, FinishReason
from osmium.errors import OsmiumError, RequestError
from osmium.server.completion import prepare_completion
from osmium.server.fields import IgnoredFields
from osmium.server.limits import MAX_RUNNING_CHOICES
from osmium.server.prepare import Prepare, Prepared, prepare_chat
from osmium.server.request_log import TOKENS
from osmium.server.request_queue import RequestQueue
from osmium.server.response_types import (
    ChatChunk,
    ChatResponse,
    CompletionChunk,
    CompletionResponse,
)
from osmium.server.response_writer import Handle, ResponseWriter, StreamEvent
from osmium.server.route import ApiRoute, Operation
from osmium.server.schema import ChatRequest, CompletionRequest
from osmium.server.shutdown import Events, Shutdown
from osmium.server.status import served_name

__all__ = ["ANSWER_ROUTES", "answer", "work_on_body"]

log = logging.getLogger("osmium.server")

T = TypeVar("T")

PING_INTERVAL_S = 5
"""Seconds between two comments of a stream; clients time out on silent streams."""

PROGRESS_INTERVAL_S = 0.25
"""Seconds between two looks at the progress of a prefill, for return_progress."""


async def chat_completions(request: Request) -> Response:
    """The model's response to a conversation, as JSON or as a stream."""
    return await answer(request, prepare_chat)


async def completions(request: Request) -> Response:
    """The model's continuation of a prompt, as JSON or as a stream."""
    try:
        return await answer(request, prepare_completion)
    except RequestError as error:
        if error.param == "messages":  # the engine's name for a prompt
            error.param = "prompt"
        raise


ANSWER_ROUTES = [
    ApiRoute(
        "/v1/chat/completions",
        chat_completions,
        Operation(
            ChatRequest,
            response=ChatResponse,
            events=ChatChunk,
        ),
    ),
    ApiRoute(
        "/v1/completions",
        completions,
        Operation(
            CompletionRequest,
            response=CompletionResponse,
            events=CompletionChunk,
        ),
    ),
]


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


async def answer(
    request: Request, prepare: Prepare, ignored: IgnoredFields | None = None
) -> Response:
    """Prepare a request's body, run it, and respond.  Raises: RequestError, EngineStopped.

    `ignored` reports fields without effect; None for those of OpenAI's API.
    """
    prepared = await work_on_body(request, prepare)
    engine: Engine = request.app.state.loader.ready()
    headers = (ignored or request.app.state.ignored).headers(prepared.ignored)
    return await _Answer(request, engine, prepared).respond(headers)


class _Answer:
    """One request that runs in the engine, once for each choice."""

    def __init__(self, request: Request, engine: Engine, prepared: Prepared) -> None:
        """Submit the request.  Raises: RequestError, also if too many wait; EngineStopped."""
        self.request, self.engine, self.prepared = request, engine, prepared
        self.writer: ResponseWriter = prepared.writer
        self.shutdown: Shutdown = request.app.state.shutdown
        self.queue: RequestQueue = request.app.state.queue
        self.events: Events = asyncio.Queue()
        self.submitted = time.perf_counter()
        self.has_token = False
        self.generated: dict[int, int] = {}
        """Tokens so far, by choice."""
        request.scope[TOKENS] = self._tokens
        self.shutdown.watch(self.events)
        self._loop = asyncio.get_running_loop()
        self.handles: list[Any] = []
        """The submitted requests, each a Handle."""
        self._number = self.queue.join(self._waits)
        try:
            for _ in range(MAX_RUNNING_CHOICES):
                self._submit_next()
        except BaseException:
            self.cancel()
            raise

    def _submit_next(self) -> None:
        """Submit the next choice, if one is left.  Raises: RequestError, EngineStopped."""
        index = len(self.handles)
        if index < len(self.prepared.runs):
            run = self.prepared.runs[index]
            mask = None if run.token_mask is None else run.token_mask()
            on_event = self._receiver(index)
            self.handles.append(self.engine.submit(run.ids, run.params, on_event, token_mask=mask))

    def _receiver(self, index: int) -> Callable[[Event], None]:
        """The engine's callback for a choice."""
        loop, put = self._loop, self.events.put_nowait

        def on_event(event: Event) -> None:  # on the engine's thread
            try:
                loop.call_soon_threadsafe(put, (index, event))
            except RuntimeError:
                pass  # the server has stopped, and its event loop is closed

        return on_event

    def cancel(self) -> None:
        """Cancel all choices; does nothing to finished ones."""
        self.queue.leave(self._number)
        for handle in self.handles:
            self.engine.cancel(handle)

    def _waits(self) -> bool:
        """Whether the engine has begun none of its choices."""
        return not any(handle.times.started for handle in self.handles)

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
            while not self.writer.finished:
                event = await self.events.get()
                if event is None:
                    return Response(status_code=499)
                self._push(event)
        finally:
            watch.cancel()
            self.cancel()
        if self.writer.error is not None:
            raise self.writer.error

        def body() -> Response:
            return JSONResponse(self.writer.body(self.handles), headers=headers)

        if self.handles[0].prompt_logprobs is None:
            return body()
        return await asyncio.to_thread(body)  # it may be megabytes

    def _push(self, event: tuple[int, Event] | Finish) -> list[StreamEvent]:
        """Pass an event on; the shutdown's has no index."""
        index, one = (0, event) if isinstance(event, Finish) else event
        self.has_token = True
        if isinstance(one, Finish):
            self.generated[index] = one.completion_tokens or self.generated.get(index, 0)
        else:
            self.generated[index] = self.generated.get(index, 0) + 1
        events = self.writer.push(index, one, self.handles)
        if not isinstance(one, Finish) or one.error is not None:
            return events
        try:
            self._submit_next()
        except OsmiumError as error:
            failed = Finish(FinishReason.ERROR, error=error)
            events += self.writer.push(len(self.handles), failed, self.handles)
        return events

    def _tokens(self) -> tuple[int, int]:
        """Tokens of the prompts, each counted once, and of all choices so far; for the log."""
        prompts = {id(run.ids): len(run.ids) for run in self.prepared.runs}
        return sum(prompts.values()), sum(self.generated.values())

    def _comment(self) -> ServerSentEvent:
        """The comment of a stream without events: its place, then the prefill's progress.

        It comes with the API's ping event, if there is one.
        """
        text = "keep-alive"
        if not self.has_token:
            place = self.queue.place(self._number)
            done, total = self.handles[0].prompt_progress
            text = f"prefill {done}/{total}" if place is None else "queued {}/{}".format(*place)
        ping = self.prepared.ping or {}
        return ServerSentEvent(ping.get("data"), event=ping.get("event"), comment=text, sep="\n")

    # -- streams -----------------------------------------------------------------------------------

    async def _stream(self) -> AsyncIterator[StreamEvent]:
        """Yield the response as server-sent events.  Its end, for any reason, cancels it.

        An exception that is a bug is logged, and the stream ends with an error event.
        """
        writer = self.writer
        try:
            for one in writer.first():
                yield one
            if self.prepared.shows_progress:
                async for one in self._progress():
                    yield one
            while not writer.finished:
                event = await self.events.get()
                assert event is not None, "_watch runs for responses without a stream"
                for one in self._push(event):
                    yield one
            if writer.error is None:
                end = writer.last(self.handles)
            else:
                end = writer.failed(writer.error, self.shutdown.begun)
            for one in end:
                yield one
        except Exception as error:  # the headers are sent, so only an event can tell the client
            log.error("A stream of %s failed", type(writer).__name__, exc_info=error)
            problem = OsmiumError(f"Internal error: {type(error).__name__}.")
            for one in writer.failed(problem, False):
                yield one
        finally:
            self.cancel()

    async def _progress(self) -> AsyncIterator[StreamEvent]:
        """The prefill's progress, until the first event is there."""
        handle: Handle = self.handles[0]
        shown = -1
        while True:
            ready = not self.events.empty()
            done, total = handle.prompt_progress
            if done != shown:
                shown = done
                seconds = time.perf_counter() - self.submitted
                for one in self.writer.progress(done, total, seconds):
                    yield one
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
