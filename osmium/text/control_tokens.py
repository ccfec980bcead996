"""Ids of a rendered template: its own markup becomes control tokens, a request's text never does.

A control token is an added token of the tokenizer, special or not: <|im_end|>, <think>, others.
"""

import re
from collections.abc import Iterator

import tokenizers

from osmium.text.encoding import encode_texts
from osmium.text.marked import MarkedText

__all__ = ["ControlTokens"]


class ControlTokens:
    """The control tokens of a tokenizer."""

    def __init__(self, inner: tokenizers.Tokenizer) -> None:
        added = inner.get_added_tokens_decoder()
        self._added = frozenset(added)
        # Added words and runs of spaces are vocabulary, as in tokenizers for code.
        control = {
            token.content: (token_id, token)
            for token_id, token in added.items()
            if token.content.strip() and not token.content.isalnum()
        }
        self._control = control
        longest_first = sorted(control, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        # Shares the model's memory; without added tokens all text is ordinary.
        self._plain = tokenizers.Tokenizer(inner.model)
        self._plain.normalizer = inner.normalizer
        self._plain.pre_tokenizer = inner.pre_tokenizer

    def id_of(self, text: str) -> int | None:
        """The id of the control token with this text; None if there is none."""
        found = self._control.get(text)
        return None if found is None else found[0]

    def all_markup(self, text: MarkedText) -> bool:
        """Whether each name of a control token in the text is the template's markup."""
        return all(text.is_markup(*match.span()) for match in self._pattern.finditer(text))

    def encode(self, text: MarkedText) -> list[int]:
        """Token ids; names of control tokens that are not markup are encoded as ordinary text."""
        plain = str.__str__(text)
        pieces, tokens = [], []
        at, rstrip = 0, False
        for start, end, token_id, token in self._matches(text):
            piece = plain[at:start].lstrip() if rstrip else plain[at:start]
            pieces.append(piece.rstrip() if token.lstrip else piece)
            tokens.append([token_id])
            at, rstrip = end, token.rstrip
        pieces.append(plain[at:].lstrip() if rstrip else plain[at:])
        tokens.append([])
        encoded = encode_texts(self._plain, pieces)
        ids: list[int] = []
        for piece, encoding, token_ids in zip(pieces, encoded, tokens, strict=True):
            ids += self._ordinary(piece, encoding.ids) + token_ids
        return ids

    def _matches(self, text: MarkedText) -> Iterator[tuple[int, int, int, "tokenizers.AddedToken"]]:
        """Start, end, id and token of each control token in the markup."""
        for start, end in text.markup_runs():
            for match in self._pattern.finditer(text, start, end):
                token_id, token = self._control[match[0]]
                if not token.single_word or _is_word(text, *match.span()):
                    yield *match.span(), token_id, token

    def _ordinary(self, piece: str, ids: list[int]) -> list[int]:
        """`ids`, unless the model's own vocabulary made a control token of a part of `piece`."""
        if self._added.isdisjoint(ids):
            return ids
        # Cut after the first character of each name: no part holds a whole name.
        cuts = [match.start() + 1 for match in self._pattern.finditer(piece)]
        parts = [piece[a:b] for a, b in zip([0, *cuts], [*cuts, len(piece)], strict=True)]
        encoded = encode_texts(self._plain, parts)
        return [token for part in encoded for token in part.ids]


def _is_word(text: str, start: int, end: int) -> bool:
    """Whether neither neighbour of text[start:end] is a letter, a digit or an underscore."""
    return not re.search(r"\w", text[max(start - 1, 0) : start] + text[end : end + 1])
