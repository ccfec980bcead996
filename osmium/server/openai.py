"""OpenAI's JSON out: completions, chunks of streams, models, errors."""

import secrets
import time
from typing import Any

from osmium.engine.request import Finish, FinishReason, Token
from osmium.errors import EngineStopped, OsmiumError, RequestError
from osmium.text.reasoning import ReasoningParser
from osmium.text.tokenizer import Tokenizer

__all__ = ["ResponseBuilder", "error_body", "error_status", "model_body"]


def error_status(error: OsmiumError) -> int:
    """The HTTP status of an error."""
    if isinstance(error, RequestError):
        return error.status
    return 503 if isinstance(error, EngineStopped) else 500


def error_body(error: OsmiumError) -> dict[str, Any]:
    """OpenAI's error object."""
    kind = "invalid_request_error" if isinstance(error, RequestError) else "server_error"
    return {
        "error": {
            "message": str(error),
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
    """One reply in OpenAI's form, whole or in chunks: `push` each event, read what it gives."""

    def __init__(
        self, name: str, tokenizer: Tokenizer | None, *, chat: bool, thinking: bool = False
    ) -> None:
        self.chat = chat
        self.thought = ReasoningParser(thinking)
        self.tokenizer = tokenizer
        self.finish: Finish | None = None
        self._texts = {"reasoning": "", "content": ""}
        self._logprobs: list[dict[str, Any]] = []
        self._plain: list[tuple[Token, int]] = []
        """Completions: each token and how much text came before it."""
        kind = "chat.completion" if chat else "text_completion"
        self._head = {
            "id": ("chatcmpl-" if chat else "cmpl-") + secrets.token_hex(12),
            "object": kind,
            "created": int(time.time()),
            "model": name,
        }

    # -- in chunks ---------------------------------------------------------------------------------

    def first(self) -> dict[str, Any]:
        """The chunk that opens a chat stream, before anything is known."""
        return self._chunk({"role": "assistant", "content": ""})

    def push(self, event: Token | Finish) -> list[dict[str, Any]]:
        """The chunks that an event makes."""
        thought, answer = self.thought.push(event.text)
        if isinstance(event, Finish):
            more = self.thought.flush()
            thought, answer = thought + more[0], answer + more[1]
            self.finish = event
        before = len(self._texts["content"])
        self._texts["reasoning"] += thought
        self._texts["content"] += answer
        logprobs = None
        if isinstance(event, Token) and event.logprob is not None:
            self._plain.append((event, before))
            entry = self._logprob(event)
            self._logprobs.append(entry)
            logprobs = {"content": [entry]} if self.chat else self._plain_logprobs(-1)
        chunks = []
        if thought:
            chunks.append(self._chunk({"reasoning_content": thought, "reasoning": thought}))
        if answer or logprobs is not None:
            delta = {"content": answer} if self.chat else answer
            chunks.append(self._chunk(delta, logprobs=logprobs))
        if isinstance(event, Finish) and event.error is None:
            chunks.append(self._chunk({} if self.chat else "", finish=_reason(event)))
        return chunks

    def usage_chunk(self) -> dict[str, Any]:
        """The last chunk of a stream whose usage was asked for."""
        return {**self._chunked(), "choices": [], "usage": self.usage()}

    def _chunk(
        self, delta: Any, finish: str | None = None, logprobs: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        part = {"delta": delta} if self.chat else {"text": delta}
        choice = {"index": 0, **part, "logprobs": logprobs, "finish_reason": finish}
        return {**self._chunked(), "choices": [choice]}

    def _chunked(self) -> dict[str, Any]:
        if not self.chat:
            return self._head
        return {**self._head, "object": "chat.completion.chunk"}

    # -- whole -------------------------------------------------------------------------------------

    def body(self) -> dict[str, Any]:
        """The whole reply."""
        assert self.finish is not None, "a reply is whole once it has finished"
        content = self._texts["content"]
        if self.chat:
            message: dict[str, Any] = {"role": "assistant", "content": content}
            if self._texts["reasoning"]:
                message["reasoning_content"] = self._texts["reasoning"]
                message["reasoning"] = self._texts["reasoning"]
            part: dict[str, Any] = {"message": message}
            logprobs: Any = {"content": self._logprobs} if self._logprobs else None
        else:
            part = {"text": content}
            logprobs = self._plain_logprobs(0) if self._plain else None
        reason = _reason(self.finish)
        choice = {"index": 0, **part, "logprobs": logprobs, "finish_reason": reason}
        return {**self._head, "choices": [choice], "usage": self.usage()}

    def usage(self) -> dict[str, Any]:
        """Tokens read and written."""
        assert self.finish is not None, "usage is known once a reply has finished"
        prompt, completion = self.finish.prompt_tokens, self.finish.completion_tokens
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": 0},
        }

    # -- log-probabilities -------------------------------------------------------------------------

    def _logprob(self, token: Token) -> dict[str, Any]:
        """Chat's form of one token's."""
        assert token.logprob is not None, "only tokens that carry one"
        top = [self._named(one, logprob) for one, logprob in token.top]
        return {**self._named(token.id, token.logprob), "top_logprobs": top}

    def _named(self, token: int, logprob: float) -> dict[str, Any]:
        raw = self.tokenizer.token_bytes(token) if self.tokenizer else b""
        return {
            "token": raw.decode("utf-8", errors="replace"),
            "logprob": logprob,
            "bytes": list(raw),
        }

    def _plain_logprobs(self, start: int) -> dict[str, Any]:
        """Completions' form, of the tokens from `start` on."""
        some = self._plain[start:]
        return {
            "tokens": [self._named(t.id, 0)["token"] for t, _ in some],
            "token_logprobs": [t.logprob for t, _ in some],
            "top_logprobs": [
                {self._named(one, 0)["token"]: logprob for one, logprob in t.top} for t, _ in some
            ],
            "text_offset": [before for _, before in some],
        }


def _reason(finish: Finish) -> str:
    return "length" if finish.reason is FinishReason.LENGTH else "stop"
