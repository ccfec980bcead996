"""What is asked and what comes back: requests, how to sample, tokens, endings.

Values with arithmetic on them.  The engine knows token ids and nothing of how text becomes them; a
`IncrementalDetokenizer` turns ids back into text, piece by piece.
"""

import math
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

from osmium.errors import OsmiumError, OutOfMemory, RequestError

__all__ = [
    "Decoder", "Event", "Finish", "FinishReason", "Request", "RequestTimes", "SamplingParams",
    "Token", "check_ids", "step_error",
]  # fmt: skip


class Decoder(Protocol):
    """Ids back to text, never splitting a character."""

    def push(self, token: int) -> str: ...
    def flush(self) -> str: ...


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen, and when to stop."""

    temperature: float = 1.0
    """0 always takes the likeliest token."""
    top_k: int = 0
    """Keep this many likeliest tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the likeliest tokens that together have this probability."""
    min_p: float = 0.0
    """Drop tokens less likely than this share of the likeliest one's probability."""
    presence_penalty: float = 0.0
    """Taken once from the logit of every token already generated."""
    frequency_penalty: float = 0.0
    """Taken from a token's logit for each time it was generated."""
    repetition_penalty: float = 1.0
    """Divides the positive logits, and multiplies the negative ones, of tokens of the prompt and
    the reply.  Keskar et al. 2019, arXiv:1909.05858."""
    seed: int | None = None
    """The same seed gives the same reply, whatever else is running."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to logits, by token id."""
    stop: tuple[str, ...] = ()
    """Texts that end the reply and are not part of it."""
    max_tokens: int | None = None
    """Most tokens of the reply; None goes on to the end of the context."""
    ignore_eos: bool = False
    """Go on past the model's end tokens."""
    logprobs: int | None = None
    """How many alternatives to give with each token; None gives no log-probabilities."""

    def __post_init__(self) -> None:
        """Raises: RequestError naming the field, its value and the rule."""
        inf = math.inf
        for name, low, high in (
            ("temperature", 0, 100), ("top_p", 0, 1), ("min_p", 0, 1),
            ("presence_penalty", -2, 2), ("frequency_penalty", -2, 2),
            ("repetition_penalty", 0.01, 100),
        ):  # fmt: skip
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not low <= value <= high:
                raise _refuse(name, value, f"a number from {low} to {high}")
        if self.top_p == 0:
            raise _refuse("top_p", self.top_p, "above 0")
        for name, least, most in (("top_k", -1, inf), ("max_tokens", 1, inf), ("logprobs", 0, 20)):
            value = getattr(self, name)
            if value is None and name != "top_k":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
                raise _refuse(name, value, f"an integer from {least} to {most}")
        if self.seed is not None and (
            not isinstance(self.seed, int) or isinstance(self.seed, bool)
        ):
            raise _refuse("seed", self.seed, "an integer")
        if not isinstance(self.stop, tuple | list) or not all(
            isinstance(one, str) and one for one in self.stop
        ):
            raise _refuse("stop", self.stop, "a tuple of texts, none of them empty")
        if not isinstance(self.logit_bias, Mapping):
            raise _refuse("logit_bias", self.logit_bias, "a mapping")
        for token, bias in self.logit_bias.items():
            id_fine = isinstance(token, int) and not isinstance(token, bool) and token >= 0
            number = isinstance(bias, int | float) and not isinstance(bias, bool)
            if not id_fine or not number or not -100 <= bias <= 100:
                raise _refuse(
                    "logit_bias", {token: bias}, "token ids with numbers from -100 to 100"
                )


def _refuse(name: str, value: object, rule: str) -> RequestError:
    return RequestError(
        f"{name} is {value!r}; it must be {rule}.", param=name, code="invalid_value"
    )


class FinishReason(StrEnum):
    """Why a reply ended."""

    STOP = "stop"
    """An end token, or a stop text."""
    LENGTH = "length"
    """max_tokens, or the context is full."""
    CANCELLED = "cancelled"
    ERROR = "error"


@dataclass(frozen=True)
class Token:
    """One token of a reply."""

    id: int
    text: str
    """The text that is certain by now: it may be empty, and include what was held back before."""
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest alternatives and their log-probabilities."""


@dataclass(frozen=True)
class Finish:
    """The end of a reply; the last event of every request."""

    reason: FinishReason
    text: str = ""
    """What was still held back."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    """Tokens generated, an end token included."""
    error: OsmiumError | None = None


Event = Token | Finish


@dataclass
class RequestTimes:
    """When it happened to a request, by time.perf_counter; 0 until it has."""

    submitted: float = field(default_factory=time.perf_counter)
    started: float = 0.0
    """Its first step was about to be computed."""
    first_token: float = 0.0
    """Its first token was there."""
    last_token: float = 0.0


class Request:
    """One reply in the making.  The engine's thread alone changes it, but for `cancelled`."""

    def __init__(
        self,
        prompt: list[int],
        params: SamplingParams,
        emit: Callable[[Event], None],
        stops: Any,
        seed: int,
        room: int = 1 << 30,
        skip_prefill: bool = False,
    ) -> None:
        self.params = params
        self.emit = emit
        self.stop_matcher = stops
        self.seed = seed
        self.max_total_tokens = room
        """Most tokens, prompt and reply."""
        self.skip_prefill = skip_prefill
        """The state is taken to hold the prompt already, but for its last token (benchmarks)."""
        self.tokens = list(prompt)
        """Prompt and reply."""
        self.prompt_tokens = len(prompt)
        self.num_computed_tokens = 0
        """Tokens whose keys, values and states the model has."""
        self.state_slot = -1
        self.pages: list[int] = []
        self.cancelled = threading.Event()
        self.done = False
        self.times = RequestTimes()

    @property
    def prompt_progress(self) -> tuple[int, int]:
        """(tokens computed, tokens in all) of the prompt; may be read on any thread."""
        return min(self.num_computed_tokens, self.prompt_tokens), self.prompt_tokens

    @property
    def num_pending_tokens(self) -> int:
        """Tokens that must be computed before the next one can be sampled; 1 while decoding."""
        return len(self.tokens) - self.num_computed_tokens

    @property
    def tokens_left(self) -> int:
        """Tokens that may still be said: by max_tokens, and by the context."""
        most = self.max_total_tokens - len(self.tokens)
        if self.params.max_tokens is None:
            return most
        return min(most, self.params.max_tokens - self.completion_tokens)

    @property
    def generated(self) -> list[int]:
        """The reply so far."""
        return self.tokens[self.prompt_tokens :]

    @property
    def completion_tokens(self) -> int:
        return len(self.tokens) - self.prompt_tokens


def step_error(error: Exception) -> OsmiumError:
    """What the requests of a step get that failed by `error`."""
    if isinstance(error, OsmiumError):
        return error
    if isinstance(error, MemoryError):
        return OutOfMemory(f"out of memory: a step could not allocate host memory ({error}).")
    return OsmiumError(f"A step failed: {error!r}")


def check_ids(ids: list[int], vocab: int) -> None:
    """Whether they are a prompt for a model of so many ids.  Raises: RequestError."""
    if not ids:
        raise RequestError("The prompt has no tokens.", param="messages", code="empty_prompt")
    low, high = min(ids), max(ids)
    if low < 0 or high >= vocab:
        raise RequestError(
            f"Token id {low if low < 0 else high} is not in the vocabulary of {vocab}.",
            param="prompt",
            code="invalid_token",
        )
