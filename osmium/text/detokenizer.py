"""Ids to text as they stream, in time linear in the tokens and bounded memory.

A character is returned once it is complete.  Bytes that no later token can complete become U+FFFD
at once, as in the decoding of the whole response.
"""

import codecs
from collections.abc import Set as AbstractSet
from typing import Protocol

import tokenizers

__all__ = [
    "BYTES",
    "ByteDetokenizer",
    "IncrementalDetokenizer",
    "WindowDetokenizer",
    "id_text",
]

MAX_PENDING = 4
"""Tokens that may wait for the rest of a character: a character has at most four bytes."""


class IncrementalDetokenizer(Protocol):
    """Converts one response's ids to text; it returns complete characters."""

    def push(self, token: int) -> str:
        """Add a token; returns the text that no later token can change."""
        ...

    def flush(self) -> str:
        """The rest of the text; bytes of an incomplete character become U+FFFD."""
        ...


def id_text(token: int) -> str:
    """The text of an id that the tokenizer lacks, without Markdown's or a terminal's characters."""
    return f"⟨{token}⟩"


class ByteDetokenizer:
    """For byte-level BPE: the tokens' bytes, decoded as UTF-8."""

    def __init__(
        self, inner: tokenizers.Tokenizer, hidden: AbstractSet[int], unknown_ids_as_text: bool
    ) -> None:
        """Ids in `hidden` have no text."""
        self._inner, self._hidden = inner, hidden
        self._unknown_ids_as_text = unknown_ids_as_text
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """Add a token; returns the text that no later token can change."""
        if token in self._hidden:
            return ""
        name = self._inner.id_to_token(token)
        if name is None:
            if not self._unknown_ids_as_text:
                return ""
            return self.flush() + id_text(token)
        return self._utf8.decode(_name_bytes(name))

    def flush(self) -> str:
        """The rest of the text; bytes of an incomplete character become U+FFFD."""
        return self._utf8.decode(b"", final=True)


class WindowDetokenizer:
    """For any other decoder: decodes a window of the last tokens twice, with and without the new.

    The window keeps the tokens of the last returned text, as a decoder may treat the first token
    of a text differently.
    """

    def __init__(
        self, inner: tokenizers.Tokenizer, hidden: AbstractSet[int], unknown_ids_as_text: bool
    ) -> None:
        """Ids in `hidden` have no text."""
        self._inner, self._hidden = inner, hidden
        self._unknown_ids_as_text = unknown_ids_as_text
        self._returned: list[int] = []
        self._pending: list[int] = []

    def push(self, token: int) -> str:
        """Add a token; returns the text that no later token can change."""
        if token in self._hidden:
            return ""
        if self._inner.id_to_token(token) is None:
            if not self._unknown_ids_as_text:
                return ""
            return self.flush() + id_text(token)
        self._pending.append(token)
        text = self._new_text()
        if text.endswith("\ufffd") and len(self._pending) < MAX_PENDING:
            return ""
        # A token without text may still change how the next ones are decoded.
        self._returned = self._pending if text else (self._returned + self._pending)[-MAX_PENDING:]
        self._pending = []
        return text

    def flush(self) -> str:
        """The rest of the text; bytes of an incomplete character become U+FFFD."""
        text = self._new_text() if self._pending else ""
        self._returned, self._pending = [], []
        return text

    def _new_text(self) -> str:
        before = self._decode(self._returned) if self._returned else ""
        return self._decode(self._returned + self._pending)[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return str(self._inner.decode(ids, skip_special_tokens=False))


def _name_bytes(name: str) -> bytes:
    """A token's bytes, as the tokenizers package decodes its name."""
    try:
        return bytes([BYTES[letter] for letter in name])
    except KeyError:
        return name.encode()


def _byte_letters() -> dict[str, int]:
    """The byte of each letter of byte-level BPE.  Radford et al. 2019 (GPT-2)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in set(printable)]
    letters.update({chr(256 + i): byte for i, byte in enumerate(others)})
    return letters


BYTES = _byte_letters()
"""The byte of each letter in the names of a byte-level vocabulary."""
