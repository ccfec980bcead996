"""What every endpoint does with the engine's events: a JSON body, or server-sent events.

answer.py runs a request and passes its events on; a ResponseWriter gives them an API's form.
"""

import json
from collections.abc import Sequence
from typing import Any, Protocol

from osmium.engine.prompt_logprobs import PromptLogprobs
from osmium.engine.request import Event, RequestTimes
from osmium.errors import OsmiumError

__all__ = ["DONE", "Handle", "ResponseWriter", "StreamEvent", "stream_event"]

StreamEvent = dict[str, str]
"""A server-sent event: `data`, and for APIs that name their events `event`."""

DONE: StreamEvent = {"data": "[DONE]"}
"""The last event of OpenAI's chats and completions."""


class Handle(Protocol):
    """What the server reads of a submitted request."""

    times: RequestTimes
    prompt_logprobs: PromptLogprobs | None

    @property
    def prompt_progress(self) -> tuple[int, int]: ...


class ResponseWriter(Protocol):
    """The response to one request, of one choice or several.

    `handles` are the submitted requests, one for each choice; the last ones may be missing until
    others have ended.
    """

    error: OsmiumError | None
    """The error of the choice that failed first; it ends the response."""
    finished: bool
    """Whether every choice has ended, or one failed."""

    def first(self) -> list[StreamEvent]:
        """The events before the prefill, so that clients see the stream at once."""

    def progress(self, done: int, total: int, seconds: float) -> list[StreamEvent]:
        """The events of the prefill's progress, in tokens."""

    def push(self, index: int, event: Event, handles: Sequence[Handle]) -> list[StreamEvent]:
        """The events of an event of a choice.  Without a stream they are dropped."""

    def last(self, handles: Sequence[Handle]) -> list[StreamEvent]:
        """The events after all choices have ended without an error."""

    def failed(self, error: OsmiumError, shutdown: bool) -> list[StreamEvent]:
        """The last events of a stream that fails; `shutdown` if the server ends."""

    def body(self, handles: Sequence[Handle]) -> dict[str, Any]:
        """The complete response, after all choices have ended without an error."""


def stream_event(value: dict[str, Any], name: str | None = None) -> StreamEvent:
    """A server-sent event of a JSON value."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":")).translate(_LINE_ENDS)
    return {"data": text} if name is None else {"event": name, "data": text}


_LINE_ENDS = {ord(char): f"\\u{ord(char):04x}" for char in "\x85\u2028\u2029"}
"""Unicode line ends, escaped: JSON allows them, but some clients split the stream's lines there."""
