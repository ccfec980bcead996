"""The token mask of one response with structured output: what may come next, and its end.

It advances by each sampled token.  When the tokens that are left only suffice to complete the text,
it allows nothing else; `completion` is what is missing if even that does not suffice.
"""

import random
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher

from osmium.errors import OsmiumError

__all__ = ["GrammarMask", "ThinkingEnd"]

Words = npt.NDArray[np.int32]

CLOSING_WINDOW = 64
"""Tokens before the last one from which on the missing text is looked for."""

CLOSING_SLACK = 8
"""Tokens more than the missing text needs, below which it is looked for at each step."""

MAX_CLOSING_BYTES = 1024
"""Most bytes of the missing text."""

_CLOSERS = b'"}],:\n 0aAtfn1{[e-.=;)'
"""Bytes in the order in which they are tried: those that end JSON's values first."""


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
        tokens: Sequence[bytes],
        max_tokens: int,
        thinking: ThinkingEnd | None = None,
    ) -> None:
        self._matcher, self._tokens, self._left = matcher, tokens, max_tokens
        self._thinking = thinking
        """None once the grammar applies."""
        self._newlines: list[int] = []
        """Tokens of newlines that may precede the text."""
        self._tail = b""
        self._closing: list[int] = []
        """Tokens that alone may come next."""
        self._least = 0
        """Tokens of the missing text when it was looked for last."""

    # -- the mask ----------------------------------------------------------------------------------

    def fill(self, words: Words) -> None:
        """Write the mask of the next token, i32 [ceil(vocab / 32)].  Allows nothing after an error,
        which `push` raises."""
        if self._thinking is not None:
            self._fill_thinking(words, self._thinking)
            return
        if not self._closing and self._must_look():
            self._look()
        if self._closing:
            words[:] = 0
            _set(words, self._closing[:1])
            return
        self._matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        _set(words, self._newlines)

    def _fill_thinking(self, words: Words, thinking: ThinkingEnd) -> None:
        words[:] = -1
        _clear(words, thinking.eos)
        _clear(words, thinking.forbidden[_overlap(self._tail, thinking.text)])
        spare = len(self._tokens) % 32
        if spare:
            words[-1] = np.int32((1 << spare) - 1) & words[-1]

    # -- advancing ---------------------------------------------------------------------------------

    def push(self, token: int) -> None:
        """Advance by a sampled token.  Raises: OsmiumError."""
        self._left -= 1
        if self._thinking is not None:
            self._push_thinking(token, self._thinking)
            return
        if self._closing and token == self._closing[0]:
            del self._closing[0]
        else:
            self._closing = []
        if token in self._newlines:
            self._newlines = []
            return
        self._newlines = []
        if not self._matcher.consume_token(token):
            raise OsmiumError(
                f"The structured output cannot continue with token {token}: "
                f"{self._matcher.get_error()[:300] or self._matcher.stop_reason()}."
            )

    def _push_thinking(self, token: int, thinking: ThinkingEnd) -> None:
        ended = token == thinking.token
        if not ended:
            text = self._tail + self._tokens[token]
            ended = thinking.text in text
            self._tail = text[1 - len(thinking.text) :]
        if ended:
            self._thinking = None
            self._newlines = thinking.newlines if token == thinking.token else []

    # -- the end -----------------------------------------------------------------------------------

    def completion(self) -> Sequence[int]:
        """Tokens of the text that is missing at the last token; none while the model thinks."""
        if self._thinking is not None:
            return ()
        return self._closing or self._missing_tokens() or ()

    def _must_look(self) -> bool:
        if self._left > CLOSING_WINDOW:
            return False
        return not self._least or self._left <= self._least + CLOSING_SLACK

    def _look(self) -> None:
        """Allow only the missing text from now on if no other token fits before it."""
        missing = self._missing_tokens()
        if missing is not None:
            self._least = max(len(missing), 1)
            if len(missing) >= self._left:
                self._closing = missing

    def _missing_tokens(self) -> list[int] | None:
        """Few tokens that complete the text; None if none were found."""
        raise NotImplementedError
