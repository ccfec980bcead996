"""The end of a text that a grammar allows: few tokens that complete what a response has so far."""

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llguidance import LLMatcher

from osmium.text.thinking_end import overlap

__all__ = ["EndHints", "TextTokens", "missing_tokens"]

MAX_CLOSING_BYTES = 2048
"""Most bytes of the missing text."""

CLOSING_S = 0.1
"""Seconds that looking for the missing text may take: other requests wait meanwhile."""

_ENDINGS = b'",:10aAtfn-{[e.=;)@\\\n }]'
"""Bytes in the order in which they are tried: those that end JSON's values first."""


@dataclass(frozen=True)
class EndHints:
    """What ends parts of a text in which any byte is allowed."""

    texts: tuple[bytes, ...] = ()
    tokens: tuple[int, ...] = ()
    """Control tokens."""


class TextTokens:
    """The tokens of a vocabulary as text."""

    def __init__(self, tokens: Sequence[bytes], encode: Callable[[bytes], list[int]]) -> None:
        self.tokens = tokens
        """The bytes of each token; empty for those that are no text."""
        self._encode = encode
        by_byte = {raw[0]: i for i, raw in reversed([*enumerate(tokens)]) if len(raw) == 1}
        order = [*_ENDINGS, *(byte for byte in range(256) if byte not in _ENDINGS)]
        self.by_byte = {byte: by_byte[byte] for byte in order if byte in by_byte}
        """The token of each byte, in the order in which endings are looked for."""

    def encode(self, text: bytes) -> list[int]:
        """Tokens whose bytes are `text`."""
        ids = self._encode(text)
        if b"".join(self.tokens[token] for token in ids) == text:
            return ids
        return [self.by_byte[byte] for byte in text]


def missing_tokens(
    matcher: LLMatcher, text: TextTokens, hints: EndHints, before: bytes
) -> list[int] | None:
    """Few tokens that complete the text of `matcher`, whose last bytes are `before`.

    Always what the grammar dictates, then a hint, then the first byte in order that is allowed.
    Where that only repeats bytes, a random one.  None if they, or their time, become too many.
    """
    ending = _Ending(matcher.deep_copy(), text, hints, before)
    end = time.perf_counter() + CLOSING_S
    while ending.num_bytes < MAX_CLOSING_BYTES and time.perf_counter() < end:
        if ending.matcher.is_accepting():
            return ending.tokens()
        if not ending.extend():
            return None
    return None


class _Ending:
    def __init__(
        self, matcher: LLMatcher, text: TextTokens, hints: EndHints, before: bytes
    ) -> None:
        self.matcher, self._text, self._hints = matcher, text, hints
        self._before = before
        self._order, self._rng = list(text.by_byte), random.Random(0)
        self._tokens: list[int] = []
        self._run = bytearray()
        """Text behind `_tokens`."""
        self.num_bytes = 0

    def tokens(self) -> list[int]:
        return [*self._tokens, *self._text.encode(bytes(self._run))]

    def extend(self) -> bool:
        """Add tokens; whether any was allowed."""
        found = self.matcher.compute_ff_tokens() or self._hinted() or self._byte()
        for token in found:
            if not self.matcher.consume_token(token):
                return False
            raw = self._text.tokens[token]
            self.num_bytes += max(len(raw), 1)
            self._run += raw
            if not raw:
                self._tokens, self._run = [*self.tokens(), token], bytearray()
        return bool(found)

    def _hinted(self) -> list[int]:
        for end in self._hints.texts:
            begun = overlap((self._before + self._run)[-len(end) :], end)
            for rest in dict.fromkeys((end[begun:], end)):
                tokens = self._text.encode(rest)
                if self.matcher.validate_tokens(tokens) == len(tokens):
                    return tokens
        for token in self._hints.tokens:
            if self.matcher.validate_tokens([token]):
                return [token]
        return []

    def _byte(self) -> list[int]:
        order = self._order
        if _repeats(self._run):
            candidates = self._rng.sample(order, len(order))
        elif self._allows(ord("{")) and self._allows(ord("}")):  # inside a JSON string
            candidates = [*b'"@', *order]
        else:
            candidates = [*b"}]", *order]
        byte = next((byte for byte in candidates if self._allows(byte)), None)
        return [] if byte is None else [self._text.by_byte[byte]]

    def _allows(self, byte: int) -> bool:
        token = self._text.by_byte.get(byte)
        return token is not None and self.matcher.validate_tokens([token]) == 1


def _repeats(text: bytearray) -> bool:
    """Whether the last twelve bytes repeat one, two, three or four bytes."""
    end = text[-12:]
    return len(end) == 12 and any(end[n:] == end[:-n] for n in (1, 2, 3, 4))
