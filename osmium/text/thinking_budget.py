"""A limit of the tokens of the thinking, as a token mask: after them </think> alone is allowed."""

from collections.abc import Sequence

from osmium.text.grammar_mask import TokenMask
from osmium.text.reasoning import END_OF_REASONING
from osmium.text.thinking_end import Words, allow
from osmium.text.tokenizer import Tokenizer

__all__ = ["ThinkingBudget"]

_BEGIN, _END = "<think>", END_OF_REASONING.encode()


class ThinkingBudget:
    """A TokenMask that ends the thinking after `budget` tokens, over another mask."""

    def __init__(
        self, budget: int, tokenizer: Tokenizer, thinking: bool, inner: TokenMask | None = None
    ) -> None:
        """`thinking`: the response starts inside it; else its first token may be <think>."""
        self._left, self._tokenizer, self.inner = budget, tokenizer, inner
        self._thinking = thinking
        self._begin = tokenizer.control_tokens.id_of(_BEGIN)
        token = tokenizer.control_tokens.id_of(END_OF_REASONING)
        self._end = token
        self._closing = (
            [token] if token is not None else tokenizer.encode(END_OF_REASONING, specials=False)
        )
        """Tokens that alone may come next, once the budget is spent."""
        self._tail = b""
        self.spent = False
        """Whether the thinking is over, so that it forbids nothing any more."""

    @property
    def _is_closing(self) -> bool:
        return self._thinking and not self.spent and self._left <= 0

    def fill(self, words: Words) -> None:
        """Write the mask of the next token, as TokenMask.fill."""
        if self._is_closing:
            words[:] = 0
            allow(words, self._closing[:1])
        elif self.inner is None:
            words[:] = -1
        else:
            self.inner.fill(words)

    def push(self, token: int) -> None:
        """Advance by a sampled token."""
        if self.inner is not None:
            self.inner.push(token)
        if self.spent:
            return
        if not self._thinking:
            self._thinking = token == self._begin
            self.spent = not self._thinking and bool(self._tokenizer.token_bytes(token).strip())
            return
        if self._is_closing:
            del self._closing[0]
        self._left -= 1
        self._tail += b"" if token == self._end else self._tokenizer.token_bytes(token)
        self.spent = token == self._end or _END in self._tail or not self._closing
        self._tail = self._tail[1 - len(_END) :]

    def completion(self) -> Sequence[int]:
        """Tokens that complete the text, as TokenMask.completion."""
        return () if self.inner is None else self.inner.completion()
