"""Log-probabilities of the answer's tokens, as their text becomes final, and of the prompt's."""

from collections.abc import Sequence
from typing import Any

from osmium.engine.prompt_logprobs import PromptLogprobs
from osmium.engine.request import Finish, Token
from osmium.text.tokenizer import Tokenizer

__all__ = [
    "AnswerTokens", "chat_logprob", "completion_logprobs", "echoed_logprobs", "prompt_logprobs",
    "token_entry",
]  # fmt: skip


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


def completion_logprobs(
    tokens: Sequence[Token], tokenizer: Tokenizer | None, text_start: int
) -> dict[str, Any]:
    """Log-probabilities in the form of completions; offsets count from `text_start` on."""
    names = [_text(token.id, tokenizer) for token in tokens]
    return {
        "tokens": names,
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [
            _alternatives(name, token.logprob or 0.0, token.top, tokenizer)
            for name, token in zip(names, tokens, strict=True)
        ],
        "text_offset": [text_start + token.start for token in tokens],
    }


def echoed_logprobs(
    found: PromptLogprobs, count: int, tokenizer: Tokenizer | None
) -> dict[str, Any]:
    """The same for a prompt's tokens, with `count` alternatives; the first one has none."""
    decoder = tokenizer.decoder(specials=True) if tokenizer else None
    names, logprobs, tops, offsets, length = [], [], [], [], 0
    for token, entry in zip(found.ids.tolist(), found.entries(), strict=True):
        name = _text(token, tokenizer)
        names.append(name)
        offsets.append(length)
        length += len(decoder.push(token)) if decoder else 0
        logprobs.append(None if entry is None else entry[1])
        tops.append(
            None if entry is None else _alternatives(name, entry[1], entry[3][:count], tokenizer)
        )
    return {
        "tokens": names,
        "token_logprobs": logprobs,
        "top_logprobs": tops,
        "text_offset": offsets,
    }


def prompt_logprobs(
    found: PromptLogprobs, count: int, tokenizer: Tokenizer | None
) -> list[dict[str, Any] | None]:
    """Log-probabilities of a prompt's tokens in vLLM's form: by token id, with ranks."""
    result: list[dict[str, Any] | None] = []
    for entry in found.entries():
        if entry is None:
            result.append(None)
            continue
        token, logprob, rank, top = entry
        ranked = [(other, value, i) for i, (other, value) in enumerate(top[:count], 1)]
        result.append({
            str(other): {"logprob": value, "rank": at, "decoded_token": _text(other, tokenizer)}
            for other, value, at in [(token, logprob, rank), *ranked]
        })  # fmt: skip
    return result


def _alternatives(
    name: str, logprob: float, top: Sequence[tuple[int, float]], tokenizer: Tokenizer | None
) -> dict[str, float]:
    """The likeliest tokens and the token itself, by text; of equal texts the likeliest counts."""
    found: dict[str, float] = {}
    for other, value in top:
        found.setdefault(_text(other, tokenizer), value)
    found.setdefault(name, logprob)
    return found


def _text(token: int, tokenizer: Tokenizer | None) -> str:
    raw = tokenizer.token_bytes(token) if tokenizer else b""
    return raw.decode("utf-8", errors="replace")
