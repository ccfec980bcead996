"""Thinking before text that a mask restricts: where it ends, and what is forbidden in it."""

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

__all__ = ["Thinking", "ThinkingEnd", "Words", "allow", "forbid", "overlap"]

Words = npt.NDArray[np.int32]


class ThinkingEnd:
    """How </think> is found in tokens, and which tokens may not follow or complete it."""

    def __init__(
        self, tokens: Sequence[bytes], token: int | None, text: bytes, eos: Sequence[int]
    ) -> None:
        """`token` is the control token of `text`, if there is one."""
        self.token, self.text, self.eos = token, text, tuple(eos)
        self.tokens = tokens
        """The bytes of each token; empty for those that are no text."""
        self.newlines = [i for i, raw in enumerate(tokens) if raw and not raw.strip(b"\n")]
        """Tokens of newlines alone."""
        self.forbidden: dict[int, list[int]] = {n: [] for n in range(len(text))}
        """By bytes of `text` at the end so far: tokens that complete it and go on with text."""
        last = text[-1:]
        for i, raw in enumerate(tokens):
            if last not in raw:
                continue
            for n in self.forbidden:
                after = (text[:n] + raw).partition(text)
                if after[1] and after[2].strip(b"\n"):
                    self.forbidden[n].append(i)


class Thinking:
    """The thinking of one response."""

    def __init__(self, end: ThinkingEnd, forbidden: Sequence[int]) -> None:
        """`forbidden` tokens do not come before its end."""
        self.end, self._forbidden = end, forbidden
        self.newlines: list[int] = []
        """Tokens of newlines that may follow, after the end."""
        self._tail = b""

    def fill(self, words: Words) -> None:
        """Write the mask of the next token, as TokenMask.fill."""
        words[:] = -1
        forbid(words, self._forbidden)
        forbid(words, self.end.forbidden[overlap(self._tail, self.end.text)])

    def push(self, token: int) -> bool:
        """Advance by a token; whether it ends the thinking."""
        end = self.end
        if token == end.token:
            self.newlines = end.newlines
            return True
        text = self._tail + end.tokens[token]
        self._tail = text[1 - len(end.text) :]
        return end.text in text


def overlap(text: bytes, end: bytes) -> int:
    """Bytes at the end of `text` that are a proper prefix of `end`."""
    return next((n for n in range(len(end) - 1, 0, -1) if text.endswith(end[:n])), 0)


def allow(words: Words, tokens: Iterable[int]) -> None:
    """Allow these tokens."""
    bits = words.view(np.uint32)
    for token in tokens:
        bits[token // 32] |= np.uint32(1 << token % 32)


def forbid(words: Words, tokens: Iterable[int]) -> None:
    """Forbid these tokens."""
    bits = words.view(np.uint32)
    for token in tokens:
        bits[token // 32] &= np.uint32(~(1 << token % 32) & 0xFFFFFFFF)
