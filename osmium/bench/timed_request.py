"""A request of random or seeded tokens, and the times of its tokens."""

import threading
import time

from osmium.engine.engine import Engine
from osmium.engine.request import Finish, SamplingParams, Token

__all__ = ["TimedRequest"]


class TimedRequest:
    """A greedy request that ignores end tokens, submitted at once."""

    def __init__(
        self, engine: Engine, prompt: list[int], max_tokens: int, computed_tokens: int = 0
    ) -> None:
        """The first `computed_tokens` of the prompt count as computed.  Raises: RequestError."""
        self._engine = engine
        self.times: list[float] = []
        """When each token came, seconds of time.perf_counter."""
        self._ended = threading.Event()
        self._error: Exception | None = None
        params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
        self.start = time.perf_counter()
        self._request = engine.submit(
            prompt, params, self._on_event, computed_tokens=computed_tokens
        )

    def _on_event(self, event: Token | Finish) -> None:
        if isinstance(event, Token):
            self.times.append(time.perf_counter())
            return
        self._error = event.error
        self._ended.set()

    @property
    def has_ended(self) -> bool:
        """Whether no more token will come."""
        return self._ended.is_set()

    def wait(self, seconds: float | None = None) -> bool:
        """Wait for the end, at most `seconds`; returns whether it came.

        Raises: the request's error.
        """
        ended = self._ended.wait(seconds)
        if self._error is not None:
            raise self._error
        return ended

    def cancel(self) -> None:
        """Cancel the request and wait for its end."""
        self._engine.cancel(self._request)
        self.wait()

    @property
    def first_token_s(self) -> float:
        """Seconds from the submission to the first token."""
        return self.times[0] - self.start
