"""Requests, sampling parameters, and the events of a response: tokens and its end.

Values with arithmetic on them.  The engine works on token ids; tokenizing is the caller's.  An
`IncrementalDetokenizer` (text/detokenizer.py) turns ids back into text, piece by piece.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from osmium.engine.prompt_logprobs import PromptLogprobs
from osmium.errors import ContextError, OsmiumError, OutOfMemory, RequestError, shown

__all__ = [
    "INTEGER_LIMITS", "LOGIT_BIAS_LIMITS", "NUMBER_LIMITS",
    "Decoder", "Event", "Finish", "FinishReason", "Request", "RequestTimes", "SamplingParams",
    "Token", "TokenMask", "check_ids", "check_params", "check_prompt", "context_error",
    "delivery_error", "step_error",
]  # fmt: skip


LOG = logging.getLogger("osmium.engine")


class Decoder(Protocol):
    """Turns ids into text, piece by piece, without splitting a character."""

    def push(self, token: int) -> str: ...
    def flush(self) -> str: ...


MAX_INT = 2**63 - 1
"""Largest integer of a parameter: it fits int64 and converts to float."""

NUMBER_LIMITS: dict[str, tuple[float, float]] = {
    "temperature": (0, 100), "top_p": (0, 1), "min_p": (0, 1),
    "presence_penalty": (-2, 2), "frequency_penalty": (-2, 2), "repetition_penalty": (0.01, 100),
}  # fmt: skip
"""(least, most) of each parameter that is a number; a top_p of 0 is refused, too."""

INTEGER_LIMITS: dict[str, tuple[int, int]] = {
    "top_k": (-1, MAX_INT), "max_tokens": (0, MAX_INT), "min_tokens": (0, MAX_INT),
    "logprobs": (0, 20), "prompt_logprobs": (0, 20),
}  # fmt: skip
"""(least, most) of each parameter that is an integer."""

LOGIT_BIAS_LIMITS = (-100, 100)


class TokenMask(Protocol):
    """Which tokens may come next, for structured output.  Used on the engine's thread alone."""

    def fill(self, words: npt.NDArray[np.int32]) -> None:
        """Write the mask of the next token: bit t % 32 of word t // 32 is 1 if t is allowed.

        words i32 [ceil(vocab / 32)], with unspecified contents
        """

    def push(self, token: int) -> None:
        """Advance by a sampled token.  Raises: OsmiumError, which ends the request."""

    def completion(self) -> Sequence[int]:
        """Tokens that complete the text of a response that ends for its length."""


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is sampled, and when a response ends."""

    temperature: float = 1.0
    """Divides the logits; 0 always takes the likeliest token."""
    top_k: int = 0
    """Keep this many likeliest tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the likeliest tokens that together have this probability."""
    min_p: float = 0.0
    """Drop tokens below this fraction of the likeliest token's probability."""
    presence_penalty: float = 0.0
    """Subtracted once from the logit of every generated token."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit for each time it was generated."""
    repetition_penalty: float = 1.0
    """Divides the positive logits, and multiplies the negative ones, of tokens in the prompt and
    the response.  Keskar et al. 2019, arXiv:1909.05858."""
    seed: int | None = None
    """The same seed gives the same response, whatever else runs; None is a random seed."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to logits, by token id."""
    stop: tuple[str, ...] = ()
    """Texts that end the response and are not part of it."""
    stop_after: str = ""
    """Stop texts count after this text and the newlines that follow it; empty: in all text."""
    stop_token_ids: tuple[int, ...] = ()
    """Token ids that end the response and are not part of it."""
    max_tokens: int | None = None
    """Most tokens of the response; None continues to the end of the context, 0 computes the prompt
    alone."""
    min_tokens: int = 0
    """Tokens before which nothing but `max_tokens` and the context ends the response."""
    ignore_eos: bool = False
    """Continue past the model's end-of-sequence tokens."""
    logprobs: int | None = None
    """Alternatives returned with each token; None returns no log-probabilities."""
    prompt_logprobs: int | None = None
    """The same for the tokens of the prompt, in Request.prompt_logprobs."""

    def __post_init__(self) -> None:
        """Raises: RequestError naming the field, its value and the rule."""
        for name, (low, high) in NUMBER_LIMITS.items():
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not low <= value <= high:
                raise _invalid_value(name, value, f"a number from {low} to {high}")
        if self.top_p == 0:
            raise _invalid_value("top_p", self.top_p, "above 0")
        for name, (least, most) in INTEGER_LIMITS.items():
            value = getattr(self, name)
            if value is None and name not in ("top_k", "min_tokens"):
                continue
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
                raise _invalid_value(name, value, f"an integer from {least} to {most}")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            rule = f"at most max_tokens, which is {shown(self.max_tokens)}"
            raise _invalid_value("min_tokens", self.min_tokens, rule)
        if self.seed is not None and (
            not isinstance(self.seed, int) or isinstance(self.seed, bool)
        ):
            raise _invalid_value("seed", self.seed, "an integer")
        if not isinstance(self.stop, tuple | list) or not all(
            isinstance(text, str) and text for text in self.stop
        ):
            raise _invalid_value("stop", _listed(self.stop), "a list of texts, none of them empty")
        if not isinstance(self.stop_after, str):
            raise _invalid_value("stop_after", self.stop_after, "a text")
        if not isinstance(self.stop_token_ids, tuple | list) or not all(
            isinstance(token, int) and not isinstance(token, bool) and token >= 0
            for token in self.stop_token_ids
        ):
            raise _invalid_value(
                "stop_token_ids", _listed(self.stop_token_ids), "a list of token ids"
            )
        if not isinstance(self.logit_bias, Mapping):
            raise _invalid_value("logit_bias", self.logit_bias, "a mapping")
        for token, bias in self.logit_bias.items():
            is_id = isinstance(token, int) and not isinstance(token, bool) and token >= 0
            number = isinstance(bias, int | float) and not isinstance(bias, bool)
            low, high = LOGIT_BIAS_LIMITS
            if not is_id or not number or not low <= bias <= high:
                rule = f"token ids with numbers from {low} to {high}"
                raise _invalid_value("logit_bias", {token: bias}, rule)

    @property
    def has_penalties(self) -> bool:
        """Whether a penalty changes logits."""
        return bool(self.repetition_penalty != 1 or self.presence_penalty or self.frequency_penalty)


def _listed(value: object) -> object:
    """A tuple as a list, which is what clients send."""
    return list(value) if isinstance(value, tuple) else value


def _invalid_value(name: str, value: object, rule: str) -> RequestError:
    return RequestError(
        f"{name} is {shown(value)}; it must be {rule}.", param=name, code="invalid_value"
    )


class FinishReason(StrEnum):
    """Why a response ended."""

    STOP = "stop"
    """An end-of-sequence token, or a stop text."""
    LENGTH = "length"
    """max_tokens reached, or the context is full."""
    CANCELLED = "cancelled"
    ERROR = "error"


@dataclass(frozen=True)
class Token:
    """One token of a response."""

    id: int
    text: str
    """Text that is final by now; it may be empty, or include text held back before."""
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest alternatives and their log-probabilities."""
    start: int = 0
    """Characters of the response before this token, before stop texts end it."""
    end: int = 0
    """The same with this token; `start` if it completes no character."""


@dataclass(frozen=True)
class Finish:
    """The end of a response; the last event of every request."""

    reason: FinishReason
    text: str = ""
    """Text that was still held back."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    """Generated tokens, an end-of-sequence token included."""
    error: OsmiumError | None = None
    stop: str | None = None
    """The stop text that ended the response."""
    end: Token | None = None
    """The token that ended the response, without text, if it has a log-probability."""


Event = Token | Finish


@dataclass
class RequestTimes:
    """Times of a request's events, seconds of time.perf_counter; 0 before the event."""

    submitted: float = field(default_factory=time.perf_counter)
    started: float = 0.0
    """Start of its first step."""
    first_token: float = 0.0
    """Its first generated token."""
    last_token: float = 0.0
    """Its newest generated token."""
    ended: float = 0.0
    """Its end."""


class Request:
    """One request and its response so far.  Only the engine's thread changes it, except
    `cancelled`."""

    def __init__(
        self,
        prompt: list[int],
        params: SamplingParams,
        emit: Callable[[Event], None],
        stop_matcher: Any,
        seed: int,
        max_total_tokens: int = 1 << 30,
        computed_tokens: int = 0,
        token_mask: TokenMask | None = None,
    ) -> None:
        self.params = params
        self.emit = emit
        self.stop_matcher = stop_matcher
        self.stop_token_ids = frozenset(params.stop_token_ids)
        self.seed = seed
        self.max_total_tokens = max_total_tokens
        """Most tokens of prompt and response together."""
        assert computed_tokens < len(prompt), f"{computed_tokens} computed of {len(prompt)} tokens"
        self.computed_tokens = computed_tokens
        """First tokens of the prompt that count as computed, without prefill (benchmarks)."""
        self.token_mask = token_mask
        """Which tokens may come next; None allows all."""
        self.mask_error: Exception | None = None
        """The error of `token_mask`; it ends the request."""
        self.tokens = list(prompt)
        """Prompt and generated tokens."""
        self.prompt_tokens = len(prompt)
        count = params.prompt_logprobs
        self.prompt_logprobs = None if count is None else PromptLogprobs(prompt, count)
        """Those of the prompt's tokens, if they are asked for."""
        self.num_computed_tokens = 0
        """Tokens whose keys, values and recurrent states are in the model's state."""
        self.tokens_read = 0
        """Tokens that count as computed for the progress: also those of the pass that runs, in
        proportion to its layers."""
        self.state_slot = -1
        self.pages: list[int] = []
        self.cancelled = threading.Event()
        self.done = False
        self.times = RequestTimes()

    @property
    def prompt_progress(self) -> tuple[int, int]:
        """(computed tokens, all tokens) of the prompt; readable on any thread.

        All count as computed from the first generated token on, also after a preemption.
        """
        done = self.prompt_tokens if self.times.first_token else self.tokens_read
        return min(done, self.prompt_tokens), self.prompt_tokens

    @property
    def num_pending_tokens(self) -> int:
        """Tokens to compute before the next one can be sampled; 1 while decoding."""
        return len(self.tokens) - self.num_computed_tokens

    @property
    def needs_prefill(self) -> bool:
        """Whether the pending tokens are computed by a prefill pass, not by a decode step."""
        is_last = self.num_pending_tokens == 1 and not self.computed_tokens
        return self.num_pending_tokens > 1 or (
            is_last and self.num_computed_tokens < self.prompt_tokens
        )

    @property
    def tokens_left(self) -> int:
        """Tokens that may still be generated, by max_tokens and by the context."""
        context_left = self.max_total_tokens - len(self.tokens)
        if self.params.max_tokens is None:
            return context_left
        return min(context_left, self.params.max_tokens - self.completion_tokens)

    @property
    def is_complete(self) -> bool:
        """Whether no token may follow and the prompt is computed, but for the last one's logits."""
        return self.num_pending_tokens <= 1 and self.tokens_left <= 0

    @property
    def needs_controls(self) -> bool:
        """Whether the request has penalties, a bias, log-probabilities or a token mask."""
        params = self.params
        return bool(
            params.has_penalties
            or params.logit_bias
            or params.logprobs is not None
            or self.token_mask is not None
        )

    @property
    def generated(self) -> list[int]:
        """The generated tokens."""
        return self.tokens[self.prompt_tokens :]

    @property
    def completion_tokens(self) -> int:
        return len(self.tokens) - self.prompt_tokens


def step_error(error: Exception) -> OsmiumError:
    """The error delivered to the requests of a step that failed with `error`."""
    if isinstance(error, OsmiumError):
        return error
    if isinstance(error, MemoryError):
        return OutOfMemory(f"out of memory: a step could not allocate host memory ({error}).")
    return OsmiumError(f"A step failed: {error!r}")


def delivery_error(error: Exception) -> OsmiumError:
    """Log a failed delivery; returns the error for the request."""
    if isinstance(error, OsmiumError):
        return error  # of the token mask
    # The message may quote the response, which the log must not have.
    LOG.warning("Could not deliver a response: %s", type(error).__name__)
    return OsmiumError(f"Could not deliver the response: {error!r}")


def context_error(context: int, count: str) -> RequestError:
    """The error of a prompt that does not fit the context; `count` is as "70 tokens"."""
    return ContextError(
        f"This model's maximum context length is {context} tokens. However, your prompt has "
        f"{count}. Shorten it, or start with a larger --context.",
        tokens=int(count.split()[0]),
        context=context,
    )


def check_ids(ids: list[int], vocab: int) -> None:
    """Check that `ids` are a prompt for a vocabulary of `vocab` ids.  Raises: RequestError."""
    if not ids:
        raise RequestError("The prompt has no tokens.", param="messages", code="empty_prompt")
    low, high = min(ids), max(ids)
    if low < 0 or high >= vocab:
        raise RequestError(
            f"Token id {low if low < 0 else high} is not in the vocabulary of {vocab}.",
            param="prompt",
            code="invalid_token",
        )


def check_prompt(ids: list[int], params: SamplingParams, vocab: int, context: int) -> None:
    """Check a prompt; with max_tokens 0 it may fill the context.  Raises: RequestError."""
    check_ids(ids, vocab)
    if len(ids) + (params.max_tokens != 0) > context:
        raise context_error(context, f"{len(ids)} tokens")


def check_params(params: SamplingParams, vocab: int) -> None:
    """Check the token ids of `params` against a vocabulary of `vocab` ids.  Raises: RequestError"""
    for name in ("logit_bias", "stop_token_ids"):
        for token in getattr(params, name):
            if token >= vocab:
                raise RequestError(
                    f"{name} names token {token}; the vocabulary has {vocab}.",
                    param=name,
                    code="invalid_value",
                )
