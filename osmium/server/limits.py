"""What a client may use: bytes of a body, connections, seconds, items of a request."""

from dataclasses import dataclass

from osmium.errors import RequestError, shown

__all__ = ["DEFAULT_LIMITS", "Limits", "check_count", "check_scores", "check_stop", "shown"]

MAX_MESSAGES = 8192
MAX_TOOLS = 1024
MAX_PROMPTS = 128
"""Prompts of one completion."""

MAX_PROMPT_IDS = 1 << 20
"""Token ids in the body of a completion, all prompts together."""

MAX_PROMPT_LOGPROBS = 1 << 19
"""Log-probabilities of prompts' tokens in a response."""

MAX_RUNNING_CHOICES = 8
"""Choices of one request in the engine at a time, so that other requests come between them."""

MAX_STOP_TEXTS = 64
MAX_STOP_CHARS = 1024
"""Characters of one stop text; each token is compared with every stop text."""


@dataclass(frozen=True)
class Limits:
    """Limits of the server, for all clients together or for each connection."""

    max_body_bytes: int = 16 << 20
    """The largest body of a request."""
    max_connections: int = 512
    """Open connections; a further one gets 503."""
    max_queued_requests: int = 256
    """Requests that wait for the engine; a further one gets 429."""
    large_body_bytes: int = 256 << 10
    """A body above this size needs one of `large_bodies` places while it is read and tokenized."""
    large_bodies: int = 4
    workers: int = 2
    """Threads that parse and tokenize bodies; one more does so for the large ones."""
    head_timeout_s: float = 10.0
    """Seconds from a connection's start to the end of its request's headers."""
    body_timeout_s: float = 30.0
    """Seconds for a body, beyond the time that `min_body_rate` allows."""
    min_body_rate: int = 64 << 10
    """Bytes per second of a slow body."""
    queue_timeout_s: float = 60.0
    """Seconds that a large body waits for its place."""
    write_timeout_s: float = 300.0
    """Seconds in which a client reads nothing of its response."""


DEFAULT_LIMITS = Limits()


def check_count(name: str, count: int, limit: int) -> None:
    """Raises: RequestError for more than `limit` items of a field."""
    if count > limit:
        raise RequestError(
            f"{name} has {count} items; at most {limit} are accepted. Send fewer.",
            param=name,
            code="too_many_items",
        )


def check_scores(tokens: int, count: int) -> None:
    """Raises: RequestError for log-probabilities of too many tokens of prompts.

    `count` is the alternatives at each token.
    """
    if tokens * (count + 1) > MAX_PROMPT_LOGPROBS:
        raise RequestError(
            f"The prompts of all choices have {tokens} tokens, with {count + 1} log-probabilities "
            f"each; a response has at most {MAX_PROMPT_LOGPROBS}. Send less per request.",
            param="prompt",
            code="too_many_items",
        )


def check_stop(stop: str | list[str] | None) -> None:
    """Raises: RequestError for too many stop texts, or one that is too long."""
    texts = [stop] if isinstance(stop, str) else stop or []
    check_count("stop", len(texts), MAX_STOP_TEXTS)
    for i, text in enumerate(texts):
        if len(text) > MAX_STOP_CHARS:
            name = "stop" if isinstance(stop, str) else f"stop[{i}]"
            raise RequestError(
                f"{name} has {len(text)} characters; a stop text has at most {MAX_STOP_CHARS}. "
                "Shorten it.",
                param=name,
                code="stop_too_long",
            )
