"""The answer's tokens with log-probabilities, as their text becomes final."""

from typing import Any

from osmium.engine.request import Finish, Token
from osmium.text.tokenizer import Tokenizer

__all__ = ["AnswerTokens", "chat_logprob", "token_entry"]


class AnswerTokens:
    """Finds the tokens of the answer: none of the reasoning, and none of a stop text."""

    def __init__(self, thinking: bool) -> None:
        """`thinking`: the prompt ends inside the reasoning."""
        self._pending: list[Token] = []
        """Tokens with log-probabilities whose text is not final yet."""
        self._length = 0
        """Characters of reasoning and answer that are final, tags included."""
        self._answer_start = None if thinking else 0
        """Characters before the answer; None while there is no answer."""

    def add(self, event: Token | Finish, answer: int, unparsed: int) -> list[Token]:
        """The answer's tokens with log-probabilities whose text is final with this event.

        `answer` are the characters that the event adds to the answer, and `unparsed` those that
        the parser has not returned yet.
        """
        self._length += len(event.text)
        if self._answer_start is None and answer:
            self._answer_start = self._length - unparsed - answer
        if isinstance(event, Token) and event.logprob is not None:
            self._pending.append(event)
        if not self._pending:
            return []
        answer_start = self._answer_start
        if answer_start is None:  # tokens of final text without an answer are reasoning
            self._pending = [token for token in self._pending if token.end > self._length]
            return []
        is_stop_text = self._pending[-1].end > self._length
        ends = isinstance(event, Finish) and not is_stop_text
        final = [token for token in self._pending if ends or token.start < self._length]
        self._pending = self._pending[len(final) :]
        return [t for t in final if t.start >= answer_start or t.end > answer_start]


def chat_logprob(token: Token, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """A token's log-probability in the form of chat completions and of responses."""
    assert token.logprob is not None, "called for tokens with a logprob"
    top = [token_entry(other, logprob, tokenizer) for other, logprob in token.top]
    return {**token_entry(token.id, token.logprob, tokenizer), "top_logprobs": top}


def token_entry(token: int, logprob: float, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """A token's text and bytes with its log-probability."""
    raw = tokenizer.token_bytes(token) if tokenizer else b""
    return {
        "token": raw.decode("utf-8", errors="replace"),
        "logprob": logprob,
        "bytes": list(raw),
    }
