"""The choices of one response, as chunks of a stream or as a whole, with usage and timings."""

from collections.abc import Sequence
from typing import Any

from osmium.engine.request import Event, Finish, Token
from osmium.errors import OsmiumError
from osmium.server.openai import ResponseBuilder, error_body
from osmium.server.response_writer import DONE, Handle, StreamEvent, stream_event
from osmium.text.tokenizer import Tokenizer

__all__ = ["Choices", "timings"]


class Choices:
    """The ResponseWriter of chats and completions: `count` choices, which end independently."""

    def __init__(
        self,
        name: str,
        tokenizer: Tokenizer | None,
        *,
        chat: bool,
        count: int = 1,
        stream_usage: bool = False,
        timings_per_token: bool = False,
        **options: Any,
    ) -> None:
        """A stream ends with `stream_usage`, and each of its chunks has `timings_per_token`.

        `options` are those of each ResponseBuilder."""
        self.chat = chat
        self._stream_usage, self._timings_per_token = stream_usage, timings_per_token
        self._tokens = 0
        """Generated tokens so far."""
        head = None
        self.builders: list[ResponseBuilder] = []
        for index in range(count):
            builder = ResponseBuilder(name, tokenizer, chat=chat, index=index, head=head, **options)
            head = builder.head
            self.builders.append(builder)
        self.error: OsmiumError | None = None
        """The error of the choice that failed first; it ends the response."""
        self.finished = False
        """Whether every choice has ended, or one failed."""

    def push(self, index: int, event: Event, handles: Sequence[Handle]) -> list[StreamEvent]:
        """See ResponseWriter."""
        chunks = self.builders[index].push(event)
        self._tokens += isinstance(event, Token)
        if isinstance(event, Finish):
            self.error = self.error or event.error
            ended = all(builder.finish is not None for builder in self.builders)
            self.finished = ended or self.error is not None
        if self._timings_per_token:
            for chunk in chunks:
                chunk["timings"] = timings(handles, self._tokens)
        if self.finished and self.error is None and not self._stream_usage:
            chunks[-1]["timings"] = timings(handles, self.usage()["completion_tokens"])
        return [stream_event(chunk) for chunk in chunks]

    def first(self) -> list[StreamEvent]:
        """See ResponseWriter: the role of each choice of a chat."""
        return [stream_event(builder.first()) for builder in self.builders] if self.chat else []

    def progress(self, done: int, total: int, seconds: float) -> list[StreamEvent]:
        """See ResponseWriter: a chunk in llama-server's form."""
        chunk = {
            **self.builders[0].progress(),
            "prompt_progress": {
                "total": total, "cache": 0, "processed": done, "time_ms": round(seconds * 1000),
            },
        }  # fmt: skip
        return [stream_event(chunk)]

    def last(self, handles: Sequence[Handle]) -> list[StreamEvent]:
        """See ResponseWriter: the usage, if it is asked for."""
        if not self._stream_usage:
            return [DONE]
        usage = self.usage()
        chunk = {**self.builders[0].chunk_head(), "choices": [], "usage": usage}
        chunk["timings"] = timings(handles, usage["completion_tokens"])
        return [stream_event(chunk), DONE]

    def failed(self, error: OsmiumError, shutdown: bool) -> list[StreamEvent]:
        """See ResponseWriter.  Without [DONE], a client knows that the engine failed."""
        return [stream_event(error_body(error)), *([DONE] if shutdown else [])]

    def body(self, handles: Sequence[Handle]) -> dict[str, Any]:
        """See ResponseWriter."""
        choices, usage = [builder.choice() for builder in self.builders], self.usage()
        return {
            **self.builders[0].head,
            "choices": choices,
            "usage": usage,
            "timings": timings(handles, usage["completion_tokens"]),
        }

    def usage(self) -> dict[str, Any]:
        """Prompt tokens, counted once, and the generated tokens of all choices."""
        finishes = [builder.finish for builder in self.builders]
        assert all(finishes), "the response has not finished"
        prompt = max(finish.prompt_tokens for finish in finishes if finish)
        completion = sum(finish.completion_tokens for finish in finishes if finish)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": 0},
        }


def timings(handles: Sequence[Handle], completion_tokens: int) -> dict[str, Any]:
    """llama-server's `timings`: tokens, milliseconds and rates of the prefill and of decoding.

    Several choices count as one: from the first start to the last token.
    """
    times = [handle.times for handle in handles]
    started = min((t.started for t in times if t.started), default=0.0)
    first = min((t.first_token for t in times if t.first_token), default=started)
    last = max((t.last_token for t in times if t.last_token), default=first)
    prompt_tokens = handles[0].prompt_progress[1]
    return {
        "cache_n": 0,
        **_rates("prompt", prompt_tokens, max(first - (started or first), 0.0)),
        **_rates("predicted", completion_tokens, max(last - first, 0.0)),
    }


def _rates(name: str, count: int, seconds: float) -> dict[str, Any]:
    return {
        f"{name}_n": count,
        f"{name}_ms": round(seconds * 1000, 3),
        f"{name}_per_token_ms": round(seconds * 1000 / count, 3) if count else 0.0,
        f"{name}_per_second": round(count / seconds, 3) if seconds else 0.0,
    }
