"""Stop texts, of any length and across token borders.

Text is held back while it could be the beginning of a stop text; a stop text itself is never given
out.
"""

from osmium.engine.request import Decoder

__all__ = ["StopMatcher"]


class StopMatcher:
    """One reply's text on its way out."""

    def __init__(self, decoder: Decoder | None, stop: tuple[str, ...]) -> None:
        self.decoder = decoder
        self.stop = stop
        self._held = ""
        self.matched = False
        """Whether a stop text has come; nothing follows it."""

    def push(self, token: int) -> str:
        """The text that is certain once `token` is there."""
        return self._release(self.decoder.push(token) if self.decoder else "")

    def flush(self) -> str:
        """What is left at the end of a reply."""
        if self.matched:
            return ""
        text = self._release(self.decoder.flush() if self.decoder else "")
        if not self.matched:
            text, self._held = text + self._held, ""
        return text

    def _release(self, more: str) -> str:
        text = self._held + more
        found = [at for at in (text.find(one) for one in self.stop) if at >= 0]
        if found:
            self.matched, self._held = True, ""
            return text[: min(found)]
        keep = max((_overlap(text, one) for one in self.stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """How much of the end of `text` is a beginning of `stop`."""
    return next(
        (n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0
    )
