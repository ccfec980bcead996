"""Stop texts, of any length and across token boundaries.

Text that may be the beginning of a stop text is held back.  A stop text itself is never delivered.
"""

from osmium.engine.request import Decoder

__all__ = ["StopMatcher"]


class StopMatcher:
    """Detokenizes one response and ends it at a stop text."""

    def __init__(self, decoder: Decoder | None, stop: tuple[str, ...]) -> None:
        self.decoder = decoder
        self.stop = stop
        self._held = ""
        self.matched = False
        """Whether a stop text was found; no text follows it."""

    def push(self, token: int) -> str:
        """Add a token; returns the text that is final by now, without the text held back."""
        return self._release(self.decoder.push(token) if self.decoder else "")

    def flush(self) -> str:
        """The text still held back at the end of a response."""
        if self.matched:
            return ""
        text = self._release(self.decoder.flush() if self.decoder else "")
        if not self.matched:
            text, self._held = text + self._held, ""
        return text

    def _release(self, more: str) -> str:
        text = self._held + more
        matches = [at for at in (text.find(stop) for stop in self.stop) if at >= 0]
        if matches:
            self.matched, self._held = True, ""
            return text[: min(matches)]
        keep = max((_overlap(text, stop) for stop in self.stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of `text` that are a proper prefix of `stop`."""
    return next(
        (n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0
    )
