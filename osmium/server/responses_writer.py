"""The ResponseWriter of /v1/responses: typed events in order, or the whole response."""

import time
from collections.abc import Callable, Sequence
from typing import Any

from osmium.engine.request import Event, Finish, FinishReason, Token
from osmium.errors import OsmiumError, RequestError
from osmium.server.logprobs import AnswerTokens, chat_logprob
from osmium.server.openai import error_body
from osmium.server.response_writer import Handle, StreamEvent, stream_event
from osmium.server.responses_input import Item
from osmium.server.responses_items import Call, CustomCall, Message, OutputItem, Reasoning
from osmium.server.responses_tools import ToolOrigin
from osmium.text.response_parser import (
    ContentDelta,
    Delta,
    ReasoningDelta,
    ResponseParser,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
)
from osmium.text.tokenizer import Tokenizer

__all__ = ["ResponsesWriter"]


class ResponsesWriter:
    """The response to one request; see ResponseWriter."""

    def __init__(
        self,
        head: dict[str, Any],
        tokenizer: Tokenizer | None,
        parser: ResponseParser,
        *,
        origins: dict[str, ToolOrigin] | None = None,
        parallel_calls: bool = True,
        shows_reasoning: bool = True,
        summary: bool = False,
        encrypted: bool = False,
        keep: Callable[[dict[str, Any]], None] = lambda response: None,
    ) -> None:
        """`head` has the response's id and the request's parameters.  `keep` gets the response
        once it has ended without an error."""
        self.error: OsmiumError | None = None
        self.finished = False
        self._head, self._tokenizer, self._parser = head, tokenizer, parser
        self._origins = origins or {}
        self._parallel_calls, self._shows_reasoning = parallel_calls, shows_reasoning
        self._summary, self._encrypted, self._keep = summary, encrypted, keep
        self._answer_tokens = AnswerTokens(parser.in_reasoning)
        self._held: list[dict[str, Any]] = []
        """Log-probabilities of tokens whose message has not begun."""
        self._items: list[OutputItem] = []
        self._open: OutputItem | None = None
        self._finish: Finish | None = None
        self._reasoning_tokens = 0
        self._sequence = 0

    # -- ResponseWriter ----------------------------------------------------------------------------

    def first(self) -> list[StreamEvent]:
        """See ResponseWriter."""
        body = self._response("in_progress")
        kinds = ("response.created", "response.in_progress")
        return self._numbered([{"type": kind, "response": body} for kind in kinds])

    def progress(self, done: int, total: int, seconds: float) -> list[StreamEvent]:
        """See ResponseWriter: there is no such event in this API."""
        return []

    def push(self, index: int, event: Event, handles: Sequence[Handle]) -> list[StreamEvent]:
        """See ResponseWriter."""
        before = self._parser.in_reasoning
        deltas = self._parser.push(event.text)
        if isinstance(event, Token):
            self._reasoning_tokens += before or self._parser.in_reasoning
        else:
            deltas += self._end(event)
        answer = sum(len(delta.text) for delta in deltas if isinstance(delta, ContentDelta))
        tokens = self._answer_tokens.add(event, answer, self._parser.unparsed)
        self._held += [chat_logprob(token, self._tokenizer) for token in tokens]
        events = [one for delta in deltas for one in self._events(delta)]
        if self._held and isinstance(self._open, Message):
            events += self._open.add("", self._taken())
        if self.finished and self.error is None:
            events += self._close_last()
        return self._numbered(events)

    def last(self, handles: Sequence[Handle]) -> list[StreamEvent]:
        """See ResponseWriter: the whole response."""
        body = self.body(handles)
        return self._numbered([{"type": f"response.{body['status']}", "response": body}])

    def failed(self, error: OsmiumError, shutdown: bool) -> list[StreamEvent]:
        """See ResponseWriter: the response with its error, and the error alone."""
        found = error_body(error)["error"]
        if self._open is not None:
            self._open.status = "incomplete"
        code = "invalid_prompt" if isinstance(error, RequestError) else "server_error"
        body = {**self._response("failed"), "error": {"code": code, "message": found["message"]}}
        alone = {
            "type": "error", "code": found["code"] or code, "message": found["message"],
            "param": found["param"],
        }  # fmt: skip
        return self._numbered([{"type": "response.failed", "response": body}, alone])

    def body(self, handles: Sequence[Handle]) -> dict[str, Any]:
        """See ResponseWriter."""
        assert self._finish is not None, "the response has not finished"
        cut = self._finish.reason is FinishReason.LENGTH
        body = self._response("incomplete" if cut else "completed")
        body["usage"] = self._usage(self._finish)
        if cut:
            body["incomplete_details"] = {"reason": "max_output_tokens"}
        else:
            body["completed_at"] = int(time.time())
        self._keep(body)
        return body

    # -- deltas ------------------------------------------------------------------------------------

    def _end(self, finish: Finish) -> list[Delta]:
        """The deltas after the last text.

        What completes the JSON of a call that was cut at a limit is left out: clients run calls
        whose arguments are valid, and these lack their end."""
        self._finish, self.error, self.finished = finish, finish.error, True
        deltas = self._parser.finish()
        if finish.reason is not FinishReason.LENGTH:
            return deltas
        cut = {
            delta.index for delta in deltas if isinstance(delta, ToolCallEnd) and not delta.complete
        }
        return [
            delta
            for delta in deltas
            if not (isinstance(delta, ToolCallArguments) and delta.index in cut)
        ]

    def _events(self, delta: Delta) -> list[dict[str, Any]]:
        match delta:
            case ReasoningDelta(text) if self._shows_reasoning:
                if isinstance(self._open, Reasoning):
                    return self._open.add(text)
                item = Reasoning(len(self._items), summary=self._summary, encrypted=self._encrypted)
                return self._begin(item) + item.add(text)
            case ContentDelta(text):
                if isinstance(self._open, Message):
                    return self._open.add(text, self._taken())
                message = Message(len(self._items))
                return self._begin(message) + message.add(text, self._taken())
            case ToolCallStart(index, call_id, name) if self._parallel_calls or not index:
                self._held = []  # tokens of the call
                origin = self._origins.get(name, ToolOrigin(name))
                kind = CustomCall if origin.custom else Call
                return self._begin(kind(len(self._items), call_id, origin))
            case ToolCallArguments(index, fragment) if self._parallel_calls or not index:
                assert isinstance(self._open, Call), "a call has begun"
                return self._open.add(fragment)
            case ToolCallEnd(index, complete) if self._parallel_calls or not index:
                cut = not complete and self._is_cut()
                return self._close("incomplete" if cut else "completed")
            case _:
                return []

    def _begin(self, item: OutputItem) -> list[dict[str, Any]]:
        events = self._close("completed")
        self._items.append(item)
        self._open = item
        return events + item.open()

    def _close(self, status: str) -> list[dict[str, Any]]:
        item, self._open = self._open, None
        return item.close(status) if item else []

    def _close_last(self) -> list[dict[str, Any]]:
        """Close the last item; a completed response without a message or a call gets one."""
        self._held = []
        if self._is_cut():
            return self._close("incomplete")
        events = self._close("completed")
        if not any(isinstance(item, Message | Call) for item in self._items):
            events += self._begin(Message(len(self._items))) + self._close("completed")
        return events

    def _is_cut(self) -> bool:
        return self._finish is not None and self._finish.reason is FinishReason.LENGTH

    def _taken(self) -> list[dict[str, Any]]:
        held, self._held = self._held, []
        return held

    # -- JSON --------------------------------------------------------------------------------------

    def _numbered(self, events: list[dict[str, Any]]) -> list[StreamEvent]:
        numbered = []
        for event in events:
            numbered.append(
                stream_event({**event, "sequence_number": self._sequence}, event["type"])
            )
            self._sequence += 1
        return numbered

    def _response(self, status: str) -> dict[str, Any]:
        output: list[Item] = [item.body() for item in self._items]
        return {**self._head, "status": status, "output": output}

    def _usage(self, finish: Finish) -> dict[str, Any]:
        return {
            "input_tokens": finish.prompt_tokens,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": finish.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": self._reasoning_tokens},
            "total_tokens": finish.prompt_tokens + finish.completion_tokens,
        }
