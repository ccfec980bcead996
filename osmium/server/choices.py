"""The choices of one response, as chunks of a stream or as a whole, with usage and timings."""

from collections.abc import Sequence
from typing import Any

from osmium.engine.request import Event, Finish, Token
from osmium.errors import OsmiumError
from osmium.server.logprobs import prompt_logprobs
from osmium.server.openai import ResponseBuilder, error_body
from osmium.server.response_writer import DONE, Handle, StreamEvent, stream_event
from osmium.text.tokenizer import Tokenizer

__all__ = ["Choices", "timings"]


class Choices:
    """The ResponseWriter of chats and completions: choices of one prompt or several, which end
    independently."""

    def __init__(
        self,
        name: str,
        tokenizer: Tokenizer | None,
        *,
        chat: bool,
        count: int = 1,
        num_prompts: int = 1,
        num_prompt_logprobs: int | None = None,
        stream_usage: bool = False,
        timings_per_token: bool = False,
        **options: Any,
    ) -> None:
        """Each prompt has `count` choices.  A stream ends with `stream_usage`, and each of its
        chunks has `timings_per_token`.

        A whole response has `num_prompt_logprobs` likeliest tokens at each position of its prompt.
        `options` are those of each ResponseBuilder."""
        self.chat, self.count = chat, count
        self.tokenizer = tokenizer
        self._num_prompt_logprobs = num_prompt_logprobs
        self._stream_usage, self._timings_per_token = stream_usage, timings_per_token
        self._tokens = 0
        """Generated tokens so far."""
        head = None
        self.builders: list[ResponseBuilder] = []
        for index in range(count * num_prompts):
            builder = ResponseBuilder(name, tokenizer, chat=chat, index=index, head=head, **options)
            head = builder.head
            self.builders.append(builder)
        self.error: OsmiumError | None = None
        """The error of the choice that failed first; it ends the response."""
        self.finished = False
        """Whether every choice has ended, or one failed."""

    def push(self, index: int, event: Event, handles: Sequence[Handle]) -> list[StreamEvent]:
        """See ResponseWriter."""
        return [stream_event(chunk) for chunk in self._chunks(index, event, handles)]

    def _chunks(self, index: int, event: Event, handles: Sequence[Handle]) -> list[dict[str, Any]]:
        """The chunks of an event of a choice."""
        chunks = self.builders[index].push(event)
        self._tokens += isinstance(event, Token)
        if isinstance(event, Finish):
            self.error = self.error or event.error
            ended = all(builder.finish is not None for builder in self.builders)
            self.finished = ended or self.error is not None
        if self._timings_per_token:
            for chunk in chunks:
                chunk["timings"] = timings(handles, self._tokens, self.count)
        if self.finished and self.error is None and not self._stream_usage:
            chunks[-1]["timings"] = self._timings(handles)
        return chunks

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
        chunk["timings"] = self._timings(handles)
        return [stream_event(chunk), DONE]

    def failed(self, error: OsmiumError, shutdown: bool) -> list[StreamEvent]:
        """See ResponseWriter.  Without [DONE], a client knows that the engine failed."""
        return [stream_event(error_body(error)), *([DONE] if shutdown else [])]

    def body(self, handles: Sequence[Handle]) -> dict[str, Any]:
        """See ResponseWriter."""
        whole = {
            **self.builders[0].head,
            "choices": [builder.choice() for builder in self.builders],
            "usage": self.usage(),
            "timings": self._timings(handles),
        }
        found = self._prompt_logprobs(handles[0])
        return whole if found is None else {**whole, "prompt_logprobs": found}

    def _prompt_logprobs(self, handle: Handle) -> list[dict[str, Any] | None] | None:
        """vLLM's prompt_logprobs of a submitted request; None if they are not asked for."""
        count, found = self._num_prompt_logprobs, handle.prompt_logprobs
        return (
            None
            if count is None or found is None
            else prompt_logprobs(found, count, self.tokenizer)
        )

    def _timings(self, handles: Sequence[Handle]) -> dict[str, Any]:
        """Timings after the end."""
        return timings(handles, self.usage()["completion_tokens"], self.count)

    def usage(self) -> dict[str, Any]:
        """Tokens of each prompt, counted once, and the generated tokens of all choices."""
        finishes = [builder.finish for builder in self.builders]
        assert all(finishes), "the response has not finished"
        prompt = sum(finish.prompt_tokens for finish in finishes[:: self.count] if finish)
        completion = sum(finish.completion_tokens for finish in finishes if finish)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": 0},
        }


def timings(
    handles: Sequence[Handle], completion_tokens: int, count: int | None = None
) -> dict[str, Any]:
    """llama-server's `timings`: tokens, milliseconds and rates of the prefill and of decoding.

    All choices count as one, from the first start to the last token.  Each prompt has `count`
    choices; None: there is one prompt.
    """
    times = [handle.times for handle in handles]
    started = min((t.started for t in times if t.started), default=0.0)
    firsts = [t.first_token or t.ended for t in times if t.first_token or t.ended]
    first = min(firsts, default=started)
    last = max((t.last_token for t in times if t.last_token), default=first)
    prompt_tokens = sum(handle.prompt_progress[1] for handle in handles[:: count or len(handles)])
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
