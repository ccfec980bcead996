"""An engine with scripted responses, so that server tests need no model.

It keeps what the server relies on of `Engine`. Events come on another thread, and every request
ends with one Finish. Requests can be cancelled at any time, and refusals come before queueing.
"""

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from starlette.testclient import TestClient

from osmium.config import Progress
from osmium.engine.engine import Engine
from osmium.engine.prompt_logprobs import PromptLogprobs
from osmium.engine.request import (
    Event,
    Finish,
    FinishReason,
    RequestTimes,
    SamplingParams,
    Token,
    TokenMask,
    context_error,
)
from osmium.engine.stops import StopMatcher
from osmium.errors import EngineStopped, OsmiumError, RequestError
from osmium.server.app import BackgroundLoader, create_app
from osmium.text.chat import ChatTemplate
from osmium.text.tokenizer import Tokenizer
from tests.text.byte_level import byte_level

__all__ = [
    "BASE_URL",
    "END",
    "PATIENCE_S",
    "TEMPLATE",
    "TOKENIZER",
    "ScriptedEngine",
    "ScriptedRequest",
    "chunks",
    "client_of",
    "host_of",
]

BASE_URL = "http://127.0.0.1:8012"
"""An address that the server allows; TestClient's own is a name."""

PATIENCE_S = 20.0
"""Waiting longer than this means that an event is lost."""

TOKENIZER = byte_level()

END = TOKENIZER.encode("<|im_end|>")[0]

TEMPLATE = """\
{%- for tool in tools or [] %}{{ tool | tojson }}{% endfor %}
{%- for message in messages %}
    {%- if message.content == 'refuse' %}{{ raise_exception('not this one') }}{% endif %}
    {{- message.role ~ ': ' ~ message.content ~ '\\n' }}
{%- endfor %}
{{- 'assistant:' }}{% if enable_thinking %}<think>{{ '\\n' }}{% endif %}"""


class ScriptedRequest:
    """One received request."""

    def __init__(self, ids: list[int], params: SamplingParams) -> None:
        self.ids, self.params = ids, params
        self.cancelled = threading.Event()
        self.finish: Finish | None = None
        self.done = threading.Event()
        self.times = RequestTimes()
        self.prompt_progress = (0, len(ids))
        count = params.prompt_logprobs if params else None
        self.prompt_logprobs = None if count is None else PromptLogprobs(ids, count)

    @property
    def prompt(self) -> str:
        return TOKENIZER.decode(self.ids, specials=True)

    def wait(self) -> Finish:
        """Wait for the end of the request."""
        assert self.done.wait(PATIENCE_S), "the request does not end"
        assert self.finish is not None
        return self.finish


class ScriptedEngine:
    """Responds to every request with the same text, one token at a time, then an end token."""

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
        self.token_ids, self.context, self.pace_s = TOKENIZER.encode(says), context, pace_s
        self.fails_after = fails_after
        self.tokenizer = tokenizer
        self.config = SimpleNamespace(vocab_size=TOKENIZER.vocab_size, eos_token_ids=())
        self.template = None if template is None else ChatTemplate(template)
        self.defaults = defaults or {}
        self.name, self.max_num_seqs = "scripted", 4
        self.stopped: EngineStopped | None = None
        self.failure: EngineStopped | None = None
        self.when_stopped: Callable[[], None] | None = None
        self.requests: list[ScriptedRequest] = []
        self.arrived = threading.Semaphore(0)
        """Released once per received request."""
        self.prefill = threading.Event()
        """While a test has cleared this, requests stay in prefill."""
        self.prefill.set()
        self.begins = threading.Event()
        """While a test has cleared this, requests wait for their first step."""
        self.begins.set()
        self.closed = False
        self.logprob = -0.5
        """Log-probability of each generated token."""

    def submit(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        on_event: Callable[[Event], None],
        token_mask: TokenMask | None = None,
    ) -> ScriptedRequest:
        if self.stopped is not None:
            raise self.stopped
        if len(prompt) + (params.max_tokens != 0) > self.context:
            raise context_error(self.context, f"{len(prompt)} tokens")
        if not prompt:
            raise RequestError("The prompt has no tokens.", param="messages", code="empty_prompt")
        request = ScriptedRequest(list(prompt), params)
        if self.begins.is_set():
            request.times.started = request.times.submitted
        self.requests.append(request)
        self.arrived.release()
        threading.Thread(target=self._answer, args=(request, on_event), daemon=True).start()
        return request

    def cancel(self, request: ScriptedRequest) -> None:
        request.cancelled.set()

    def close(self) -> None:
        self.closed = True

    def wait_for_request(self) -> ScriptedRequest:
        """Wait for a request, and return the latest."""
        assert self.arrived.acquire(timeout=PATIENCE_S), "no request was received"
        return self.requests[-1]

    def _answer(self, request: ScriptedRequest, on_event: Callable[[Event], None]) -> None:
        params = request.params
        decoder = self.tokenizer.decoder() if self.tokenizer else None
        special_ids = {self.tokenizer.special_id(s): s for s in params.stop if self.tokenizer}
        stop_ids = {token: s for token, s in special_ids.items() if token is not None}
        stops = StopMatcher(decoder, params.stop, params.stop_after, stop_ids, params.min_tokens)
        reason, generated, error, end = FinishReason.STOP, 0, None, None
        for gate in (self.begins, self.prefill):
            while not gate.is_set() and not request.cancelled.is_set():
                time.sleep(0.002)
            request.times.started = request.times.started or time.perf_counter()
        request.prompt_progress = (len(request.ids), len(request.ids))
        if request.prompt_logprobs is not None:
            request.prompt_logprobs.add(0, self.logits_of(request.ids))
        if params.max_tokens == 0:
            reason = FinishReason.LENGTH
        for token in self.token_ids[: params.max_tokens]:
            if request.cancelled.wait(self.pace_s) if self.pace_s else request.cancelled.is_set():
                reason = FinishReason.CANCELLED
                break
            if generated == self.fails_after:
                error = EngineStopped("The engine has stopped: the card is gone.")
                reason = FinishReason.ERROR
                break
            generated += 1
            now = time.perf_counter()
            request.times.first_token = request.times.first_token or now
            request.times.last_token = now
            if token in params.stop_token_ids or stops.stops_at(token):
                break
            start, text = stops.length, stops.push(token)
            on_event(self.token(token, text, params, start, stops.length))
            if stops.matched:
                break
            if generated in (params.max_tokens, self.context - len(request.ids)):
                reason = FinishReason.LENGTH
                break
        else:
            if reason is FinishReason.STOP:
                generated += 1
                end = self.token(END, "", params, stops.length, stops.length)
        text = "" if error else stops.flush()
        end = None if params.logprobs is None else end
        counts = len(request.ids), generated
        request.finish = Finish(reason, text, *counts, error, stops.found, end)
        on_event(request.finish)
        request.done.set()

    @staticmethod
    def logits_after(token: int) -> npt.NDArray[np.float32]:
        """Logits of the prompt's tokens: the next id is the likeliest, then the ones behind it."""
        distance = (np.arange(TOKENIZER.vocab_size) - token - 1) % TOKENIZER.vocab_size
        return (-0.1 * distance).astype(np.float32)

    @classmethod
    def logits_of(cls, ids: Sequence[int]) -> npt.NDArray[np.float32]:
        return np.stack([cls.logits_after(token) for token in ids])

    def token(self, token: int, text: str, params: SamplingParams, start: int, end: int) -> Token:
        if params.logprobs is None:
            return Token(token, text, start=start, end=end)
        found = enumerate([token, 0][: params.logprobs])
        top = tuple((one, self.logprob - i) for i, one in found)
        return Token(token, text, self.logprob, top, start, end)


def host_of(engine: ScriptedEngine | Engine) -> BackgroundLoader:
    """A background loader whose model loads at once."""

    def load(progress: Progress) -> Engine:
        return cast(Engine, engine)

    return BackgroundLoader(load)


@contextmanager
def client_of(
    engine: ScriptedEngine | Engine | OsmiumError | None = None, **options: Any
) -> Iterator[TestClient]:
    """A client of an app over an engine; with an error, loading fails with it."""

    def load(progress: Progress) -> Engine:
        if isinstance(engine, OsmiumError):
            raise engine
        return cast(Engine, engine or ScriptedEngine())

    host = BackgroundLoader(load)
    done = threading.Event()
    host.on_done = done.set
    app = create_app(host, **options)
    with TestClient(app, base_url=BASE_URL, raise_server_exceptions=False) as client:
        assert done.wait(PATIENCE_S)
        yield client


def chunks(text: str) -> list[dict[str, Any]]:
    """The JSON objects of an event stream, which must end with [DONE]."""
    events = [one for one in text.split("\n\n") if one and not one.startswith(":")]
    assert all(one.startswith("data: ") for one in events)
    assert events[-1] == "data: [DONE]"
    return [json.loads(one.removeprefix("data: ")) for one in events[:-1]]
