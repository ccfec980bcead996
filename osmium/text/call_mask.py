"""The token mask of free text in which every call of a tool follows a grammar."""

from collections.abc import Callable, Sequence

from osmium.text.grammar_mask import GrammarMask
from osmium.text.thinking_end import Thinking, Words

__all__ = ["CallMask"]

_QUOTES = (b"`", b'"', b"'")
"""What is before a tag that the text only mentions."""


class CallMask:
    """See engine.request.TokenMask.  In the thinking no call begins."""

    def __init__(
        self,
        call_mask: Callable[[int], GrammarMask],
        token: int,
        tokens: Sequence[bytes],
        max_tokens: int,
        thinking: Thinking | None,
    ) -> None:
        """`call_mask` makes the mask of one call of at most so many tokens, whose first is `token`.

        `tokens` are the bytes of each token.
        """
        self._call_mask, self._token, self._tokens = call_mask, token, tokens
        self._left, self._thinking = max_tokens, thinking
        self._call: GrammarMask | None = None
        """The mask of the call that is open."""
        self._last = b""
        """The bytes of the last token."""

    def fill(self, words: Words) -> None:
        """Write the mask of the next token, as TokenMask.fill."""
        if self._thinking is not None:
            self._thinking.fill(words)
        elif self._call is not None:
            self._call.fill(words)
        else:
            words[:] = -1

    def push(self, token: int) -> None:
        """Advance by a sampled token.  Raises: OsmiumError."""
        left, self._left = self._left, self._left - 1
        if self._thinking is not None:
            if self._thinking.push(token):
                self._thinking = None
            return
        if self._call is None and token == self._token and not self._last.endswith(_QUOTES):
            self._call = self._call_mask(left)
        self._last = self._tokens[token]
        if self._call is not None:
            self._call.push(token)
            if self._call.is_complete:
                self._call = None

    def completion(self) -> Sequence[int]:
        """Tokens that complete a call that is open."""
        return () if self._call is None else self._call.completion()
