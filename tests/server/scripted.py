"""An engine that says what it is told to: the server's tests need no model.

It keeps the promises of `Engine` that the server builds on: events on another thread, one Finish at
the end of every request, cancel at any moment, refusals before anything is queued.
"""

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

from starlette.testclient import TestClient

from osmium.config import Progress
from osmium.engine.engine import Engine
from osmium.engine.request import Event, Finish, FinishReason, SamplingParams, Token
from osmium.engine.stops import StopMatcher
from osmium.errors import EngineStopped, OsmiumError, RequestError
from osmium.server.app import BackgroundLoader, create_app
from osmium.text.chat import ChatTemplate
from osmium.text.tokenizer import Tokenizer
from tests.text.byte_level import byte_level

__all__ = [
    "PATIENCE_S",
    "TEMPLATE",
    "TOKENIZER",
    "Asked",
    "Scripted",
    "chunks",
    "client_of",
    "host_of",
]

PATIENCE_S = 20.0
"""A test that waits longer than this has found something that never comes."""

TOKENIZER = byte_level()

TEMPLATE = """\
{%- for tool in tools or [] %}{{ tool | tojson }}{% endfor %}
{%- for message in messages %}
    {%- if message.content == 'refuse' %}{{ raise_exception('not this one') }}{% endif %}
    {{- message.role ~ ': ' ~ message.content ~ '\\n' }}
{%- endfor %}
{{- 'assistant:' }}{% if enable_thinking %}<think>{{ '\\n' }}{% endif %}"""


class Asked:
    """One request that came in."""

    def __init__(self, ids: list[int], params: SamplingParams) -> None:
        self.ids, self.params = ids, params
        self.cancelled = threading.Event()
        self.finish: Finish | None = None
        self.done = threading.Event()

    @property
    def prompt(self) -> str:
        return TOKENIZER.decode(self.ids, specials=True)

    def wait(self) -> Finish:
        """How it ended, which must come."""
        assert self.done.wait(PATIENCE_S), "the request goes on"
        assert self.finish is not None
        return self.finish


class Scripted:
    """Answers every request with the same text, one token at a time, then an end token."""

    def __init__(
        self,
        says: str = "the end",
        *,
        context: int = 200,
        pace_s: float = 0.0,
        fails_after: int | None = None,
        tokenizer: Tokenizer | None = TOKENIZER,
        template: str | None = TEMPLATE,
        defaults: dict[str, Any] | None = None,
    ) -> None:
        self.says, self.context, self.pace_s = TOKENIZER.encode(says), context, pace_s
        self.fails_after = fails_after
        self.tokenizer = tokenizer
        self.template = None if template is None else ChatTemplate(template)
        self.defaults = defaults or {}
        self.name = "scripted"
        self.stopped: EngineStopped | None = None
        self.failure: EngineStopped | None = None
        self.when_stopped: Callable[[], None] | None = None
        self.asked: list[Asked] = []
        self.arrived = threading.Semaphore(0)
        """Released for each request that came in."""
        self.prefill = threading.Event()
        """Requests stay in prefill until this is set; it is, unless a test clears it."""
        self.prefill.set()
        self.closed = False

    def submit(
        self, prompt: Sequence[int], params: SamplingParams, on_event: Callable[[Event], None]
    ) -> Asked:
        if self.stopped is not None:
            raise self.stopped
        if len(prompt) >= self.context:
            raise RequestError(
                f"This model's maximum context length is {self.context} tokens. However, your "
                f"prompt has {len(prompt)} tokens.",
                param="messages",
                code="context_length_exceeded",
            )
        if not prompt:
            raise RequestError("The prompt has no tokens.", param="messages", code="empty_prompt")
        asked = Asked(list(prompt), params)
        self.asked.append(asked)
        self.arrived.release()
        threading.Thread(target=self._answer, args=(asked, on_event), daemon=True).start()
        return asked

    def cancel(self, request: Asked) -> None:
        request.cancelled.set()

    def close(self) -> None:
        self.closed = True

    def wait_for_request(self) -> Asked:
        """The next request that comes in."""
        assert self.arrived.acquire(timeout=PATIENCE_S), "no request came in"
        return self.asked[-1]

    def _answer(self, asked: Asked, on_event: Callable[[Event], None]) -> None:
        params = asked.params
        decoder = self.tokenizer.decoder() if self.tokenizer else None
        stops = StopMatcher(decoder, params.stop)
        reason, said, error = FinishReason.STOP, 0, None
        while not self.prefill.is_set() and not asked.cancelled.is_set():
            time.sleep(0.002)
        for token in self.says:
            if asked.cancelled.wait(self.pace_s) if self.pace_s else asked.cancelled.is_set():
                reason = FinishReason.CANCELLED
                break
            if said == self.fails_after:
                error = EngineStopped("The engine has stopped: the card is gone.")
                reason = FinishReason.ERROR
                break
            said += 1
            on_event(self._token(token, stops.push(token), params))
            if stops.matched:
                break
            if said in (params.max_tokens, self.context - len(asked.ids)):
                reason = FinishReason.LENGTH
                break
        else:
            said += 1  # the end token
        text = "" if error else stops.flush()
        asked.finish = Finish(reason, text, len(asked.ids), said, error)
        on_event(asked.finish)
        asked.done.set()

    @staticmethod
    def _token(token: int, text: str, params: SamplingParams) -> Token:
        if params.logprobs is None:
            return Token(token, text)
        top = tuple((one, -0.5 - i) for i, one in enumerate([token, 0][: params.logprobs]))
        return Token(token, text, -0.5, top)


def host_of(engine: Scripted) -> BackgroundLoader:
    """A host whose model is there at once."""

    def load(progress: Progress) -> Engine:
        return cast(Engine, engine)

    return BackgroundLoader(load)


@contextmanager
def client_of(engine: Scripted | OsmiumError | None = None, **options: Any) -> Iterator[TestClient]:
    """A client of an app over an engine; an error is what loading fails with."""

    def load(progress: Progress) -> Engine:
        if isinstance(engine, OsmiumError):
            raise engine
        return cast(Engine, engine or Scripted())

    host = BackgroundLoader(load)
    done = threading.Event()
    host.on_done = done.set
    app = create_app(host, **options)
    with TestClient(app, raise_server_exceptions=False) as client:
        assert done.wait(PATIENCE_S)
        yield client


def chunks(text: str) -> list[dict[str, Any]]:
    """The objects of a stream, which must end as streams end."""
    events = [one for one in text.split("\n\n") if one and not one.startswith(":")]
    assert all(one.startswith("data: ") for one in events)
    assert events[-1] == "data: [DONE]"
    return [json.loads(one.removeprefix("data: ")) for one in events[:-1]]
