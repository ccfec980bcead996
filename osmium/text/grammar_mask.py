"""The token mask of one response with structured output: what may come next, and its end.

It advances by each sampled token.  When the tokens that are left only suffice to complete the text,
it allows nothing else; `completion` is what is missing if even that does not suffice.
"""

from collections.abc import Sequence
from typing import Protocol

from llguidance import LLMatcher

from osmium.errors import OsmiumError
from osmium.text.grammar_ending import EndHints, TextTokens, missing_tokens
from osmium.text.thinking_end import Thinking, Words, allow

__all__ = ["GrammarMask", "TokenMask"]

CLOSING_WINDOW = 64
"""Tokens before the last one from which on the missing text is looked for."""

CLOSING_SLACK = 8
"""Tokens more than the missing text needs, below which it is looked for at each step."""

RECENT_BYTES = 32
"""Bytes of a text that are kept; hints are shorter."""

NO_HINTS = EndHints()


class TokenMask(Protocol):
    """engine.request.TokenMask."""

    def fill(self, words: Words) -> None: ...
    def push(self, token: int) -> None: ...
    def completion(self) -> Sequence[int]: ...


class GrammarMask:
    """See engine.request.TokenMask.  Used on the engine's thread alone."""

    def __init__(
        self,
        matcher: LLMatcher,
        text: TextTokens,
        max_tokens: int,
        thinking: Thinking | None = None,
        *,
        hints: EndHints = NO_HINTS,
        call: int | None = None,
        calls: TokenMask | None = None,
    ) -> None:
        """`thinking` if the grammar applies only after the thinking.

        With `call`, this token may come instead of the text; then `calls` applies, or nothing.
        """
        self._matcher, self._text, self._left = matcher, text, max_tokens
        self._thinking = thinking
        """None once the grammar applies."""
        self._newlines: list[int] = []
        """Tokens of newlines that may precede the text."""
        self._hints = hints
        self._recent = b""
        """The text's last bytes, if there are hints."""
        self._call, self._calls = call, calls
        """The token is None once the text has begun."""
        self._is_call = False
        self._closing: list[int] = []
        """Tokens that alone may come next."""
        self._least = 0
        """Tokens of the missing text when it was looked for last."""
        self._in_vain = False
        """Whether no missing text was found."""

    @property
    def is_complete(self) -> bool:
        """Whether the text may end here."""
        return self._thinking is None and bool(self._matcher.is_accepting())

    # -- the mask ----------------------------------------------------------------------------------

    def fill(self, words: Words) -> None:
        """Write the mask of the next token, i32 [ceil(vocab / 32)].

        It allows nothing once the grammar exceeds a limit of the package."""
        if self._thinking is not None:
            self._thinking.fill(words)
            return
        if self._is_call:
            if self._calls is None:
                words[:] = -1
            else:
                self._calls.fill(words)
            return
        if not self._closing and self._must_look():
            self._look()
        if self._closing:
            words[:] = 0
            allow(words, self._closing[:1])
            return
        self._matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        if self._matcher.is_error():
            words[:] = 0
        else:
            allow(words, self._newlines)
            allow(words, () if self._call is None else (self._call,))

    # -- advancing ---------------------------------------------------------------------------------

    def push(self, token: int) -> None:
        """Advance by a sampled token.  Raises: OsmiumError."""
        self._left -= 1
        if self._thinking is not None:
            if self._thinking.push(token):
                self._newlines, self._thinking = self._thinking.newlines, None
            return
        if token == self._call:
            self._is_call = True
        if self._is_call:
            if self._calls is not None:
                self._calls.push(token)
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
        if self._hints.texts:
            self._recent = (self._recent + self._text.tokens[token])[-RECENT_BYTES:]

    # -- the end -----------------------------------------------------------------------------------

    def completion(self) -> Sequence[int]:
        """Tokens of the missing text; none while the model thinks."""
        if self._thinking is not None:
            return ()
        if self._is_call:
            return () if self._calls is None else self._calls.completion()
        return self._closing or self._missing() or ()

    def _must_look(self) -> bool:
        if self._left > CLOSING_WINDOW or self._in_vain:
            return False
        return not self._least or self._left <= self._least + CLOSING_SLACK

    def _look(self) -> None:
        """Allow only the missing text from now on if no other token fits before it."""
        missing = self._missing()
        if missing is None:
            self._in_vain = True
            return
        self._least = max(len(missing), 1)
        if len(missing) >= self._left:
            self._closing = missing

    def _missing(self) -> list[int] | None:
        return missing_tokens(self._matcher, self._text, self._hints, self._recent)
