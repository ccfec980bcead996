"""OpenAI's JSON out: completions, chunks of streams, models, errors."""

import secrets
import time
from collections.abc import Sequence
from typing import Any

from osmium.engine.request import Finish, FinishReason, Token
from osmium.errors import EngineStopped, OsmiumError, RequestError
from osmium.server.logprobs import AnswerTokens, chat_logprob, completion_logprobs
from osmium.text.response_parser import (
    ContentDelta,
    Delta,
    ReasoningDelta,
    ResponseParser,
    ToolCallArguments,
    ToolCallStart,
)
from osmium.text.tokenizer import Tokenizer
from osmium.text.tool_formats import ToolFormat

__all__ = ["ResponseBuilder", "error_body", "error_status", "model_body"]


MAX_ERROR_CHARS = 2000
"""Characters of an error's message; the middle of a longer one is left out."""


def error_status(error: OsmiumError) -> int:
    """The HTTP status of an error."""
    if isinstance(error, RequestError):
        return error.status
    return 503 if isinstance(error, EngineStopped) else 500


def error_body(error: OsmiumError) -> dict[str, Any]:
    """OpenAI's error object."""
    kind = "invalid_request_error" if isinstance(error, RequestError) else "server_error"
    text = str(error)  # it may contain a value of the client's
    if len(text) > MAX_ERROR_CHARS:
        text = text[: MAX_ERROR_CHARS // 2] + " ... " + text[-MAX_ERROR_CHARS // 2 :]
    return {
        "error": {
            "message": text,
            "type": kind,
            "param": getattr(error, "param", None),
            "code": getattr(error, "code", None),
        }
    }


def model_body(name: str, context: int, created: int) -> dict[str, Any]:
    """One entry of /v1/models."""
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "osmium",
        "max_model_len": context,
        "context_length": context,
    }


class ResponseBuilder:
    """Builds one choice in OpenAI's form: `push` each event; it returns the chunks.

    choice() is the complete choice, after the event that finishes it.
    """

    def __init__(
        self,
        name: str,
        tokenizer: Tokenizer | None,
        *,
        chat: bool,
        thinking: bool = False,
        tools: Sequence[Any] | None = None,
        tool_format: ToolFormat | None = None,
        parallel_calls: bool = True,
        shows_reasoning: bool = True,
        index: int = 0,
        head: dict[str, Any] | None = None,
    ) -> None:
        """`thinking`: the prompt ends inside the reasoning.  `tools`: those that the request
        offers; calls of them in `tool_format` become tool_calls, without `parallel_calls` one
        of them.  Choices of a response share `head`, which the first one makes."""
        self.chat, self.index = chat, index
        self.text_start = 0
        """Added to the offsets of a completion's tokens."""
        self.shows_end = False
        """Whether log-probabilities include the token that ended the response."""
        self._parallel_calls, self._shows_reasoning = parallel_calls, shows_reasoning
        self.parser = ResponseParser(tool_format, tools, thinking) if chat else None
        self.tokenizer = tokenizer
        self.finish: Finish | None = None
        self._texts = {"reasoning": "", "content": ""}
        self._calls: list[dict[str, Any]] = []
        self._answer_tokens = AnswerTokens(thinking)
        self._tokens: list[Token] = []
        """The answer's tokens with log-probabilities."""
        kind = "chat.completion" if chat else "text_completion"
        self.head = head or {
            "id": ("chatcmpl-" if chat else "cmpl-") + secrets.token_hex(12),
            "object": kind,
            "created": int(time.time()),
            "model": name,
        }

    # -- chunks of a stream ------------------------------------------------------------------------

    def first(self) -> dict[str, Any]:
        """The choice's first chunk of a chat stream, sent before the prefill."""
        return self.chunk({"role": "assistant", "content": ""})

    def progress(self) -> dict[str, Any]:
        """A chunk without text, for the progress of the prefill."""
        return self.chunk({} if self.chat else "")

    def push(self, event: Token | Finish) -> list[dict[str, Any]]:
        """The chunks of an event; none if it has no text."""
        if isinstance(event, Finish):
            self.finish = event
        fields = [self._field(delta) for delta in self._deltas(event)]
        answer = sum(len(field.get("content", "")) for field in fields)
        unparsed = self.parser.unparsed if self.parser else 0
        tokens = self._answer_tokens.add(event, answer, unparsed)
        if isinstance(event, Finish) and event.end is not None and self.shows_end:
            tokens = [*tokens, event.end]
        self._tokens += tokens
        logprobs = self._logprobs(tokens)
        if logprobs is not None and not any("content" in field for field in fields):
            fields.append({"content": ""})
        chunks = []
        for field in filter(None, fields):
            is_answer = logprobs is not None and "content" in field
            delta = field if self.chat else field["content"]
            chunks.append(self.chunk(delta, logprobs=logprobs if is_answer else None))
            logprobs = None if is_answer else logprobs
        if isinstance(event, Finish) and event.error is None:
            chunks.append(self.chunk({} if self.chat else "", finish=self._reason(event)))
        return chunks

    def _deltas(self, event: Token | Finish) -> list[Delta]:
        """What an event adds to reasoning, answer and calls."""
        if self.parser is None:
            return [ContentDelta(event.text)] if event.text else []
        deltas = self.parser.push(event.text)
        return deltas + self.parser.finish() if isinstance(event, Finish) else deltas

    def _field(self, delta: Delta) -> dict[str, Any]:
        """A delta in the form of a chunk's `delta`; empty for the end of a call."""
        match delta:
            case ReasoningDelta() if not self._shows_reasoning:
                return {}
            case ToolCallStart(index) | ToolCallArguments(index) if (
                index and not self._parallel_calls
            ):
                return {}
            case ReasoningDelta(text):
                self._texts["reasoning"] += text
                return {"reasoning_content": text, "reasoning": text}
            case ContentDelta(text):
                self._texts["content"] += text
                return {"content": text}
            case ToolCallStart(index, call_id, name):
                function = {"name": name, "arguments": ""}
                call = {"id": call_id, "type": "function", "function": function}
                self._calls.append(call)
                return {"tool_calls": [{"index": index, **call, "function": dict(function)}]}
            case ToolCallArguments(index, fragment):
                self._calls[index]["function"]["arguments"] += fragment
                return {"tool_calls": [{"index": index, "function": {"arguments": fragment}}]}
            case _:
                return {}

    def _reason(self, finish: Finish) -> str:
        """The finish reason; an ended response with calls has "tool_calls"."""
        reason = _reason(finish)
        return "tool_calls" if self._calls and reason == "stop" else reason

    def chunk(
        self, delta: Any, finish: str | None = None, logprobs: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """A chunk of this choice."""
        text = {"delta": delta} if self.chat else {"text": delta}
        choice = {"index": self.index, **text, "logprobs": logprobs, "finish_reason": finish}
        return {**self.chunk_head(), "choices": [choice]}

    def chunk_head(self) -> dict[str, Any]:
        if not self.chat:
            return self.head
        return {**self.head, "object": "chat.completion.chunk"}

    # -- complete response -------------------------------------------------------------------------

    def choice(self) -> dict[str, Any]:
        """The complete choice."""
        assert self.finish is not None, "the response has not finished"
        content = self._texts["content"]
        if self.chat:
            message: dict[str, Any] = {"role": "assistant", "content": content}
            if self._calls:
                message |= {"content": content or None, "tool_calls": self._calls}
            if self._texts["reasoning"]:
                message["reasoning_content"] = self._texts["reasoning"]
                message["reasoning"] = self._texts["reasoning"]
            text: dict[str, Any] = {"message": message}
        else:
            text = {"text": content}
        logprobs = self._logprobs(self._tokens)
        reason = self._reason(self.finish)
        return {"index": self.index, **text, "logprobs": logprobs, "finish_reason": reason}

    # -- log-probabilities -------------------------------------------------------------------------

    def _logprobs(self, tokens: list[Token]) -> dict[str, Any] | None:
        """Log-probabilities of tokens; None without tokens."""
        if not tokens:
            return None
        if self.chat:
            return {"content": [chat_logprob(token, self.tokenizer) for token in tokens]}
        return completion_logprobs(tokens, self.tokenizer, self.text_start)


def _reason(finish: Finish) -> str:
    return "length" if finish.reason is FinishReason.LENGTH else "stop"
