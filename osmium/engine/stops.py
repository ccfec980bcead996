"""Stop texts, of any length and across token boundaries.

Text that may be the beginning of a stop text is held back.  A stop text itself is never delivered.
"""

from collections.abc import Mapping

from osmium.engine.request import Decoder

__all__ = ["StopMatcher"]


class StopMatcher:
    """Detokenizes one response and ends it at a stop text."""

    def __init__(
        self,
        decoder: Decoder | None,
        stop: tuple[str, ...],
        after: str = "",
        token_ids: Mapping[int, str] | None = None,
        min_tokens: int = 0,
    ) -> None:
        """Stop texts count after the text `after` and the newlines that follow it.

        `token_ids` has the stop texts that are special tokens, by id; those have no text.  Nothing
        counts before token `min_tokens`.
        """
        self.decoder = decoder
        self.stop = stop
        self.length = 0
        """Characters of the response so far, before stop texts end it."""
        self.matched = False
        """Whether a stop text was found; no text follows it."""
        self.found: str | None = None
        """The stop text that was found, also one that is a special token."""
        self._tokens_until_stops = min_tokens
        self._after = after
        self._token_ids = dict(token_ids or {})
        self._tail = ""
        """The end of the text so far, while it may be the beginning of `after`."""
        self._skips_newlines = False
        self._held = ""

    def stops_at(self, token: int) -> bool:
        """Whether the token is a stop text that counts by now; `found` is its text."""
        if token not in self._token_ids or self._after or self._tokens_until_stops > 0:
            return False
        self.found = self._token_ids[token]
        return True

    def push(self, token: int) -> str:
        """Add a token; returns the text that is final by now, without the text held back."""
        text = self.decoder.push(token) if self.decoder else ""
        self.length += len(text)
        self._tokens_until_stops -= 1
        return self._release(text)

    def flush(self) -> str:
        """The text still held back at the end of a response."""
        if self.matched:
            return ""
        text = self._release(self.decoder.flush() if self.decoder else "")
        if not self.matched:
            text, self._held = text + self._held, ""
        return text

    def _release(self, more: str) -> str:
        if not self.stop:
            return more
        before, more = self._before_stops(more)
        if self._tokens_until_stops > 0 and not self.matched:
            return before + more
        text = self._held + more
        matches = [(at, len(stop), stop) for stop in self.stop if (at := text.find(stop)) >= 0]
        if self.matched or matches:
            at, _, found = min(matches, default=(0, 0, self.found))  # the first
            self.matched, self._held, self.found = True, "", found
            return before + text[:at]
        keep = max((_overlap(text, stop) for stop in self.stop), default=0)
        self._held = text[len(text) - keep :]
        return before + text[: len(text) - keep]

    def _before_stops(self, more: str) -> tuple[str, str]:
        """`more` in two parts; stop texts count in the second."""
        if self._after:
            text = self._tail + more
            at = text.find(self._after)
            if at < 0:
                self._tail = text[max(len(text) - len(self._after) + 1, 0) :]
                return more, ""
            end = at + len(self._after) - len(self._tail)
            self.matched = self._after in self.stop and self._tokens_until_stops <= 0
            self.found = self._after if self.matched else None
            self._after, self._skips_newlines = "", True
        else:
            end = 0
        if self._skips_newlines and not self.matched:
            rest = more[end:].lstrip("\n")
            self._skips_newlines = not rest
            end = len(more) - len(rest)
        return more[:end], more[end:]


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of `text` that are a proper prefix of `stop`."""
    return next(
        (n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0
    )
