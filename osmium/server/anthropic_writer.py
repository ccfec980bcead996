"""Anthropic's JSON out: a message of content blocks, whole or as named events of a stream."""

import json
import secrets
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from osmium.engine.request import Event, Finish, FinishReason
from osmium.errors import OsmiumError
from osmium.server.anthropic_errors import anthropic_error
from osmium.server.anthropic_signature import signature
from osmium.server.chat_prompt import ChatPrompt
from osmium.server.response_writer import Handle, StreamEvent, stream_event
from osmium.text.response_parser import (
    ContentDelta,
    Delta,
    ReasoningDelta,
    ResponseParser,
    ToolCallArguments,
    ToolCallStart,
)
from osmium.text.tool_formats import ToolFormat

__all__ = ["PING", "MessageWriter", "anthropic_model"]

PING = stream_event({"type": "ping"}, "ping")
"""An event without content, as clients close streams that are silent."""


class MessageWriter:
    """The ResponseWriter of Anthropic's messages."""

    def __init__(
        self,
        name: str,
        request_id: str,
        prompt: ChatPrompt,
        tool_format: ToolFormat | None,
        *,
        parallel_calls: bool = True,
        omits_thinking: bool = False,
    ) -> None:
        """Without `parallel_calls` only the first call is returned.  With `omits_thinking` a
        thinking block has its text in its signature alone."""
        self.error: OsmiumError | None = None
        self.finished = False
        self._request_id, self._prompt_tokens = request_id, prompt.num_tokens
        self._parallel_calls, self._omits_thinking = parallel_calls, omits_thinking
        self._parser = ResponseParser(
            tool_format, prompt.tools, prompt.thinking, new_id=lambda: "toolu_" + _random()
        )
        self._finish: Finish | None = None
        self._blocks: list[dict[str, Any]] = []
        self._is_open = False
        """Whether the last block continues."""
        self._pieces: list[str] = []
        """The text or the JSON of the open block."""
        self._head = {
            "id": "msg_" + _random(), "type": "message", "role": "assistant", "model": name,
        }  # fmt: skip

    # -- events of a stream ------------------------------------------------------------------------

    def first(self) -> list[StreamEvent]:
        """See ResponseWriter."""
        empty: dict[str, Any] = {"content": [], "stop_reason": None, "stop_sequence": None}
        message = {**self._head, **empty, "usage": self._usage(0)}
        return [_event("message_start", message=message), PING]

    def progress(self, done: int, total: int, seconds: float) -> list[StreamEvent]:
        """See ResponseWriter: none; comments have the progress."""
        return []

    def push(self, index: int, event: Event, handles: Sequence[Handle]) -> list[StreamEvent]:
        """See ResponseWriter."""
        deltas = self._parser.push(event.text)
        if isinstance(event, Finish):
            deltas += self._parser.finish()
        events = [one for delta in deltas for one in self._push(delta)]
        if isinstance(event, Finish):
            self._finish, self.error, self.finished = event, event.error, True
            events += self._close()
        return events

    def last(self, handles: Sequence[Handle]) -> list[StreamEvent]:
        """See ResponseWriter."""
        assert self._finish is not None, "the response has not finished"
        usage = self._usage(self._finish.completion_tokens)
        return [
            _event("message_delta", delta=self._stop(self._finish), usage=usage),
            _event("message_stop"),
        ]

    def failed(self, error: OsmiumError, shutdown: bool) -> list[StreamEvent]:
        """See ResponseWriter."""
        return [stream_event(anthropic_error(error, self._request_id), "error")]

    # -- complete response -------------------------------------------------------------------------

    def body(self, handles: Sequence[Handle]) -> dict[str, Any]:
        """See ResponseWriter."""
        assert self._finish is not None, "the response has not finished"
        return {
            **self._head,
            "content": self._blocks,
            **self._stop(self._finish),
            "usage": self._usage(self._finish.completion_tokens),
        }

    def _stop(self, finish: Finish) -> dict[str, Any]:
        """Why the response ended."""
        if finish.stop is not None:
            reason = "stop_sequence"
        elif finish.reason is FinishReason.LENGTH:
            reason = "max_tokens"
        else:
            has_calls = any(block["type"] == "tool_use" for block in self._blocks)
            reason = "tool_use" if has_calls else "end_turn"
        return {"stop_reason": reason, "stop_sequence": finish.stop}

    def _usage(self, output_tokens: int) -> dict[str, Any]:
        return {
            "input_tokens": self._prompt_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 0,
            "output_tokens": output_tokens,
        }

    # -- blocks ------------------------------------------------------------------------------------

    def _push(self, delta: Delta) -> list[StreamEvent]:
        """The events of a delta; a block starts with the first delta of another kind."""
        match delta:
            case ToolCallStart(index) | ToolCallArguments(index) if (
                index and not self._parallel_calls
            ):
                return []
            case ReasoningDelta(text):
                events = self._open({"type": "thinking", "thinking": "", "signature": ""})
                self._pieces.append(text)
                if not self._omits_thinking:
                    events.append(self._delta("thinking_delta", thinking=text))
                return events
            case ContentDelta(text):
                events = self._open({"type": "text", "text": ""})
                self._pieces.append(text)
                return [*events, self._delta("text_delta", text=text)]
            case ToolCallStart(_, call_id, name):
                return [
                    *self._close(),
                    *self._open({"type": "tool_use", "id": call_id, "name": name, "input": {}}),
                ]
            case ToolCallArguments(_, fragment):
                self._pieces.append(fragment)
                return [self._delta("input_json_delta", partial_json=fragment)]
            case _:
                return []

    def _open(self, block: dict[str, Any]) -> list[StreamEvent]:
        """Start a block, unless one of this type is open."""
        if self._is_open and self._blocks[-1]["type"] == block["type"]:
            return []
        events = self._close()
        self._blocks.append(block)
        self._is_open = True
        start = _event("content_block_start", index=len(self._blocks) - 1, content_block=block)
        return [*events, start]

    def _close(self) -> list[StreamEvent]:
        """End the open block, if there is one, and complete it for `body`."""
        if not self._is_open:
            return []
        block, text, events = self._blocks[-1], "".join(self._pieces), []
        self._is_open, self._pieces = False, []
        if block["type"] == "text":
            block["text"] = text
        elif block["type"] == "tool_use":
            block["input"] = _arguments(text)
        else:
            block["thinking"] = "" if self._omits_thinking else text
            block["signature"] = signature(text if self._omits_thinking else "")
            events.append(self._delta("signature_delta", signature=block["signature"]))
        return [*events, _event("content_block_stop", index=len(self._blocks) - 1)]

    def _delta(self, kind: str, **values: str) -> StreamEvent:
        """An event of the last block."""
        index = len(self._blocks) - 1
        return _event("content_block_delta", index=index, delta={"type": kind, **values})


def anthropic_model(name: str, context: int, created: int) -> dict[str, Any]:
    """Anthropic's fields of an entry of /v1/models, which has OpenAI's, too."""
    return {
        "type": "model",
        "display_name": name,
        "created_at": datetime.fromtimestamp(created, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "lifecycle": "active",
        "max_input_tokens": context,
        "max_tokens": context,
    }


def _event(kind: str, **values: Any) -> StreamEvent:
    return stream_event({"type": kind, **values}, kind)


def _random() -> str:
    return secrets.token_hex(12)


def _arguments(text: str) -> dict[str, Any]:
    """The arguments of a call; numbers are bounded, as JSON has no infinity."""
    found = json.loads(text or "{}", parse_int=_integer, parse_float=_number)
    return found if isinstance(found, dict) else {}


def _integer(text: str) -> int:
    return int(text) if len(text) < 300 else int(_number(text))


def _number(text: str) -> float:
    return max(-sys.float_info.max, min(float(text), sys.float_info.max))
