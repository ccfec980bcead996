"""The token mask of one response with structured output: what may come next, and its end.

It advances by each sampled token.  When the tokens that are left only suffice to complete the text,
it allows nothing else; `completion` is what is missing if even that does not suffice.
"""

import random
import time
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher

from osmium.errors import OsmiumError

__all__ = ["GrammarMask", "TextTokens", "ThinkingEnd"]

Words = npt.NDArray[np.int32]

CLOSING_WINDOW = 64
"""Tokens before the last one from which on the missing text is looked for."""

CLOSING_SLACK = 8
"""Tokens more than the missing text needs, below which it is looked for at each step."""

MAX_CLOSING_BYTES = 2048
"""Most bytes of the missing text."""

CLOSING_S = 0.1
"""Seconds that looking for the missing text may take: other requests wait meanwhile."""

_ENDINGS = b'",:10aAtfn-{[e.=;)@\\\n }]'
"""Bytes in the order in which they are tried: those that end JSON's values first."""


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


class ThinkingEnd:
    """How </think> is found in tokens, and which tokens may not follow or complete it."""

    def __init__(
        self, tokens: Sequence[bytes], token: int | None, text: bytes, eos: Sequence[int]
    ) -> None:
        """`token` is the control token of `text`, if there is one."""
        self.token, self.text, self.eos = token, text, tuple(eos)
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


class GrammarMask:
    """See engine.request.TokenMask.  Used on the engine's thread alone."""

    def __init__(
        self,
        matcher: LLMatcher,
        text: TextTokens,
        max_tokens: int,
        thinking: ThinkingEnd | None = None,
        call: int | None = None,
    ) -> None:
        """`thinking` if the grammar applies only after the thinking.

        With `call`, this token may come instead of the text, and then any others.
        """
        self._matcher, self._text, self._left = matcher, text, max_tokens
        self._thinking = thinking
        """None once the grammar applies."""
        self._newlines: list[int] = []
        """Tokens of newlines that may precede the text."""
        self._tail = b""
        self._call = call
        """None once the text has begun."""
        self._is_call = False
        self._closing: list[int] = []
        """Tokens that alone may come next."""
        self._least = 0
        """Tokens of the missing text when it was looked for last."""
        self._in_vain = False
        """Whether no missing text was found."""

    # -- the mask ----------------------------------------------------------------------------------

    def fill(self, words: Words) -> None:
        """Write the mask of the next token, i32 [ceil(vocab / 32)].

        It allows nothing once the grammar exceeds a limit of the package."""
        if self._thinking is not None:
            self._fill_thinking(words, self._thinking)
            return
        if self._is_call:
            words[:] = -1
            return
        if not self._closing and self._must_look():
            self._look()
        if self._closing:
            words[:] = 0
            _set(words, self._closing[:1])
            return
        self._matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        if self._matcher.is_error():
            words[:] = 0
        else:
            _set(words, self._newlines)
            _set(words, () if self._call is None else (self._call,))

    def _fill_thinking(self, words: Words, thinking: ThinkingEnd) -> None:
        words[:] = -1
        _clear(words, thinking.eos)
        _clear(words, thinking.forbidden[_overlap(self._tail, thinking.text)])

    # -- advancing ---------------------------------------------------------------------------------

    def push(self, token: int) -> None:
        """Advance by a sampled token.  Raises: OsmiumError."""
        self._left -= 1
        if self._thinking is not None:
            self._push_thinking(token, self._thinking)
            return
        if token == self._call:
            self._is_call = True
        if self._is_call:
            return
        newlines, self._newlines = self._newlines, []
        if self._closing:
            del self._closing[0]
        elif token in newlines:
            return
        self._call = None
        if not self._matcher.consume_token(token):
            raise OsmiumError(
                f"The structured output cannot continue with token {token}: "
                f"{self._matcher.get_error()[:300] or self._matcher.stop_reason()}."
            )

    def _push_thinking(self, token: int, thinking: ThinkingEnd) -> None:
        ended = token == thinking.token
        if not ended:
            text = self._tail + self._text.tokens[token]
            ended = thinking.text in text
            self._tail = text[1 - len(thinking.text) :]
        if ended:
            self._thinking = None
            self._newlines = thinking.newlines if token == thinking.token else []

    # -- the end -----------------------------------------------------------------------------------

    def completion(self) -> Sequence[int]:
        """Tokens of the missing text; none while the model thinks or calls tools."""
        if self._thinking is not None or self._is_call:
            return ()
        return self._closing or self._missing_tokens() or ()

    def _must_look(self) -> bool:
        if self._left > CLOSING_WINDOW or self._in_vain:
            return False
        return not self._least or self._left <= self._least + CLOSING_SLACK

    def _look(self) -> None:
        """Allow only the missing text from now on if no other token fits before it."""
        missing = self._missing_tokens()
        if missing is None:
            self._in_vain = True
            return
        self._least = max(len(missing), 1)
        if len(missing) >= self._left:
            self._closing = missing

    def _missing_tokens(self) -> list[int] | None:
        """Few tokens that complete the text; None if none were found."""
        text = self._ending()
        return None if text is None else self._text.encode(text)

    def _ending(self) -> bytes | None:
        """Bytes that complete the text: always the first byte in order that is allowed.

        Where that only repeats bytes, a random one.  None if they, or their time, become too many.
        """
        matcher, by_byte = self._matcher.deep_copy(), self._text.by_byte
        order, ending, rng = list(by_byte), bytearray(), random.Random(0)
        end = time.perf_counter() + CLOSING_S

        def allows(byte: int) -> bool:
            return byte in by_byte and matcher.validate_tokens([by_byte[byte]]) == 1

        while len(ending) < MAX_CLOSING_BYTES and time.perf_counter() < end:
            if matcher.is_accepting():
                return bytes(ending)
            if _repeats(ending):
                candidates = rng.sample(order, len(order))
            elif allows(ord("{")) and allows(ord("}")):  # inside a JSON string
                candidates = [*b'"@', *order]
            else:
                candidates = [*b"}]", *order]
            byte = next((byte for byte in candidates if allows(byte)), None)
            if byte is None:
                return None
            matcher.consume_token(by_byte[byte])
            ending.append(byte)
        return None


def _repeats(text: bytearray) -> bool:
    """Whether the last twelve bytes repeat one, two, three or four bytes."""
    end = text[-12:]
    return len(end) == 12 and any(end[n:] == end[:-n] for n in (1, 2, 3, 4))


def _overlap(text: bytes, end: bytes) -> int:
    """Bytes at the end of `text` that are a proper prefix of `end`."""
    return next((n for n in range(len(end) - 1, 0, -1) if text.endswith(end[:n])), 0)


def _set(words: Words, tokens: Iterable[int]) -> None:
    """Allow these tokens."""
    bits = words.view(np.uint32)
    for token in tokens:
        bits[token // 32] |= np.uint32(1 << token % 32)


def _clear(words: Words, tokens: Iterable[int]) -> None:
    """Forbid these tokens."""
    bits = words.view(np.uint32)
    for token in tokens:
        bits[token // 32] &= np.uint32(~(1 << token % 32) & 0xFFFFFFFF)
